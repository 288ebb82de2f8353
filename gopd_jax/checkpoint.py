"""Checkpoints of a run: written asynchronously, restored bit for bit, or refused.

A checkpoint is the TrainState, a checksum of each of its arrays, and the run's identity: settings,
data and models by content. Data and randomness are functions of the step, so nothing else has to be
kept.
"""

import contextlib
import gc
import logging
import re
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

EXPORT = "export"  # beside the checkpoints: the student of a run that came to its end
# Entries of an identity that the first version did not record: not compared where they are absent.
UNRECORDED = ("ends of completions", "reader of ")
# Files of Orbax that log what `wait_until_finished`, `save` or `close` raises as well.
RAISED_TOO = ("future.py", "async_checkpointer.py", "checkpoint_manager.py")


class NotSaved(RuntimeError):
    """A checkpoint that could not be written; str() says why and what to do."""


@contextlib.contextmanager
def open_manager(workdir, *, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Orbax's manager of workdir/checkpoints, which keeps the newest `keep`.

    Opening it creates the directory and removes what a killed save left half-written. NotSaved at
    the end where the last save has failed.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    with _one_error():
        manager = ocp.CheckpointManager(_directory(workdir), options=options)
        try:
            yield manager
        except BaseException:
            with contextlib.suppress(Exception):  # the same once more, if it is a save's
                manager.close()
            gc.collect()  # as _drop_the_others, where a save has failed
            raise
        with _saving(manager):
            manager.close()


@contextlib.contextmanager
def _saving(manager: ocp.CheckpointManager):
    """Around whatever may tell that a save, this one or the one before, has failed."""
    directory = Path(manager.directory)
    try:
        yield
        return
    except Exception as error:
        why = _first(error)
    _drop_the_others()
    newest = _steps(directory)[-1:]
    then = f"continues from step {newest[0]}" if newest else "starts over"
    raise NotSaved(
        f"a checkpoint in {directory} could not be written: {why}\nFree some space or mend the "
        f"file system; the same command then {then}"
    )


def restore(workdir, like, identity: dict[str, str]):
    """The newest TrainState in workdir/checkpoints, or None where there is none. Writes nothing.

    like: a TrainState of ShapeDtypeStructs with this run's shardings; the mesh and the number of
    processes may differ from those it was saved on. ValueError where the checkpoint belongs to
    another run, naming what differs, and where it cannot be read.
    """
    step = newest_step(workdir)
    if step is None:
        return None
    path = _directory(workdir) / str(step)
    saved = _read(path, "identity", ocp.args.JsonRestore())
    saved = {k: v for k, v in identity.items() if k.startswith(UNRECORDED)} | saved
    if changes := differences(saved, identity):
        raise ValueError(
            f"{path} is of another run:\n  "
            + "\n  ".join(changes)
            + "\nUndo the changes to continue it, or give another --config.workdir to start anew"
        )
    sums = _read(path, "checksums", ocp.args.JsonRestore())
    state = _read(path, "state", ocp.args.StandardRestore(like))
    if wrong := [name for name, n in checksums(state).items() if sums.get(name) != n]:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise _damaged(path, f"not what was saved are {wrong[:4]}{more}")
    return state


def restore_params(workdir, step: int, shapes):
    """The parameters alone of a checkpoint, as NumPy arrays on the host. Writes nothing.

    shapes: a tree of ShapeDtypeStructs. Needs no device that holds the model, and does not read the
    optimizer's state. ValueError where the checkpoint is damaged or of another model.
    """
    path = _directory(workdir) / str(step)
    how = ocp.args.PyTreeRestore(
        item={"params": shapes},
        restore_args={
            "params": jax.tree.map(
                lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), shapes
            )
        },
        partial_restore=True,
    )
    params = _read(path, "state", how)["params"]
    sums = _read(path, "checksums", ocp.args.JsonRestore())
    for keys, array in jax.tree_util.tree_leaves_with_path(params):
        # The paths of `checksums` are those of a TrainState; one array at a time is on the device.
        if sums.get(name := f".params{jax.tree_util.keystr(keys)}") != _checksum(array):
            raise _damaged(path, f"not what was saved is {name}")
    return params


def newest_step(workdir) -> int | None:
    """The step of the newest complete checkpoint, or None. ValueError where processes disagree."""
    steps = _steps(_directory(workdir))
    if jax.process_count() > 1:
        newest = np.array(steps[-1] if steps else 0)
        seen = multihost_utils.process_allgather(newest).reshape(-1).tolist()
        if len(set(seen)) > 1:
            raise ValueError(
                f"the newest steps in {_directory(workdir)} are {seen} as the processes see it (0: "
                "none); give a --config.workdir on storage that all of them share"
            )
    return steps[-1] if steps else None


def steps(workdir) -> list[int]:
    """Steps of the complete checkpoints in a workdir, oldest first."""
    return _steps(_directory(workdir))


