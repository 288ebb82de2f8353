"""What a paper on distillation has to report, filled from a run's own files.

An item that the run cannot know says "not recorded: ..." and why; nothing is guessed.
"""

from __future__ import annotations

import math
from functools import partial

from gopd_jax.reporting import account, evidence, watch
from gopd_jax.reporting.account import Unknown, count, get, off, span
from gopd_jax.reporting.plots import Run

MANY = "microbatches"
UNREAD = "not recorded"  # in place of a text, and of checks that cannot be read
N_ERRORS = 2.0  # standard errors of a difference from which a task counts as worse


def checklist(run: Run) -> list[tuple[str, str, str | None]]:
    """(section, item, text) of every item; text None where the item does not apply to the run."""
    found = []
    for section, item, tell in (*account.models(run), *ITEMS):
        try:
            told = tell(run)
        except Unknown as reason:
            told = f"{UNREAD}: {reason}"
        found.append((section, item, told))
    return found


def _setting(run: Run, key: str) -> str:
    """A setting that may be off, or a tuple of entries that may be empty."""
    value = off(run, key)
    return str(value) if not isinstance(value, list | tuple) else ", ".join(value) or "none"


def _rows(run: Run) -> int:
    return get(run, "batch.prompts") * get(run, "batch.rollouts", 1)


def _done(run: Run) -> int:
    if not run.metrics:
        raise Unknown("metrics.jsonl has no row")
    return run.metrics[-1]["step"]


def _mask(run: Run) -> str:
    return (
        "the completion's tokens, end token included; neither the prompt nor what follows the end"
    )


def _reduction(run: Run) -> str:
    return (
        f"{get(run, 'objective.reduction')}; weights fixed on the {_rows(run)} rows of a batch "
        f"before it is split into {count(get(run, 'batch.microbatches', 1), 'microbatch', MANY)}"
    )


def _nucleus(run: Run) -> str:
    top_p = off(run, "sampling.top_p")
    return "1, the whole vocabulary is sampled from" if top_p == "none" else str(top_p)


def _rollouts(run: Run) -> str:
    return f"{get(run, 'batch.rollouts', 1)} of each of {get(run, 'batch.prompts')} prompts a step"


def _lengths(run: Run) -> str:
    told = f"prompt at most {get(run, 'data.prompt_length')} tokens, "
    told += f"completion at most {get(run, 'sampling.completion_length')}; "
    return told + f"completions in training {span(run, 'length', '{:.1f}')} tokens"


def _truncation(run: Run) -> str:
    return f"completions cut at that limit: {span(run, 'truncated', '{:.2g} %', scale=100)}"


def _optimizer(run: Run) -> str:
    told = (
        f"AdamW, learning rate {get(run, 'optimizer.learning_rate'):g}, "
        f"{get(run, 'optimizer.schedule')} after {get(run, 'optimizer.warmup_steps', 0)} steps of "
        f"warm-up, betas {get(run, 'optimizer.b1'):g} and {get(run, 'optimizer.b2'):g}, "
        f"weight decay {get(run, 'optimizer.weight_decay'):g}; trained: "
    )
    lora = evidence.setting(run.info["config"], "lora")
    return told + ("all weights" if lora is None else f"adapters of rank {lora['rank']}")


def _forwards(run: Run) -> str | None:
    if not account.gopd(run):
        return None
    mixed = any("," in str(text) for text in get(run, "routes", {}).values())
    whose = "every teacher" if mixed else "the teacher"
    tokens = f", {sum(run.values('tokens')):,.0f} completion tokens" if run.values("tokens") else ""
    told = f"{_done(run) * _rows(run):,} rows{tokens}: each row once by {whose} of its task, "
    told += f"of {count(len(get(run, 'teachers', {})), 'teacher')}"
    return told + (
        ", and once by the reference" if "reference" in run.info.get("models", {}) else ""
    )


def _tokens(run: Run) -> str:
    if not (tokens := run.values("tokens")):
        raise Unknown("metrics.jsonl has no tokens")
    return f"{sum(tokens):,.0f} completion tokens in {len(tokens):,} steps, prompts not counted"


