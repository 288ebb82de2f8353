"""Weights that turn per-token losses into one number: loss = sum(weight_BT * loss_BT).

They are computed from the global batch's mask, before it is split, so that the update does not
depend on how it is split. Each returns float32 [B, T], 0 off the mask.
"""

import math

import jax.numpy as jnp

from gopd_jax.spec import table


def token_mean(mask_BT):
    """Every token of the batch weighs the same: 1 / (tokens in the batch)."""
    return mask_BT / jnp.maximum(mask_BT.sum(), 1).astype(jnp.float32)


def sequence_mean(mask_BT):
    """Mean over rows of the mean over their tokens; a row without tokens counts for nothing."""
    n_tokens_B1 = mask_BT.sum(1, keepdims=True)
    n_rows = jnp.maximum((n_tokens_B1 > 0).sum(), 1)
    return mask_BT / (jnp.maximum(n_tokens_B1, 1) * n_rows).astype(jnp.float32)


def sequence_sum(mask_BT, *, length):
    """Mean over rows of the sum over tokens, in units of `length` tokens (> 0)."""
    if not isinstance(length, (int, float)) or not 0 < length < math.inf:
        raise ValueError(f"length has to be a positive number of tokens and is {length!r}")
    return mask_BT / jnp.float32(mask_BT.shape[0] * length)


REDUCTIONS = table(token_mean, sequence_mean, sequence_sum)
