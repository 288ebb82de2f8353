"""The optimizer and its learning rate."""

import jax
import jax.numpy as jnp
import optax


def make_optimizer(
    *,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    steps: int,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
):
    """(AdamW behind a clip of the global norm, its schedule: step -> rate).

    schedule: "constant", or "cosine" to 0 at `steps`; either after a linear warm-up from 0.
    """
    rate = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1)),
    }[schedule]
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        rate = optax.join_schedules([warmup, rate], [warmup_steps])
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw), rate


def where(condition, new, old):
    """A tree's new values where the condition holds, and all of its old ones where it does not."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