def save(manager: ocp.CheckpointManager, step: int, state, identity: dict[str, str]) -> None:
    """Start writing this step's state; returns before it is on disk. A step is written once.

    The next step may donate the state: JAX leaves buffers alone that the writer still reads.
    NotSaved where the save before has failed.
    """
    if manager.latest_step() == step:
        return
    sums = checksums(state)
    with _saving(manager):
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                checksums=ocp.args.JsonSave(sums),
                identity=ocp.args.JsonSave(identity),
            ),
        )


def wait(manager: ocp.CheckpointManager) -> None:
    """Until every save is on disk. NotSaved where one has failed."""
    with _saving(manager):
        manager.wait_until_finished()


def checksums(state) -> dict[str, int]:
    """Path of each array -> checksum of its bits, the same on any mesh."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    sums = [int(n) for n in np.asarray(_checksums(jax.tree.leaves(state)))]
    return dict(zip(paths, sums))


@jax.jit
def _checksums(arrays):
    """Sums, modulo 2^32, of an array's words, each times an odd number of its own place.

    Odd, so that no change of one word goes unseen; integers, so that the order does not matter.
    """

    def one(x):
        if x.dtype == bool:  # of the rollouts that wait; it has no bits to read as a word
            x = x.astype(jnp.uint8)
        word = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
        words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
        place = jnp.zeros(x.shape, jnp.uint32)
        for axis, size in enumerate(x.shape):
            place = place * size + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)

    return jnp.stack([one(x) for x in arrays])


def _checksum(array) -> int:
    return int(_checksums([array])[0])


def differences(saved: dict[str, str], now: dict[str, str]) -> list[str]:
    """ "key: saved value in the checkpoint, value now" for each that differs."""
    absent = "nothing"
    return [
        f"{key}: {saved.get(key, absent)} in the checkpoint, {now.get(key, absent)} now"
        for key in sorted(saved.keys() | now.keys())
        if not _same(saved.get(key), now.get(key))
    ]


def _same(a: str | None, b: str | None) -> bool:
    """5 and 5.0 are one setting: earlier versions wrote some numbers as they were given."""
    numbers = [re.fullmatch(r"-?\d{1,12}(\.\d+)?", text or "") for text in (a, b)]
    return a == b or (all(numbers) and float(a) == float(b))


def _directory(workdir) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _steps(directory: Path) -> list[int]:
    """Steps whose checkpoint is complete: Orbax renames a directory to its step's number last."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


def _read(path: Path, item: str, how):
    """One item of a checkpoint. ValueError where it is damaged, whatever Orbax makes of that."""
    with _one_error():
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                return reader.restore(path, args=ocp.args.Composite(**{item: how}))[item]
        except Exception as error:
            why = _first(error)
        _drop_the_others()
    raise _damaged(path, why)


@contextlib.contextmanager
def _one_error():
    """Where one of Orbax's reads or writes fails, asyncio, Orbax's threads and Python print each
    of the others, a hundred pages around the one line that helps. Not in here: the first is raised,
    and what others have to say is printed as ever."""
    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    python_says = sys.unraisablehook

    def unraisable(what):
        file = getattr(getattr(what.object, "cr_code", None), "co_filename", "")
        if "orbax" not in file and str(what.exc_value) != "Event loop is closed":
            python_says(what)

    for logger in loggers:
        logger.addFilter(_not_orbax)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = python_says
        for logger in loggers:
            logger.removeFilter(_not_orbax)


def _drop_the_others() -> None:
    """Reads or writes that Orbax has left where one failed: Python would print them at its end.
    Behind the `except` clause, which holds them."""
    time.sleep(0.5)  # those under way end, and find their event loop closed
    gc.collect()


def _not_orbax(record: logging.LogRecord) -> bool:
    """False for what Orbax's threads log of an exception that `result` raises too, and for what
    asyncio says of a task of Orbax's or of a read that such a task no longer waits for; its other
    errors, of removing an old checkpoint say, stay."""
    raised = "orbax" in record.pathname and record.filename in RAISED_TOO
    theirs = re.search("orbax|tensorstore", record.getMessage()) and record.name == "asyncio"
    return not (record.exc_info and (raised or theirs))


def _first(error: BaseException) -> str:
    """What went wrong first, in one line: Orbax's own message holds the whole of TensorStore's
    description of an array, and hides what TensorStore said."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(f"{error}".split()).split(" [source locations=")[0].split("; [")[0]
    return f"{type(error).__name__}: {textwrap.shorten(said, 700, placeholder=' ...')}"


def _damaged(path: Path, why: str) -> ValueError:
    older = [step for step in _steps(path.parent) if step < int(path.name)]
    then = f"continue from step {older[-1]}" if older else "start over"
    export = path.parents[1] / EXPORT  # a run with it and without a checkpoint is not begun again
    more = f" and {export}" if export.exists() and not older else ""
    return ValueError(
        f"the checkpoint {path} cannot be read: {why}\nDelete that directory{more} to {then}"
    )
