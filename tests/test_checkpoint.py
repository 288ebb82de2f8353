"""Checkpoints come back bit for bit on any mesh, or are refused with the reason."""

import asyncio
import gc
import logging
import os
import re
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gopd_jax import checkpoint
from gopd_jax.types import TrainState

IDENTITY = {"seed": "0", "objective.lam": "1.25", "model student": "ab12"}


def state_on(mesh, step=3):
    """A TrainState with a sharded, a replicated and an optimizer's array, of odd values."""
    rng = np.random.default_rng(step)
    put = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, P(*axes)))  # noqa: E731
    params = {
        "embed": put(rng.standard_normal((64, 64)).astype(np.float32), "tensor", "fsdp"),
        "norm": put(np.float32([np.nan, -0.0, np.inf, 1e-45, 1, 2, 3, 4])),
    }
    moments = {"embed": put(rng.standard_normal((64, 64)).astype(np.float32), None, "fsdp")}
    return TrainState(put(np.int32(step)), params, (put(np.int32(step)), moments))


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def bits(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def write(workdir, *states, keep=2):
    with checkpoint.open_manager(workdir, keep=keep) as manager:
        for state in states:
            checkpoint.save(manager, int(state.step), state, IDENTITY)
        checkpoint.wait(manager)


def files(directory):
    """Every file's bytes and every directory, to tell whether anything changed."""
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None
        for p in sorted(directory.rglob("*"))
    }


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (1, 2, 4), (1, 1, 1)], ids=str)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(make_mesh, tmp_path, shape):
    saved = state_on(make_mesh((2, 2, 2)))
    write(tmp_path, saved)
    like = abstract(state_on(make_mesh(shape), step=0))
    got = checkpoint.restore(tmp_path, like, IDENTITY)
    assert bits(got) == bits(saved)
    assert jax.tree.structure(got) == jax.tree.structure(saved)
    for x, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(like)):
        assert x.sharding.is_equivalent_to(wanted.sharding, x.ndim)


def test_what_is_saved_is_the_state_at_the_call_though_its_buffers_are_reused(make_mesh, tmp_path):
    mesh = make_mesh((8, 1, 1))
    state = state_on(mesh, 1)
    want, like = bits(state), abstract(state)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 1, state, IDENTITY)
        for _ in range(50):  # while the writer is at work
            state = jax.block_until_ready(advance(state))
    assert bits(checkpoint.restore(tmp_path, like, IDENTITY)) == want


def test_steps_go_on_while_a_checkpoint_is_written(make_mesh, tmp_path, monkeypatch):
    mesh = make_mesh((8, 1, 1))
    state = state_on(mesh, 1)
    want, like, real = bits(state), abstract(state), os.rename
    done, reached = threading.Event(), threading.Event()

    def rename(*args, **options):  # of the finished directory into its place: the writer's last act
        reached.set()
        done.wait(20)
        return real(*args, **options)

    monkeypatch.setattr(os, "rename", rename)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 1, state, IDENTITY)
        for _ in range(3):
            state = jax.block_until_ready(advance(state))
        assert reached.wait(60)
        assert checkpoint.newest_step(tmp_path) is None
        done.set()
    assert bits(checkpoint.restore(tmp_path, like, IDENTITY)) == want


def test_the_newest_are_kept_and_a_step_is_written_once(make_mesh, tmp_path):
    mesh = make_mesh((8, 1, 1))
    states = [state_on(mesh, step) for step in (2, 4, 6)]
    write(tmp_path, *states)
    assert checkpoint._steps(tmp_path / "checkpoints") == [4, 6]
    other = state_on(mesh, 7).replace(step=jnp.int32(6))
    write(tmp_path, other)
    got = checkpoint.restore(tmp_path, abstract(states[2]), IDENTITY)
    assert bits(got) == bits(states[2]) != bits(other)


def test_a_checksum_tells_every_bit_and_place(make_mesh):
    state = {"x": jnp.arange(24, dtype=jnp.float32).reshape(4, 6), "n": jnp.int32(1)}
    words = np.arange(24, dtype=np.float32).view(np.uint32).astype(object)
    want = sum(int(word) * (2 * i + 1) for i, word in enumerate(words)) % 2**32
    got = checkpoint.checksums(state)
    assert got == {"['n']": 1, "['x']": want}
    flipped = state["x"].at[3, 5].set(np.nextafter(np.float32(23), np.float32(24)))
    swapped = state["x"].at[0, :2].set(state["x"][0, 1::-1])
    negative = state["x"].at[0, 0].set(-0.0)
    for x in (flipped, swapped, negative):
        assert checkpoint.checksums({"x": x})["['x']"] != want
    meshes = [make_mesh(shape) for shape in ((2, 2, 2), (1, 1, 1))]
    assert len({str(checkpoint.checksums(state_on(mesh))) for mesh in meshes}) == 1


def test_there_is_nothing_to_restore_in_a_new_workdir(make_mesh, tmp_path):
    like = abstract(state_on(make_mesh((8, 1, 1))))
    assert checkpoint.restore(tmp_path / "none", like, IDENTITY) is None
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    assert checkpoint.restore(tmp_path, like, IDENTITY) is None
    assert not (tmp_path / "none").exists()


def test_restoring_writes_nothing_and_opening_clears_half_written_ones(make_mesh, tmp_path):
    state = state_on(make_mesh((8, 1, 1)))
    write(tmp_path, state)
    half_written = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    (half_written / "state").mkdir(parents=True)
    before = files(tmp_path)
    assert bits(checkpoint.restore(tmp_path, abstract(state), IDENTITY)) == bits(state)
    with pytest.raises(ValueError, match="another run"):
        checkpoint.restore(tmp_path, abstract(state), {})
    assert files(tmp_path) == before
    write(tmp_path)
    deadline = time.monotonic() + 10
    while half_written.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not half_written.exists()
    assert checkpoint._steps(tmp_path / "checkpoints") == [3]


