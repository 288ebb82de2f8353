"""Attention of whole rows (prefill, scoring, the update) behind one function, by name.

"xla" forms all scores, [B, H, L, L] in float32, on one device those that a block of queries can
see. "splash" (TPUs) and "cudnn" (NVIDIA GPUs) are kernels that hold a block of them at a time and
make them again in the backward pass; the softmax is float32 in each. Decoding with a cache is not
here: a single query forms few scores.
"""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from gopd_jax.models.architectures import ModelConfig
from gopd_jax.models.ops import attend, mesh_axes, shards

NAMES = ("xla", "splash", "cudnn")
# Larger blocks read keys and values less often; 512 is the largest that fits all chips' VMEM.
BLOCKS = (512, 256, 128)
# Of queries by "xla": smaller ones are slower than what they save, more of them long to compile.
XLA_BLOCK, XLA_BLOCKS = 64, 8
FAMILY = {"tpu": "splash", "gpu": "cudnn"}


def whole_rows(name: str, q_BLHE, k_BKLE, v_BKLE, mask_BxL, *, window=None, slides=None):
    """Causal grouped-query attention of scaled queries to the keys of their rows, out_BLHE.

    Query head h reads key/value head h // (H / K). mask_BxL: for "xla" True where query x sees key
    L <= x, all told; for a kernel valid_B1L, the keys of real tokens, causality and the window
    being the kernel's. window: positions that a sliding layer sees, or None; slides: a bool array,
    whether this layer slides, where layers differ. Queries that see no key give finite values.
    """
    if name == "xla":
        given = q_BLHE, k_BKLE, v_BKLE, mask_BxL
        if _alone():
            return _in_blocks(*given)
        return _at_once(*given) if shards("length") == 1 else _spread(_at_once, *given, window=None)
    window = None if window is None or window >= q_BLHE.shape[1] else window
    given = q_BLHE, k_BKLE, v_BKLE, mask_BxL[:, 0]
    ways = [functools.partial(_spread, KERNELS[name], window=w) for w in (window, None)]
    if window is None or slides is None:
        return ways[0](*given)
    return jax.lax.cond(slides, *ways, *given)


def choose(wanted: str, cfg: ModelConfig, dtype: str, device) -> tuple[str, str]:
    """(name, why) of a model's attention on devices like this one; wanted: one of NAMES, or auto.

    auto takes the device's kernel where it can run the model, and else "xla". ValueError with the
    cure where one that is named cannot.
    """
    kind = device.platform
    if wanted == "auto":
        if (kernel := FAMILY.get(kind)) is None:
            return "xla", f"the devices are {kind.upper()}s"
        why = _unfit(kernel, cfg, dtype, device)
        return ("xla", f"{kernel} {why}") if why else (kernel, f"the devices are {kind.upper()}s")
    if wanted != "xla" and (why := _unfit(wanted, cfg, dtype, device)):
        raise ValueError(
            f"batch.attention is {wanted!r}, which {why}; change that, or leave it at "
            "--config.batch.attention=auto"
        )
    return wanted, "it was asked for"


def _unfit(name: str, cfg: ModelConfig, dtype: str, device) -> str | None:
    """What keeps a kernel from running a model on a device, as the end of a sentence, or None."""
    kind, width = device.platform, cfg.head_dim
    if FAMILY.get(kind) != name:
        needs = next(one for one, kernel in FAMILY.items() if kernel == name)
        return f"runs on {needs.upper()}s, and the devices are {kind.upper()}s"
    if dtype != "bfloat16":
        # float32 means float32: see ops.einsum.
        return f"multiplies in bfloat16, and dtype is {dtype!r} (the cure: dtype='bfloat16')"
    if name == "splash":
        return None if width % 64 == 0 else f"needs a head_dim of 64, 128, .., and it is {width}"
    capability = str(getattr(device, "compute_capability", None))
    if not re.fullmatch(r"\d+\.\d+", capability) or float(capability) < 8.0:
        return f"needs an NVIDIA GPU of compute capability 8.0, and this one's is {capability}"
    most = 256 if float(capability) >= 9.0 else 128
    if width % 8 or width > most:
        return f"needs a head_dim that 8 divides, up to {most}, and it is {width}"
    return None


def _alone() -> bool:
    """Whether there is one device.

    Several, emulated on a CPU, locked with blocks: each waited in an all-reduce that not all of
    them had joined (the resumed study in tests/test_study.py).
    """
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1


def _at_once(q_BLHE, k_BKLE, v_BKLE, mask_BLL, *, window=None):
    return attend(q_BLHE, k_BKLE, v_BKLE, mask_BLL, None, None)


def _in_blocks(q_BLHE, k_BKLE, v_BKLE, mask_BLL):
    """attend(...) block by block of queries, each with the keys up to its end: mask_BLL is causal.

    With n blocks (n - 1) / 2n of the scores are never formed. A window is in the mask.
    """
    length = q_BLHE.shape[1]
    block = max(XLA_BLOCK, -(-length // XLA_BLOCKS))
    ends = [min(start + block, length) for start in range(0, length, block)]
    parts = [
        attend(q_BxHE, k_BKLE[:, :, :end], v_BKLE[:, :, :end], mask_BxL[:, :, :end], None, None)
        for end, q_BxHE, mask_BxL in zip(
            ends, *(jnp.split(x, ends[:-1], axis=1) for x in (q_BLHE, mask_BLL))
        )
    ]
    return jnp.concatenate(parts, axis=1)


def _spread(kernel, q_BLHE, k_BKLE, v_BKLE, valid_BL, *, window):
    """A kernel on each device's own rows and heads; the compiler could not divide it."""
    run = functools.partial(kernel, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q_BLHE, k_BKLE, v_BKLE, valid_BL)
    rows, heads, kv_heads = (mesh_axes(name) for name in ("batch", "heads", "kv_heads"))
    length = None
    if shards("length") > 1:
        (length,) = mesh_axes("length")
        run = functools.partial(_of_whole_rows, run, axis=length)
    n_rows = q_BLHE.shape[0]
    # shard_map wants equal shares of rows; what is computed for the added ones is cut off again.
    missing = -n_rows % math.prod(mesh.shape[axis] for axis in rows)
    given = [
        jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)))
        for x in (q_BLHE, k_BKLE, v_BKLE, valid_BL)
    ]
    own = jax.shard_map(
        run,
        in_specs=(P(rows, length, heads), *(P(rows, kv_heads, length),) * 2, P(rows)),
        out_specs=P(rows, length, heads),
        check_vma=False,  # a pallas_call does not say how its outcome varies
    )
    return own(*given)[:n_rows]


