"""Is this the right teacher? Checks on the real weights, in seconds, before the first step.

The most common failure of distillation is silent: a run that trains against a teacher with random
weights, another template, other ids, another end token. Every model judges a few completions that
the student samples, a few texts of the data, and its own likeliest completions; what comes out is
held against limits that no trained model of the right kind comes near.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from gopd_jax import processes, step
from gopd_jax.objectives import objective
from gopd_jax.objectives.targets import tilted
from gopd_jax.probe import Probe, mean
from gopd_jax.recipe import Frozen
from gopd_jax.setup import Role, Run

# Share of ln V, the entropy of a model that knows nothing: a trained one stays far below it.
KNOWS_NOTHING = 0.8
# Nats a token.
OWN_TEXT = -2.0  # of a model's likeliest completion; a trained one is near -0.3
NEAR, APART = 0.5, 2.0  # KL of the student to a teacher: usual up to the one, beyond the other not
# Of the data's completions, which a teacher ought to find likelier than the student does: how many
# times the student's nats, and how many more, it may take.
TIMES, MORE = 2.0, 0.3
# KL at the first token, which shows where two templates do not meet, in nats and times the mean.
FIRST_TOKEN, FIRST_TIMES = 1.5, 3.0
OTHER_END = 0.1  # share of a teacher's mass on an end token that the student does not stop at
# Sampler and scorer take the same sums in another order. bfloat16 rounds each of them.
SAME = {"float32": 1e-3, "bfloat16": 0.25}
SAME_FORWARD = 1e-4

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the table. verdict: "ok", "warn" or "fail"; says: what to do about it."""

    role: str
    name: str
    value: str
    limit: str
    verdict: str = "ok"
    says: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Every check, and one rendered example: (text, whether it is learnt from) of each token."""

    checks: tuple[Check, ...]
    example: tuple[tuple[str, bool], ...]

    def failures(self) -> list[str]:
        failed = (c for c in self.checks if c.verdict == "fail")
        return [f"{c.role}: {c.name} is {c.value} ({c.limit}): {c.says}" for c in failed]


def run(this: Run) -> Report:
    """Probe every role of the run. All processes call it; each gets the whole report."""
    probe = Probe(this)
    checks: list[Check] = []
    for name, role in this.roles.items():
        checks += of_role(probe, name, role)
    if not any(check.verdict == "fail" for check in checks):
        checks += of_student(probe)
        for name, role in this.roles.items():
            if name != "student":
                checks += against_student(probe, name, role)
    return Report(checks=tuple(checks), example=probe.example())


def of_role(probe: Probe, name: str, role: Role) -> list[Check]:
    """Is it a trained model at all, of this tokenizer?"""
    mine_B = probe.mine(name)
    logp_BT, entropy_BT = probe.judge(role, probe.rollout, probe.view(name))
    entropy = mean(entropy_BT, probe.mask_BT & mine_B[:, None])
    chat = role.tokenizer
    told = {
        "weights": (role.digest[:12], "sha256"),
        "its log-probs": (probe.fingerprint(name), "sha256"),
        "template": (chat.template_fingerprint()[:12], "sha256"),
        "vocabulary": (chat.fingerprint()[:12], "sha256"),
        "pad": (chat.contents[chat.pad_id], "its own"),
        "ends": (" ".join(chat.contents[i] for i in chat.eos_ids), "its own"),
    }
    facts = [Check(role=name, name=n, value=v, limit=limit) for n, (v, limit) in told.items()]
    if not np.isfinite(logp_BT).all():
        says = "its weights or activations are not finite; load the checkpoint again"
        bad = {"value": "nan", "limit": "finite", "verdict": "fail", "says": says}
        return [*facts, Check(role=name, name="log-probs", **bad)]
    own = probe.own(name, mine_B)
    return [
        *facts,
        _bound(
            name,
            "entropy, nats a token",
            entropy,
            fail_above=KNOWS_NOTHING * probe.ln_v,
            says=f"ln V = {probe.ln_v:.2f} is a model that knows nothing: random or zeroed "
            "weights; load the checkpoint again",
        ),
        *_of_text(probe, name, mine_B),
        _bound(
            name,
            "log-prob of own text",
            own,
            fail_below=OWN_TEXT,
            says="it does not follow itself: wrong weights, config.json or template",
        ),
    ]


def _of_text(probe: Probe, name: str, mine_B) -> list[Check]:
    """How likely it finds what others wrote; no check where that is nothing, single tokens say."""
    text, what = probe.text(name, mine_B)
    students, _ = probe.text("student", mine_B)
    if text is None or students is None:
        return []
    limit = -probe.ln_v
    if name != "student":
        limit = max(limit, TIMES * students - MORE)
    return [
        _bound(
            name,
            f"log-prob of {what}",
            text,
            # Words of a prompt are nothing that every model was trained on: shown, not judged.
            fail_below=limit if what == "the data" else -math.inf,
            says=f"the student's is {students:.4g} and a guess's "
            f"{-probe.ln_v:.4g}: its ids, its config.json (rope, norms, heads), some of its layers "
            "or its template are another model's",
        )
    ]


def of_student(probe: Probe) -> list[Check]:
    """Sampler and scorer agree; a student that is its own teacher has nothing to learn."""
    dtype = probe.student.decoder.dtype
    gap_BT = np.abs(processes.gather(probe.rollout.logp_BT) - probe.logp_BT)
    checks = [
        _bound(
            "student",
            "sampler - scorer, nats",
            float(gap_BT[probe.mask_BT].max()),
            fail_above=SAME[dtype],
            says="the log-probs of sampling and of training part: another temperature, mask or "
            "position; report this with your config",
        )
    ]
    if probe.recipe.objective.needs_teacher:
        own = dataclasses.replace(
            probe.recipe,
            teachers=(probe.student.decoder,),
            routes=((0,) * len(probe.run.train.tasks),),
            mixture=None,
            # The sampled tokens' log-probs, whatever this run's own loss takes of the vocabulary.
            objective=objective.build(lam=probe.recipe.objective.lam),
            reference=probe.student.decoder,
            critic=None,
        )
        params, lam = probe.student.params, own.objective.lam
        frozen = Frozen(teachers=(params,), reference=params)
        _, score, _ = step.staged(own)
        scores = score(frozen, probe.rollout.replace(teacher=None, reference=None))
        scores = processes.gather(scores)
        advantage_BT = tilted(scores.teacher_BT, scores.ref_BT, lam=lam) - probe.logp_BT
        checks.append(
            _bound(
                "student",
                "|A| as own teacher",
                float(np.abs(np.asarray(advantage_BT)[probe.mask_BT]).max()),
                fail_above=SAME_FORWARD if dtype == "float32" else SAME[dtype],
                says="teacher and student see other rows or positions; report this",
            )
        )
    return checks


def against_student(probe: Probe, name: str, role: Role) -> list[Check]:
    """Is it another model than the student, near enough to teach it, ending where it ends?"""
    mine_B = probe.mine(name)
    mask_BT = probe.mask_BT & mine_B[:, None]
    view = probe.view(name)
    logp_BT, _ = probe.judge(role, probe.rollout, view)
    gap_BT = probe.logp_BT - logp_BT
    kl, first = mean(gap_BT, mask_BT), probe.rollout.n_prompt - 1
    at_first = float(gap_BT[mine_B, first].mean())
    checks = [
        _bound(
            name,
            "KL from the student",
            kl,
            fail_above=APART,
            warn_above=NEAR,
            says="it finds the student's samples all but impossible: another template, "
            "tokenizer, checkpoint or context",
        ),
        _bound(
            name,
            "KL at the first token",
            at_first,
            # A context is there to make a difference from the first token on.
            warn_above=max(FIRST_TOKEN, FIRST_TIMES * kl)
            if role.reader.context is None
            else math.inf,
            says="the prompt does not end as this model expects; compare its template and its "
            "template options with the student's",
        ),
    ]
    if name.startswith("teacher:"):
        checks += _identity(probe, name, role, logp_BT, mask_BT)
    if set(role.tokenizer.eos_ids) - set(probe.recipe.eos_ids):
        checks.append(_ends(probe, name, role, view, mine_B))
    return checks


def _identity(probe: Probe, name: str, role: Role, logp_BT, mask_BT) -> list[Check]:
    """A teacher has to differ from the student, and from the reference, to say anything."""

    def other(what: str, than: Role, than_BT, says: str) -> Check:
        same = than.digest == role.digest and role.reader.reads_as(than.reader)
        # One that follows the student leaves both with the first step.
        same |= float(np.abs((logp_BT - than_BT)[mask_BT]).max()) < SAME_FORWARD
        same &= role.params is not None
        verdict = {"value": "no", "verdict": "fail", "says": says} if same else {"value": "yes"}
        return Check(role=name, name=f"other than the {what}", limit="yes", **verdict)

    checks = []
    if probe.recipe.teachers:
        says = (
            "its log-probs are the student's, so there is nothing to learn; give the trained "
            "teacher's directory, not its base"
        )
        checks.append(other("student", probe.student, probe.logp_BT, says))
    if probe.recipe.objective.needs_reference:
        reference = probe.run.roles["reference"]
        its_BT, _ = probe.judge(reference, probe.rollout, probe.view("reference"))
        says = (
            "log T - log R is 0 and lambda has no effect; give the model that the teacher was "
            "trained from, or the student's start, as the reference"
        )
        checks.append(other("reference", reference, its_BT, says))
    return checks


def _ends(probe: Probe, name: str, role: Role, view, mine_B) -> Check:
    """The teacher's mass on ends of its own that stop no completion, where it would have ended.

    What lies there is lost to the student's end token, so that it learns to run on.
    """
    mass_B, others = probe.mass_on_other_ends(role, view)
    ours = (probe.student.tokenizer.contents[i] for i in probe.recipe.eos_ids)
    return _bound(
        name,
        f"mass on {', '.join(map(repr, others))}",
        float(mass_B[mine_B].mean()),
        fail_above=OTHER_END,
        says="it ends completions with a token that does not end the student's, and lengths would "
        f'run away; set --config.sampling.stop="{(*ours, *others)}"',
    )


def _bound(
    role: str,
    name: str,
    value: float,
    *,
    says: str,
    fail_above: float | None = None,
    fail_below: float | None = None,
    warn_above: float | None = None,
) -> Check:
    """A check of a number; says is kept where it does not pass. NaN fails.

    The limit that is shown is the one that fails, if there is one; infinity is none.
    """
    above = fail_above if fail_above is not None else warn_above
    failed = math.isnan(value)
    failed |= fail_above is not None and value > fail_above
    failed |= fail_below is not None and value < fail_below
    warned = warn_above is not None and value > warn_above
    verdict = "fail" if failed else "warn" if warned else "ok"
    limit = f"at most {above:.4g}" if above is not None else f"at least {fail_below:.4g}"
    limit = "none" if math.inf in (above, -(fail_below or 0.0)) else limit
    return Check(
        role=role,
        name=name,
        value=f"{value:.4g}",
        limit=limit,
        verdict=verdict,
        says=says if verdict != "ok" else "",
    )


def show(report: Report, console: Console | None = None) -> None:
    """The table and the example on stderr: prompt dim, what the student learns from in green."""
    console = console or Console(stderr=True)
    roles = list(dict.fromkeys(check.role for check in report.checks))
    table = Table(Column("preflight", no_wrap=True), *roles, box=box.SIMPLE_HEAD, pad_edge=False)
    by_name: dict[str, dict[str, Check]] = {}
    for check in report.checks:
        by_name.setdefault(check.name, {})[check.role] = check
    for name, checks in by_name.items():
        cells = [checks.get(role) for role in roles]
        # Eight digits tell two models apart, and four models fit beside each other.
        shown = [
            (c.value[:8] if c.limit == "sha256" else c.value, c.verdict) if c else ("", "ok")
            for c in cells
        ]
        table.add_row(name, *(Text(value, style=COLOURS[verdict]) for value, verdict in shown))
    console.print(table)
    for check in report.checks:
        if check.verdict != "ok":
            told = f"{check.verdict}: {check.role}: {check.name} is {check.value}: {check.says}"
            console.print(Text(told, style=COLOURS[check.verdict]))
    shown = Text("a row of the batch; green is learnt from: ", style="bold")
    for text, learnt in report.example:
        shown.append(text.replace("\n", "⏎"), style="green" if learnt else "dim")
    console.print(shown)


def write(report: Report, workdir: str | Path) -> None:
    """workdir/preflight.json."""
    Path(workdir).mkdir(parents=True, exist_ok=True)
    part = Path(workdir) / "preflight.json.part"
    part.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    part.replace(Path(workdir) / "preflight.json")
