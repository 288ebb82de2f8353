"""Losses of a position, to be minimised; differentiable in logp_x, the current student's log-prob.

x is any shape of positions. No loss knows of the others, and what is off the mask is left to the
caller. logp_x, target_x are log-probs of the sampled tokens, advantage_x is stopped.
"""

import jax
import jax.numpy as jnp

from gopd_jax.objectives.distributional import DISTRIBUTIONAL
from gopd_jax.objectives.routing import ROUTING
from gopd_jax.spec import table

LOG_LIMIT = 20.0  # nats of a log-ratio whose exponential is taken


def policy_gradient(logp_x, advantage_x):
    """-A log S, nats: its gradient is minus the score-function estimate of ascent along A."""
    return -advantage_x * logp_x


def ppo(logp_x, student_x, advantage_x, *, low=0.2, high=0.28, dual=3.0):
    """-min(w A, clip(w, 1 - low, 1 + high) A), and at most -dual A where A < 0; w = S / S_old.

    student_x: log-probs at the start of the batch. A token whose w has moved past the bound in the
    direction that A asks for has no gradient. arXiv 1707.06347, eq. 7; a higher upper bound is that
    of arXiv 2503.14476; dual > 1 bounds the loss of a token with A < 0 whose w has grown
    (arXiv 1912.09729, eq. 5); None leaves it out.
    """
    if not (0 <= low <= 1 and high >= 0 and (dual is None or dual > 1)):
        raise ValueError(
            f"ppo: low = {low}, high = {high}, dual = {dual}; give 0 <= low <= 1, high >= 0 and "
            "dual above 1 or None"
        )
    ratio_x = jnp.exp(jnp.clip(logp_x - student_x, -LOG_LIMIT, LOG_LIMIT))
    bounded_x = jnp.clip(ratio_x, 1 - low, 1 + high)
    loss_x = jnp.maximum(-ratio_x * advantage_x, -bounded_x * advantage_x)
    if dual is None:
        return loss_x
    return jnp.where(advantage_x < 0, jnp.minimum(loss_x, -dual * advantage_x), loss_x)


def k1(logp_x, target_x):
    """log S - log T, nats: an estimate of KL(S || T) that is no loss, its mean gradient is zero."""
    return _log_ratio(logp_x, target_x)


def k2(logp_x, target_x):
    """(log S - log T)^2 / 2: its mean gradient is that of KL(S || T), as policy_gradient's is."""
    return _log_ratio(logp_x, target_x) ** 2 / 2


def k3(logp_x, target_x):
    """T / S - 1 - log(T / S): an estimate of KL(S || T) whose mean gradient is KL(T || S)'s."""
    log_u_x = -_log_ratio(logp_x, target_x)
    return jnp.expm1(log_u_x) - log_u_x


def _log_ratio(logp_x, target_x):
    """log S - log T held within +-LOG_LIMIT, its derivative in log S left at 1.

    So the gradients of k2 and k3 are those of a clipped advantage. Clipped outright, the tokens
    that are furthest off would have none. k-estimators: http://joschu.net/blog/kl-approx.html
    """
    stopped_x = jax.lax.stop_gradient(logp_x)
    value_x = jnp.clip(stopped_x - jax.lax.stop_gradient(target_x), -LOG_LIMIT, LOG_LIMIT)
    return value_x + (logp_x - stopped_x)


LOSSES = table(policy_gradient, ppo, k1, k2, k3, *DISTRIBUTIONAL.values(), *ROUTING.values())
