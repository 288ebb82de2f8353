"""Sampling that reads less: 8-bit weights and cache, and widths of what is there."""

import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import eight_bits
from gopd_jax import batching, sampler, scoring, sharding, step
from gopd_jax.microworld import preset
from gopd_jax.models import cache as caching
from gopd_jax.models import decoder as lm
from gopd_jax.models import ops, quantized
from gopd_jax.models.params import logical_axes, table
from gopd_jax.objectives import objective
from gopd_jax.recipe import init_state
from tests import families
from tests.families import LEFT, LENGTH, MODELS, N_PROMPT, random_params
from tests.test_sampler import EOS, KEY, TEMPERATURE, same

pytestmark = pytest.mark.slow

generate = jax.jit(
    sampler.generate,
    static_argnums=0,
    static_argnames=(
        *("completion_length", "temperature", "eos_ids", "n_vocab", "greedy"),
        *("slots", "n_shards", "buckets", "prompt_buckets", "cache_dtype"),
    ),
)
N_ROWS, WIDTH, NEW = 24, 5, 12
DTYPES = list(quantized.DTYPES)
PLATFORMS = ["cpu", "tpu"]  # which have keys lie otherwise


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- numbers


@pytest.mark.parametrize("axes", [(1,), (0, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_is_the_nearest_of_its_run(dtype, axes):
    x = random(6, 8, 5) * np.array([1e-3, 1, 50, 1, 1, 1])[:, None, None]
    x[3] = 0
    got = quantized.quantize(x, dtype, axes)
    top = np.abs(x.astype(np.float64)).max(axes, keepdims=True)
    scale = np.where(top == 0, 1, top / quantized.DTYPES[dtype])
    np.testing.assert_allclose(got.scale, scale, rtol=1e-6)
    if dtype == "int8":
        assert np.abs(np.asarray(got.values)).max() == 127
        assert np.abs(np.asarray(quantized.full(got, "float32")) - x).max(axes).max() > 0
        off = np.abs(np.asarray(quantized.full(got, "float32"), np.float64) - x)
        assert (off <= 0.5000001 * scale + 1e-12).all()
    else:
        want = (x / np.asarray(got.scale)).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(np.asarray(got.values).astype(np.float32), want.astype("f4"))
    assert got.values.dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_rounded_numbers(dtype):
    x, weight = random(4, 3, 6), random(6, 2, 5, seed=1)
    rounded = quantized.quantize(weight, dtype, (0,))
    want = ops.project(x, quantized.full(rounded, "float32"))
    np.testing.assert_allclose(ops.project(x, rounded), want, atol=2e-6)
    x, weight = random(4, 2, 6), random(2, 6, 5, seed=1)
    rounded = quantized.quantize(weight, dtype, (0, 1))
    want = ops.project(x, quantized.full(rounded, "float32"), contract=2)
    np.testing.assert_allclose(ops.project(x, rounded, contract=2), want, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_to_a_rounded_past_is_that_to_its_numbers(dtype):
    q, k, v = random(3, 1, 4, 8), random(3, 2, 1, 8, seed=1), random(3, 2, 1, 8, seed=2)
    past = [quantized.quantize(3 * random(3, 2, 7, 8, seed=i), dtype, (3,)) for i in (3, 4)]
    mask, past_mask = np.ones((3, 1, 1), bool), np.arange(7) < np.array([[7], [4], [1]])
    plain = [quantized.full(x, "float32") for x in past]
    want = ops.attend(q, k, v, mask, plain, past_mask)
    np.testing.assert_allclose(ops.attend(q, k, v, mask, past, past_mask), want, atol=2e-6)


@pytest.mark.parametrize("name", MODELS)
def test_every_dense_matrix_is_rounded_and_nothing_else(name):
    cfg = MODELS[name]
    made = quantized.matrices(random_params(cfg), cfg, "int8")
    for row in table(cfg):
        leaf = (made["layers"] if row.stacked else made)[row.name]
        dense = len(row.tensor_axes) >= 2 and "expert" not in row.name and row.name != "router"
        dense &= not row.name.endswith("bias")
        assert isinstance(leaf, quantized.Quantized) == dense, row.path


# --- the model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3", "qwen3, untied", "qwen3_moe", "gemma3_text"])
def test_a_model_of_rounded_weights_is_the_model_with_these_weights(name, dtype):
    cfg = MODELS[name]
    decoder, batch = lm.Decoder(cfg), families.batch()
    made = quantized.matrices(random_params(cfg), cfg, dtype)
    plain = jax.tree.map(
        lambda x: quantized.full(x, "float32"),
        made,
        is_leaf=lambda x: isinstance(x, quantized.Quantized),
    )

    @jax.jit
    def logits(params):
        hidden_BLD = lm.hidden(decoder, params, *batch)
        return lm.logits(decoder, params, hidden_BLD)

    want = logits(plain)
    assert np.abs(want - logits(random_params(cfg))).max() > 1e-2
    np.testing.assert_allclose(logits(made), want, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("buckets", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_rounded_cache_holds_what_was_appended_rounded_once(
    name, dtype, buckets, platform, monkeypatch
):
    """Beside a cache of full width that holds the same numbers.

    They are taken over once they have been found to lie as near to the keys and values as rounding
    by hand does, for of two that are equally near either may be had.
    """
    cfg = MODELS[name]
    decoder, params = lm.Decoder(cfg), random_params(cfg)
    tokens_BL, valid_BL = families.batch()
    prompt = tokens_BL[:, :N_PROMPT], valid_BL[:, :N_PROMPT]
    decode = jax.jit(lm.decode, static_argnums=0)
    monkeypatch.setattr(caching, "platform", lambda: platform)

    def taken_over(plain, cache, n):
        """plain with the first n slots' numbers of cache, and these alone."""
        held = {}
        for name, slots in zip(("k_NBKLE", "v_NBKLE"), cache.slots):
            exact, got = getattr(plain, name), getattr(cache, name)
            by_hand = quantized.quantize(exact, dtype, (7 - slots,))
            off, least = (np.abs(quantized.full(x, "float32") - exact) for x in (got, by_hand))
            of = (np.arange(LENGTH) < n).reshape(-1, *(1,) * (4 - slots))
            assert ((off <= least + 1e-3 * by_hand.scale) | ~of).all()
            held[name] = jnp.where(of, quantized.full(got, "float32"), exact)
        return plain.replace(**held)

    _, plain = lm.prefill(decoder, params, *prompt, length=LENGTH)
    options = {
        "length": LENGTH,
        "buckets": buckets,
        "prompt_buckets": buckets,
        "cache_dtype": dtype,
    }
    _, cache = lm.prefill(decoder, params, *prompt, **options)
    plain = taken_over(plain, cache, N_PROMPT)
    for t in range(N_PROMPT, LENGTH):
        got, cache = decode(decoder, params, tokens_BL[:, t], cache)
        want, plain = decode(decoder, params, tokens_BL[:, t], plain)
        np.testing.assert_allclose(got, want, atol=2e-5)
        plain = taken_over(plain, cache, t + 1)
    assert cache.k_NBKLE.values.dtype == dtype


def on_a_cpu():
    return sharding.use(sharding.make_mesh(None, 1, 1, devices=jax.devices()[:1]))


def test_where_a_cpus_mesh_is_set_keys_lie_as_its_products_want_them():
    decoder, params = model("qwen3")
    tokens_BL, valid_BL = families.batch()
    filled = jax.jit(lambda: lm.prefill(decoder, params, tokens_BL, valid_BL, length=LENGTH)[1])
    plain = filled()
    with on_a_cpu():
        turned = filled()
    assert (plain.slots, turned.slots) == ((3, 3), (4, 3))
    np.testing.assert_allclose(turned.k_NBKLE.swapaxes(3, 4), plain.k_NBKLE, atol=1e-6)
    np.testing.assert_allclose(turned.v_NBKLE, plain.v_NBKLE, atol=1e-6)


@pytest.mark.parametrize("slots", [None, 5])
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_how_keys_lie_changes_no_completion(sample, slots, cache_dtype):
    options = {"slots": slots, "cache_dtype": cache_dtype, "buckets": 3}
    want = sample("qwen3", **options)
    with on_a_cpu():
        same(sample("qwen3", **options), want)


def test_prompts_are_cut_to_the_width_of_the_longest():
    decoder, params = lm.Decoder(MODELS["qwen3"]), random_params(MODELS["qwen3"])
    tokens_BL, valid_BL = families.batch()
    for most, width in ((8, 8), (6, 6), (5, 6), (3, 4), (2, 2), (1, 2)):
        valid_BP = np.arange(N_PROMPT) >= N_PROMPT - np.minimum(most, 1 + LEFT)[:, None]
        prompt = tokens_BL[:, :N_PROMPT], valid_BP & (np.arange(N_PROMPT) >= N_PROMPT - most)
        want, _ = lm.prefill(decoder, params, *prompt, length=LENGTH)
        got, cache = lm.prefill(decoder, params, *prompt, length=LENGTH, prompt_buckets=4)
        longest = int(prompt[1].sum(1).max())
        assert cache.index == next(w for w in (2, 4, 6, 8) if w >= longest)
        assert longest < most or cache.index == width
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_reading_takes_the_least_width_that_holds_what_is_there(platform, monkeypatch):
    monkeypatch.setattr(caching, "platform", lambda: platform)
    kv = (jnp.zeros((1, 1, 1, 3, 2)),) * 2
    valid_BP, position_BP = jnp.ones((1, 3), bool), jnp.arange(3)[None]
    cache = caching.filled(kv, valid_BP, position_BP, length=12, buckets=3, dtype=None)
    assert cache.widths == (4, 8, 12)
    for index, width in ((3, 4), (4, 4), (5, 8), (8, 8), (9, 12), (12, 12), (30, 12)):
        there = cache.replace(index=jnp.int32(index))
        assert caching.at_width(jnp.int32, there) == width, index
        assert [x.shape for x in caching.read(there, 0, width)] == [(1, 1, width, 2)] * 2
    assert caching.widths(16384, 4) == (4096, 8192, 12288, 16384)
    assert caching.widths(7, 1) == (7,)


# --- the sampler


@functools.cache
def model(name):
    """A model whose completions end at many lengths."""
    params = random_params(MODELS[name])
    return lm.Decoder(MODELS[name]), params | {"embed": 0.3 * params["embed"]}


@pytest.fixture
def sample(make_prompts, n_vocab):
    def run(name, params=None, prompts=None, **options):
        decoder, own = model(name)
        prompts = make_prompts(N_ROWS, WIDTH) if prompts is None else prompts
        params = own if params is None else params
        defaults = {"eos_ids": EOS, "n_vocab": n_vocab, "temperature": TEMPERATURE}
        defaults |= {"completion_length": NEW}
        return generate(decoder, params, prompts, KEY, **(defaults | options))

    return run


@pytest.mark.parametrize("slots", [None, 5])  # with 5 the ring closes
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_widths_change_no_completion(sample, make_prompts, name, slots):
    same(sample(name, buckets=4, prompt_buckets=3, slots=slots), sample(name))
    short = make_prompts(N_ROWS, WIDTH)
    short = short.replace(valid_BP=short.valid_BP & (np.arange(WIDTH) >= WIDTH - 2))
    same(
        sample(name, prompts=short, buckets=4, prompt_buckets=3, slots=slots),
        sample(name, prompts=short),
    )


def test_longer_prompts_than_the_first_ones_pass_through_the_slots(sample, make_prompts):
    # The first five rows' prompts are cut to four tokens; those behind them have twelve.
    tokens_BP = np.random.default_rng(3).integers(0, 61, (N_ROWS, 12))
    short_B1 = (np.arange(N_ROWS) < 5)[:, None]
    valid_BP = ~short_B1 | (np.arange(12) >= 9)
    prompts = make_prompts(N_ROWS, 12).replace(tokens_BP=tokens_BP, valid_BP=valid_BP)
    got = sample("qwen3", prompts=prompts, buckets=4, prompt_buckets=3, slots=5)
    same(got, sample("qwen3", prompts=prompts))


def test_log_probs_are_of_the_weights_that_sampled(sample, make_mesh, n_vocab):
    decoder, params = model("qwen3")
    mesh = make_mesh((1, 1, 1))
    narrow = batching.decode_copy(mesh, decoder, params, "int8")
    rollout = sample("qwen3", params=narrow)
    plain = jax.tree.map(
        lambda x: quantized.full(x, "float32"),
        narrow,
        is_leaf=lambda x: isinstance(x, quantized.Quantized),
    )

    def score(params):
        options = {"temperature": TEMPERATURE, "n_vocab": n_vocab, "chunk": 4}
        return scoring.score(decoder, params, rollout, **options)[0]

    np.testing.assert_allclose(rollout.logp_BT, score(plain), atol=2e-5)
    assert np.abs(rollout.logp_BT - score(params)).max() > 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rounded_cache_draws_the_same_whatever_the_slots_and_widths(sample, dtype):
    """A token's scale is its own, so that nothing hangs on what was cached with it."""
    want = sample("qwen3", cache_dtype=dtype)
    same(sample("qwen3", cache_dtype=dtype, slots=5, buckets=3), want)
    assert np.abs(want.logp_BT - sample("qwen3").logp_BT).max() > 1e-3


# --- the step

NARROW = {
    "cache_dtype": "int8",
    "sampling_dtype": "int8",
    "sampling_buckets": 3,
    "prompt_buckets": 2,
    "objective": objective.build(loss="policy_gradient", lam=1.25, importance="token"),
}


SAID = ("sampler_kl", "log_ess")


@pytest.mark.slow
def test_a_mesh_changes_no_narrow_step(setting):
    found = []
    for shape, slots in (((1, 1, 1), None), ((2, 2, 2), 8)):
        recipe, params, frozen, prompts = setting(shape, slots=slots, **NARROW)
        key = jax.random.key(3)
        _, rollout, metrics = step.fused(recipe)(init_state(recipe, params), frozen, prompts, key)
        found.append((jax.device_get(rollout), jax.device_get(metrics)))
    (want, want_metrics), (got, got_metrics) = found
    np.testing.assert_array_equal(got.tokens_BL, want.tokens_BL)
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, atol=2e-5)
    for name, mean in want_metrics.items():
        np.testing.assert_allclose(
            got_metrics[name].total, mean.total, rtol=2e-5, atol=1e-4, err_msg=name
        )


def test_what_was_sampled_in_8_bits_is_weighed(setting):
    """log w of the step's metrics is that of the student against what sampled."""
    recipe, params, frozen, prompts = setting((1, 1, 1), **NARROW)
    key = jax.random.key(3)
    _, rollout, metrics = step.fused(recipe)(init_state(recipe, params), frozen, prompts, key)
    _, params, _, _ = setting((1, 1, 1))
    logp_BT, _ = step.judging(recipe, recipe.student)(params, rollout, None)
    log_w = np.asarray(logp_BT - rollout.logp_BT)[np.asarray(rollout.mask_BT)].astype(np.float64)
    assert np.abs(log_w).max() > 1e-4
    found = {name: float(metrics[name].total / metrics[name].count) for name in SAID}
    assert found["sampler_kl"] == pytest.approx(-log_w.mean(), abs=1e-6)
    w = np.exp(log_w)
    assert found["log_ess"] == pytest.approx(np.log(w.sum() ** 2 / len(w) / (w**2).sum()), abs=1e-6)


def test_evaluation_samples_with_the_models_own_numbers(setting):
    recipe, params, frozen, prompts = setting((1, 1, 1), **NARROW)
    plain, *_ = setting((1, 1, 1))
    key = jax.random.key(3)
    got = step.sampling(recipe, recipe.student)(params, prompts, key)
    same(got, step.sampling(plain, plain.student)(params, prompts, key))


@pytest.mark.slow
def test_the_benchmarks_line_is_of_the_builtin_model():
    config = preset.two_teachers("unused")
    config.batch.prompts, config.batch.microbatches = 16, 1
    text, millions = eight_bits.line(config, ("float32", "int8", None))
    cells = text.strip("| ").split(" | ")
    assert cells[:3] == ["float32", "int8", ""]
    assert 0 < float(cells[4]) < 1e-3
    assert 0.5 < millions < 1


def test_shards_are_rounded_before_they_are_gathered(make_model, make_mesh):
    """Of the matrices 8 bits travel, and nothing of a scale is left to be gathered by a token."""
    decoder, params = make_model()
    mesh = make_mesh((1, 8, 1))
    params = jax.device_put(params, sharding.shardings(mesh, logical_axes(decoder.cfg)))

    def copied(params):
        return batching.decode_copy(mesh, decoder, params, "int8")

    with sharding.use(mesh):
        compiled = jax.jit(copied).lower(params).compile()
        made = compiled(params)
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    wide = [dims for kind, dims in gathered if kind == "f32" and len(dims.split(",")) > 2]
    assert any(kind == "s8" for kind, _ in gathered)
    assert all(1 in map(int, dims.split(",")) for dims in wide), wide
    for row in table(decoder.cfg):
        leaf = (made["layers"] if row.stacked else made)[row.name]
        if isinstance(leaf, quantized.Quantized):
            assert leaf.scale.sharding.is_fully_replicated, row.path
