"""The run, top to bottom: restore or start, evaluate, step, save, evaluate, export, report."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import jax

from gopd_jax import checkpoint, data, metrics, preflight, processes, results, step
from gopd_jax import config as settings
from gopd_jax import workdir as workdirs
from gopd_jax.advance import Stepper, abstract_state, prompts_of
from gopd_jax.assembly import attention_told
from gopd_jax.evaluate import evaluate, rows_at_once
from gopd_jax.method import teachers_of
from gopd_jax.progress import Progress
from gopd_jax.recipe import init_state
from gopd_jax.reporting.watch import Watch
from gopd_jax.setup import Run, prepare
from gopd_jax.signals import stop_signals
from gopd_jax.types import TrainState

EVALUATION_SEED = 1  # the stream of rollouts is 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Begun:
    """A run that is loaded, checked and restored; nothing is compiled yet, nor written but the
    workdir's lock."""

    this: Run
    state: TrainState | None  # of the newest checkpoint; None where there is none
    held: workdirs.Held | None  # its workdir; None on all processes but the first
    lost: str | None  # what to say of rows that the workdir has lost

    @property
    def step(self) -> int:
        return 0 if self.state is None else int(self.state.step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Where a run's results lie, and how far it came."""

    workdir: Path
    step: int
    stopped_by: int | None  # the signal that ended it early; None where it came to its last step
    export: Path | None  # the student as a Hugging Face directory; None where it was stopped


def run(config: settings.Config) -> Summary:
    """Train to config.steps, from the newest checkpoint in config.workdir where there is one.

    Everything wrong with settings, models or data is a ValueError before the first compile. SIGTERM
    and Ctrl-C end the run after the step in hand, saved; the same call continues it.
    """
    return finish(check(begin(config)))


def begin(config: settings.Config) -> Begun:
    """Load, check and restore. ValueError with what is wrong, also where another run has the
    workdir, of which nothing but its lock is written."""
    this = prepare(config)
    held = workdirs.hold(config.workdir)
    newest = checkpoint.newest_step(config.workdir)
    export = Path(config.workdir) / checkpoint.EXPORT
    if newest is None and export.exists():
        raise ValueError(
            f"{config.workdir} holds the results of a finished run, {export}, and no checkpoint to "
            "continue it from; give another --config.workdir, or remove that one to start over"
        )
    # Another schedule ends with steps, which are then part of what `restore` compares and names.
    longer_cures = config.optimizer.schedule == "constant"
    if newest is not None and newest > config.steps and longer_cures:
        raise ValueError(
            f"{config.workdir} holds step {newest} and steps is {config.steps}; give "
            f"--config.steps={newest} or more, or another --config.workdir to start anew"
        )
    lost = workdirs.rows_lost(config.workdir, newest or 0)
    state = checkpoint.restore(config.workdir, abstract_state(this), this.identity)
    return Begun(this=this, state=state, held=held, lost=lost)


def check(begun: Begun) -> Begun:
    """The same, after the preflight of a run that has not begun; ValueError where one fails."""
    this, wanted = begun.this, begun.this.config.preflight
    if wanted == "off" or begun.state is not None:
        return begun
    report = preflight.run(this)
    if jax.process_index() == 0:
        preflight.show(report)
        preflight.write(report, this.config.workdir)
    if wanted == "refuse" and (failures := report.failures()):
        raise ValueError(
            "\n".join(f"- {failure}" for failure in failures)
            + "\nNothing was trained. To go on all the same: --config.preflight=warn"
        )
    return begun


def finish(begun: Begun) -> Summary:
    """The rest of a run: evaluate, step, save, evaluate, export."""
    this, start, resumed = begun.this, begun.step, begun.state is not None
    config, workdir = this.config, Path(this.config.workdir)
    state = begun.state if resumed else init_state(this.recipe, this.student.params)
    held, lost = begun.held, begun.lost  # noqa: F841 (held until this returns)
    del begun  # its state is donated to the first step
    _release(this)
    first, traced = jax.process_index() == 0, _steps(config.profile)
    if first:
        results.write_run(workdir, this)
    watch, signal_of = metrics.StopWatch(), None
    with (
        stop_signals() as stop,
        checkpoint.open_manager(workdir, keep=config.checkpoints.keep) as manager,
        # A run without a checkpoint starts over: rows of step 0 are its to write again too.
        metrics.Writer(workdir, resume_step=start if resumed else -1, enabled=first) as writer,
        Progress(config.steps, start, enabled=first) as progress,
        contextlib.closing(data.prefetch(prompts_of(this), start + config.sampling.lag)) as batches,
        contextlib.ExitStack() as trace,
    ):
        if start == config.steps:
            progress.note(f"{workdir} is at step {start} of {start}: nothing is left to train")
        elif resumed:
            progress.note(f"continuing {workdir} after step {start}")
        attends = attention_told(config, this.mesh, this.roles)
        warnings = (*([lost] if lost else []), *data.overlap(this.train, this.test))
        by_row = config.objective.lam_by_row and this.recipe.objective.drawn
        warnings += data.lambdas_missing(this.train, by_row)
        for note in (*config.notes(), *warnings, this.recipe.objective.formula, attends):
            progress.note(note)
        told = metrics.read_rows(workdir / metrics.METRICS)
        adviser = Watch(settings.to_dict(config), told)
        judge = _judge(this, writer, progress)
        if not resumed:
            signal_of = _judge_all(this, judge, state, stop, progress.note)
        elif start == config.steps and _unevaluated(workdir, start):
            # It was stopped here, when more steps were to come, and shall be exported as it is.
            judge("student", this.student.decoder, results.whole(this, state), start)
        watch.lap(0)
        advance, under_way = Stepper(this), []  # steps that are dispatched and not yet told of
        tell = _telling(advance, under_way, watch, writer, progress, adviser)
        state = advance.begin(state)
        try:
            for i in range(start, config.steps):
                if signal_of := signal_of or stop():
                    break
                with watch("data"):
                    prompts = next(batches)
                if i in traced and i == max(start, traced.start):
                    trace.enter_context(jax.profiler.trace(str(workdir / "profile")))
                now = i + 1
                with watch("dispatch"), jax.profiler.StepTraceAnnotation("train", step_num=now):
                    state, seen = advance.dispatch(state, prompts, i)
                tell()  # of the step before: the device is at this one meanwhile
                under_way.append((now, seen))
                every = config.evaluation.every
                evaluates = now == config.steps or (every and now % every == 0)
                saves = now == config.steps or now % config.checkpoints.every == 0
                if evaluates:
                    with watch("wait"):  # for the step, whose seconds are not the evaluation's
                        jax.block_until_ready(state)
                    with watch("evaluate"):
                        judge("student", this.student.decoder, results.whole(this, state), now)
                if evaluates or saves or now in (traced.start, traced.stop) or advance.looks(now):
                    tell()  # the host needs this step done; a checkpoint is never without its row
                if now == traced.stop:
                    trace.close()
                with watch("save"):
                    if saves:
                        checkpoint.save(manager, now, state, this.identity)
        except Exception:
            # The step before the one that failed is done, and its row is written as any other. Not
            # so on a second Ctrl-C, nor by one process of several: the others would have to help.
            if jax.process_count() == 1:
                tell()
            raise
        tell()
        reached = int(state.step)
        if signal_of and reached:
            progress.note(f"stopping after step {reached}: saving")
            checkpoint.save(manager, reached, state, this.identity)
        checkpoint.wait(manager)
    export = None if signal_of else results.export(workdir, this, state)
    return Summary(workdir=workdir, step=reached, stopped_by=signal_of, export=export)


def _telling(advance: Stepper, under_way: list, watch, writer, progress, adviser):
    """(): wait for the steps under way, write their rows, show them and what they say is wrong.

    A row comes when the next step is already dispatched. Nothing that the run computes hangs on it:
    a gradient that is not finite is left out on the device, in `update`, and advice is a sentence
    for the reader, as right a step later.
    """

    def tell():
        while under_way:
            at, seen = under_way.pop(0)
            with watch("wait"):
                row = advance.row(seen)
            timing = watch.lap(row["tokens"])
            writer.write(at, row, timing)
            progress.update(at, row, timing)
            for sentence in adviser.see({"step": at} | row):
                progress.note(f"advice: {sentence}")

    return tell


def _release(this: Run) -> None:
    """Give up the student's first weights, of which the state is a copy or what was learnt since.

    Those that are a frozen model's too, the reference's say, stay.
    """
    others = [role.params for role in this.roles.values() if role is not this.student]
    kept = {id(x) for x in jax.tree.leaves((this.frozen, others))}
    for x in jax.tree.leaves(this.student.params):
        if id(x) not in kept:
            x.delete()


def _steps(profile: str | None) -> range:
    """The steps that "10:13" names: 10, 11 and 12."""
    return range(*map(int, profile.split(":"))) if profile else range(0)


def _unevaluated(workdir: Path, step: int) -> bool:
    """Whether the student's evaluation after this step is missing. All processes ask and hear what
    the first one finds, which writes the rows."""
    told = metrics.read_rows(workdir / metrics.EVALUATION) if jax.process_index() == 0 else []
    done = any((row["model"], row["step"]) == ("student", step) for row in told)
    return not int(processes.largest(int(done)))


def _judge_all(this: Run, judge, state: TrainState, stop, note) -> int | None:
    """Evaluate the teachers and the student before the first step; the signal that cut it short."""
    names, found = [name for name in this.roles if name.startswith("teacher:")], {}
    for name in names if this.config.evaluation.teachers else ():
        if signal_of := stop():
            return signal_of
        follows = this.roles[name].params is None
        params = results.whole(this, state) if follows else this.roles[name].params
        found[name] = judge(name, this.roles[name].decoder, params, 0)
    if signal_of := stop():
        return signal_of
    students = judge("student", this.student.decoder, results.whole(this, state), 0)
    for task in this.train.tasks if this.recipe.teachers else ():
        names = [f"teacher:{name}" for name in teachers_of(this.config, task)]
        theirs = {name: found[name][task] for name in names if name in found}
        for said in doubts(task, students[task], theirs):
            note(said)
    return None


def doubts(task: str, own: dict, theirs: dict[str, dict]) -> Iterator[str]:
    """What to say before the first step where a task's teachers are not ahead of the student.

    own: the student's row of evaluation.jsonl; theirs: name -> the teacher's.
    """
    if theirs and own["accuracy"] == 1:
        yield (
            f"warning: the student solves every problem of {task!r} that it is evaluated on "
            "already: what it learns will not be seen there; raise --config.evaluation.problems, "
            "or give harder ones"
        )
        return
    for name, told in theirs.items():
        if told["accuracy"] <= own["accuracy"] + _error(told, own):
            yield (
                f"warning: by these samples {name} is not clearly better than the student on "
                f"{task!r}, {_shown(told)} and {_shown(own)}: is it the right teacher?"
            )


def worse(before: list[dict], after: list[dict]) -> str | None:
    """What to say of the tasks on which a student lost more than two standard errors."""
    first = {row["task"]: row for row in before}
    fell = [
        f"{row['task']!r} from {_shown(first[task])} to {_shown(row)}"
        for row in after
        if (task := row["task"]) in first
        and first[task]["accuracy"] - row["accuracy"] > 2 * _error(first[task], row)
    ]
    return f"warning: the student got worse on {', '.join(fell)}" if fell else None


def _error(*rows: dict) -> float:
    """The standard error of a difference; not a number where one problem tells none."""
    return math.hypot(*(math.nan if row["stderr"] is None else row["stderr"] for row in rows))


def _shown(row: dict) -> str:
    return f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} %"


def _judge(this: Run, writer: metrics.Writer, progress: Progress):
    """(name, decoder, params, step): evaluate, write the rows, say the result above the bar."""
    c, samplers = this.config, {}
    told = metrics.read_rows(Path(c.workdir) / metrics.EVALUATION)
    first = [row for row in told if (row["model"], row["step"]) == ("student", 0)]

    def judge(name, decoder, params, at: int):
        sample = samplers.setdefault(decoder, step.sampling(this.recipe, decoder))
        result = evaluate(
            sample,
            params,
            this.test,
            this.roles[name].reader,
            mesh=this.mesh,
            n_problems=c.evaluation.problems,
            n_samples=c.evaluation.samples,
            n_rows=rows_at_once(c),
            seed=EVALUATION_SEED,
            step=at,
            model=name,
            bar=progress.bar,
        )
        writer.evaluation(result.rows)
        writer.samples(result.samples)
        shown = "   ".join(f"{row['task']} {_shown(row)}" for row in result.rows)
        progress.note(f"step {at:4d}  {name:14s} {shown}")
        if name == "student":
            if not first:
                first.extend(result.rows)
            if fell := worse(first, result.rows):
                progress.note(fell)
        return {row["task"]: row for row in result.rows}

    return judge
