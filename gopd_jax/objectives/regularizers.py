"""Regularizers: losses of a position that are added, in the policy loss's units times `weight`."""

import jax.numpy as jnp

from gopd_jax.objectives.losses import k2
from gopd_jax.spec import table


def entropy(student_xV, real_xV, *, weight):
    """-weight H(S), nats, over the ids that are real: descent keeps S spread out.

    student_xV: log-probs, differentiable; what they are where real_xV is False is not read.
    """
    logp_xV = jnp.where(real_xV, student_xV, -jnp.inf)
    # Both places: the derivative of what where() leaves out would be 0 times infinity.
    term_xV = jnp.exp(logp_xV) * jnp.where(real_xV, student_xV, 0.0)
    return weight * term_xV.sum(-1)


def anchor(logp_x, ref_x, *, weight):
    """weight (log S - log R)^2 / 2 of the sampled token: its mean gradient is KL(S || R)'s."""
    return weight * k2(logp_x, ref_x)


REGULARIZERS = table(entropy, anchor)
