"""What a run leaves behind and shows while it runs: JSON rows, TensorBoard, progress, stop watch.

Rows are reproducible byte for byte, and a continued run's files equal the uninterrupted run's;
so whatever depends on the clock goes into timing.jsonl alone.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path

import rich.progress as rp
from rich.console import Console
from rich.table import Column

from gopd_jax.types import Mean

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"
EVALUATION, SAMPLES = "evaluation.jsonl", "samples.jsonl"
ROWS = METRICS, TIMING, EVALUATION, SAMPLES
CURVES = ("accuracy", "stderr", "length", "truncated")
EVALUATION_KEYS = ("step", "model", "task", *CURVES, "pass_at", "problems", "samples")
SAMPLE_KEYS = ("step", "model", "task", "prompt", "completion", "score", "reason")
# Phases that are no part of training, so that tokens/s compares between runs that evaluate
# and save more or less often.
OUTSIDE_TRAINING = ("evaluate", "save")


def to_row(metrics: dict[str, Mean | float | int], **extra: float) -> dict[str, float]:
    """Plain floats by name: each Mean's value (NaN where it is empty), and `extra` beside them."""
    if twice := metrics.keys() & extra.keys():
        raise ValueError(f"{sorted(twice)} are given twice, as metrics and as extra; rename one")
    return {
        key: value.value() if isinstance(value, Mean) else float(value)
        for key, value in (metrics | extra).items()
    }


def read_rows(path: Path) -> list[dict]:
    """The objects of a .jsonl file, oldest first; [] where there is no file.

    A last line that a kill tore is left out. Any other broken line is a ValueError.
    """
    if not path.exists():
        return []
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            # Only the last line has nothing after it, so only it can be a torn write.
            if any(lines[number:]):
                raise ValueError(
                    f"{path}:{number} is not a JSON object: {line[:60]!r}; delete that line"
                ) from error
    return rows


def _line(row: dict) -> bytes:
    """`row` as one line of strict JSON, which has no NaN and no infinity: both become null."""
    plain = {key: x.item() if hasattr(x, "item") else x for key, x in row.items()}
    odd = {key for key, x in plain.items() if isinstance(x, float) and not math.isfinite(x)}
    plain |= dict.fromkeys(odd)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False)
    # Half of a surrogate pair, which a model can write, has no UTF-8; JSON spells it \udXXX.
    return text.encode(errors="backslashreplace") + b"\n"


def _replace(path: Path, rows: list[dict]) -> None:
    """Write the whole file in one step that a kill cannot halve."""
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(b"".join(map(_line, rows)))
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _append(path: Path, rows: list[dict]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(map(_line, rows)))


def _keep_until(path: Path, step: int) -> list[dict]:
    """Cut a torn last line and every row after `step` off the file; the rows that stay."""
    rows = [row for row in read_rows(path) if row["step"] <= step]
    if path.exists() and path.read_bytes() != b"".join(map(_line, rows)):
        _replace(path, rows)
    return rows


def _result(row: dict) -> tuple:
    return row["step"], row["model"], row["task"]