def _clock(run: Run) -> str:
    if not (seconds := run.values("seconds", "timing")):
        raise Unknown("timing.jsonl has no row")
    total, outside = sum(seconds), sum(map(sum, _outside(run)))
    told = f"{total:,.0f} s, of which evaluating and saving {outside:,.0f} s"
    return f"{told}; loading and the evaluation before step 1 not counted"


def _outside(run: Run) -> list[list[float]]:
    return [run.values(f"seconds/{phase}", "timing") for phase in ("evaluate", "save")]


def _devices(run: Run) -> str:
    if not (found := run.info.get("environment")):
        raise Unknown("the workdir has no run.json with the surroundings")
    mesh = " x ".join(f"{axis} {n}" for axis, n in found.get("mesh", {}).items())
    return f"{found.get('devices', 'unknown')}, mesh {mesh or 'unknown'}, jax {found.get('jax')}"


def _baselines(run: Run) -> str:
    student, others = run.student(), run.others()
    if not student and not others:
        raise Unknown("evaluation.jsonl has no row")
    told = [f"student at step {min(student)}"] if student else []
    return (
        f"evaluated alike: {', '.join([*told, *others])}. Other methods are not part of a run: "
        "not recorded, compare runs by several --workdir"
    )


def _samples(run: Run) -> str:
    counts = sorted({(row["problems"], row["samples"]) for row in run.evaluation})
    if not counts:
        raise Unknown("evaluation.jsonl has no row")
    told = "; ".join(
        f"{count(n, 'problem')} of each task, {count(k, 'completion')} of each" for n, k in counts
    )
    digest = run.info.get("identity", {}).get("data.test content")
    return told + (f"; content {digest}" if digest else "")


def _seeds(run: Run) -> str:
    return f"one, {get(run, 'seed')}. The spread over seeds is not recorded: it takes further runs"


def _errors(run: Run) -> str:
    if not run.evaluation:
        raise Unknown("evaluation.jsonl has no row")
    return (
        "± one standard error of the mean over problems, a problem's score being its mean over "
        "completions; not of training's own randomness"
    )


def _diagnostics(run: Run) -> str:
    keys = dict.fromkeys(key for row in run.metrics for key in row if row[key] is not None)
    steps = sorted({key.split("/")[0] for key in keys} - {"step", "probe"})
    told = f"by step: {', '.join(steps)}" if steps else "none by step"
    probes = sorted(key.removeprefix("probe/") for key in keys if key.startswith("probe/"))
    return f"{told}; on probe rows: {', '.join(probes) or 'none'}"


def _preflight(run: Run) -> str:
    if not run.checks:
        unread = run.info.get("preflight", {}).get(UNREAD)
        raise Unknown(unread or "the workdir has no preflight.json")
    odd = [c for c in run.checks if c["verdict"] != "ok"]
    told = [f"{c['role']}: {c['name']} is {c['value']} ({c['limit']}): {c['verdict']}" for c in odd]
    passed = f"{len(run.checks) - len(odd)} of {len(run.checks)} checks passed"
    return "; ".join([passed, *told])


def recovered(before: dict, now: dict, teacher: dict | None) -> float | None:
    """Share of the way from `before` to the teacher's accuracy that `now` has gone.

    None where that way is shorter than two standard errors, or these are not known: the share would
    be noise.
    """
    error = None if teacher is None else _error(before, teacher)
    if error is None:
        return None
    way = teacher["accuracy"] - before["accuracy"]
    return None if way <= N_ERRORS * error else (now["accuracy"] - before["accuracy"]) / way


def _error(one: dict, other: dict) -> float | None:
    """The standard error of a difference of accuracies; None where either was of one problem."""
    errors = [one["stderr"], other["stderr"]]
    return math.hypot(*errors) if all(map(evidence.is_number, errors)) else None


def _ends(run: Run) -> tuple[dict[str, dict], dict[str, dict]]:
    """The student's first and last evaluation by task."""
    student = run.student()
    if len(student) < 2:
        raise Unknown("the student was not evaluated both before and after")
    return student[min(student)], student[max(student)]


