"""Advantages A_BT: the weight of each sampled token's log-prob in the ascent direction.

Each takes Scores and mask_BT and returns float32, 0 off the mask. No gradient flows through them:
the caller passes the student's log-probs with their gradient stopped.
"""

import jax.numpy as jnp

from gopd_jax.objectives.targets import tilted
from gopd_jax.spec import table


def gopd(scores, mask_BT, *, lam=1.0):
    """A = lam (log T - log R) - (log S - log R), nats: the token advantage of G-OPD.

    Its expectation under S is -KL(S || T_lam) up to a constant per state. lam = 1 is plain
    on-policy distillation, log T - log S, with no reference. arXiv 2602.12125, eq. 14, which
    prints the gradient of the minimised loss and so the opposite sign.
    """
    target_BT = tilted(scores.teacher_BT, scores.ref_BT, lam=lam)
    return jnp.where(mask_BT, target_BT - scores.student_BT, 0.0)


def grpo(scores, mask_BT):
    """The row's reward, already compared within its group, at each of its tokens.

    scores.reward_B comes from `baselines.group_relative`. arXiv 2402.03300, outcome supervision.
    """
    return jnp.where(mask_BT, scores.reward_B[:, None], 0.0)


def imitation(scores, mask_BT):
    """A = 1 at every token: the policy gradient becomes maximum likelihood on what was written."""
    return mask_BT.astype(jnp.float32)


ADVANTAGES = table(gopd, grpo, imitation)
