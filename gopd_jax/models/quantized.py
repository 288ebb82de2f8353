"""Arrays in 8 bits with a scale for each run of numbers: what decoding reads from memory.

Rounding is symmetric and to the nearest: int8 has 127 steps on either side of 0, float8_e4m3fn
three bits of mantissa over a range of its own, so that outliers cost the rest less. Products take
the 8-bit numbers as they are, exactly, and the scale afterwards, so that nothing of full width is
ever in memory.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import struct

from gopd_jax.models.params import ModelConfig, table
from gopd_jax.types import Array

DTYPES = {"int8": 127.0, "float8_e4m3fn": 448.0}  # name -> largest number
# Matrices that the decoder multiplies with -> their summed axes, behind the one over layers.
_LAYERS = {name: (1,) for name in ("q", "k", "v", "gate", "up", "down")} | {"o": (1, 2)}
_SUMMED = {f"layers/{name}": axes for name, axes in _LAYERS.items()} | {"embed": (1,), "head": (1,)}


@struct.dataclass
class Quantized:
    """values * scale; values of 8 bits, scale float32 with 1 along the axes that share one."""

    values: Array
    scale: Array


def quantize(x, dtype: str, axes: tuple[int, ...]) -> Quantized:
    """x, rounded to `dtype` (of DTYPES) with one scale for all along `axes`."""
    x = x.astype(jnp.float32)
    top = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scale = jnp.where(top == 0, 1.0, top / DTYPES[dtype])
    x = x / scale
    return Quantized((jnp.round(x) if dtype == "int8" else x).astype(dtype), scale)


def full(x, dtype):
    """x in `dtype`, quantized or not."""
    if isinstance(x, Quantized):
        return (x.values.astype(jnp.float32) * x.scale).astype(dtype)
    return x.astype(dtype)


def parts(x, dtype):
    """(numbers in `dtype` to multiply with, the scale that their products still want or None)."""
    if isinstance(x, Quantized):
        return x.values.astype(dtype), x.scale
    return x.astype(dtype), None


def matrices(params, cfg: ModelConfig, dtype: str) -> dict:
    """params with embedding, head and the dense matrices of layers quantized by output channel.

    Norms, biases, adapters and what is routed stay as they are: small, or not multiplied densely.
    """
    made = {**params, "layers": {**params["layers"]}}
    for row in table(cfg):
        if row.path not in _SUMMED:
            continue
        holder = made["layers"] if row.stacked else made
        holder[row.name] = quantize(holder[row.name], dtype, _SUMMED[row.path])
    return made
