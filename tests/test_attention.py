"""Attention of whole rows: every implementation against one oracle, NumPy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import GEMMA3, LLAMA, QWEN3

from gopd_jax import sharding
from gopd_jax.models import attention
from gopd_jax.models import decoder as lm
from gopd_jax.models import params as lm_params
from gopd_jax.planning import chips, flops

pytestmark = pytest.mark.slow

HEADS, WIDTH, LENGTH = 4, 8, 20
LEFT = np.array([0, 3, 0, 4, 0])
RIGHT = np.array([0, 0, 5, 2, LENGTH])  # the last row has no token
ON_CPU = ["xla", "cudnn by xla", pytest.param("splash interpreted", marks=pytest.mark.slow)]
EACH = pytest.mark.parametrize("name", ON_CPU)


def valid(left=LEFT, right=RIGHT, length=LENGTH):
    at_L = np.arange(length)
    return (at_L >= left[:, None]) & (at_L < length - right[:, None])


def drawn(n_kv, length=LENGTH, rows=5):
    draw = np.random.default_rng(0).normal
    shapes = (rows, length, HEADS, WIDTH), *((rows, n_kv, length, WIDTH),) * 2
    return [draw(size=shape).astype(np.float32) for shape in shapes]


def oracle(q_BLHE, k_BKLE, v_BKLE, valid_BL, window, g_BLHE):
    """(out_BLHE, gradients of sum(g * out) in q, k, v), a row, a head and a query at a time."""
    q, k, v, g = (np.asarray(x, np.float64) for x in (q_BLHE, k_BKLE, v_BKLE, g_BLHE))
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    rows, length, heads, _ = q.shape
    for b, h in np.ndindex(rows, heads):
        of = h // (heads // k.shape[1])
        tokens = np.flatnonzero(valid_BL[b])
        for i in tokens:
            # A window counts tokens.
            seen = [j for j in tokens if j <= i][-(window or length) :]
            score = k[b, of, seen] @ q[b, i, h]
            p = np.exp(score - score.max())
            p /= p.sum()
            out[b, i, h] = p @ v[b, of, seen]
            d_score = p * (v[b, of, seen] @ g[b, i, h] - out[b, i, h] @ g[b, i, h])
            dq[b, i, h] = d_score @ k[b, of, seen]
            dk[b, of, seen] += np.outer(d_score, q[b, i, h])
            dv[b, of, seen] += np.outer(p, g[b, i, h])
    return out, (dq, dk, dv)


def masked(name, valid_BL, window):
    """What a decoder gives whole_rows: all that is masked for xla, the real tokens for a kernel."""
    valid_B1L = np.asarray(valid_BL)[:, None]
    if name != "xla":
        return valid_B1L
    mask_BLL = valid_B1L & np.tri(valid_BL.shape[1], dtype=bool)
    if window is None:
        return mask_BLL
    position_BL = np.cumsum(valid_BL, 1)
    return mask_BLL & (position_BL[:, :, None] - position_BL[:, None] < window)


def compare(name, given, valid_BL, window=None, slides=None):
    """The output and its gradient at real tokens against the oracle's, finite everywhere."""
    g_BLHE = np.random.default_rng(1).normal(size=given[0].shape).astype(np.float32)
    # Nothing comes back from padding, as in a loss; its own values are free.
    g_BLHE = np.where(valid_BL[:, :, None, None], g_BLHE, 0)
    mask = masked(name, valid_BL, window)
    attend = functools.partial(attention.whole_rows, name, window=window)

    @jax.jit
    def run(*given):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, mask, slides=slides), *given)
        return out, back(g_BLHE)

    got, gradients = jax.device_get(run(*given))
    want, wanted = oracle(*given, valid_BL, window, g_BLHE)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[valid_BL], want[valid_BL], atol=3e-6)
    for one, other in zip(gradients, wanted):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one, other, atol=2e-5)


@EACH
@pytest.mark.parametrize("n_kv", [1, 2, 4])
def test_padding_on_any_side_and_groups_of_heads(name, n_kv):
    compare(name, drawn(n_kv), valid())


