"""Two processes with four devices each are one run: same numbers, each its own rows and shards."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from gopd_jax.checkpoint import _steps
from gopd_jax.models import hf

FLAGS = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.evaluation.every=3")
LOCAL = tiny.REPOSITORY / "launch" / "local.sh"


def launched(root, *arguments, n=2, n_devices=4, **environment):
    """launch/local.sh in a session of its own."""
    return subprocess.Popen(
        [LOCAL, str(n), "--", f"--config={root / 'preset.py'}", *FLAGS, *arguments],
        env=tiny.environment(n_devices) | {"PYTHON": sys.executable} | environment,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def two(root, *arguments):
    process = launched(root, *arguments, XLA_FLAGS=tiny.CHEAP)
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 0, err
    return out, err


def one(root, *arguments):
    done = tiny.run(root, *FLAGS, *arguments, n_devices=8, XLA_FLAGS=tiny.CHEAP)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_run(got, want):
    """Rows to rounding (the all-reduces sum in another order), parameters likewise."""
    rows, wanted = read(got / "metrics.jsonl"), read(want / "metrics.jsonl")
    assert [row.keys() for row in rows] == [row.keys() for row in wanted]
    for row, other in zip(rows, wanted):
        # The sum's order rounds in proportion to the loss: a float32 of 3 to 8 has steps of 2.4e-7
        # and 4.8e-7, and six of them were seen.
        np.testing.assert_allclose(row["loss"], other["loss"], rtol=1e-6, atol=0)
        for key in ("tokens", "length", "truncated", "step"):
            assert row[key] == other[key]
        for key in row:
            np.testing.assert_allclose(row[key], other[key], rtol=2e-5, atol=2e-5, err_msg=key)
    assert (got / "evaluation.jsonl").read_bytes() == (want / "evaluation.jsonl").read_bytes()
    assert (got / "samples.jsonl").read_bytes() == (want / "samples.jsonl").read_bytes()
    a, b = (hf.load_params(path / "export", tiny.CFG) for path in (got, want))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=2e-5), a, b)


def same_preflight(got, want):
    """The same checks of the same rows; their values are written to four digits."""
    found, wanted = (json.loads((path / "preflight.json").read_text()) for path in (got, want))
    assert found["example"] == wanted["example"]
    assert len(found["checks"]) == len(wanted["checks"]) > 10
    for check, other in zip(found["checks"], wanted["checks"]):
        assert (check["role"], check["name"]) == (other["role"], other["name"])
        if check["name"] == "its log-probs":  # in hundredths, which rounding may tip over
            assert len(check["value"]) == len(other["value"]) == 12
        elif not check["limit"].startswith("at "):
            assert check == other
        elif check["role"] != "student":  # there, rounding itself is what is measured
            a, b = float(check["value"]), float(other["value"])
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models and data."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.build(root)
    preset = root / "preset.py"
    # Adam divides by the gradient's size, which would turn rounding of tiny gradients into steps.
    preset.write_text(preset.read_text().replace("learning_rate=1e-2", "learning_rate=1e-3"))
    return root


@pytest.mark.slow
def test_two_processes_train_the_same_student_and_each_continues_the_other(root, tmp_path):
    uninterrupted = tmp_path / "one"
    one(root, f"--config.workdir={uninterrupted}", "--config.preflight=warn")
    for workdir, first, then in (("a", two, one), ("b", one, two)):
        flag = f"--config.workdir={tmp_path}/{workdir}"
        _, err = first(root, flag, "--config.steps=3", "--config.preflight=warn")
        assert "Traceback" not in err
        same_preflight(tmp_path / workdir, uninterrupted)
        out, err = then(root, flag, "--config.preflight=warn")
        assert f"continuing {tmp_path}/{workdir} after step 3" in err
        assert "Traceback" not in err
        same_run(tmp_path / workdir, uninterrupted)
    (last,) = [line for line in out.splitlines() if "continue with" in line]
    assert last.startswith(f"0: report: {tmp_path}/b/report.html")
    # Each process wrote shards: Orbax keeps them apart by process.
    newest = tmp_path / "b" / "checkpoints" / "6" / "state"
    assert {p.name for p in newest.glob("ocdbt.process_*")} == {
        "ocdbt.process_0",
        "ocdbt.process_1",
    }


@pytest.mark.slow
def test_sigterm_to_the_launcher_stops_all_processes_at_one_step(root, tmp_path):
    workdir = tmp_path / "run"
    flags = (f"--config.workdir={workdir}", "--config.steps=400")
    process = launched(root, *flags)
    while not _steps(workdir / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 143, err
    (last,) = _steps(workdir / "checkpoints")[-1:]
    assert f"0: stopped after step {last} of 400; continue with: " in out
    assert "Traceback" not in err
    rows = read(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, last + 1))


@pytest.mark.slow
def test_a_process_that_dies_takes_the_others_with_it(root, tmp_path):
    workdir = tmp_path / "run"
    process = launched(root, f"--config.workdir={workdir}", "--config.steps=400")
    while not _steps(workdir / "checkpoints"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    pids = subprocess.run(
        ["pgrep", "-P", str(process.pid), "-f", "gopd_jax.main"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert len(pids) == 2
    os.kill(int(pids[1]), signal.SIGKILL)
    process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 137
    for pid in pids:
        assert not os.path.exists(f"/proc/{pid}")


def test_the_launcher_passes_wrong_input_on_and_refuses_wrong_use(root):
    process = launched(root, "--config.optimizer.schedule=x")
    _, err = process.communicate(timeout=tiny.TIMEOUT)
    assert process.returncode == 2
    said = [line for line in err.splitlines() if "optimizer.schedule is 'x'" in line]
    assert sorted(line[:3] for line in said) == ["0: ", "1: "]
    for arguments in ((), ("2",), ("0", "--", "--config=x"), ("2", "--config=x")):
        done = subprocess.run([LOCAL, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: ")


@pytest.mark.parametrize("flag", ["--processes=2", "--process=0"])
def test_one_of_several_processes_has_to_be_told_where_they_meet(root, flag):
    done = tiny.run(root, flag, f"--config.workdir={root}/alone")
    assert done.returncode == 2
    assert f"{flag} without others to meet: give --coordinator=HOST:PORT" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (root / "alone").exists()