class Writer:
    """Appends a run's rows to its workdir and to TensorBoard's event files in workdir/tensorboard.

    resume_step: the step of the checkpoint that the run continues from, 0 for a new run. Rows
    of later steps are dropped, because the run is about to write them again. enabled: False on
    every process but the first; such a writer touches nothing.
    """

    def __init__(self, workdir: str | Path, *, resume_step: int, enabled: bool = True):
        self.workdir, self.enabled = Path(workdir), enabled
        if not enabled:
            return
        self.workdir.mkdir(parents=True, exist_ok=True)
        for name in ROWS:
            rows = _keep_until(self.workdir / name, resume_step)
            if name == METRICS:
                self._step = rows[-1]["step"] if rows else 0
        from tensorboardX import SummaryWriter  # it imports torch, where there is one

        self._board = SummaryWriter(
            str(self.workdir / "tensorboard"),
            purge_step=resume_step + 1,  # TensorBoard hides what earlier files hold from it on
            flush_secs=5,  # a kill loses these seconds of the curves; the JSON rows lose nothing
            filename_suffix=f".after{resume_step}",
        )

    def write(self, step: int, row: dict[str, float], timing: dict[str, float]) -> None:
        """One step's row into metrics.jsonl and its clock readings into timing.jsonl, flushed."""
        if not self.enabled:
            return
        if step <= self._step:
            raise ValueError(
                f"step {step} comes after step {self._step} in {self.workdir / METRICS}; steps "
                "count from 1, and a continued run gives its checkpoint's step as resume_step"
            )
        for name, values in ((METRICS, row), (TIMING, timing)):
            values = {key: float(values[key]) for key in sorted(values) if key != "step"}
            _append(self.workdir / name, [{"step": int(step)} | values])
            for key in (key for key, value in values.items() if math.isfinite(value)):
                self._board.add_scalar(f"{Path(name).stem}/{key}", values[key], step)
        self._step = step

    def evaluation(self, rows: Iterable[dict]) -> None:
        """Results with the keys EVALUATION_KEYS into evaluation.jsonl.

        A result of the same (step, model, task) is replaced: a run that was killed between its
        evaluation and its checkpoint evaluates again.
        """
        for row in self._put(EVALUATION, EVALUATION_KEYS, rows):
            pass_at = {f"pass_at_{k}": x for k, x in row["pass_at"].items()}
            for key, value in ({key: row[key] for key in CURVES} | pass_at).items():
                tag = f"evaluation/{row['task']}/{row['model']}/{key}"
                if math.isfinite(value):  # of one problem there is no standard error
                    self._board.add_scalar(tag, value, row["step"])

    def samples(self, rows: Iterable[dict]) -> None:
        """Completions with the keys SAMPLE_KEYS into samples.jsonl, replaced as evaluations are."""
        self._put(SAMPLES, SAMPLE_KEYS, rows)

    def _put(self, name: str, keys: tuple[str, ...], rows: Iterable[dict]) -> list[dict]:
        groups = defaultdict(list)
        for row in rows if self.enabled else ():
            if row.keys() != set(keys):
                raise ValueError(f"a row of {name} has keys {sorted(row)}; it needs {sorted(keys)}")
            groups[_result(row)].append({key: row[key] for key in keys})
        if not groups:
            return []
        path, rows, old = self.workdir / name, [*chain(*groups.values())], defaultdict(list)
        for row in read_rows(path):
            old[_result(row)].append(row)
        if old.keys() & groups.keys():
            # Each at the place of what it replaces: the order is the uninterrupted run's.
            _replace(path, [*chain(*(old | groups).values())])
        else:
            _append(path, rows)
        return rows

    def close(self) -> None:
        if self.enabled:
            self._board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class StopWatch:
    """Wall-clock seconds per named phase of a step: `with watch("data"): ...`, then `lap`."""

    def __init__(self, clock=time.perf_counter):
        self._clock, self._start, self._phases = clock, clock(), defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._phases[phase] += self._clock() - start

    def lap(self, tokens: float) -> dict[str, float]:
        """The timing row since the last lap, and start over.

        seconds: all of it; seconds/<phase>; tokens_per_second: `tokens` over the seconds that
        were spent neither evaluating nor saving. A device computes on while Python goes ahead,
        so the phase that waits for the result has to be inside `with watch(...)` too.
        """
        now = self._clock()
        seconds, self._start = now - self._start, now
        training = seconds - sum(self._phases[phase] for phase in OUTSIDE_TRAINING)
        row = {"seconds": seconds, "tokens_per_second": tokens / training if training > 0 else 0.0}
        row |= {f"seconds/{name}": value for name, value in self._phases.items() if value}
        self._phases.clear()
        return row


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _figures(row: dict[str, float], timing: dict[str, float]) -> str:
    """The row's main figures in one line; those that it has not are left out. KL: to teacher."""
    shown = (
        (row.get("reward"), "reward {:.3f}"),
        (row.get("kl_teacher"), "KL {:.4f}"),
        (row.get("length"), "length {:.1f}"),
        (timing.get("tokens_per_second"), "{:,.0f} tok/s"),
    )
    return "  ".join(form.format(x) for x, form in shown if x is not None)