@EACH
@pytest.mark.parametrize("window", [1, 4, LENGTH - 1, LENGTH, 50])
def test_a_sliding_window(name, window):
    compare(name, drawn(2), valid(), window)


@pytest.mark.parametrize("name", ["cudnn by xla", *ON_CPU[2:]])
def test_where_layers_differ_a_flag_chooses(name):
    given, valid_BL = drawn(2), valid()
    compare(name, given, valid_BL, 4, jnp.array(True))
    mask = masked(name, valid_BL, None)
    near = attention.whole_rows(name, *given, mask, window=4, slides=jnp.array(False))
    plain = attention.whole_rows(name, *given, mask)
    np.testing.assert_allclose(near, plain, atol=1e-6)


@pytest.mark.parametrize("name", ["xla", "cudnn by xla"])
def test_tokens_need_not_be_next_to_each_other(name):
    valid_BL = np.random.default_rng(2).random((len(LEFT), LENGTH)) < 0.6
    compare(name, drawn(2), valid_BL)
    compare(name, drawn(2), valid_BL, 3)


@EACH
def test_what_stands_at_padding_changes_nothing(name):
    given, valid_BL = drawn(2), valid()
    other = [np.where(valid_BL[:, :, None, None], given[0], 1e4)]
    other += [np.where(valid_BL[:, None, :, None], x, 1e4) for x in given[1:]]
    mask = masked(name, valid_BL, None)
    out = [np.asarray(attention.whole_rows(name, *x, mask)) for x in (given, other)]
    assert np.isfinite(out[1]).all()
    np.testing.assert_array_equal(out[0][valid_BL], out[1][valid_BL])


def test_cudnn_never_sees_padding_nor_its_gradient():
    """A kernel may leave anything at padding: it gets zeros there, and what it gives is dropped."""
    given, valid_BL = drawn(2), valid()
    given[0] = np.where(valid_BL[:, :, None, None], given[0], np.nan)
    given[1:] = (np.where(valid_BL[:, None, :, None], x, np.nan) for x in given[1:])

    def attend(*given):
        return attention.whole_rows("cudnn by xla", *given, masked("cudnn", valid_BL, None))

    out, back = jax.vjp(attend, *given)
    gradients = back(jnp.ones_like(out))
    assert np.isfinite(out).all()
    assert all(np.isfinite(x).all() for x in gradients)
    assert not np.asarray(out)[~valid_BL].any()
    assert not np.asarray(gradients[0])[~valid_BL].any()


@pytest.mark.slow
@pytest.mark.parametrize("length", [128, 300, 600])  # blocks of 128 and of 512, filled up or not
def test_splash_at_lengths_of_several_blocks(length):
    valid_BL = valid(np.array([0, 37]), np.array([5, 20]), length)
    compare("splash interpreted", drawn(2, length, 2), valid_BL)
    compare("splash interpreted", drawn(2, length, 2), valid_BL, 70)


@pytest.mark.parametrize("length", [65, 150, 530])  # of blocks of 64; of 67, the last one shorter
def test_xla_at_lengths_of_several_blocks(length):
    valid_BL = valid(np.array([0, 37]), np.array([5, 20]), length)
    compare("xla", drawn(2, length, 2), valid_BL)
    compare("xla", drawn(2, length, 2), valid_BL, 70)


@pytest.mark.parametrize("name", ON_CPU[1:])
def test_a_mesh_changes_nothing(name, make_mesh):
    given = [x[:3] for x in drawn(2)]  # not a multiple of the shards of rows
    mask = masked(name, valid()[:3], None)

    def loss(q, k, v):
        out = attention.whole_rows(name, q, k, v, mask, window=4)
        return jnp.sum(jnp.sin(out) * mask[:, 0, :, None, None]), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    want = run(*given)
    with sharding.use(make_mesh((2, 2, 2))):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True)).trace(*given)
        assert "shard_map" in str(traced.jaxpr)
        got = traced.lower().compile()(*given)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


