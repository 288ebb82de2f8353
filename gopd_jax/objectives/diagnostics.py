"""What a step reports, as exact sums over the whole batch."""

import inspect

import jax
import jax.numpy as jnp

from gopd_jax.objectives.entries import fed
from gopd_jax.objectives.importance import statistics
from gopd_jax.types import Mean

QUANTILES = {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}


def diagnostics(rollout, quantities, *, objective, n_tasks, lam, sampled=True):
    """Means of one step, keyed as they are written; vector Means have one entry a task.

    quantities: {name: [B, T]} of what the objective saw of the batch; a key is left out where its
    quantity is. lam: of this step, a number or [B]. sampled: whether the student wrote the tokens,
    so that the sampler's log-probs can be held against the student's. kl_teacher and kl_ref are the
    sampled estimates of KL(S || .) in nats a token (k1: the mean of log S - log .). Where teachers
    are mixed in log space and nothing asks for the vocabulary, and so for their normaliser,
    kl_teacher is the weighted mean of the KLs to each of them.
    """
    q, mask_BT = quantities, rollout.mask_BT
    length_B = mask_BT.sum(1).astype(jnp.float32)
    found = {
        "entropy": Mean.of(q["entropy_BT"], mask_BT),
        "eos_probability": Mean.of(q["eos_probability_BT"], mask_BT),
        "length": Mean.of(length_B),
        "length_p95": Mean.one(jnp.quantile(length_B, 0.95)),
        "truncated": Mean.of(~rollout.ended_B),
        "tokens": Mean.one(length_B.sum()),
    }
    if (advantage_BT := q.get("advantage_BT")) is not None:
        found |= _advantage(advantage_BT, mask_BT)
    if (reward_BT := q.get("token_reward_BT")) is not None and objective.needs_teacher:
        found |= quantiles("token_reward", reward_BT, mask_BT)
    if (clipped_BT := _clipped(q, objective)) is not None:
        found["advantage_clipped"] = Mean.of(clipped_BT, mask_BT)
    teacher_BT, ref_BT = q.get("teacher_BT"), q.get("ref_BT")
    if teacher_BT is not None:
        gap_BT = q["student_BT"] - teacher_BT
        found["kl_teacher"] = Mean.of(gap_BT, mask_BT)
        found["kl_teacher_task"] = Mean(
            *(
                jax.ops.segment_sum(values_B, rollout.task_B, n_tasks)
                for values_B in (jnp.where(mask_BT, gap_BT, 0.0).sum(1), length_B)
            )
        )
    if ref_BT is not None:
        found["kl_ref"] = Mean.of(q["student_BT"] - ref_BT, mask_BT)
    if teacher_BT is not None and ref_BT is not None and objective.tilts:
        ratio_BT = jnp.abs(teacher_BT - ref_BT)
        found["extrapolation_p99"] = Mean.one(_quantile(ratio_BT, mask_BT, 0.99))
        found["lam"] = Mean.of(jnp.float32(lam))
    if (weight_BT := q.get("weight_BT")) is not None:
        found["weight"] = Mean.of(weight_BT, mask_BT)
    if sampled:
        found |= statistics(q["student_BT"], q["sampler_BT"], mask_BT)
        found |= _off_policy(q, mask_BT, objective)
    return found


def quantiles(name: str, values_BT, mask_BT) -> dict[str, Mean]:
    """{name_p01: ..}: quantiles of the values on the mask, NaN where it is nowhere."""
    return {
        f"{name}_{key}": Mean.one(_quantile(values_BT, mask_BT, share))
        for key, share in QUANTILES.items()
    }


def _quantile(values_BT, mask_BT, share: float):
    return jnp.nanquantile(jnp.where(mask_BT, values_BT, jnp.nan), share)


def _advantage(advantage_BT, mask_BT) -> dict[str, Mean]:
    n = jnp.maximum(mask_BT.sum(), 1)
    on_BT = jnp.where(mask_BT, advantage_BT, 0.0)
    mean = on_BT.sum() / n
    deviation = jnp.sqrt(jnp.where(mask_BT, (advantage_BT - mean) ** 2, 0.0).sum() / n)
    return {
        "advantage_mean": Mean.of(advantage_BT, mask_BT),
        "advantage_negative": Mean.of(advantage_BT < 0, mask_BT),
        "advantage_absmax": Mean.one(jnp.abs(on_BT).max()),
        "advantage_snr": Mean.one(jnp.abs(mean) / jnp.maximum(deviation, 1e-12)),
    }


def _clipped(q, objective):
    """Whether a clip of log u, of log T - log R or of the advantage has touched a token."""
    touched = []
    if objective.log_u_clip is not None and "log_u_BT" in q:
        touched.append(jnp.abs(q["log_u_BT"]) > objective.log_u_clip)
    if objective.ratio_cap is not None and q.get("ref_BT") is not None:
        touched.append(jnp.abs(q["teacher_BT"] - q["ref_BT"]) > objective.ratio_cap)
    if objective.advantage_clip is not None and "advantage_BT" in q:
        touched.append(jnp.abs(q["advantage_BT"]) >= objective.advantage_clip)
    return sum(x.astype(jnp.float32) for x in touched) > 0 if touched else None


def _off_policy(q, mask_BT, objective) -> dict[str, Mean]:
    """Shares of the tokens whose importance weight is at its cap, and that are rejected."""
    found = {}
    if objective.importance is not None:
        options = inspect.signature(objective.importance).parameters
        if "cap" in options:
            at_cap_BT = fed(objective.importance, q) >= options["cap"].default
            found["importance_capped"] = Mean.of(at_cap_BT, mask_BT)
    if (keep_BT := objective.kept(q)) is not None:
        found["rejected"] = Mean.of(~keep_BT, mask_BT)
    return found
