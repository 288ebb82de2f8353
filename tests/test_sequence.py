"""Positions of a row on several devices: the step of one device, in less memory on each."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from families import GEMMA3, MOE, QWEN3, random_params
from test_attention import compare, drawn, masked, valid
from test_step_program import values

from gopd_jax import command, setup, sharding, step
from gopd_jax.critic import Critic
from gopd_jax.models import attention, lora
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import Lora
from gopd_jax.objectives import objective
from gopd_jax.recipe import init_state

pytestmark = pytest.mark.slow

# data, fsdp, tensor, expert, sequence
BY_TENSOR, BY_FSDP = (2, 1, 2, 1, 2), (1, 2, 1, 1, 4)
EXACT = objective.build(lam=1.25, loss="exact", reduction="token_mean")


# What differs is around the kernel, and one that is interpreted takes long.
HEADS = [
    *itertools.product(["xla", "cudnn by xla"], [(4, 4), (4, 2), (4, 1), (2, 2)]),
    ("splash interpreted", (4, 2)),
]


@pytest.mark.parametrize(("name", "heads"), HEADS, ids=str)
def test_attention_swaps_positions_for_heads_and_back(make_mesh, name, heads):
    """Key/value heads that divide over the devices, and too few of them."""
    n, n_kv = heads
    with sharding.use(make_mesh((2, 1, 1, 1, n))):
        compare(name, drawn(n_kv), valid())
        compare(name, drawn(n_kv), valid(), 4)


def test_a_devices_heads_may_read_parts_of_two_groups(make_mesh):
    """Three query heads on each of two devices, and groups of two."""
    draw = np.random.default_rng(0).normal
    q_BLHE, mask = draw(size=(2, 8, 6, 4)).astype(np.float32), masked("xla", valid()[:2, :8], None)
    k_BKLE, v_BKLE = draw(size=(2, 2, 3, 8, 4)).astype(np.float32)
    want = attention.whole_rows("xla", q_BLHE, k_BKLE, v_BKLE, mask)
    with sharding.use(make_mesh((1, 1, 1, 1, 2))):
        got = jax.jit(lambda *x: attention.whole_rows("xla", *x))(q_BLHE, k_BKLE, v_BKLE, mask)
    np.testing.assert_allclose(got, want, atol=1e-6)


def first_step(setting, shape, model=None, **changes):
    """(params, rollout, metrics) on the host, of one fused step; model: the student's shape."""
    recipe, params, frozen, prompts = setting(shape, **changes)
    if model is not None:
        remat = "layers" if model.sliding_window else None
        model = dataclasses.replace(model, vocab_size=96)  # which two devices divide
        recipe = dataclasses.replace(recipe, student=Decoder(model, remat=remat))
        axes = lm_params.logical_axes(model)
        where = sharding.shardings(recipe.mesh, axes)
        params = jax.device_put(jax.tree.map(jnp.asarray, random_params(model)), where)
        if model.lora is not None:
            params, base = lora.split(params)
            frozen = frozen.replace(base=base)
    state, key = init_state(recipe, params), jax.random.key(0)
    if recipe.objective.needs_reward:
        generate, score, update = step.staged(recipe)
        rollout = generate(state.params, frozen, prompts, key)
        solved_B = (rollout.mask_BT.sum(1) % 2).astype(jnp.float32)
        scores = score(frozen, rollout).replace(reward_B=solved_B)
        state, metrics = update(state, rollout, scores, frozen)
    else:
        if recipe.lag:  # what the first steps of a run wrote
            write, _, _ = step.staged(recipe)
            keys = jax.random.split(jax.random.key(1), recipe.lag)
            waiting = [write(state.params, frozen, prompts, key) for key in keys]
            state = state.replace(pending=tuple(waiting))
        state, rollout, metrics = step.fused(recipe)(state, frozen, prompts, key)
    trained = state.params if state.critic is None else (state.params, state.critic.params)
    return jax.device_get((trained, rollout, values(metrics)))


