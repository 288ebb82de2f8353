"""Frozen models whose layers stay in host memory, against the same models on the device."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from families import GEMMA3, MOE
from test_step import KEY

from gopd_jax import (
    processes,
    sharding,
    step,
)
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.objectives import objective
from gopd_jax.recipe import Mixture, init_state

pytestmark = pytest.mark.slow

MESHES = [(1, 1, 1), (2, 2, 2)]


def away(tree):
    return jax.tree.map(lambda x: jax.device_put(x, sharding.on_host(x.sharding)), tree)


def by_layer(recipe, frozen):
    """(recipe, frozen) with every frozen model in host memory, to be brought in by layer."""

    def streamed(decoder):
        return decoder and dataclasses.replace(decoder, by_layer=True)

    teachers = tuple(map(streamed, recipe.teachers))
    reference = streamed(recipe.reference)
    return dataclasses.replace(recipe, teachers=teachers, reference=reference), away(frozen)


def equal(got, want):
    """Bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(got), jax.device_get(want))


def exact():
    return objective.build(lam=1.25, loss="exact", reduction="token_mean")


CASES = {
    "two teachers and the reference": lambda: {},
    "the whole vocabulary": lambda: {"objective": exact()},
    "widths": lambda: {"buckets": 2, "routes": ((0, 0),), "microbatches": 4},
    "teachers mixed": lambda: {
        "routes": ((0, 1), (1, 0)),
        "mixture": Mixture(weights=((0.7, 0.5), (0.3, 0.5)), space="probability"),
    },
    "experts and sliding windows": lambda: {},
}


def case(setting, name, shape):
    """(recipe, params, frozen, prompts), one of CASES."""
    recipe, params, frozen, prompts = setting(shape, **CASES[name]())
    if name == "experts and sliding windows":
        teachers, laid = [], []
        for seed, cfg in enumerate((MOE, GEMMA3)):
            cfg = dataclasses.replace(cfg, vocab_size=68)
            layout = sharding.shardings(recipe.mesh, lm_params.logical_axes(cfg))
            teachers.append(Decoder(cfg))
            laid.append(jax.device_put(lm_params.init(cfg, jax.random.key(seed)), layout))
        recipe = dataclasses.replace(recipe, teachers=tuple(teachers))
        frozen = frozen.replace(teachers=tuple(laid))
    return recipe, params, frozen, prompts


# By default one mesh has all of the cases, and the other two of them.
SOON = "two teachers and the reference", "the whole vocabulary"
PLACES = [
    pytest.param(name, shape, marks=() if shape == MESHES[0] or name in SOON else pytest.mark.slow)
    for name, shape in itertools.product(CASES, MESHES)
]


@pytest.mark.parametrize(("name", "shape"), PLACES, ids=str)
def test_scores_are_those_of_models_on_the_device(setting, first_step, name, shape):
    recipe, _, frozen, _ = case(setting, name, shape)
    rollout = processes.to_global(recipe.mesh, jax.device_get(first_step[0]))
    want = step.staged(recipe)[1](frozen, rollout)
    equal(step.staged(by_layer(recipe, frozen)[0])[1](away(frozen), rollout), want)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_the_update_meets_the_heads_of_the_models_on_the_device(setting, first_step, shape):
    recipe, params, frozen, _ = case(setting, "the whole vocabulary", shape)
    recipe = dataclasses.replace(recipe, routes=((0, 0),))
    rollout = processes.to_global(recipe.mesh, jax.device_get(first_step[0]))
    _, score, update = step.staged(recipe)
    scores = score(frozen, rollout)
    want = update(init_state(recipe, params), rollout, scores, frozen)
    streamed, there = by_layer(recipe, frozen)
    equal(step.staged(streamed)[2](init_state(recipe, params), rollout, scores, there), want)


def test_a_model_by_layer_is_judged_and_decoded_as_on_the_device(setting):
    recipe, _, frozen, prompts = setting()
    decoder = dataclasses.replace(recipe.reference, by_layer=True)
    there = away(frozen.reference)
    want = step.sampling(recipe, recipe.reference)(frozen.reference, prompts, KEY)
    equal(step.sampling(recipe, decoder)(there, prompts, KEY), want)
    judged = step.judging(recipe, recipe.reference)(frozen.reference, want, None)
    equal(step.judging(recipe, decoder)(there, want, None), judged)


# --- what is brought in, and where


def transfers(jaxpr, turns=1, loops=0):
    """(shape, how often, in how many loops, the equation that takes it) of copies off the host."""
    users = {}
    for eqn in jaxpr.eqns:
        for x in eqn.invars:
            users.setdefault(id(x), []).append(eqn)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "device_put":
            for x, out in zip(eqn.invars, eqn.outvars):
                if x.aval.memory_space == jax.memory.Space.Host:
                    (user,) = users[id(out)]
                    yield x.aval.shape, turns, loops, user
        scan = eqn.primitive.name == "scan"
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                n = eqn.params["length"] if scan else 1
                yield from transfers(inner, turns * n, loops + scan)


def of_score(recipe, frozen, rollout):
    return [*transfers(step.staged(recipe)[1].trace(frozen, rollout).jaxpr.jaxpr)]


def test_no_stack_of_matrices_comes_in_whole_and_each_layer_once_a_microbatch(setting, first_step):
    recipe, _, frozen, _ = setting()
    recipe = dataclasses.replace(recipe, routes=((0, 0),), teachers=recipe.teachers[:1])
    recipe = dataclasses.replace(recipe, objective=exact(), microbatches=4)
    frozen = frozen.replace(teachers=frozen.teachers[:1])
    rollout, n_layers = first_step[0], recipe.reference.cfg.num_hidden_layers
    found = of_score(*by_layer(recipe, frozen), rollout)
    stacks = [x.shape for x in jax.tree.leaves(frozen) if x.ndim > 2]
    assert len(stacks) == 2 * 7
    inside = [(shape, turns) for shape, turns, loops, _ in found if loops]
    assert sorted(inside) == sorted((shape[1:], 4 * n_layers) for shape in stacks)
    outside = sorted(shape for shape, _, loops, _ in found if not loops)
    assert outside == sorted(x.shape for x in jax.tree.leaves(frozen) if x.ndim <= 2)


@pytest.mark.parametrize("layers", [True, False])
def test_what_comes_in_keeps_its_shards(setting, first_step, layers):
    """Else its shards would be gathered before the copy, on the hosts."""
    recipe, _, frozen, _ = setting((2, 2, 2))
    there = by_layer(recipe, frozen) if layers else (recipe, away(frozen))
    rollout = processes.to_global(recipe.mesh, jax.device_get(first_step[0]))
    found = set()
    for shape, _, _, user in of_score(*there, rollout):
        assert user.primitive.name == "sharding_constraint"
        found.add((shape, user.params["sharding"].spec))
    want = set()
    for path, x in jax.tree_util.tree_leaves_with_path(frozen):
        sliced = (
            layers and any(key == jax.tree_util.DictKey("layers") for key in path) and x.ndim > 2
        )
        shape, spec = (x.shape[1:], x.sharding.spec[1:]) if sliced else (x.shape, x.sharding.spec)
        want.add((shape, jax.P(*spec)))
    assert found == want
