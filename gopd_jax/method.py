"""What a Config's objective asks of the rest of it: models, rollouts, a critic; what it lacks."""

import dataclasses
import math
import re
from collections.abc import Iterator

from gopd_jax import notes
from gopd_jax.objectives import checks, entries, objective
from gopd_jax.objectives.baselines import BASELINES

SOURCES = ("student", "teacher", "data")
MIXTURES = ("probability", "log")


def settings(config) -> dict:
    """config.objective as keyword arguments of objective.build."""
    o = config.objective
    own = {f.name: getattr(o, f.name) for f in dataclasses.fields(o)}
    own["lam_by_row"] = o.lam_by_row or bool(o.task_lam)
    own["mixture"] = o.mixture if any(len(_parts(t)) > 1 for t in config.routes.values()) else None
    return {name: x for name, x in own.items() if name not in ("source", "task_lam")}


def goal(config) -> objective.Objective | None:
    """The objective; None where its settings are wrong."""
    if not _readable(config):
        return None
    options = settings(config)
    if checks.objective_problems(options):
        return None
    return objective.build(**options)


def _nearly(config) -> objective.Objective | None:
    """The objective with what is wrong in it left at the defaults, to check the rest against."""
    try:
        return objective.build(**checks.sound(settings(config)))
    except (ValueError, TypeError):
        return None


def teachers_of(config, task: str) -> dict[str, float]:
    """Name -> weight of the task's teachers: what routes says, or the task's own name alone."""
    return _parts(config.routes.get(task, task))


def teacher_names(config) -> tuple[str, ...]:
    """The tasks' teachers, each once, in the order of the tasks."""
    return tuple(dict.fromkeys(n for task in config.data.tasks for n in teachers_of(config, task)))


def _parts(text: str) -> dict[str, float]:
    """ "name", or "name=0.7, name=0.3". ValueError for a weight that is no number."""
    if "=" not in text:
        return {text: 1.0}
    pairs = [part.split("=") for part in text.split(",")]
    return {name.strip(): float(weight) for name, weight in pairs}


def _readable(config) -> bool:
    """Whether teachers can be read off routes; where not, `find` says so."""
    try:
        return all(_parts(text) for text in config.routes.values())
    except ValueError:
        return False


def roles(config) -> dict:
    """Setting -> Model, of the models that this run loads."""
    c, found = config, {"student": config.student}
    made = goal(c)
    if made is not None and made.needs_reference and c.reference is not None:
        found["reference"] = c.reference
    judged = made is not None and made.needs_teacher
    asked = judged or c.objective.source == "teacher" or c.evaluation.teachers
    if asked and _readable(c):
        named = (name for name in teacher_names(c) if name in c.teachers)
        found |= {f"teachers.{name}": c.teachers[name] for name in named}
    return found


def find(config) -> Iterator[str]:
    """What is wrong with the objective and what it needs of other settings."""
    c, o = config, config.objective
    if unread := [*_routes(c)]:
        yield from unread
        return
    yield from checks.objective_problems(settings(c))
    if (made := _nearly(c)) is None:
        return
    yield from _roles(c, made)
    yield from _rows(c, made)
    yield from _sampling(c)
    measured = entries.TARGETS & {*entries.names(made.advantage)}
    if made.needs_critic and c.critic is None:
        begun = "" if measured else " --config.critic.closed_form=False"
        yield (
            f"objective.credit = {o.credit!r} and baseline = {o.baseline!r} need a value of each "
            f"state and there is no critic; set --config.critic=build{begun}"
        )
    if made.baseline is BASELINES["value"] and "value_BT" in entries.names(made.credit):
        yield "objective.baseline = 'value' is taken off by credit = 'gae' already; use 'none'"
    if made.needs_critic and c.critic is not None and c.critic.closed_form and not measured:
        yield (
            f"critic.closed_form = True begins V at minus a state's divergence from the target, "
            f"and objective.advantage = {o.advantage!r} measures none; set "
            "--config.critic.closed_form=False"
        )
    if made.needs_critic and c.critic is not None and c.steps > 0:
        before, warm = c.critic.warmup_steps, c.optimizer.warmup_steps
        if c.steps <= before:
            yield (
                f"critic.warmup_steps = {before} leaves no step of steps = {c.steps} to the "
                "student; lower it, or raise steps"
            )
        elif warm < c.steps <= before + warm:
            yield (
                f"critic.warmup_steps = {before} and, after them, optimizer.warmup_steps = {warm} "
                f"leave none of steps = {c.steps} at the full rate; lower one, or raise steps"
            )


