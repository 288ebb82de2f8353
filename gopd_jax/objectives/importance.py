"""Weights and rejections where rows were sampled by another policy than the one that learns.

student_BT are log-probs of the sampled tokens under the student at the start of the batch,
sampler_BT those under what sampled them; w = student / sampler, in a product over tokens for a row.
Everything is stopped, float32 [B, T], and off the mask neither read nor counted.
"""

import jax
import jax.numpy as jnp

from gopd_jax.spec import table
from gopd_jax.types import Mean

LOG_LIMIT = 20.0  # nats; exp of it and its square are float32, and no cap is that far


def none(mask_BT):
    """Every token weighs 1."""
    return mask_BT.astype(jnp.float32)


def token(student_BT, sampler_BT, mask_BT, *, cap=5.0):
    """min(w, cap) of each token: unbiased, but for the cap, where visits of states are frozen."""
    _check("cap", cap)
    return _weight(_log_ratio(student_BT, sampler_BT, mask_BT), mask_BT, cap)


def sequence(student_BT, sampler_BT, mask_BT, *, cap=5.0, geometric=False):
    """min(w, cap) of a whole row at each of its tokens: unbiased, but for the cap.

    geometric: w is the geometric mean over tokens in place of the product, which keeps long rows
    near 1 and is biased.
    """
    _check("cap", cap)
    log_w_B1 = _row_log_ratio(student_BT, sampler_BT, mask_BT, geometric)
    return _weight(log_w_B1, mask_BT, cap)


IMPORTANCE = table(none, token, sequence)


def keep_all(mask_BT):
    """Every token stays."""
    return mask_BT


def keep_tokens(student_BT, sampler_BT, mask_BT, *, cap=5.0):
    """Tokens whose w is from 1 / cap to cap; False on the others and off the mask."""
    _check("cap", cap)
    return mask_BT & (jnp.abs(_log_ratio(student_BT, sampler_BT, mask_BT)) <= jnp.log(cap))


def keep_sequences(student_BT, sampler_BT, mask_BT, *, cap=5.0, geometric=False):
    """Rows whose w is from 1 / cap to cap, whole; geometric as in `sequence`."""
    _check("cap", cap)
    log_w_B1 = _row_log_ratio(student_BT, sampler_BT, mask_BT, geometric)
    return mask_BT & (jnp.abs(log_w_B1) <= jnp.log(cap))


def veto(student_BT, sampler_BT, mask_BT, *, floor):
    """Rows none of whose tokens has log w < floor (nats, < 0): one such token spoils the row."""
    if not floor < 0:
        raise ValueError(f"veto: floor is {floor}; give a log-ratio below 0, such as -9.2")
    log_w_BT = jnp.where(mask_BT, student_BT - sampler_BT, 0.0)
    return mask_BT & (log_w_BT >= floor).all(1, keepdims=True)


REJECTIONS = {"none": keep_all, "token": keep_tokens, "sequence": keep_sequences, "veto": veto}


def statistics(student_BT, sampler_BT, mask_BT):
    """How far the sampler is from the student, over tokens: {name: Mean}.

    sampler_kl: KL(sampler || student), nats a token, the mean of -log w (k1). sampler_k3: the same
    from terms >= 0, w - 1 - log w. sampler_chi2: Pearson's chi-squared of the student from the
    sampler, the mean of (w - 1)^2. log_ess: log of the effective share of the tokens,
    (sum w)^2 / (n sum w^2), 0 where all count alike; no mean, it is of the batch that it is given.
    """
    log_w_BT = _log_ratio(student_BT, sampler_BT, mask_BT)
    w_less_1_BT = jnp.expm1(log_w_BT)
    n_tokens = mask_BT.sum().astype(jnp.float32)
    w_BT = jnp.where(mask_BT, jnp.exp(log_w_BT), 0.0)
    share = w_BT.sum() ** 2 / (jnp.maximum(n_tokens, 1.0) * (w_BT**2).sum())
    some = (n_tokens > 0).astype(jnp.float32)
    return {
        "log_ess": Mean(jnp.where(some > 0, jnp.log(share), 0.0), some),
        "sampler_kl": Mean.of(-log_w_BT, mask_BT),
        "sampler_k3": Mean.of(w_less_1_BT - log_w_BT, mask_BT),
        "sampler_chi2": Mean.of(w_less_1_BT**2, mask_BT),
    }


def _log_ratio(student_BT, sampler_BT, mask_BT):
    """log w of tokens within +-LOG_LIMIT, 0 off the mask."""
    log_w_BT = jnp.where(mask_BT, student_BT - sampler_BT, 0.0)
    return jax.lax.stop_gradient(jnp.clip(log_w_BT, -LOG_LIMIT, LOG_LIMIT))


def _row_log_ratio(student_BT, sampler_BT, mask_BT, geometric):
    """log w of rows, [B, 1], within +-LOG_LIMIT; 0 of a row without tokens."""
    log_w_B1 = jnp.where(mask_BT, student_BT - sampler_BT, 0.0).sum(1, keepdims=True)
    if geometric:
        log_w_B1 = log_w_B1 / jnp.maximum(mask_BT.sum(1, keepdims=True), 1)
    return jax.lax.stop_gradient(jnp.clip(log_w_B1, -LOG_LIMIT, LOG_LIMIT))


def _weight(log_w, mask_BT, cap):
    return jnp.where(mask_BT, jnp.minimum(jnp.exp(log_w), cap), 0.0)


def _check(name, cap):
    if not cap >= 1:
        raise ValueError(f"{name} is {cap}; give a ratio of at least 1, such as 5")
