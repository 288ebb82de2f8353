"""The step as one program: the same on every mesh and in stages, its memory and its layout."""

import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gopd_jax import step
from gopd_jax.recipe import init_state

N_ROWS, WIDTH, LENGTH, SMALLEST_GROUP = 16, 5, 6, 6
KEYS = jax.random.key(0), jax.random.key(1)


def same(got, want, atol=5e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


def values(metrics):
    """Metrics as they are read: means, or one mean a task."""
    return {k: np.asarray(m.total) / np.asarray(m.count) for k, m in metrics.items()}


def two_steps(setting, shape):
    """(states, [(rollout, metrics)]) on the host, of a run of two fused steps."""
    recipe, params, frozen, prompts = setting(shape)
    run, state, states, seen = step.fused(recipe), init_state(recipe, params), [], []
    for key in KEYS:
        state, rollout, metrics = run(state, frozen, prompts, key)
        states.append(jax.device_get(state))
        seen.append(jax.device_get((rollout, values(metrics))))
    return states, seen


@pytest.fixture(scope="module")
def one_device(setting):
    """Two fused steps on a mesh of one device."""
    return two_steps(setting, (1, 1, 1))


def test_slots_change_no_step(setting, one_device):
    """Rows of two tasks, on four row shards with two slots each."""
    recipe, params, frozen, prompts = setting((2, 2, 1), slots=8)
    _, rollout, metrics = step.fused(recipe)(init_state(recipe, params), frozen, prompts, KEYS[0])
    want_rollout, want_metrics = one_device[1][0]
    np.testing.assert_array_equal(rollout.tokens_BL, want_rollout.tokens_BL)
    np.testing.assert_array_equal(rollout.mask_BT, want_rollout.mask_BT)
    same(rollout.logp_BT, want_rollout.logp_BT, 2e-5)
    same(values(metrics), want_metrics, 2e-5)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 2, 2),
        (1, 2, 4),
        (2, 1, 1, 1, 4),
        (1, 2, 2, 2),
        pytest.param((8, 1, 1), marks=pytest.mark.slow),
        pytest.param((1, 8, 1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_mesh_takes_the_same_two_steps(setting, one_device, shape):
    want_states, want_seen = one_device
    states, seen = two_steps(setting, shape)
    for (rollout, metrics), (want_rollout, want_metrics) in zip(seen, want_seen):
        np.testing.assert_array_equal(rollout.tokens_BL, want_rollout.tokens_BL)
        np.testing.assert_array_equal(rollout.mask_BT, want_rollout.mask_BT)
        same(rollout.logp_BT, want_rollout.logp_BT, 2e-5)
        same(metrics, want_metrics, 2e-5)
    same(states, want_states, 2e-5)


def test_stages_give_the_numbers_of_the_fused_step(one_device, first_step):
    (want_state, _), ((want_rollout, want_metrics), _) = one_device
    rollout, _, state, metrics = first_step
    np.testing.assert_array_equal(rollout.tokens_BL, want_rollout.tokens_BL)
    same(rollout.logp_BT, want_rollout.logp_BT)
    same(state, want_state)
    same(values(metrics), want_metrics)


def test_the_state_is_donated_and_the_parameters_it_came_from_are_not(setting):
    recipe, params, frozen, prompts = setting()
    frozen = frozen.replace(reference=params)
    state = init_state(recipe, params)
    before = jax.device_get(params)
    step.fused(recipe)(state, frozen, prompts, KEYS[0])
    donated = jax.tree.leaves((state.params, state.opt_state))
    assert all(x.is_deleted() for x in donated if x.ndim)
    same(params, before, 0)


def test_moments_lie_as_the_parameters_they_belong_to(setting):
    recipe, params, _, _ = setting((2, 2, 2))
    state = init_state(recipe, params)
    adam = state.opt_state[1][0]
    of_width = ("fsdp", "sequence")
    for name, spec in {"embed": P("tensor", of_width), "final_norm": P(of_width)}.items():
        for tree in (state.params, adam.mu, adam.nu):
            assert tree[name].sharding.spec == spec
    assert adam.mu["layers"]["q"].sharding.spec == P(None, of_width, "tensor", None)
    assert adam.count.sharding.spec == P()
    same(state.params, params, 0)


def walk(jaxpr):
    """Every equation of a jaxpr and of those inside its parameters."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from walk(inner)


def shapes_of(jaxpr):
    return {v.aval.shape for eqn in walk(jaxpr) for v in eqn.outvars if hasattr(v.aval, "shape")}


def shapes_in(hlo):
    found = re.findall(r"\b(?:[a-z]+\d+|pred)\[(\d[\d,]*)\]", hlo)
    return {tuple(map(int, text.split(","))) for text in found}


def whole_logits(shapes, cfg):
    """Shapes with the vocabulary in them, as large as the smallest group's logits or larger."""
    V = cfg.vocab_size
    limit = SMALLEST_GROUP * LENGTH * V
    return {s for s in shapes if math.prod(s) >= limit and any(n and n % V == 0 for n in s)}


def program(setting, **changes):
    recipe, params, frozen, prompts = setting(**changes)
    state = init_state(recipe, params)
    return recipe.student.cfg, step.fused(recipe), (state, frozen, prompts, KEYS[0])


def test_no_array_of_the_step_holds_the_logits_of_all_positions(setting):
    cfg, run, args = program(setting)
    traced, compiled = (
        shapes_of(run.trace(*args).jaxpr),
        shapes_in(run.lower(*args).compile().as_text()),
    )
    for shapes in (traced, compiled):
        # The walk reaches a microbatch of the update, and a chunk of the head.
        assert (N_ROWS // 2, WIDTH + LENGTH, 32) in shapes
        chunk = N_ROWS * 2 * cfg.vocab_size
        assert any(math.prod(s) == chunk and cfg.vocab_size in s for s in shapes)
        assert not whole_logits(shapes, cfg)


def test_that_check_sees_the_logits_where_the_chunk_is_all_positions(setting, first_step):
    cfg, run, args = program(setting, head_chunk=LENGTH)
    assert whole_logits(shapes_of(run.trace(*args).jaxpr), cfg)
    recipe, params, _, _ = setting(head_chunk=LENGTH)
    rollout, scores, _, _ = first_step
    update = step.staged(recipe)[2]
    compiled = update.lower(init_state(recipe, params), rollout, scores).compile()
    assert whole_logits(shapes_in(compiled.as_text()), cfg)


def test_the_step_is_traced_with_its_sharding_constraints(setting):
    _, run, args = program(setting, shape=(2, 2, 2))
    specs = {
        eqn.params["sharding"].spec
        for eqn in walk(run.trace(*args).jaxpr)
        if eqn.primitive.name == "sharding_constraint"
    }
    rows, decoded = ("data", "fsdp", "expert"), ("data", "fsdp", "expert", "sequence")
    # The scorer's head in its own shard, the sampler's head, the MLP, attention heads, rows.
    wanted = {
        P(None, None, "tensor"),
        P(decoded, "tensor"),
        P(rows, "sequence", "tensor"),
        P(rows, "sequence", "tensor", None),
        P(rows),
    }
    assert wanted <= specs