DECODERS = {
    "qwen3": QWEN3,
    "gemma3, layers that slide and layers that do not": GEMMA3,
    "mistral, all slide": dataclasses.replace(
        LLAMA,
        architecture="mistral",
        rope_scaling=None,
        sliding_window=5,
        layer_types=("sliding_attention",) * 2,
    ),
}


@pytest.mark.parametrize("name", ON_CPU[1:])
@pytest.mark.parametrize("cfg", DECODERS.values(), ids=DECODERS.keys())
def test_a_decoder_is_the_same_function_by_any_name(cfg, name):
    draw = np.random.default_rng(0).normal
    params = lm_params.tree(
        cfg, lambda row: draw(row.name.endswith("norm"), 0.2, row.shape(cfg)).astype(np.float32)
    )
    tokens_BL = np.random.default_rng(1).integers(0, 97, (4, LENGTH), np.int32)
    valid_BL = valid()[:4]

    @functools.partial(jax.jit, static_argnums=0)
    def run(decoder, params):
        def loss(params):
            hidden_BLD = lm.hidden(decoder, params, tokens_BL, valid_BL)
            return jnp.mean(jnp.where(valid_BL[..., None], hidden_BLD, 0.0) ** 3), hidden_BLD

        grads, hidden_BLD = jax.grad(loss, has_aux=True)(params)
        last, cache = lm.prefill(decoder, params, tokens_BL[:2], valid_BL[:2], length=LENGTH + 1)
        after, _ = lm.decode(decoder, params, tokens_BL[:2, 0], cache)
        return jnp.where(valid_BL[..., None], hidden_BLD, 0.0), grads, last, after

    want = run(lm.Decoder(cfg), params)
    # The products that the backward pass keeps are no kernel's.
    got = run(lm.Decoder(cfg, remat="products", attention=name), params)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, np.abs(other).max()))


def test_bfloat16_in_is_bfloat16_out_with_a_softmax_in_float32():
    given = [jnp.asarray(x, jnp.bfloat16) for x in drawn(2, 64, 1)]
    valid_BL = np.ones((1, 64), bool)
    for name in ("xla", "cudnn by xla"):
        out = attention.whole_rows(name, *given, masked(name, valid_BL, None))
        assert out.dtype == jnp.bfloat16
        want, _ = oracle(*given, valid_BL, None, given[0])
        # A weight is rounded once; a softmax of bfloat16 scores is off by ten times as much.
        np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-2)


def test_a_kernels_products_are_counted_block_by_block():
    given = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in drawn(2, 512, 3)]
    mask = np.ones((3, 1, 512), bool)

    def attend(q, k, v):
        return attention.whole_rows("splash", q, k, v, mask).astype(jnp.float32).sum()

    one = 2 * 3 * HEADS * 512 * 512 * WIDTH  # a product of all queries with all keys
    assert flops.count(jax.make_jaxpr(attend)(*given)) == flops.Work(narrow=2 * one)
    both = flops.count(jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(*given))
    # Again the scores and what they weigh, for queries and for keys and values; then the gradients.
    assert both.narrow == pytest.approx((2 + 3 + 4) * one, rel=0.01)


def test_xla_forms_no_scores_of_blocks_that_lie_ahead(make_mesh):
    given = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in drawn(2, 512, 3)]
    mask = np.broadcast_to(np.tri(512, dtype=bool), (3, 512, 512))

    def work():
        run = jax.make_jaxpr(lambda *given: attention.whole_rows("xla", *given, mask))
        return flops.count(run(*given)).total

    both = 2 * 2 * 3 * HEADS * 512 * 512 * WIDTH
    assert work() == both * 9 / 16
    with sharding.use(make_mesh((1, 1, 1))):
        assert work() == both * 9 / 16
    with sharding.use(make_mesh((2, 2, 2))):  # with blocks emulated devices locked
        assert work() == both