class Progress:
    """A live bar of a run's steps on a terminal; elsewhere a plain line every `period` seconds.

    total, start: the last step, and the one that the run continues from. unit: a step's name there.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        enabled: bool = True,
        *,
        unit: str = "step",
        console: Console | None = None,
        period: float = 5.0,
        clock=time.monotonic,
    ):
        self._unit, self._total, self._enabled = unit, total, enabled
        self._console = console or Console(stderr=True)
        self._live = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._period, self._clock = period, clock
        self._printed, self._reward = -math.inf, {}
        # When recent steps were done. The first, which compiles, only begins the count.
        self._done: deque[tuple[float, int]] = deque(maxlen=26)
        self._rich = _rich_bar(self._console)
        self._task = self._rich.add_task("", total=total, completed=start, text="compiling")

    def __enter__(self) -> Progress:
        if self._live:
            self._rich.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._rich.stop()

    def update(self, step: int, row: dict[str, float], timing: dict[str, float]) -> None:
        """Show one step. A reward, which not every step has, stays until the next one."""
        if not self._enabled:
            return
        self._done.append((now := self._clock(), step))
        self._reward = {"reward": row["reward"]} if "reward" in row else self._reward
        text = _figures(row | self._reward, timing)
        # The median, as some steps evaluate too.
        if each := [(b - a) / max(j - i, 1) for (a, i), (b, j) in pairwise(self._done)]:
            text += f"  {_clock_text(statistics.median(each) * (self._total - step))} left"
        if self._live:
            self._rich.update(self._task, completed=step, text=text)
        elif now - self._printed >= self._period or step == self._total:
            self._printed = now
            self.note(f"{self._unit} {step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def bar(self, work: Iterable | int, description: str) -> Iterator:
        """As the function `bar`, below this bar."""
        rich = self._rich if self._live else None
        return bar(work, description, self._enabled, console=self._console, rich=rich)


def _rich_bar(console: Console) -> rp.Progress:
    line = Column(no_wrap=True, overflow="ellipsis")
    return rp.Progress(
        rp.SpinnerColumn(),
        rp.BarColumn(bar_width=10),
        rp.MofNCompleteColumn(),
        rp.TextColumn("{task.description}{task.fields[text]}", markup=False, table_column=line),
        console=console,
        transient=True,
    )


def bar(
    work: Iterable | int,
    description: str,
    enabled: bool = True,
    *,
    console: Console | None = None,
    rich: rp.Progress | None = None,
    period: float = 5.0,
    clock=time.monotonic,
) -> Iterator:
    """Iterate over `work` (an int n means range(n)) and show how far it is, as Progress does."""
    work = range(work) if isinstance(work, int) else work
    if not enabled:
        yield from work
        return
    console, total = console or Console(stderr=True), getattr(work, "__len__", lambda: None)()
    live, shown = console.is_terminal and not console.is_dumb_terminal, rich or _rich_bar(console)
    task = shown.add_task(f"{description}  ", total=total, text="")
    if live and rich is None:
        shown.start()
    start = printed = clock()
    try:
        for done, item in enumerate(work, 1):
            yield item
            now, text = clock(), ""
            if total is not None:
                text = f"{_clock_text((now - start) / done * (total - done))} left"
            shown.update(task, completed=done, text=text)
            if not live and now - printed >= period:
                printed, line = now, f"{description} {done}/{total or '?'}  {text}".rstrip()
                console.print(line, markup=False, highlight=False, soft_wrap=True)
    finally:
        shown.remove_task(task)
        if live and rich is None:
            shown.stop()
