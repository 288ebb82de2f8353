"""Choices of a Config that change nothing, or that nothing makes right, under its objective."""

import collections
import inspect
from collections.abc import Iterator

from gopd_jax.objectives import checks, objective


def find(config, made: objective.Objective) -> Iterator[str]:
    """Sentences for the log; made: the objective of the config, in which nothing is wrong."""
    yield from _unseen(config, made)
    yield from _unsampled(config)
    yield from _futile(config, made)


def _unseen(c, made) -> Iterator[str]:
    """What looks at completions of the student, or at a teacher, where there are none."""
    if c.diagnostics.every is not None and not made.needs_teacher:
        yield (
            f"diagnostics.every = {c.diagnostics.every} has no effect: they compare with a "
            "teacher, and this objective has none"
        )
    for key in ("rows", "top_k") if c.diagnostics.every is None else ():
        if (value := getattr(c.diagnostics, key)) != getattr(type(c.diagnostics)(), key):
            yield f"diagnostics.{key} = {value} has no effect: diagnostics.every is none"
    looks = {"diagnostics.every": c.diagnostics.every if made.needs_teacher else None}
    # The default is nobody's wish.
    every, default = c.evaluation.verify_every, type(c.evaluation)().verify_every
    if every != default and made.needs_reward:
        yield (
            f"evaluation.verify_every = {every} has no effect: the objective is of the verifier's "
            "reward, and every step has verdicts"
        )
    elif every != default:
        looks["evaluation.verify_every"] = every
    for key in (key for key, every in looks.items() if every and c.objective.source != "student"):
        yield (
            f"{key} = {looks[key]} has no effect: it looks at completions that the student writes, "
            f"and objective.source is {c.objective.source!r}"
        )


def _unsampled(c) -> Iterator[str]:
    """How completions are decoded, in a step or an evaluation, where that changes nothing."""
    rows, s = c.batch.prompts * c.batch.rollouts, c.sampling
    evaluated, alone = min(rows, c.evaluation.rows or rows), "and evaluations alone decode so"
    of_slots = alone
    if s.slots is not None and s.slots >= evaluated:
        of_slots = f"nor in an evaluation, of {evaluated} rows at one time"
    if c.objective.source == "data":
        kept = {"slots": None, "buckets": 1, "prompt_buckets": 1}
        for key in (key for key, plain in kept.items() if getattr(s, key) != plain):
            yield (
                f"sampling.{key} = {getattr(s, key)} has no effect in a step, which samples "
                f"nothing: objective.source is 'data', {of_slots if key == 'slots' else alone}"
            )
        if (n := c.batch.rollouts) > 1:
            yield (
                f"batch.rollouts = {n} has each completion of the data {n} times in a batch, which "
                "learns no more from them; use rollouts = 1 and more batch.prompts"
            )
    elif s.slots is not None and s.slots >= rows:
        yield f"sampling.slots = {s.slots} has no effect: a step samples {rows} rows"
    elif c.objective.source == "teacher" and s.slots is not None:
        writers = collections.Counter(c.routes.get(t, t).split("=")[0] for t in c.data.tasks)
        most = max(writers.values()) * rows // len(c.data.tasks)
        if s.slots >= most:
            yield (
                f"sampling.slots = {s.slots} has no effect in a step, in which a teacher writes "
                f"{most} rows at most, {of_slots}"
            )
    if (few := c.evaluation.rows) is not None and few >= rows:
        yield (
            f"evaluation.rows = {few} has no effect: evaluations sample no more at one time than a "
            f"step's {rows} rows"
        )


def _futile(c, made) -> Iterator[str]:
    """Entries of the objective that change nothing beside the others."""
    o = c.objective
    if not checks.over_support(made) and not (c.critic is not None and c.critic.closed_form):
        kept = {"support": "full", "mass": "rest"}
        for key in (key for key, plain in kept.items() if getattr(o, key) != plain):
            yield (
                f"objective.{key} = {getattr(o, key)!r} has no effect: with "
                "critic.closed_form = False no distributions are compared"
            )
    elif o.mass != "rest" and made.support is objective.SUPPORTS["full"]:
        yield (
            f"objective.mass = {o.mass!r} has no effect: no id is outside of "
            "objective.support = 'full'"
        )
    if o.estimator == "stop_gradient" and made.divergence is objective.DIVERGENCES["reverse_kl"]:
        yield "objective.estimator = 'stop_gradient' has no effect: reverse KL's correction is 0"
    elif o.estimator == "stop_gradient" and not _measures(made.advantage):
        yield (
            "objective.estimator = 'stop_gradient' has no effect: objective.advantage = "
            f"{o.advantage!r} is of no divergence, and has no correction"
        )
    by_row = o.lam_by_row or o.task_lam
    scheduled = made.drawn and made.lam_schedule is not objective.SCHEDULES["constant"]
    if scheduled and not by_row and made.lam_schedule(0, o.lam) == o.lam:
        cure = "the reference is scored for it; raise lam" if o.lam == 1 else "stays there; move it"
        yield (
            f"objective.lam_schedule = {o.lam_schedule!r} goes from {o.lam:g} to objective.lam = "
            f"{o.lam:g}, and {cure}, or leave the schedule out"
        )
    if made.drawn and o.lam != 1 and set(c.data.tasks) <= o.task_lam.keys():
        yield f"objective.lam = {o.lam} has no effect: objective.task_lam has one of each task"
    if made.task is not None and o.distil_weight == 0:
        yield (
            "objective.distil_weight = 0 leaves objective.task alone to be learnt from; "
            f"objective.advantage = {o.task!r} in place of both is the same without the teachers"
        )
    if made.loss is objective.LOSSES["k1"]:
        yield (
            "objective.loss = 'k1' is KL's value as a sample, whose gradient is zero on average; "
            "to descend it use 'policy_gradient', 'k2' or 'exact'"
        )
    again = c.batch.updates * c.batch.epochs
    if again > 1 and made.loss is objective.LOSSES["policy_gradient"] and o.source == "student":
        yield (
            f"batch.updates * batch.epochs = {again}, and objective.loss = 'policy_gradient' takes "
            "the later ones for on-policy; 'ppo' corrects them"
        )


def _measures(advantage) -> bool:
    return "divergence" in inspect.signature(advantage).parameters