def _of_whole_rows(run, q_BLHE, k_BKLE, v_BKLE, valid_BL, *, axis: str):
    """run(...) of whole rows where each device of an axis has some positions of all heads.

    They swap positions for heads, and back (DeepSpeed-Ulysses, arXiv:2309.14509, section 3): each
    has as much to do, which it would not have for a part of causal queries, and run need not know.
    Where there are too few key/value heads to be divided, each device has those that it reads.
    """
    n, n_heads, n_kv = jax.lax.axis_size(axis), q_BLHE.shape[2], k_BKLE.shape[1]
    swap = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
    if n_kv % n == 0:
        k_BKLE, v_BKLE = (swap(x, split_axis=1, concat_axis=2) for x in (k_BKLE, v_BKLE))
    else:
        n_own, group = n_heads // n, n_heads // n_kv
        first = jax.lax.axis_index(axis) * n_own
        if group % n_own == 0:
            read = (first // group)[None]
        else:
            read = (first + jnp.arange(n_own)) // group
        k_BKLE, v_BKLE = (
            jnp.take(jax.lax.all_gather(x, axis, axis=2, tiled=True), read, axis=1)
            for x in (k_BKLE, v_BKLE)
        )
    out_BLHE = run(swap(q_BLHE, split_axis=2, concat_axis=1), k_BKLE, v_BKLE, valid_BL)
    return swap(out_BLHE, split_axis=1, concat_axis=2)


def splash(q_BLHE, k_BKLE, v_BKLE, valid_BL, *, window, interpret: bool = False):
    """jax.experimental.pallas.ops.tpu.splash_attention, a kernel of Pallas for TPUs.

    Blocks that nothing is seen in are skipped. Padding is a segment of its own, so that its queries
    see something. A window counts places in the row, which is positions where a row's tokens are
    next to each other: padded left, right or on both sides.
    """
    n, heads = q_BLHE.shape[1:3]
    # The largest block that lengthens the rows by an eighth at most.
    block = next(b for b in BLOCKS if -n % b <= n // 8 or b == BLOCKS[-1])
    more = -n % block
    q_BHLE, k_BKLE, v_BKLE = (
        jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0)))
        for x in (q_BLHE.swapaxes(1, 2), k_BKLE, v_BKLE)
    )
    segment_BL = jnp.pad(valid_BL.astype(jnp.int32), ((0, 0), (0, more)))
    shape = n + more, n + more
    mask = masks.CausalMask(shape)
    if window is not None:
        mask = masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = ["block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"]
    kernel = kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(sizes, block)),
        interpret=interpret,
    )
    segments = kernels.SegmentIds(q=segment_BL, kv=segment_BL)
    return jax.vmap(kernel)(q_BHLE, k_BKLE, v_BKLE, segments).swapaxes(1, 2)[:, :n]


def cudnn(q_BLHE, k_BKLE, v_BKLE, valid_BL, *, window, implementation: str = "cudnn"):
    """jax.nn.dot_product_attention, whose cuDNN kernel knows padding on the right alone.

    So the rows' tokens are moved to the front, in their order, and the outcome back. What stands at
    padding, there and in the gradient, is the kernel's business and is dropped.
    """
    order_BL = jnp.argsort(~valid_BL, axis=1, stable=True)
    back_BL = jnp.argsort(order_BL, axis=1)
    n_B = jnp.sum(valid_BL, axis=1, dtype=jnp.int32)

    def kept(x_BLnE):
        return jnp.where(valid_BL[:, :, None, None], x_BLnE, 0)

    out_BLHE = jax.nn.dot_product_attention(
        *(_moved(kept(x), order_BL, back_BL) for x in (q_BLHE, *_by_position(k_BKLE, v_BKLE))),
        scale=1.0,
        is_causal=True,
        query_seq_lengths=n_B,
        key_value_seq_lengths=n_B,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return kept(_moved(out_BLHE, back_BL, order_BL))


def _by_position(*of_heads):
    return (x_BKLE.swapaxes(1, 2) for x_BKLE in of_heads)


@jax.custom_vjp
def _moved(x_BLnE, order_BL, back_BL):
    """Positions in another order; back_BL undoes it, and is the gradient's way: no scatter."""
    return jnp.take_along_axis(x_BLnE, order_BL[:, :, None, None], axis=1)


_moved.defvjp(
    lambda x, order, back: (_moved(x, order, back), (order, back)),
    lambda orders, g: (_moved(g, *orders[::-1]), None, None),
)

# Those that run on a CPU, as the tests do, are no choice of a run's.
KERNELS = {
    "splash": splash,
    "splash interpreted": functools.partial(splash, interpret=True),
    "cudnn": cudnn,
    "cudnn by xla": functools.partial(cudnn, implementation="xla"),
}
