"""Trained weights and moments in bfloat16: their bytes, their rounding, their checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tiny

from gopd_jax import checkpoint, export, step, train
from gopd_jax.models import hf
from gopd_jax.optimizer import at_random, make_optimizer, rounded
from gopd_jax.planning import flops
from gopd_jax.recipe import abstract_state, init_state

pytestmark = pytest.mark.slow

OPTIONS = {"learning_rate": 0.01, "schedule": "constant", "warmup_steps": 0, "steps": 9}
OPTIONS |= {"b1": 0.9, "b2": 0.999, "weight_decay": 0.01, "clip_norm": 1.0}
ROUND = jax.jit(at_random)


def neighbours(x):
    """The bfloat16 at or next to float32 x towards 0, and the one away from it."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    low = bits & np.uint32(0xFFFF0000)
    return low.view(np.float32), (low + np.uint32(0x10000)).view(np.float32)


def test_rounding_at_random_gives_a_neighbour_and_the_number_in_expectation():
    for x in (1.001, -3.1415927, 1e-3, 7e-30, 300.7):
        low, high = neighbours(np.float32(x))
        got = np.asarray(ROUND(jax.random.key(0), jnp.full(200_000, x, jnp.float32)))
        assert got.dtype == ml_dtypes.bfloat16
        wide = got.astype(np.float64)
        assert set(np.unique(wide)) == {low, high}
        share = (np.float32(x) - low) / (high - low)
        error = np.sqrt(share * (1 - share) / got.size)  # of the share that went up
        np.testing.assert_allclose(np.mean(wide == high), share, atol=5 * error)


def test_what_bfloat16_holds_is_not_rounded_and_no_number_becomes_another():
    held = np.array([0.0, -0.0, 1.0, -1.5, 2.0**100, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(ROUND(jax.random.key(1), held).astype(np.float32), held)
    for bits in (0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF):  # a carry would turn the last two into zeros
        nan = np.full(1000, bits, np.uint32).view(np.float32)
        assert np.isnan(ROUND(jax.random.key(1), nan)).all()


def test_updates_that_rounding_to_the_nearest_loses_add_up():
    n, steps, change = 20_000, 100, 1e-4  # a quarter of a tenth of the distance of two bfloat16
    weights = {"w": jnp.ones(n, jnp.bfloat16)}
    lost = optax.apply_updates(weights, {"w": jnp.full(n, change)})
    np.testing.assert_array_equal(lost["w"], weights["w"])
    optimizer = rounded(optax.sgd(1.0), 0)

    @jax.jit
    def walk(weights):
        def body(carry, _):
            moves, state = optimizer.update({"w": jnp.full(n, -change)}, carry[1], carry[0])
            return (optax.apply_updates(carry[0], moves), state), None

        carry, _ = jax.lax.scan(body, (weights, optimizer.init(weights)), None, steps)
        return carry

    (moved, state) = walk(weights)
    assert moved["w"].dtype == jnp.bfloat16
    assert int(state.count) == steps
    moved = np.asarray(moved["w"], np.float64)
    # Each step is one draw of variance at most change * ulp.
    deviation = np.sqrt(steps * change * 2**-7 / n)
    np.testing.assert_allclose(moved.mean(), 1 + steps * change, atol=5 * deviation)


def test_the_update_of_rounded_weights_is_exact_and_its_draws_are_of_seed_and_count():
    draw = np.random.default_rng(0).normal
    weights = {name: jnp.asarray(draw(size=(50, 40)), jnp.bfloat16) for name in "ab"}
    gradients = jax.tree.map(lambda x: jnp.asarray(draw(size=x.shape), jnp.bfloat16), weights)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), weights)
    inner = optax.adam(0.05)
    moves, _ = inner.update(
        jax.tree.map(lambda x: x.astype(jnp.float32), gradients), inner.init(wide), wide
    )
    exact = optax.apply_updates(wide, moves)
    found = {}
    for seed in (0, 1):
        optimizer = rounded(inner, seed)
        state = optimizer.init(weights)
        assert {x.dtype for x in jax.tree.leaves(state)} == {
            jnp.dtype("int32"),
            jnp.dtype("float32"),
        }
        for again in range(2):
            got, after = optimizer.update(gradients, state, weights)
            found[seed, again] = optax.apply_updates(weights, got)
        later, _ = optimizer.update(gradients, after._replace(inner=state.inner), weights)
        found[seed, "later"] = optax.apply_updates(weights, later)
    for made in found.values():
        for name in "ab":
            low, high = neighbours(exact[name])
            value = np.asarray(made[name], np.float32)
            assert ((value == low) | (value == high)).all()

    def same(x, y):
        return all(np.array_equal(found[x][name], found[y][name]) for name in "ab")

    assert same((0, 0), (0, 1))
    assert not same((0, 0), (1, 0))
    assert not same((0, 0), (0, "later"))
    # Two arrays of one content are rounded by draws of their own.
    twice = {name: weights["a"] for name in "ab"}
    moves, _ = rounded(inner, 0).update(twice, rounded(inner, 0).init(twice), twice)
    assert not np.array_equal(moves["a"], moves["b"])