# --- with the TPU's compiler


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("tensor", "width", "length"), [(1, 128, 1100), (2, 64, 640), (2, 256, 128)]
)
def test_splash_compiles_for_a_tpu_and_never_holds_all_scores(tensor, width, length):
    pytest.importorskip("libtpu", reason='the TPU compiler: pip install "jax[tpu]"')
    topology = chips.topology("v5e:2x2")
    mesh = sharding.make_mesh(None, 1, tensor, devices=topology.devices)
    rows, heads = ("batch", "length", "heads", None), ("batch", "kv_heads", "length", None)
    shapes = (8, length, 8, width), (8, 4, length, width), (8, 4, length, width)
    given = [
        jax.ShapeDtypeStruct(
            shape, jnp.bfloat16, sharding=sharding.shardings(mesh, {"x": names})["x"]
        )
        for shape, names in zip(shapes, (rows, heads, heads))
    ]
    whole = sharding.replicated(mesh)
    valid_B1L = jax.ShapeDtypeStruct((8, 1, length), bool, sharding=sharding.by_rows(mesh))
    slides = jax.ShapeDtypeStruct((), bool, sharding=whole)

    def loss(q, k, v, valid_B1L, slides):
        out = attention.whole_rows("splash", q, k, v, valid_B1L, window=100, slides=slides)
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    with sharding.use(mesh):
        traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*given, valid_B1L, slides)
        made = traced.lower().compile()
    scores = 8 * 8 * length**2 * 4 // 4  # float32, of one of the four devices
    if length > 1000:
        assert made.memory_analysis().temp_size_in_bytes < scores / 2


# --- which is taken


@dataclasses.dataclass
class Device:
    """What `choose` asks of a jax.Device."""

    platform: str
    compute_capability: str | None = None


TPU, H100, A100, OLD = (
    Device("tpu"),
    Device("gpu", "9.0"),
    Device("gpu", "8.0"),
    Device("gpu", "7.5"),
)
WIDE = dataclasses.replace(QWEN3, head_dim=128)


@pytest.mark.parametrize(
    ("device", "head_dim", "dtype", "taken", "why"),
    [
        (Device("cpu"), 128, "bfloat16", "xla", "the devices are CPUs"),
        (TPU, 128, "bfloat16", "splash", "the devices are TPUs"),
        (TPU, 128, "float32", "xla", "splash multiplies in bfloat16, and dtype is 'float32'"),
        (TPU, 12, "bfloat16", "xla", "splash needs a head_dim of 64, 128, .., and it is 12"),
        (H100, 256, "bfloat16", "cudnn", "the devices are GPUs"),
        (A100, 256, "bfloat16", "xla", "cudnn needs a head_dim that 8 divides, up to 128"),
        (A100, 128, "bfloat16", "cudnn", "the devices are GPUs"),
        (OLD, 128, "bfloat16", "xla", "compute capability 8.0, and this one's is 7.5"),
        (Device("gpu", "gfx90a"), 128, "bfloat16", "xla", "this one's is gfx90a"),
        (H100, 128, "float32", "xla", "cudnn multiplies in bfloat16"),
    ],
)
def test_auto_takes_the_devices_kernel_or_says_why_not(device, head_dim, dtype, taken, why):
    cfg = dataclasses.replace(QWEN3, head_dim=head_dim)
    name, said = attention.choose("auto", cfg, dtype, device)
    assert name == taken
    assert why in said
    if taken == "xla" and device.platform != "cpu":
        with pytest.raises(ValueError, match=r"--config.batch.attention=auto"):
            attention.choose(attention.FAMILY[device.platform], cfg, dtype, device)
    assert attention.choose("xla", cfg, dtype, device) == ("xla", "it was asked for")


def test_a_kernel_of_other_devices_is_refused():
    for name, device in (("splash", H100), ("cudnn", TPU), ("splash", Device("cpu"))):
        with pytest.raises(ValueError, match=f"'{name}', which runs on ..Us, and the devices are"):
            attention.choose(name, WIDE, "bfloat16", device)