FIRST = "sampled, two teachers"
GAE = objective.build(lam=1.25, credit="gae(gamma=1.0, lam=0.9)", reduction="token_mean")
LATE = objective.build(lam=1.25, importance="token", reduction="token_mean")
TASK = objective.build(lam=1.25, task="grpo", distil_weight=0.5, reduction="token_mean")
TO_GO = objective.build(
    lam=1.25, credit="return_to_go", baseline="batch_mean", gates=("first(n=4)",)
)
HEAD = Critic(learning_rate=0.02, width=8, closed_form=True, warmup_steps=0, value_clip=None)
CASES = {
    FIRST: {},
    "exact, two teachers": {"objective": EXACT},
    "exact, one teacher": {"objective": EXACT, "routes": ((1, 1),), "buckets": 2},
    "windows, recomputed": {"model": GEMMA3},
    "experts": {"model": MOE},
    "adapters": {
        "model": dataclasses.replace(QWEN3, lora=Lora(rank=2, alpha=4.0, targets="(q|o|up)_proj"))
    },
    "a critic": {"objective": GAE, "critic": HEAD},
    "returns, a baseline, gates": {"objective": TO_GO},
    "rewards": {"objective": TASK},
    "slots, widths": {"slots": 8, "sampling_buckets": 2, "prompt_buckets": 2},
    "late, two updates": {"objective": LATE, "lag": 1, "updates": 2},
    "cache and weights in 8 bits": {
        "objective": LATE,
        "cache_dtype": "int8",
        "sampling_dtype": "int8",
    },
    "the teacher's likeliest": {
        "objective": objective.build(lam=1.25, loss="exact", support="top_k(k=4)"),
    },
    "a part of the vocabulary, gated": {
        "objective": objective.build(
            lam=1.25, loss="entropy_gated(k=3, threshold=1.0)", support="top_k(k=4, of='union')"
        ),
    },
}


@pytest.fixture(scope="module")
def on_one_device(setting):
    done = {}

    def get(name):
        if name not in done:
            done[name] = first_step(setting, (1, 1, 1), **CASES[name])
        return done[name]

    return get


# By default some of the cases on one mesh, and one of them on the other.
SOON = FIRST, "exact, two teachers", "experts"
USUAL = [(name, BY_TENSOR) for name in SOON] + [(FIRST, BY_FSDP)]
# What moves rows or positions about is on both; the other cases are on one.
MOVING = "exact, one teacher", "slots, widths", "late, two updates", "windows, recomputed"
REST = [(name, BY_TENSOR) for name in CASES if name not in SOON]
REST += [(name, BY_FSDP) for name in MOVING]


@pytest.mark.parametrize(
    ("name", "shape"),
    USUAL + [pytest.param(*one, marks=pytest.mark.slow) for one in REST],
    ids=str,
)
def test_a_step_is_that_of_one_device(setting, on_one_device, name, shape):
    params, rollout, metrics = first_step(setting, shape, **CASES[name])
    want_params, want_rollout, want_metrics = on_one_device(name)
    np.testing.assert_array_equal(rollout.tokens_BL, want_rollout.tokens_BL)
    np.testing.assert_array_equal(rollout.mask_BT, want_rollout.mask_BT)
    for key, value in want_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=5e-6, err_msg=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=8e-6), params, want_params)


LENGTH = 59  # of completions behind prompts of 5: rows of 64 positions


def update_of(setting, shape, **changes):
    """The compiled update of rows of 64 positions, four rows at a time."""
    changes = {"completion_length": LENGTH, "microbatches": 4, "head_chunk": 2} | changes
    recipe, params, frozen, prompts = setting(shape, **changes)
    generate, score, update = step.staged(recipe)
    state = init_state(recipe, params)
    where = sharding.by_rows(recipe.mesh), sharding.by_positions(recipe.mesh)

    def laid(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[x.ndim > 2])

    rollout = jax.tree.map(
        laid, generate.trace(state.params, frozen, prompts, jax.random.key(0)).out_info
    )
    scores = jax.tree.map(laid, score.trace(frozen, rollout).out_info)
    return update.lower(state, rollout, scores, frozen).compile()


@pytest.mark.parametrize(
    "changes", [{}, {"objective": EXACT, "routes": ((1, 1),)}], ids=["sampled", "exact"]
)
def test_a_device_holds_its_own_positions_of_activations(setting, changes):
    """Rows of 64 positions, 32 wide, MLPs 48 wide, on four devices."""
    compiled = {n: update_of(setting, (1, 1, 1, 1, n), **changes) for n in (1, 4)}
    sizes = {}
    for n, one in compiled.items():
        found = re.findall(r"= f32\[([\d,]+)\]", one.as_text())
        shapes = {tuple(map(int, dims.split(","))) for dims in found}
        # Of one row, of four, in layers or not: what is as long as a row and as wide as a state.
        sizes[n] = {s for s in shapes if len(s) > 2 and s[-2] >= 48 and s[-1] in (32, 48)}
    assert sizes[1]
    assert not sizes[4]
    temporaries = {n: one.memory_analysis().temp_size_in_bytes for n, one in compiled.items()}
    assert temporaries[4] < 0.5 * temporaries[1]


def test_rows_and_heads_that_do_not_divide_are_refused(root):
    config = tiny.config(root, batch={"prompts": 4, "rollouts": 1}, mesh={"sequence": 8})
    with pytest.raises(ValueError, match=r"4 rows .* mesh.sequence = 1 \* 1 \* 8, over which"):
        setup.checked_mesh(config)
    with pytest.raises(ValueError, match=r"'heads', which mesh.sequence \* mesh.tensor = 8 \* 1"):
        command.open_model(root / "base", sequence=8)
