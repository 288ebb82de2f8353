"""Products, norms and attention of the decoder: pure functions of arrays."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from gopd_jax.models import quantized

# Finite, so that a query without any valid key (padding) averages instead of becoming NaN.
MASKED = -1e30


def attend(q_BLHE, k_BKLE, v_BKLE, mask_BxL, past, past_mask_BS):
    """Grouped-query attention of scaled queries to these keys and to the past ones, out_BLHE.

    Query head h reads key/value head h // (H / K); keys and values are not repeated, the heads of
    a group are rows of one product. The softmax is one over both parts, without joining them:
    joined, the past would be copied. Keys and values of the past may be Quantized token by token:
    scores take the scale of a key, and weights that of a value.
    """
    n_rows, n_queries, n_heads, width = q_BLHE.shape
    n_kv = k_BKLE.shape[1]
    group = n_heads // n_kv
    q_BLKGE = q_BLHE.reshape(n_rows, n_queries, n_kv, group, width)
    # x runs over the queries of a group's heads, head by head.
    q_BKxE = q_BLKGE.transpose(0, 2, 3, 1, 4).reshape(n_rows, n_kv, group * n_queries, width)
    parts = [(k_BKLE, v_BKLE, jnp.tile(mask_BxL[:, None], (1, 1, group, 1)))]
    if past is not None:
        parts.append((*past, past_mask_BS[:, None, None]))
    scores = [jnp.where(mask, _scores(q_BKxE, k), MASKED) for k, _, mask in parts]
    top = jax.lax.stop_gradient(jnp.stack([s.max(-1) for s in scores]).max(0))
    weights = [jnp.exp(s - top[..., None]) for s in scores]
    total = sum(w.sum(-1) for w in weights)
    out_BKxE = sum(
        _weighed(w / total[..., None], v, q_BLHE.dtype) for w, (_, v, _) in zip(weights, parts)
    )
    out_BKGLE = out_BKxE.reshape(n_rows, n_kv, group, n_queries, width)
    return out_BKGLE.transpose(0, 3, 1, 2, 4).reshape(q_BLHE.shape)


def _scores(q_BKxE, k_BKSE):
    plain_BKSE, scale_BKS1 = quantized.parts(k_BKSE, q_BKxE.dtype)
    score_BKxS = einsum("bkxe,bkse->bkxs", q_BKxE, plain_BKSE, out_dtype=jnp.float32)
    return score_BKxS if scale_BKS1 is None else score_BKxS * scale_BKS1.swapaxes(2, 3)


def _weighed(weight_BKxS, v_BKSE, dtype):
    plain_BKSE, scale_BKS1 = quantized.parts(v_BKSE, dtype)
    if scale_BKS1 is not None:
        weight_BKxS = weight_BKxS * scale_BKS1.swapaxes(2, 3)
    return einsum("bkxs,bkse->bkxe", weight_BKxS.astype(dtype), plain_BKSE)


def project(x, weight, contract: int = 1):
    """x times weight over x's last and weight's first `contract` axes, as one matrix product.

    weight is cast to x's dtype, or Quantized by output channel, whose scales the product takes. The
    CPU backend runs higher-rank products, and above all their gradients, several times slower.
    """
    weight, scale = quantized.parts(weight, x.dtype)
    leading, out = x.shape[: x.ndim - contract], weight.shape[contract:]
    width = math.prod(weight.shape[:contract])
    if shards("length") > 1:  # positions that lie apart cannot be joined to rows that do
        product = einsum("...i,io->...o", x.reshape(*leading, width), weight.reshape(width, -1))
    else:
        product = einsum("ri,io->ro", x.reshape(-1, width), weight.reshape(width, -1))
    if scale is not None:
        product = (product * scale.reshape(-1)).astype(x.dtype)
    return product.reshape(*leading, *out)


def rms_norm(x, weight, eps, offset: bool = False):
    """x over its root mean square along the last axis, times weight (or 1 + weight); float32."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    scale = 1.0 + weight.astype(jnp.float32) if offset else weight.astype(jnp.float32)
    return (x32 * scale).astype(x.dtype)


def einsum(equation, x, y, out_dtype=None):
    """Product accumulated in float32, rounded to x's dtype (or out_dtype).

    HIGHEST: float32 means float32. TPUs and GPUs would otherwise use bfloat16 or TF32 passes, whose
    error is as large as the log-ratios being trained on. It has no effect on bfloat16 operands.
    """
    accumulate = out_dtype or x.dtype
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=accumulate)


def on_host(x) -> bool:
    """Whether an array, or one that is traced, lies in host memory. Quantized ones do not."""
    if isinstance(x, quantized.Quantized):
        return False
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_device(x, *names):
    """x, copied to the device if it lies in host memory, of the same logical axes; inside a jit.

    Without the names the partitioner may gather its shards before the copy, on the hosts.
    """
    return constrain(jax.device_put(x, jax.memory.Space.Device), *names) if on_host(x) else x


def constrain(x, *names):
    """Sharding by logical names where rules and a mesh are set; nothing otherwise."""
    return nn.with_logical_constraint(x, names)


def mesh_axes(name: str) -> tuple[str, ...]:
    """Axes of the mesh on which the rules in force put a logical axis."""
    axes = nn.logical_to_mesh_axes((name,))[0]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def shards(name: str) -> int:
    """Among how many devices the rules in force divide a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in mesh_axes(name))


def platform() -> str | None:
    """What the mesh's devices are: "cpu", "tpu", ..; None where there is no mesh, or no device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return None if device is None else device.platform
