"""Rotary position embeddings, and the ways in which they are stretched for long contexts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from gopd_jax.models.architectures import LinearRope, Llama3Rope, YarnRope

Scaling = Llama3Rope | LinearRope | YarnRope | None


def rope_of(positions_BL, head_dim: int, theta: float, scaling: Scaling):
    """(cos_BLE, sin_BLE) float32 of the rotation angles, over half of a head's width."""
    frequency_E = frequencies(head_dim, theta, scaling)
    angle_BLE = positions_BL[..., None].astype(jnp.float32) * frequency_E
    cos_BLE, sin_BLE = jnp.cos(angle_BLE), jnp.sin(angle_BLE)
    if isinstance(scaling, YarnRope):
        factor = attention_factor(scaling)
        cos_BLE, sin_BLE = cos_BLE * factor, sin_BLE * factor
    return cos_BLE, sin_BLE


def frequencies(head_dim: int, theta: float, scaling: Scaling) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [head_dim / 2]."""
    exponent_E = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency_E = (1.0 / np.power(np.float32(theta), exponent_E)).astype(np.float32)
    if scaling is None:
        return frequency_E
    if isinstance(scaling, LinearRope):
        kept_E = np.float32(0.0)
    elif isinstance(scaling, YarnRope):
        kept_E = _kept_by_yarn(head_dim, theta, scaling)
    else:
        kept_E = _kept_by_llama3(frequency_E, scaling)
    return (frequency_E * (kept_E + (1 - kept_E) / scaling.factor)).astype(np.float32)


def _kept_by_llama3(frequency_E, scaling: Llama3Rope) -> np.ndarray:
    """The share of each frequency that is not stretched.

    Wavelengths beyond the original context are stretched by `factor`, short ones kept, and those
    between interpolated in frequency. https://arxiv.org/abs/2407.21783
    """
    turns_E = scaling.original_max_position_embeddings * frequency_E / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return np.clip((turns_E - low) / (high - low), 0.0, 1.0)


def _kept_by_yarn(head_dim: int, theta: float, scaling: YarnRope) -> np.ndarray:
    """The share of each frequency that is not stretched.

    Pairs that turn more than beta_fast times in the original context are kept, those that turn less
    than beta_slow times stretched, and those between interpolated by their index.
    """

    def pair(turns):  # the index of the pair that turns so often in the original context
        radians = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(radians) / (2 * math.log(theta))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0  # as transformers does
    ramp_E = (np.arange(head_dim // 2, dtype=np.float32) - low) / (high - low)
    return 1.0 - np.clip(ramp_E, 0.0, 1.0)


def attention_factor(scaling: YarnRope) -> float:
    """What cosines and sines are multiplied by, so that logits grow with the context's length."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def at(mscale):
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return at(scaling.mscale) / at(scaling.mscale_all_dim)
    return at(1.0)


def rotate(x_BLHE, rope, scale: float = 1.0):
    """Pairs (i, i + E/2) of each head turned by the position's angle, times scale."""
    cos_BLE, sin_BLE = (scale * part[:, :, None] for part in rope)
    a, b = jnp.split(x_BLHE.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos_BLE - b * sin_BLE, b * cos_BLE + a * sin_BLE], axis=-1)
    return turned.astype(x_BLHE.dtype)
