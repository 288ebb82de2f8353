"""What a run leaves behind of its numbers: JSON rows, TensorBoard, and the watch that times phases.

Rows are reproducible byte for byte, and a continued run's files equal the uninterrupted run's;
so whatever depends on the clock goes into timing.jsonl alone.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

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
