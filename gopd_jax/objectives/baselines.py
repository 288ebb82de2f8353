"""Baselines over the whole batch, subtracted before it is split into microbatches."""

import jax
import jax.numpy as jnp


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
