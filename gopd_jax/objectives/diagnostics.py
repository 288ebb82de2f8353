"""What a step reports, as exact sums over the whole batch."""

import jax
import jax.numpy as jnp

from gopd_jax.types import Mean


def diagnostics(rollout, scores, entropy_BT, advantage_BT, *, n_tasks):
    """Means of one step, keyed as they are written; vector Means have one entry a task.

    entropy_BT: nats of the student at each state; advantage_BT as the loss used it. kl_teacher and
    kl_ref are the sampled estimates of KL(S || .) in nats a token (k1: the mean of log S - log .).
    """
    mask_BT = rollout.mask_BT
    length_B = mask_BT.sum(1).astype(jnp.float32)
    found = {
        "advantage_mean": Mean.of(advantage_BT, mask_BT),
        "advantage_negative": Mean.of(advantage_BT < 0, mask_BT),
        "advantage_absmax": _exact(jnp.abs(jnp.where(mask_BT, advantage_BT, 0.0)).max()),
        "entropy": Mean.of(entropy_BT, mask_BT),
        "length": Mean.of(length_B),
        "length_p95": _exact(jnp.quantile(length_B, 0.95)),
        "truncated": Mean.of(~rollout.ended_B),
        "tokens": _exact(length_B.sum()),
    }
    if scores.teacher_BT is not None:
        gap_BT = scores.student_BT - scores.teacher_BT
        found["kl_teacher"] = Mean.of(gap_BT, mask_BT)
        found["kl_teacher_task"] = Mean(
            *(
                jax.ops.segment_sum(values_B, rollout.task_B, n_tasks)
                for values_B in (jnp.where(mask_BT, gap_BT, 0.0).sum(1), length_B)
            )
        )
    if scores.ref_BT is not None:
        found["kl_ref"] = Mean.of(scores.student_BT - scores.ref_BT, mask_BT)
    return found


def _exact(value):
    """A number that is no mean, in the same clothes."""
    return Mean(jnp.float32(value), jnp.float32(1.0))