def narrowed(recipe, **dtypes):
    optimizer, _ = make_optimizer(**OPTIONS, **dtypes)
    weights = dtypes.get("weights_dtype", "float32")
    return dataclasses.replace(recipe, optimizer=optimizer, weights_dtype=weights)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_bytes_of_the_state_by_dtype(setting):
    recipe, params, *_ = setting()
    n = sum(x.size for x in jax.tree.leaves(params))
    counts = {"float32": 8, "bfloat16": 12}  # Adam's and the schedule's; the draws'
    for weights, moment, each in (
        ("float32", "float32", 12),
        ("float32", "bfloat16", 10),
        ("bfloat16", "float32", 10),
        ("bfloat16", "bfloat16", 8),
    ):
        made = narrowed(recipe, weights_dtype=weights, moment_dtype=moment)
        shapes, state = abstract_state(made), init_state(made, params)
        for one in (shapes, state):
            assert size((one.params, one.opt_state)) in range(
                each * n, each * n + counts[weights] + 1
            )
        told = jax.tree.map(lambda x: (x.shape, x.dtype), (shapes, state))
        assert told[0] == told[1]
    averaged = dataclasses.replace(made, ema_decay=0.9)
    kinds = {x.dtype.name for x in jax.tree.leaves(abstract_state(averaged).ema)}
    assert kinds == {"float32"}  # it moves by too little for bfloat16


def steps_of(recipe, params, frozen, prompts, n=4):
    """(params after n steps, the losses)."""
    run, state, losses = step.fused(recipe), init_state(recipe, params), []
    for i in range(n):
        state, _, seen = run(state, frozen, prompts, jax.random.key(i))
        losses.append(float(seen["grad_norm"].total))
    return jax.device_get(state.params), np.array(losses)


def apart(one, other, start):
    """Root mean square of a difference over that of the way from the start."""
    one, other, start = (
        np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
        for tree in (one, other, start)
    )
    return np.sqrt(np.mean((one - other) ** 2) / np.mean((other - start) ** 2))


def test_a_narrow_mean_of_gradients_takes_nearly_the_same_way(setting):
    recipe, params, frozen, prompts = setting()
    start = jax.device_get(params)
    want, norms = steps_of(narrowed(recipe), params, frozen, prompts)
    got, others = steps_of(narrowed(recipe, moment_dtype="bfloat16"), params, frozen, prompts)
    # A mean has eight bits, and each step's update of a weight is off by as much: 2^-9 of it.
    assert 1e-5 < apart(got, want, start) < 2**-7
    np.testing.assert_allclose(others, norms, rtol=2e-2)


@pytest.mark.slow
def test_narrow_weights_learn_on_any_mesh_and_in_microbatches(setting):
    changes = {"microbatches": 1}
    found = []
    for shape in ((1, 1, 1), (2, 2, 2)):
        recipe, params, frozen, prompts = setting(shape, **changes)
        start = jax.device_get(params)
        made = narrowed(recipe, weights_dtype="bfloat16", moment_dtype="bfloat16")
        found.append(steps_of(made, params, frozen, prompts, 1)[0])
    want, _ = steps_of(narrowed(recipe), params, frozen, prompts, 1)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    # A step moves a weight by 0.01; weights of 0.2 stand 2^-10 apart, of 1 and more 2^-7.
    assert apart(found[0], want, start) < 0.5
    # The draws are the same wherever the weights lie: it is rounding before them that differs.
    same = [np.mean(a == b) for a, b in zip(*map(jax.tree.leaves, found))]
    assert np.mean(same) > 0.98


def carried(jaxpr):
    """(shape, dtype) of everything that a scan anywhere in a jaxpr carries."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "scan":
            first = eqn.params["num_consts"]
            for var in eqn.invars[first : first + eqn.params["num_carry"]]:
                yield var.aval.shape, var.aval.dtype.name
        for inner in flops._called(eqn.params):
            yield from carried(inner)


def test_gradients_of_narrow_weights_are_summed_in_float32(setting):
    recipe, params, frozen, prompts = setting()
    made = narrowed(recipe, weights_dtype="bfloat16")
    traced = step.fused(made).trace(init_state(made, params), frozen, prompts, jax.random.key(0))
    shape = params["layers"]["q"].shape
    assert {dtype for of, dtype in carried(traced.jaxpr) if of == shape} == {"float32"}


@pytest.mark.slow
def test_a_narrow_run_is_continued_bit_for_bit_and_exported_as_it_was(root, tmp_path):
    options = {
        "steps": 4,
        "optimizer": dict.fromkeys(("moment_dtype", "weights_dtype"), "bfloat16"),
        "checkpoints": {"every": 2, "keep": 4},
    }
    whole = tiny.config(root, workdir=str(tmp_path / "whole"), **options)
    train.run(whole)
    cut = tiny.config(root, workdir=str(tmp_path / "cut"), **(options | {"steps": 2}))
    train.run(cut)
    train.run(tiny.config(root, workdir=str(tmp_path / "cut"), **options))
    rows = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    done = train.begin(whole)
    assert {x.dtype.name for x in jax.tree.leaves(done.state.params)} == {"bfloat16"}
    assert checkpoint.checksums(done.state) == checkpoint.checksums(train.begin(cut_of(cut)).state)
    export.export(tmp_path / "whole", tmp_path / "model", dtype="bfloat16")
    made = hf.load_params(tmp_path / "model", hf.load_config(tmp_path / "model"), dtype="stored")
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(done.state.params), strict=True):
        np.testing.assert_array_equal(one, other)
    wide = tiny.config(root, workdir=str(tmp_path / "whole"), steps=4)
    with pytest.raises(ValueError, match=r"optimizer\.weights_dtype"):
        train.begin(wide)


def cut_of(config):
    config.steps = 4
    return config
