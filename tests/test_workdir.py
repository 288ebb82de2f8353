"""One run at a time has a workdir, and rows that are lost from it are told."""

import errno
import gc
import json
import signal
import subprocess
import sys
import threading

import jax
import pytest
import tiny

from gopd_jax import train, workdir

HOLD = """
import sys, time
from gopd_jax import workdir
workdir.PATIENCE = 0.1
held = workdir.hold(sys.argv[1])
print(1)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds tmp_path/run until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-uc", f"{HOLD}time.sleep(600)", str(tmp_path / "run")],
        env=tiny.environment(1),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "1\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(workdir, "PATIENCE", 0.1)


def test_a_workdir_is_one_process_s_until_that_ends_however_it_does(tmp_path, other, capsys):
    with pytest.raises(ValueError, match=f"another run is under way in {tmp_path}/run; wait for"):
        workdir.hold(tmp_path / "run")
    assert "waiting 0.1 seconds for its end" in capsys.readouterr().err
    assert workdir.hold(tmp_path / "another")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert workdir.hold(tmp_path / "run")


def test_a_run_waits_for_one_that_is_about_to_end(tmp_path, other, monkeypatch):
    monkeypatch.setattr(workdir, "PATIENCE", 60)
    threading.Timer(1.5, other.kill).start()
    assert workdir.hold(tmp_path / "run")
    assert other.wait() == -signal.SIGKILL


def test_a_process_may_begin_anew_and_lets_go_with_its_last_run(tmp_path):
    first = workdir.hold(tmp_path / "run")
    assert workdir.hold(f"{tmp_path}/run") is first
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    options = {"env": tiny.environment(1), "capture_output": True, "text": True}
    assert "another run is under way" in subprocess.run(command, **options).stderr
    del first
    gc.collect()
    assert subprocess.run(command, **options).stdout == "1\n"


def test_the_run_of_another_process_is_refused_before_its_files_are_read(tmp_path, other):
    tiny.build(tmp_path)
    with pytest.raises(ValueError, match=f"another run is under way in {tmp_path}/run; wait for"):
        train.begin(tiny.config(tmp_path))
    assert [path.name for path in (tmp_path / "run").iterdir()] == [workdir.LOCK]


def test_where_nothing_can_be_written_the_cure_is_another_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nothing can be written to .*file/run .*config.workdir"):
        workdir.hold(tmp_path / "file" / "run")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(workdir.fcntl, "flock", refuse)
    assert workdir.hold(tmp_path / "run")
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {tmp_path}/run cannot be locked (No locks available)")


def test_only_the_first_process_holds_and_all_refuse_together(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(workdir.processes, "largest", lambda n: 1)
    with pytest.raises(ValueError, match="the first process cannot have"):
        workdir.hold(tmp_path / "run")
    monkeypatch.setattr(workdir.processes, "largest", lambda n: n)
    assert workdir.hold(tmp_path / "run") is None
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([1, 2, 3], None),
        ([1, 3], "lacks the rows of 1 of 3 steps (2):"),
        ([], "lacks the rows of 3 of 3 steps (1, 2, 3):"),
    ],
)
def test_rows_that_are_lost_are_told(tmp_path, steps, said):
    whole(tmp_path)
    put(tmp_path / "metrics.jsonl", [{"step": n} for n in steps])
    found = workdir.rows_lost(tmp_path, 3)
    assert found is None if said is None else f"metrics.jsonl {said}" in found


def put(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def whole(path):
    """What a run of three steps has written."""
    for name in ("metrics.jsonl", "timing.jsonl"):
        put(path / name, [{"step": n} for n in (1, 2, 3)])
    for name in ("evaluation.jsonl", "samples.jsonl"):
        rows = [(0, "teacher:math"), (0, "student"), (3, "student")]
        put(path / name, [{"step": n, "model": model} for n, model in rows])


@pytest.mark.parametrize("name", workdir.metrics.ROWS)
def test_a_file_that_is_gone_or_cut_short_is_told(tmp_path, name):
    whole(tmp_path)
    assert workdir.rows_lost(tmp_path, 3) is None
    lines = (tmp_path / name).read_text().splitlines(keepends=True)
    (tmp_path / name).write_text(lines[0])
    cut = workdir.rows_lost(tmp_path, 3)
    assert cut.startswith(f"warning: {name} lacks ")
    (tmp_path / name).unlink()
    gone = workdir.rows_lost(tmp_path, 3)
    assert gone.startswith(f"warning: {name} lacks ")
    assert workdir.rows_lost(tmp_path / "new", 0) is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_a_step_that_is_there_twice_is_an_error(tmp_path, name):
    whole(tmp_path)
    put(tmp_path / name, [{"step": n} for n in (1, 2, 2, 3)])
    with pytest.raises(ValueError, match=f"{name} has two rows of step 2; delete one"):
        workdir.rows_lost(tmp_path, 3)


@pytest.mark.parametrize("name", workdir.metrics.ROWS)
def test_a_damaged_row_is_an_error_with_its_place(tmp_path, name):
    (tmp_path / name).write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=f"{name}:2 is not a JSON object"):
        workdir.rows_lost(tmp_path, 0)
