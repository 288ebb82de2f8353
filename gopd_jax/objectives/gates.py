"""Gates: weights >= 0 that multiply tokens' losses; several of them multiply each other.

Each returns float32 [B, T], 0 off the mask, whatever the quantities are there. A gate is part of
the objective, not of its estimate: gated tokens are trained on less, and the sum is not rescaled.
"""

import jax.numpy as jnp

from gopd_jax.spec import table


def trust(log_u_BT, mask_BT):
    """min(T / S, 1): tokens that the teacher would hardly have written say little."""
    return _where(mask_BT, jnp.exp(jnp.minimum(log_u_BT, 0.0)))


def first(position_BT, mask_BT, *, n):
    """1 on the first n tokens of a completion, later ones are not trained on: prefixes drift."""
    if n < 1:
        raise ValueError(f"first: n is {n}; give at least 1 token")
    return _where(mask_BT, position_BT < n)


def skip_end(end_BT, mask_BT):
    """0 on the token that ends a completion: its length is not trained."""
    return _where(mask_BT, ~end_BT)


def skip_ids(ids_BT, mask_BT, *, ids):
    """0 on the tokens `ids`, such as those of the template."""
    if not ids:
        raise ValueError(f"skip_ids: ids is {ids}; name tokens, or leave the gate out")
    return _where(mask_BT, ~jnp.isin(ids_BT, jnp.array(ids)))


def teacher_entropy(teacher_entropy_BT, mask_BT, *, at_most=None, at_least=None):
    """1 where the teacher's entropy is within the bounds, in nats, both inclusive."""
    if at_most is None and at_least is None:
        raise ValueError("teacher_entropy gates nothing; give at_most, at_least or both, in nats")
    inside_BT = mask_BT
    if at_most is not None:
        inside_BT &= teacher_entropy_BT <= at_most
    if at_least is not None:
        inside_BT &= teacher_entropy_BT >= at_least
    return _where(mask_BT, inside_BT)


def agree(advantage_BT, reward_B, mask_BT, *, threshold=0.5):
    """1 where verifier and advantage push one way: up in rows that are right, down in others.

    A row is right where reward_B > threshold: 0.5 for verdicts of 0 and 1.
    """
    right_B1 = (reward_B > threshold)[:, None]
    return _where(mask_BT, jnp.where(right_B1, advantage_BT >= 0, advantage_BT <= 0))


def drift(position_BT, mask_BT, *, half_life):
    """2^(-position / half_life): later states, further from what the teacher writes, weigh less."""
    if not half_life > 0:
        raise ValueError(f"drift: half_life is {half_life}; give tokens above 0")
    return _where(mask_BT, jnp.exp2(-position_BT / half_life))


def _where(mask_BT, weight_BT):
    return jnp.where(mask_BT, weight_BT, 0).astype(jnp.float32)


GATES = table(trust, first, skip_end, skip_ids, teacher_entropy, agree, drift)