def _routes(c) -> Iterator[str]:
    if stray := sorted(c.routes.keys() - set(c.data.tasks)):
        yield f"routes names tasks {stray}, which are not in data.tasks = {c.data.tasks}"
    for task, text in c.routes.items():
        try:
            parts = _parts(text)
        except ValueError:
            yield f"routes[{task!r}] is {text!r}; give a teacher, or 'math=0.7, code=0.3'"
            continue
        weights = parts.values()
        if not all(0 < w < math.inf for w in weights) or abs(sum(weights) - 1) > 1e-6:
            yield f"routes[{task!r}] is {text!r}; weights are positive and sum to 1"
    if c.objective.mixture not in MIXTURES:
        yield f"objective.mixture is {c.objective.mixture!r}; it is one of {MIXTURES}"
    if stray := sorted(c.objective.task_lam.keys() - set(c.data.tasks)):
        yield f"objective.task_lam names {stray}, which are not in data.tasks = {c.data.tasks}"


def _roles(c, made) -> Iterator[str]:
    """Roles that the objective lacks, and sources of completions that it cannot learn from."""
    o = c.objective
    if made.needs_reference and math.isfinite(o.lam) and c.reference is None:
        why, other = "log T - log R has no R", "lam = 1"
        own = {"lam_by_row": o.lam_by_row, "task_lam": o.task_lam, "lam_schedule": o.lam_schedule}
        own = {name: value for name, value in own.items() if value not in (False, {}, "constant")}
        told = f"objective.lam is {o.lam}"
        if not made.tilts:
            why, other = "anchor has no R", "take the anchor out of objective.regularizers"
        elif own:  # lam alone is not what tilts
            own = {"lam": o.lam} | own if o.lam != 1 else own
            told = ", ".join(f"objective.{name} is {value!r}" for name, value in own.items())
            others = " and ".join(name for name in own if name != "lam")
            other = f"take {others} out" + " with lam = 1" * ("lam" in own)
        yield (
            f"{told} and there is no reference, so {why}; set "
            "--config.reference=build --config.reference.path=... (the student's own path, or the "
            f"teacher's base), or {other}"
        )
    imitates = _name(o.advantage) == "imitation" and made.weighs
    if not imitates and o.source != "student" and made.weighs:
        yield (
            f"objective.advantage = {o.advantage!r} is on-policy and objective.source is "
            f"{o.source!r}; use source = 'student', or advantage = 'imitation'"
        )
    if imitates and o.source == "student":
        yield (
            "objective.advantage = 'imitation' and objective.source = 'student' teach the student "
            "what it does already; use source = 'teacher' or 'data'"
        )
    distils = made.needs_teacher or o.source == "teacher"
    missing = [t for t in c.data.tasks if not teachers_of(c, t).keys() <= c.teachers.keys()]
    if distils and missing:
        yield (
            f"tasks {sorted(missing)} of data.tasks have no teacher; teachers are "
            f"{sorted(c.teachers)} and routes {c.routes}; add theirs in a preset, route them to "
            "one that there is, or take the tasks out of data.tasks"
        )
    mixed = [t for t in c.data.tasks if len(teachers_of(c, t)) > 1]
    if mixed and o.source == "teacher":
        yield (
            f"objective.source = 'teacher' and tasks {mixed} have several teachers; who writes? "
            "Route each to one, or use source = 'student'"
        )


def _rows(c, made) -> Iterator[str]:
    """What the objective compares between rows, and how rows are split."""
    b, o = c.batch, c.objective
    compared = [k for k in ("advantage", "task") if made.weighs and _uses_reward(made, k)]
    compared += (
        ["gates"] if any("relative_reward_B" in entries.names(g) for g in made.gates) else []
    )
    if made.baseline is not None and "group_B" in entries.names(made.baseline):
        compared.append("baseline")
    if compared and b.rollouts == 1:
        key = compared[0]
        yield (
            f"objective.{key} = {getattr(o, key)!r} compares the rollouts of one prompt and "
            "batch.rollouts is 1; use 8, say"
        )
    rows = b.prompts * b.rollouts
    if b.updates > 0 and b.microbatches > 0 and rows % (b.updates * b.microbatches):
        several = f"batch.updates * batch.microbatches = {b.updates} * {b.microbatches}"
        pieces = several if b.updates > 1 else f"batch.microbatches = {b.microbatches}"
        yield (
            f"batch.prompts * batch.rollouts = {rows} rows do not divide into {pieces}; choose a "
            f"divisor of {rows}"
        )
        return
    whole = made.needs_vocabulary or (
        made.needs_critic and c.critic is not None and c.critic.closed_form
    )
    shares = [teachers_of(c, task) for task in c.data.tasks]
    if whole and b.buckets != 1 and any(share != shares[0] for share in shares):
        yield (
            f"batch.buckets is {b.buckets}, and the objective is over the vocabulary of several "
            "teachers, whose rows cannot be sorted by length; use batch.buckets = 1"
        )
    if whole and len(teacher_names(c)) > 1 and b.updates * b.microbatches > 0:
        of_task, pieces = rows // len(c.data.tasks), b.updates * b.microbatches
        if of_task % pieces:
            yield (
                f"a task has {of_task} rows and batch.updates * batch.microbatches is {pieces}; an "
                "objective over the vocabulary of several teachers needs as many rows of each task "
                f"in every piece: choose a divisor of {of_task}"
            )


