"""Temporal credit: what a token earns of the rewards that come after it in its row.

Each takes token rewards [B, T] and returns float32 [B, T], 0 off the mask, whatever the inputs are
there. A row's mask is one run of positions. The exact gradient of E[sum_t r_t], r_t = -f(u_t), is
that of return_to_go plus `divergences.correction`, added after: the correction is the token's own
and is never summed or discounted. All else is biased, as docs/bias.md measures.
"""

import jax
import jax.numpy as jnp

from gopd_jax.spec import table


def immediate(token_reward_BT, mask_BT):
    """Each token its own reward: the semi-gradient, blind to what prefixes lead to."""
    return jnp.where(mask_BT, token_reward_BT, 0.0)


def return_to_go(token_reward_BT, mask_BT):
    """The sum of rewards from the token to the end of its row: unbiased."""
    return discounted(token_reward_BT, mask_BT, gamma=1.0)


def discounted(token_reward_BT, mask_BT, *, gamma):
    """sum over m >= t of gamma^(m - t) r_m, 0 <= gamma <= 1; the bias falls to 0 as gamma -> 1."""
    _check(gamma=gamma)
    return _discounted_sum(token_reward_BT, mask_BT, gamma)


def k_step(token_reward_BT, mask_BT, *, k, gamma=1.0):
    """The first k terms of `discounted`; k = 1 is `immediate`, k as long as rows all of it."""
    _check(gamma=gamma)
    if k != int(k) or k < 1:
        raise ValueError(f"k is {k}; give a whole number of steps, at least 1")
    n_positions = mask_BT.shape[1]

    def later(values_BT, n):
        """gamma^n times what is n positions later."""
        n = min(n, n_positions)
        return gamma**n * jnp.pad(values_BT[:, n:], ((0, 0), (0, n)))

    # Windows of 1, 2, 4, ... terms, of which the bits of k choose: sums alone, so that no digit is
    # lost, in log2(k) passes.
    window_BT, width = jnp.where(mask_BT, token_reward_BT, 0.0), 1
    total_BT, covered, left = jnp.zeros_like(window_BT), 0, min(int(k), n_positions)
    while left:
        if left & 1:
            total_BT, covered = total_BT + later(window_BT, covered), covered + width
        window_BT, width, left = window_BT + later(window_BT, width), 2 * width, left >> 1
    return jnp.where(mask_BT, total_BT, 0.0)


def gae(token_reward_BT, value_BT, bootstrap_B, ended_B, mask_BT, *, gamma=1.0, lam=0.95):
    """sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V(s_{t+1}) - V(s_t).

    value_BT: V at the state in which the token was sampled. After a row's last token V is 0 where
    the completion ended and bootstrap_B where it was cut off (bootstrap_B elsewhere is not read).
    The result is the lambda-return minus V, so no baseline is due. At gamma = 1 it is unbiased if
    V is exact or lam = 1. arXiv 1506.02438, eq. 16; for V of a KL see `baselines.local_kl`.
    """
    _check(gamma=gamma, lam=lam)
    value_BT = jnp.where(mask_BT, value_BT, 0.0)
    next_BT = jnp.pad(value_BT[:, 1:], ((0, 0), (0, 1)))
    last_BT = mask_BT & ~jnp.pad(mask_BT[:, 1:], ((0, 0), (0, 1)))
    after_BT = jnp.where(last_BT & ~ended_B[:, None], bootstrap_B[:, None], next_BT)
    delta_BT = token_reward_BT + gamma * after_BT - value_BT
    return _discounted_sum(delta_BT, mask_BT, gamma * lam)


def _discounted_sum(values_BT, mask_BT, discount):
    """sum over m >= t of discount^(m - t) values_m, in log2(T) passes."""
    values_BT = jnp.where(mask_BT, values_BT, 0.0)

    def join(late, early):
        return early[0] * late[0], early[1] + early[0] * late[1]

    discount_BT = jnp.full_like(values_BT, discount)
    _, sums_BT = jax.lax.associative_scan(join, (discount_BT, values_BT), axis=1, reverse=True)
    return jnp.where(mask_BT, sums_BT, 0.0)


def _check(**shares):
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be from 0 to 1")


CREDITS = table(immediate, return_to_go, discounted, k_step, gae)