def _gap(run: Run) -> str | None:
    if run.info.get("config", {}).get("teachers") == {}:
        return None
    (before, after), others, told = _ends(run), run.others(), []
    for task in (task for task in before if task in after):
        names = run.teachers(task)
        for name in names:
            teacher = others.get(name, {}).get(task)
            share = recovered(before[task], after[task], teacher)
            way = _no_share(before[task], teacher) if share is None else f"{100 * share:.0f} %"
            told.append(f"{task}{f' to {name}' if len(names) > 1 else ''} {way}")
    return "; ".join(told)


def _no_share(before: dict, teacher: dict | None) -> str:
    """Why there is no share of the way to a teacher."""
    if teacher is None:
        return "not known: its teacher was not evaluated"
    if _error(before, teacher) is None:
        return "not known: one problem has no standard error"
    return f"none: its teacher is not ahead by {N_ERRORS:g} standard errors"


def _advice(run: Run) -> str:
    if not run.metrics:
        raise Unknown("metrics.jsonl has no row")
    told: dict[str, list[str]] = {}
    for step, name, _ in watch.history(run.metrics, run.info.get("config", {})):
        told.setdefault(name, []).append(str(step))
    return "; ".join(f"{n} at step {', '.join(steps)}" for n, steps in told.items()) or "none"


def _skipped(run: Run) -> str:
    skipped = run.values("skipped")
    if not skipped:
        raise Unknown("metrics.jsonl has no count of them")
    updates = get(run, "batch.updates", 1) * get(run, "batch.epochs", 1)
    return f"{sum(skipped):g} of {len(skipped) * updates}"


def _worse(run: Run) -> str:
    """Tasks that fell, and whether by more than their error."""
    (before, after), told = _ends(run), []
    for task, now in after.items():
        if task not in before or now["accuracy"] >= before[task]["accuracy"]:
            continue
        fell = before[task]["accuracy"] - now["accuracy"]
        error, by = _error(now, before[task]), f"{task} by {100 * fell:.1f} points"
        if error is None:
            told.append(f"{by}, of one problem, which has no standard error")
            continue
        clear = "beyond" if fell > N_ERRORS * error else "within"
        told.append(
            f"{by}, {clear} {N_ERRORS:g} standard errors ({100 * error:.1f}) of the difference"
        )
    return "; ".join(told) or "none"


ITEMS = (
    ("States", "source", account.source),
    ("States", "staleness", account.staleness),
    ("Signal", "target", account.target),
    ("Signal", "divergence and direction", account.divergence),
    ("Signal", "estimator that is differentiated", account.estimator),
    ("Signal", "formula", account.formula),
    ("Signal", "support and mass outside it", account.support),
    ("Signal", "verifier's reward", account.task_reward),
    ("Credit", "gamma and lambda", account.credit),
    ("Credit", "baseline", account.baseline),
    ("Credit", "critic", account.critic),
    ("Weights", "routing", account.routing),
    ("Weights", "gates", partial(_setting, key="objective.gates")),
    ("Weights", "off-policy correction", account.off_policy),
    ("Weights", "clips", account.clips),
    ("Weights", "mask", _mask),
    ("Weights", "aggregation", _reduction),
    ("Weights", "regularisers", partial(_setting, key="objective.regularizers")),
    ("Sampling", "temperature", partial(_setting, key="sampling.temperature")),
    ("Sampling", "top-p", _nucleus),
    ("Sampling", "rollouts per prompt", _rollouts),
    ("Sampling", "lengths", _lengths),
    ("Sampling", "truncation", _truncation),
    ("Compute", "optimiser", _optimizer),
    ("Compute", "steps", lambda run: f"{_done(run)} of {get(run, 'steps')}"),
    ("Compute", "teacher forwards", _forwards),
    ("Compute", "tokens", _tokens),
    ("Compute", "wall clock", _clock),
    ("Compute", "devices", _devices),
    ("Evaluation", "matched baselines", _baselines),
    ("Evaluation", "samples", _samples),
    ("Evaluation", "seeds", _seeds),
    ("Evaluation", "error bars", _errors),
    ("Evaluation", "share of the way to the teacher", _gap),
    ("Diagnostics", "recorded", _diagnostics),
    ("Diagnostics", "preflight", _preflight),
    ("Negative results", "advice", _advice),
    ("Negative results", "skipped updates", _skipped),
    ("Negative results", "tasks that got worse", _worse),
)