def _sampling(c) -> Iterator[str]:
    """Off-policy settings that have nothing to correct, or nobody to correct them."""
    o, s = c.objective, c.sampling
    for key in ("importance", "rejection", "veto"):
        if getattr(o, key) not in (None, "none") and o.source != "student":
            yield (
                f"objective.{key} = {getattr(o, key)!r} compares the student with the sampler, and "
                f"objective.source is {o.source!r}; take it out, or use source = 'student'"
            )
    if s.lag and o.source != "student":
        yield (
            f"sampling.lag is {s.lag} and objective.source is {o.source!r}; only the student's "
            "own rollouts can be stale: use lag = 0"
        )
    for key in ("cache_dtype", "weights_dtype"):
        if (kind := getattr(s, key)) is None:
            continue
        if o.source != "student":
            yield (
                f"sampling.{key} is {kind!r} and objective.source is {o.source!r}; only what the "
                f"student samples is corrected for it: use {key} = None"
            )
        elif o.importance == "none":
            yield (
                f"sampling.{key} = {kind!r} samples from another policy than the one that learns; "
                "correct it with --config.objective.importance=token, or leave it at None"
            )


def unused(config) -> Iterator[str]:
    """Settings without effect: allowed, so that one flag can turn a preset into another method."""
    c, o, made = config, config.objective, goal(config)
    if made is None:
        return
    plain = {"lam": 1, "lam_schedule": "constant", "task_lam": {}, "lam_by_row": False}
    plain["ratio_cap"] = None
    for key in (key for key, x in plain.items() if not made.drawn and getattr(o, key) != x):
        yield (
            f"objective.{key} = {getattr(o, key)} has no effect in "
            f"objective.advantage = {o.advantage!r}"
        )
    if o.mixture != "probability" and not (made.mixture and made.needs_teacher):
        why = "no teacher is learnt from" if made.mixture else "no task has several teachers"
        yield f"objective.mixture = {o.mixture!r} has no effect: {why}"
    if c.reference is not None and not made.needs_reference:
        why = (
            "objective.lam = 1, where it cancels" if made.drawn else f"advantage = {o.advantage!r}"
        )
        yield f"reference = {c.reference.path!r} is not loaded: {why}"
    loaded = roles(c)
    if idle := sorted(name for name in c.teachers if f"teachers.{name}" not in loaded):
        yield (
            f"teachers {idle} are not loaded: they have no use under data.tasks = {c.data.tasks}, "
            f"advantage = {o.advantage!r} and evaluation.teachers = {c.evaluation.teachers}"
        )
    if c.critic is not None and not made.needs_critic:
        yield f"critic is not made: credit = {o.credit!r} and baseline = {o.baseline!r} need none"
    # Both measure from the start of the batch, however old its rows are.
    moves = {"objective.loss = 'ppo'": _name(o.loss) == "ppo"}
    moves["critic.value_clip"] = made.needs_critic and c.critic and c.critic.value_clip is not None
    for key in (key for key, there in moves.items() if there):
        if c.batch.updates * c.batch.epochs == 1:
            yield (
                f"{key} clips nothing in the first update of a batch, and there is only one; raise "
                "batch.updates or batch.epochs"
            )
    if c.sampling.lag and o.importance == "none" and o.rejection == "none":
        yield (
            f"sampling.lag = {c.sampling.lag} is not corrected: objective.importance and rejection "
            "are 'none'"
        )
    yield from notes.find(c, made)


def _uses_reward(made, key: str) -> bool:
    entry = getattr(made, key)
    return entry is not None and "relative_reward_B" in entries.names(entry)


def _name(text: str) -> str:
    return re.split(r"\(", text)[0].strip()
