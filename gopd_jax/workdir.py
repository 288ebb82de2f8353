"""A run's directory as it is found: one run at a time has it, and no row of its steps is lost."""

import fcntl
import sys
import time
import weakref
from pathlib import Path

import jax

from gopd_jax import metrics, processes

LOCK = ".lock"
PATIENCE = 120  # seconds
_HELD: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


class Held:
    """A workdir that no other process's run can have while this object is there.

    The kernel lets go of it with the process, however that ends.
    """

    def __init__(self, path: Path):
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._file = (path / LOCK).open("ab")
        except OSError as error:
            raise ValueError(
                f"nothing can be written to {path} ({error.strerror}); give another "
                "--config.workdir"
            ) from error
        try:
            self._wait(path)
        except OSError as error:  # not every shared file system has locks
            print(
                f"warning: {path} cannot be locked ({error.strerror}): see to it that no other run "
                "writes there",
                file=sys.stderr,
            )

    def _wait(self, path: Path) -> None:
        """A job that is put in the place of a preempted one may begin while that still saves, and a
        lock on a network file system outlives its host by a minute or two."""
        end, told = time.monotonic() + PATIENCE, False
        while True:
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise ValueError(
                        f"another run is under way in {path}; wait for its end, stop it, or give "
                        "another --config.workdir"
                    ) from error
            if not told:
                told = True
                print(
                    f"another run is under way in {path}; waiting {PATIENCE} seconds for its end",
                    file=sys.stderr,
                )
            time.sleep(min(1.0, PATIENCE))


def hold(workdir) -> Held | None:
    """The workdir, held by the process that writes it; None on the others.

    Every process has to ask. ValueError, on all of them, where another run has it for longer than
    PATIENCE or nothing can be written there. A process that has it already may begin anew.
    """
    path, held, refused = Path(workdir).resolve(), None, None
    if jax.process_index() == 0:
        try:
            if (held := _HELD.get(path)) is None:
                held = _HELD[path] = Held(path)
        except ValueError as error:
            refused = error
    several = jax.process_count() > 1
    if several and int(processes.largest(int(refused is not None))) and refused is None:
        raise ValueError(f"the first process cannot have {path}; it says why")
    if refused is not None:
        raise refused
    return held


def rows_lost(workdir, step: int) -> str | None:
    """What to say of rows that files of a run at `step` lack.

    Those of evaluations but the first are not missed: how often a run evaluates may have changed.
    ValueError where a file is damaged otherwise than by a kill.
    """
    rows = {name: metrics.read_rows(Path(workdir) / name) for name in metrics.ROWS}
    told, steps = [], range(1, step + 1)
    for name in (metrics.METRICS, metrics.TIMING):
        found = [row.get("step") for row in rows[name]]
        if len(found) > len({*found}):
            twice = next(n for n in found if found.count(n) > 1)
            raise ValueError(f"{Path(workdir) / name} has two rows of step {twice}; delete one")
        if lost := sorted({*steps} - {*found}):
            first = ", ".join(map(str, lost[:4])) + (" ..." if len(lost) > 4 else "")
            told.append(f"{name} lacks the rows of {len(lost)} of {step} steps ({first})")
    for name in (metrics.EVALUATION, metrics.SAMPLES):
        before = ((row.get("model"), row.get("step")) == ("student", 0) for row in rows[name])
        if step and not any(before):
            told.append(f"{name} lacks what the student was before the first step")
    if not told:
        return None
    return f"warning: {', '.join(told)}: what is told of this run, its report too, is without them"