def test_another_run_is_refused_by_naming_what_differs(make_mesh, tmp_path):
    state = state_on(make_mesh((8, 1, 1)))
    write(tmp_path, state)
    now = {"seed": "0", "objective.lam": "1.5", "data.train content": "ff"}
    with pytest.raises(ValueError) as error:
        checkpoint.restore(tmp_path, abstract(state), now)
    assert str(error.value).splitlines() == [
        f"{tmp_path}/checkpoints/3 is of another run:",
        "  data.train content: nothing in the checkpoint, ff now",
        "  model student: ab12 in the checkpoint, nothing now",
        "  objective.lam: 1.25 in the checkpoint, 1.5 now",
        "Undo the changes to continue it, or give another --config.workdir to start anew",
    ]


def truncate(step):
    for file in step.glob("state/**/*"):
        if file.is_file() and "d/" in str(file.relative_to(step)):
            file.write_bytes(file.read_bytes()[:-20])


def zero(step):
    """The largest file; every read of an array fails then."""
    file = max((f for f in step.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))


def flip(step):
    """One bit within an array of the largest file: zstd and Orbax do not see it.

    A quarter in: halfway may lie between two arrays, and at the end are bytes that nobody reads.
    """
    file = max((f for f in step.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    assert "d" in file.relative_to(step).parts
    content = bytearray(file.read_bytes())
    content[len(content) // 4] ^= 1
    file.write_bytes(content)


def unlink(pattern):
    def damage(step):
        found = [file for file in step.glob(pattern) if file.is_file()]
        assert found
        for file in found:
            file.unlink()

    return damage


def garble(step):
    (step / "identity" / "metadata").write_text('{"seed": ')


def test_a_read_that_nobody_waits_for_is_not_printed_and_another_error_is(caplog):
    """Which of Orbax's reads is still awaited where one fails is a race between threads."""

    def forget(error):
        loop = asyncio.new_event_loop()
        loop.create_future().set_exception(error)
        gc.collect()
        loop.close()

    with checkpoint._one_error():
        forget(ValueError("OUT_OF_RANGE: Error reading .zarray [tensorstore_spec='{}']"))
        forget(ValueError("of something else"))
    (record,) = caplog.records
    assert "of something else" in record.getMessage()


@pytest.mark.parametrize(
    "damage",
    [truncate, zero, flip, unlink("state/**/*"), unlink("identity/*"), unlink("**/*"), garble],
    ids=["truncated", "zeros", "flipped", "no state", "no identity", "empty", "garbled identity"],
)
def test_a_damaged_checkpoint_is_named_with_the_cure(make_mesh, tmp_path, caplog, capfd, damage):
    mesh = make_mesh((8, 1, 1))
    older, newest = state_on(mesh, 2), state_on(mesh, 4)
    write(tmp_path, older, newest)
    damage(tmp_path / "checkpoints" / "4")
    before = files(tmp_path)
    for cure in ("continue from step 2", "start over"):
        said = re.escape(f"{tmp_path}/checkpoints/4 cannot be read: ")
        # In one line, and not TensorStore's whole description of an array.
        said += f".{{1,{800 + len(str(tmp_path))}}}\nDelete that directory to {cure}$"
        with pytest.raises(ValueError, match=said):
            checkpoint.restore(tmp_path, abstract(newest), IDENTITY)
        assert files(tmp_path) == before
        gc.collect()  # what Orbax left unread would be said here
        assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
        assert capfd.readouterr().err == ""
        if cure != "start over":
            (tmp_path / "checkpoints" / "2").rename(tmp_path / "moved")
            before = files(tmp_path)


def test_to_start_over_the_export_of_a_finished_run_has_to_go_too(make_mesh, tmp_path):
    state = state_on(make_mesh((8, 1, 1)), 2)
    write(tmp_path, state)
    (tmp_path / checkpoint.EXPORT).mkdir()
    truncate(tmp_path / "checkpoints" / "2")
    cure = f"Delete that directory and {tmp_path}/export to start over$"
    with pytest.raises(ValueError, match=cure):
        checkpoint.restore(tmp_path, abstract(state), IDENTITY)


FULL = """
import resource, sys
import jax.numpy as jnp, numpy as np
from gopd_jax import checkpoint
draw = np.random.default_rng(0).standard_normal
state = {f"a{i}": jnp.asarray(draw((256, 256)), jnp.float32) for i in range(8)}
with checkpoint.open_manager(sys.argv[1], keep=4) as manager:
    checkpoint.save(manager, 1, state, {})
# The largest size of any one file, as if the disk were full.
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
for notice in (checkpoint.wait, lambda _: None, lambda m: checkpoint.save(m, 3, state, {})):
    try:
        with checkpoint.open_manager(sys.argv[1], keep=4) as manager:
            checkpoint.save(manager, 2, state, {})
            notice(manager)
    except checkpoint.NotSaved as error:
        print(error)
print(checkpoint.steps(sys.argv[1]))
"""


def test_a_checkpoint_that_cannot_be_written_is_told_in_two_lines_whenever_it_is_noticed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)],
        env=tiny.environment(1) | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    *said, steps = done.stdout.splitlines()
    for why, cure in zip(said[::2], said[1::2], strict=True):
        assert why.startswith(f"a checkpoint in {tmp_path}/checkpoints could not be written: ")
        assert "File too large" in why
        assert cure.endswith("the same command then continues from step 1")
    assert (len(said), steps) == (6, "[1]")
