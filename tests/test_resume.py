"""The command killed at any moment and given again: its files are the uninterrupted run's."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny

from gopd_jax.checkpoint import _steps

FILES = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl")
FLAGS = ("--config.steps=24", "--config.checkpoints.every=3", "--config.evaluation.every=8")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models and data, and the uninterrupted run in root/run."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.build(root)
    done = tiny.run(root, *FLAGS)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def begin(root, tmp_path):
    """Start the command in a workdir of the test's own; what still runs is killed at the end."""
    started = []

    def begin():
        process = tiny.start(root, *FLAGS, f"--config.workdir={tmp_path}/run")
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(condition, process):
    """Wait for it as closely as Python can."""
    deadline = time.monotonic() + tiny.TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill(process, number=signal.SIGKILL):
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    return process.returncode, out, err


def finish(process):
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    return out, err


def same(workdir, want):
    for name in (*FILES, "export/model.safetensors"):
        assert (workdir / name).read_bytes() == (want / name).read_bytes(), name


def saved(workdir):
    return _steps(workdir / "checkpoints")


@pytest.mark.slow
def test_a_kill_during_an_asynchronous_save_costs_only_what_came_after_the_last_one(
    root, tmp_path, begin
):
    workdir = tmp_path / "run"
    process = begin()
    until(lambda: 3 in saved(workdir), process)
    half_written = workdir / "checkpoints" / "6.orbax-checkpoint-tmp"
    until(half_written.exists, process)
    assert kill(process)[0] == -signal.SIGKILL
    assert half_written.exists()
    assert saved(workdir) == [3]
    _, err = finish(begin())
    assert f"continuing {workdir} after step 3" in err
    assert not list((workdir / "checkpoints").glob("*tmp*"))
    same(workdir, root / "run")


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(root, tmp_path, begin):
    workdir, draw = tmp_path / "run", random.Random(0)
    resumed = []
    while (before := saved(workdir))[-1:] != [24]:
        process = begin()
        until(lambda seen=before: saved(workdir)[-1:] > seen[-1:], process)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is None:
            kill(process)
        resumed.append(saved(workdir)[-1])
    finish(begin())
    assert len(resumed) >= 2, resumed
    same(workdir, root / "run")


@pytest.mark.slow
def test_sigterm_and_then_ctrl_c_end_after_the_step_in_hand_with_the_command(root, tmp_path, begin):
    workdir = tmp_path / "run"
    process = begin()
    until(lambda: 3 in saved(workdir), process)
    code, out, err = kill(process, signal.SIGTERM)
    (last,) = saved(workdir)[-1:]
    assert code == 143
    assert (
        f"stopped after step {last} of 24; continue with: python -m gopd_jax.main --config=" in out
    )
    assert out.strip().endswith(f"--config.workdir={workdir}")
    assert f"stopping after step {last}: saving" in err
    assert "Traceback" not in err
    process = begin()
    until(lambda: saved(workdir)[-1] > last, process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to every process of the command
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 130
    assert f"stopped after step {saved(workdir)[-1]} of 24" in out
    assert "Traceback" not in err
    finish(begin())
    same(workdir, root / "run")


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_and_one_before_the_export(root, tmp_path, begin):
    workdir = tmp_path / "run"
    process = begin()
    metrics = workdir / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.stat().st_size, process)
    kill(process)
    assert saved(workdir) == []
    process = begin()
    until(lambda: 24 in saved(workdir), process)
    kill(process)
    assert not (workdir / "export").exists()
    out, err = finish(begin())
    assert f"{workdir} is at step 24 of 24: nothing is left to train" in err
    same(workdir, root / "run")
    for part in (f"report: {workdir}/report.html", f"metrics: {workdir}/metrics.jsonl"):
        assert part in out
    assert f"model: {workdir}/export" in out
    (command,) = re.findall(r"continue with: python (.*)", out)
    assert command.endswith("--config.steps=48")
    assert (workdir / "report.html").exists()


@pytest.mark.slow
def test_the_last_line_is_a_command_that_works(root, tmp_path):
    flags = (f"--config.workdir={tmp_path}/run", "--config.steps=2")
    out = tiny.run(root, *flags).stdout
    (command,) = re.findall(r"continue with: python (.*)", out)
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=tiny.environment(),
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "continuing" in done.stderr
    assert [*_steps(tmp_path / "run" / "checkpoints")] == [2, 4]


@pytest.mark.slow
def test_another_run_is_not_continued_and_not_touched(root):
    before = {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()}
    changed = (root / "train.jsonl").read_text()
    (root / "train.jsonl").write_text("\n".join(changed.splitlines()[:-1]))
    done = tiny.run(root, *FLAGS, "--config.objective.lam=2", "--config.seed=1")
    (root / "train.jsonl").write_text(changed)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for line in ("objective.lam: 1.25 in the", "seed: 0 in the checkpoint, 1 now", "data.train"):
        assert f"  {line}" in done.stderr
    assert "Undo the changes to continue it, or give another --config.workdir" in done.stderr
    assert {p: p.read_bytes() for p in (root / "run").rglob("*") if p.is_file()} == before
