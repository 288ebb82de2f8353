"""Baselines over the whole batch, before it is split into microbatches.

An entry of BASELINES returns what is to be subtracted from credit_BT: float32 [B, T], 0 off the
mask, whatever its inputs are there. None depends on the token that it stands against, so none of
them changes an expected gradient: a mean over the batch leaves the row itself out. A row with
nobody to compare with has baseline 0.
"""

import jax
import jax.numpy as jnp

from gopd_jax.spec import table


def none(mask_BT):
    """Nothing is subtracted."""
    return jnp.zeros(mask_BT.shape, jnp.float32)


def batch_mean(credit_BT, mask_BT):
    """Mean credit over all tokens of the other rows."""
    total_B, count_B = _sums(credit_BT, mask_BT)
    mean_B = _mean(total_B.sum() - total_B, count_B.sum() - count_B)
    return jnp.where(mask_BT, mean_B[:, None], 0.0)


def position_mean(credit_BT, mask_BT):
    """Mean credit over the other rows at the same position; columns are positions of completions.

    Credits that sum up what is left of a row fall along it, which one mean over all positions
    does not follow.
    """
    credit_BT = jnp.where(mask_BT, credit_BT, 0.0)
    count_T = mask_BT.sum(0).astype(jnp.float32)
    mean_BT = _mean(credit_BT.sum(0) - credit_BT, count_T - mask_BT)
    return jnp.where(mask_BT, mean_BT, 0.0)


def leave_one_out(credit_BT, mask_BT, group_B):
    """Mean over the group's other rows, each counted by its mean credit; group_B in [0, B).

    A reward of whole rows has here the leave-one-out baseline of arXiv 2402.14740. Rows without
    tokens are nobody.
    """
    n_rows = mask_BT.shape[0]
    total_B, count_B = _sums(credit_BT, mask_BT)
    row_B, there_B = _mean(total_B, count_B), (count_B > 0).astype(jnp.float32)
    sum_B = jax.ops.segment_sum(row_B, group_B, n_rows)[group_B]
    rows_B = jax.ops.segment_sum(there_B, group_B, n_rows)[group_B]
    return jnp.where(mask_BT, _mean(sum_B - row_B, rows_B - there_B)[:, None], 0.0)


def local_kl(local_kl_BT, mask_BT):
    """-KL(S || T_lam) at the token's state: what immediate reverse-KL credit is on average."""
    return jnp.where(mask_BT, -local_kl_BT, 0.0)


def value(value_BT, mask_BT):
    """A learned V at the token's state."""
    return jnp.where(mask_BT, value_BT, 0.0)


BASELINES = table(none, batch_mean, position_mean, leave_one_out, local_kl, value)


def group_relative(reward_B, group_B, *, eps=1e-4):
    """(r - mean) / (std + eps) over the rows of one prompt; 0 where all of them agree.

    reward_B float32; group_B int32 in [0, B); std is the population's. A group whose rewards agree
    carries no preference. GRPO, arXiv 2402.03300; eps only keeps the division finite.
    """
    n_rows = reward_B.shape[0]

    def group_mean(values_B):
        total_B = jax.ops.segment_sum(values_B, group_B, n_rows)
        count_B = jax.ops.segment_sum(jnp.ones_like(values_B), group_B, n_rows)
        return (total_B / jnp.maximum(count_B, 1.0))[group_B]

    centred_B = reward_B - group_mean(reward_B)
    return centred_B / (jnp.sqrt(group_mean(centred_B**2)) + eps)


def _sums(values_BT, mask_BT):
    """Each row's sum over its mask, and its count, float32 [B]."""
    return jnp.where(mask_BT, values_BT, 0.0).sum(1), mask_BT.sum(1).astype(jnp.float32)


def _mean(total, count):
    """total / count, 0 where nothing was counted (a total there is rounding)."""
    return jnp.where(count > 0, total / jnp.maximum(count, 1.0), 0.0)
