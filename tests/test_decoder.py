"""The decoder against itself: cache, padding, dtype, mesh. test_hf.py compares it with torch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import GEMMA3, LLAMA, MODELS, MOE, QWEN3

from gopd_jax import sharding
from gopd_jax.models import decoder as lm
from gopd_jax.models import params as lm_params
from gopd_jax.models import rope
from gopd_jax.models.params import LinearRope, Llama3Rope, YarnRope

# Every piece of the mathematics is in one of them.
EACH = {"qwen3": QWEN3, "llama": LLAMA, "qwen3_moe": MOE, "gemma3_text": GEMMA3}
EACH["qwen2"] = dataclasses.replace(MODELS["qwen2, yarn"], tie_word_embeddings=True)
EACH["mistral"] = MODELS["mistral, sliding"]
MODELS = pytest.mark.parametrize("cfg", EACH.values(), ids=EACH.keys())
LEFT = np.array([0, 2, 5, 3])  # padding of each row
N_PROMPT, LENGTH = 7, 12

hidden = jax.jit(lm.hidden, static_argnums=0)
prefill = jax.jit(lm.prefill, static_argnums=0, static_argnames="length")
decode = jax.jit(lm.decode, static_argnums=0)


@functools.cache
def model(cfg, dtype="float32"):
    """Large random weights, norms too: every part of the layer shows in the logits."""
    draw = np.random.default_rng(0).normal
    params = lm_params.tree(
        cfg,
        lambda row: jnp.asarray(
            draw(row.name.endswith("norm"), 0.2, row.shape(cfg)).astype(np.float32)
        ),
    )
    return lm.Decoder(cfg, dtype), params


@functools.cache
def batch():
    tokens_BL = np.random.default_rng(1).integers(0, 97, (len(LEFT), LENGTH), np.int32)
    return jnp.asarray(tokens_BL), jnp.arange(LENGTH) >= LEFT[:, None]


def full_logits(cfg, tokens_BL, valid_BL, dtype="float32"):
    decoder, params = model(cfg, dtype)
    return lm.logits(decoder, params, hidden(decoder, params, tokens_BL, valid_BL))


@MODELS
def test_cached_decoding_equals_the_forward_pass_of_whole_rows(cfg):
    decoder, params = model(cfg)
    tokens_BL, valid_BL = batch()
    want_BLV = full_logits(cfg, tokens_BL, valid_BL)
    hidden_BD, cache = prefill(
        decoder, params, tokens_BL[:, :N_PROMPT], valid_BL[:, :N_PROMPT], length=LENGTH
    )
    for t in range(N_PROMPT - 1, LENGTH):
        got_BV = lm.logits(decoder, params, hidden_BD)
        np.testing.assert_allclose(got_BV, want_BLV[:, t], atol=1e-5)
        if t + 1 < LENGTH:
            hidden_BD, cache = decode(decoder, params, tokens_BL[:, t + 1], cache)
    assert int(cache.index) == LENGTH
    np.testing.assert_array_equal(cache.valid_BL, valid_BL)
    np.testing.assert_array_equal(cache.next_B, LENGTH - LEFT)


@MODELS
def test_where_the_padding_is_and_what_it_holds_change_nothing(cfg):
    decoder, params = model(cfg)
    tokens_BL, valid_BL = batch()
    # An id outside the table is the hardest padding: it must reach neither values nor finiteness.
    left_BLD = hidden(decoder, params, jnp.where(valid_BL, tokens_BL, 10**6), valid_BL)
    assert np.isfinite(left_BLD).all()
    shifted = [jnp.stack([jnp.roll(r, -n) for r, n in zip(x, LEFT)]) for x in batch()]
    right_BLD = hidden(decoder, params, *shifted)
    # Padding between tokens: windows and rope count tokens, not places in the row.
    order_BL = np.array([[*range(n, n + 4), *range(n), *range(n + 4, LENGTH)] for n in LEFT])
    between_BLD = hidden(decoder, params, *(jnp.take_along_axis(x, order_BL, 1) for x in batch()))
    for row, left in enumerate(LEFT):
        got_LD, want_LD = left_BLD[row, left:], right_BLD[row, : LENGTH - left]
        np.testing.assert_allclose(got_LD, want_LD, atol=1e-5)
        got_LD = np.delete(between_BLD[row], np.s_[4 : 4 + left], axis=0)
        np.testing.assert_allclose(got_LD, want_LD, atol=1e-5)


@MODELS
def test_no_token_sees_a_later_one(cfg):
    tokens_BL, valid_BL = batch()
    got_BLV = full_logits(cfg, tokens_BL, valid_BL)
    changed_BLV = full_logits(cfg, tokens_BL.at[:, 8:].set(3), valid_BL)
    gone_BLV = full_logits(cfg, tokens_BL, valid_BL & (jnp.arange(LENGTH) < 8))
    early_BL = np.asarray(valid_BL & (jnp.arange(LENGTH) < 8))
    np.testing.assert_array_equal(got_BLV[early_BL], changed_BLV[early_BL])
    np.testing.assert_array_equal(got_BLV[early_BL], gone_BLV[early_BL])
    assert np.abs(got_BLV[:, 11] - changed_BLV[:, 11]).max() > 0.1


def test_an_id_outside_the_table_shows_at_a_valid_position():
    tokens_BL, valid_BL = batch()
    logits_BLV = full_logits(QWEN3, tokens_BL.at[0, 9].set(97), valid_BL)
    assert np.isnan(logits_BLV[0, 9:]).all()
    assert np.isfinite(logits_BLV[1:]).all()


@MODELS
def test_bfloat16_computes_near_float32_and_gives_float32_logits(cfg):
    tokens_BL, valid_BL = batch()
    exact_BLV = full_logits(cfg, tokens_BL, valid_BL)
    rough_BLV = full_logits(cfg, tokens_BL, valid_BL, "bfloat16")
    assert exact_BLV.dtype == rough_BLV.dtype == jnp.float32
    error = np.abs(rough_BLV - exact_BLV)[np.asarray(valid_BL)].std() / exact_BLV.std()
    assert 1e-4 < error < 2e-2  # eight bits of mantissa, two layers
    decoder, params = model(cfg, "bfloat16")
    hidden_BD, cache = prefill(decoder, params, tokens_BL, valid_BL, length=LENGTH)
    assert hidden_BD.dtype == cache.k_NBKLE.dtype == jnp.bfloat16


def test_gradient_agrees_with_finite_differences_with_rematerialisation_and_padding():
    _, params = model(QWEN3)
    tokens_BL, valid_BL = batch()
    draw = np.random.default_rng(4).normal
    direction = jax.tree.map(lambda x: jnp.asarray(draw(0, 1, x.shape), jnp.float32), params)

    def along(h, remat, padding):
        decoder = lm.Decoder(QWEN3, remat=remat)
        moved = jax.tree.map(lambda x, d: x + h * d, params, direction)
        tokens = jnp.where(valid_BL, tokens_BL, padding)
        hidden_BLD = lm.hidden(decoder, moved, tokens, valid_BL)
        return jnp.mean(jnp.where(valid_BL[..., None], hidden_BLD, 0.0) ** 3)

    value = jax.jit(along, static_argnums=(1, 2))
    far, near = (float(value(h, None, 0) - value(-h, None, 0)) for h in (1e-3, 5e-4))
    slope = (8 * near - far) / (12 * 5e-4)  # error of fourth order
    for remat in (*lm.REMAT, None):
        gradient = jax.jit(jax.grad(along), static_argnums=(1, 2))(0.0, remat, -7)
        np.testing.assert_allclose(gradient, slope, rtol=1e-3)


def test_what_is_recomputed_changes_no_gradient_and_takes_less_memory():
    cfg = dataclasses.replace(LLAMA, num_hidden_layers=8)
    _, params = model(cfg)
    tokens_BL = jnp.asarray(np.random.default_rng(5).integers(0, 97, (8, 64), np.int32))

    def loss(params, remat):
        hidden_BLD = lm.hidden(lm.Decoder(cfg, remat=remat), params, tokens_BL, tokens_BL > 3)
        return jnp.mean(hidden_BLD**3)

    found, held = {}, {}
    for remat in ("layers", "products", None):
        made = jax.jit(jax.grad(loss), static_argnums=1).lower(params, remat).compile()
        held[remat] = made.memory_analysis().temp_size_in_bytes
        found[remat] = made(params)
    assert held["layers"] < held["products"] < held[None]
    for remat in ("layers", "products"):
        for got, want in zip(*map(jax.tree.leaves, (found[remat], found[None]))):
            np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@MODELS
def test_the_module_declares_the_parameters_of_the_table(cfg):
    tokens_BL, _ = batch()
    decoder, valid_B1L = lm.Decoder(cfg), jnp.ones((len(LEFT), 1, LENGTH), bool)
    made = jax.eval_shape(
        lambda key: decoder.init(key, tokens_BL, tokens_BL, valid_B1L, None), jax.random.key(0)
    )
    want = lm_params.abstract_params(cfg)
    assert made["params"] == want
    assert jax.eval_shape(lambda key: lm_params.init(cfg, key), jax.random.key(0)) == want
    axes, sizes = lm_params.logical_axes(cfg), lm_params.axis_sizes(cfg)
    by_name = jax.tree.map(lambda leaf, names: tuple(sizes[n] for n in names), want, axes)
    assert by_name == jax.tree.map(lambda leaf: leaf.shape, want)


def test_initial_parameters_are_small_independent_draws_and_unit_norms():
    params = jax.device_get(jax.jit(lm_params.init, static_argnums=0)(LLAMA, jax.random.key(0)))
    leaves = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    norms = {name for name in leaves if "norm" in name}
    assert len(norms) == 3
    assert all((leaves[name] == 1).all() for name in norms)
    drawn = [leaves[name].ravel() for name in leaves if name not in norms]
    for x in drawn:
        np.testing.assert_allclose([x.mean(), x.std()], [0, 0.02], atol=1.5e-3)
    assert len({x[0] for x in drawn}) == len(drawn)


def test_constraints_are_there_under_rules_and_a_mesh_and_nowhere_else():
    decoder, params = model(QWEN3)
    tokens_BL, valid_BL = batch()

    def trace():
        return str(
            jax.make_jaxpr(lambda p: lm.logits(decoder, p, lm.hidden(decoder, p, *batch())))(params)
        )

    assert "sharding_constraint" not in trace()
    plain_BLV = full_logits(QWEN3, tokens_BL, valid_BL)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with sharding.use(mesh):
        assert trace().count("sharding_constraint") >= 8
        held_BLV = jax.jit(lambda p: lm.logits(decoder, p, lm.hidden(decoder, p, *batch())))(params)
    np.testing.assert_allclose(plain_BLV, held_BLV, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2", "gemma3_text"])  # test_step has the others
def test_a_mesh_changes_neither_logits_nor_gradients(name, make_mesh):
    cfg = dataclasses.replace(EACH[name], vocab_size=98)  # even
    decoder, params = model(cfg)
    tokens_BL, valid_BL = (x[:3] for x in batch())  # not a multiple of the shards of rows

    def run(params):
        def loss(params):
            logits_BLV = lm.logits(decoder, params, lm.hidden(decoder, params, tokens_BL, valid_BL))
            logits_BLV = jnp.where(valid_BL[..., None], logits_BLV, 0.0)
            return jnp.mean(logits_BLV**2), logits_BLV

        gradient, logits_BLV = jax.grad(loss, has_aux=True)(params)
        before = tokens_BL[:, :-1], valid_BL[:, :-1]
        _, cache = lm.prefill(decoder, params, *before, length=LENGTH)
        hidden_BD, _ = lm.decode(decoder, params, tokens_BL[:, -1], cache)
        return gradient, logits_BLV, lm.logits(decoder, params, hidden_BD)

    want, mesh = jax.jit(run)(params), make_mesh((2, 2, 2))
    spread = jax.device_put(params, sharding.shardings(mesh, lm_params.logical_axes(cfg)))
    with sharding.use(mesh):
        got = jax.jit(run)(spread)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=2e-5 * np.abs(w).max())


def test_logits_take_any_leading_shape():
    decoder, params = model(LLAMA)
    hidden_BLD = jax.random.normal(jax.random.key(3), (2, 3, 32))
    want_BLV = np.einsum("bld,vd->blv", hidden_BLD, params["head"])
    for lead in ((2, 3), (6,), (1, 2, 3, 1)):
        got = lm.logits(decoder, params, hidden_BLD.reshape(*lead, 32))
        np.testing.assert_allclose(got, want_BLV.reshape(*lead, 97), atol=1e-5)
    np.testing.assert_allclose(
        lm.logits(decoder, params, hidden_BLD[1, 2]), want_BLV[1, 2], atol=1e-5
    )


def test_a_cache_shorter_than_the_prompt_is_refused():
    decoder, params = model(QWEN3)
    with pytest.raises(ValueError, match=r"length = 5 cannot hold prompts of 12 tokens"):
        lm.prefill(decoder, params, *batch(), length=5)


def test_decoders_of_one_description_are_one_static_argument():
    assert hash(lm.Decoder(QWEN3)) == hash(lm.Decoder(QWEN3))
    assert lm.Decoder(QWEN3) == lm.Decoder(QWEN3) != lm.Decoder(QWEN3, "bfloat16")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factor", 2.0),
        ("low_freq_factor", 1.5),
        ("high_freq_factor", 8.0),
        ("original_max_position_embeddings", 64),
    ],
)
def test_every_constant_of_llama3_rope_matters(name, value):
    changed = dataclasses.replace(LLAMA.rope_scaling, **{name: value})
    assert not np.allclose(
        rope.frequencies(8, 500.0, LLAMA.rope_scaling), rope.frequencies(8, 500.0, changed)
    )


def test_positions_near_and_far_in_a_stretched_context():
    """The pairs that turn fastest are kept and the slowest divided, whatever the scaling."""
    plain_E = rope.frequencies(64, 1e4, None)
    llama3 = Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512
    )
    yarn = YarnRope(factor=4.0, original_max_position_embeddings=512)
    for scaling in (llama3, yarn):
        ratio_E = rope.frequencies(64, 1e4, scaling) / plain_E
        assert ratio_E[0] == 1
        np.testing.assert_allclose(ratio_E[-1], 1 / scaling.factor, rtol=1e-6)
        assert (np.diff(ratio_E) <= 0).all()
    linear_E = rope.frequencies(64, 1e4, LinearRope(factor=8.0))
    np.testing.assert_allclose(linear_E, plain_E / 8, rtol=1e-6)
    # sqrt(1/t) = 0.1 ln s + 1, https://arxiv.org/abs/2309.00071
    np.testing.assert_allclose(rope.attention_factor(yarn), 1 + 0.1 * np.log(4))
