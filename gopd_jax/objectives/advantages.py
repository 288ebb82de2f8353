"""Token rewards r_BT, from which advantages are made: ascent raises log S where r is above zero.

Parameters name the quantities that an entry is fed. Each returns float32, 0 off the mask, whatever
the quantities are there. No gradient flows through them: the quantities have theirs stopped.
"""

import jax.numpy as jnp

from gopd_jax.objectives.divergences import reverse_kl, token_reward
from gopd_jax.spec import table


def gopd(log_u_BT, mask_BT, *, divergence=reverse_kl, clip=None):
    """-f(u) of u = T_lam / S, in nats where f has a logarithm: its mean is -D_f(S || T_lam).

    log_u_BT = log T_lam - log S, where T_lam ~ T^lam R^(1 - lam). With reverse KL it is
    lam (log T - log R) - (log S - log R), G-OPD's advantage (arXiv 2602.12125, eq. 14, printed
    there as the gradient of the minimised loss and so with the opposite sign). clip: log u is held
    within +-clip nats first; 5 or 6 where f is unbounded.
    """
    return token_reward(divergence, clipped(log_u_BT, mask_BT, clip=clip))


def clipped(log_u_BT, mask_BT, *, clip=None):
    """log u within +-clip nats (None: as it is) and 0, where S = T, off the mask."""
    log_u_BT = jnp.where(mask_BT, log_u_BT, 0.0)
    if clip is None:
        return log_u_BT
    if not clip > 0:
        raise ValueError(f"clip of log u is {clip}; give nats above 0, or None for no clip")
    return jnp.clip(log_u_BT, -clip, clip)


def grpo(relative_reward_B, mask_BT):
    """The row's reward, already compared within its group, at each of its tokens.

    relative_reward_B comes from `baselines.group_relative`. arXiv 2402.03300, outcome supervision.
    """
    return jnp.where(mask_BT, relative_reward_B[:, None], 0.0)


def imitation(mask_BT):
    """r = 1 at every token: the policy gradient becomes maximum likelihood on what was written."""
    return mask_BT.astype(jnp.float32)


ADVANTAGES = table(gopd, grpo, imitation)
