"""The walls of the sandbox, each without the others, and the life of its workers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from judging import SUM, judge, record, returns, workers_end  # noqa: F401

from gopd_jax.verifiers import sandbox, verify
from gopd_jax.verifiers.sandbox import Job, Sandbox

DRIVER = """
import ctypes, importlib.util, json, socket, sys
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
job = json.loads(sys.argv[2])
program = worker.seccomp_program()
if sys.argv[3] == "kernel":
    worker._audit = lambda permitted: lambda event, args: None
if sys.argv[3] in ("audit", "nothing"):
    program = None
    worker.resource.setrlimit = lambda *a: None
if sys.argv[3] == "nothing":
    worker._audit = lambda permitted: lambda event, args: None
print(json.dumps(worker.judge(job, ctypes.CDLL(None), program)))
"""
WAYS = {
    "read": "open('/proc/self/status').read()",
    "socket": "sys.modules['socket'].socket()",
    "fork": "os.fork() or os._exit(0)",
    "kill": "os.kill(os.getppid(), 0)",
    "remove": "os.remove('/nowhere/at/all')",
    "pipe": "os.pipe()",
    "duplicate": "os.dup(1)",
    "thread": "sys.modules['_thread'].start_new_thread(int, ())",
}
FREE_OF_AUDIT = {"pipe", "duplicate", "thread"}  # not every Python reports these; they do no harm


def _each_way(walls):
    """What each of WAYS raises with only some walls standing, "" where it succeeds."""
    lines = ["import sys\nos = sys.modules['os']", "said = {}", "def f():"]
    for name, way in WAYS.items():
        lines += [f"    try: said[{name!r}] = ''; {way}"]
        lines += [f"    except Exception as e: said[{name!r}] = type(e).__name__ + str(e)"]
    job = {"source": "\n".join([*lines, "    return said"]), "entry": "f", "args": [[]]}
    job |= {"cpu_s": 5, "wall_s": 20.0, "memory_mb": 256}
    path = Path(sandbox.__file__).with_name("worker.py")
    command = [sys.executable, "-sSP", "-c", DRIVER, str(path), json.dumps(job), walls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(json.loads(done.stdout)["output"])["value"]


def test_the_kernel_refuses_without_the_audit_hook():
    said = _each_way("kernel")
    assert all(said.values()), said
    assert "not permitted in the sandbox" not in str(said)
    # Lowered limits alone would say EMFILE and EAGAIN: the filter answers first.
    assert "Operation not permitted" in said["socket"]
    assert "Operation not permitted" in said["fork"]


def test_the_audit_hook_refuses_without_the_kernel():
    said = _each_way("audit")
    refused = {name for name, text in said.items() if "not permitted in the sandbox" in text}
    assert refused >= WAYS.keys() - FREE_OF_AUDIT, said


def test_without_walls_the_same_ways_are_open():
    said = _each_way("nothing")
    refused = {name for name, text in said.items() if text}
    # Another user's process and a missing file are refused anywhere.
    assert refused <= {"kill", "remove"}, said


def test_the_source_is_never_told_what_is_wanted(monkeypatch):
    told = []
    run = Sandbox.run
    monkeypatch.setattr(Sandbox, "run", lambda self, jobs: told.extend(jobs) or run(self, jobs))
    assert judge("def f(x): return 'wanted-7f3a'", returns("wanted-7f3a", 1)).score == 1.0
    (job,) = told
    without_source = dataclasses.replace(job, source="")
    assert "wanted-7f3a" not in json.dumps(dataclasses.asdict(without_source))


def _job(text, **limits):
    limits = {"cpu_s": 1, "wall_s": 2.0, "memory_mb": 256} | limits
    return Job(source=text, entry="f", args=[[]], **limits)


def test_hashes_and_random_numbers_are_the_same_in_every_worker():
    text = "import random\ndef f(): return [hash('abc'), random.random()]"
    outputs = []
    for _ in range(2):
        alone = Sandbox(1)
        outputs += [alone.run([_job(text), _job(text)])]
        alone.close()
    assert len({outcome.output for pair in outputs for outcome in pair}) == 1
    assert "value" in outputs[0][0].output


def test_equal_rows_run_once_and_all_get_the_verdict(monkeypatch):
    n_jobs = []
    run = Sandbox.run
    monkeypatch.setattr(
        Sandbox, "run", lambda self, jobs: n_jobs.append(len(jobs)) or run(self, jobs)
    )
    good, bad = "def f(x): return sum(x)", "def f(x): return 1"
    verdicts = verify([good, bad] * 8, [record("code", SUM)] * 16)
    assert [v.score for v in verdicts] == [1.0, 0.0] * 8
    assert n_jobs == [2]


def test_killed_workers_are_replaced():
    good = ["def f(x): return sum(x)", "def f(x): return sum(x) + 0"]
    verify(good, [record("code", SUM)] * 2)
    before = sandbox.shared().pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    assert [v.score for v in verify(good, [record("code", SUM)] * 2)] == [1.0, 1.0]
    assert not set(before) & set(sandbox.shared().pids())


def _children(pid):
    """Process ids whose parent is pid."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def _until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_worker_killed_at_work_takes_its_child_along(monkeypatch):
    monkeypatch.setattr(sandbox, "N_TRIES", 1)
    alone, outcomes = Sandbox(1), []
    job = _job("import time\ndef f(): time.sleep(60)", wall_s=120.0)
    alone.run([_job("def f(): return 1")])  # past the trial child of the worker's start
    (worker,) = alone.pids()
    thread = threading.Thread(target=lambda: outcomes.extend(alone.run([job])))
    thread.start()
    _until(lambda: _children(worker))
    (child,) = _children(worker)
    os.kill(worker, signal.SIGKILL)
    _until(lambda: not _running(child))
    thread.join(timeout=30)
    assert outcomes[0].stopped == "dead"
    assert worker not in alone.pids()
    alone.close()
    assert alone.pids() == []


def _running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_stopped_worker_is_replaced(monkeypatch):
    monkeypatch.setattr(sandbox, "GRACE_S", 0.2)
    alone = Sandbox(1)
    alone.run([_job("def f(): return 1")])
    before = alone.pids()
    os.kill(before[0], signal.SIGSTOP)
    started = time.monotonic()
    outcomes = alone.run([_job("def f(): return 2", wall_s=0.2)])
    assert time.monotonic() - started < 20.0
    assert outcomes[0].output == '{"value": 2}\n'
    assert alone.pids() != before
    alone.close()


def test_a_job_whose_workers_always_die_is_given_up(monkeypatch):
    killed = []

    def send(self, job):
        killed.append(self.process.pid)
        self.process.kill()

    monkeypatch.setattr(sandbox._Worker, "send", send)
    alone = Sandbox(1)
    outcomes = alone.run([_job("def f(): return 1")])
    assert outcomes[0].stopped == "dead"
    assert len(killed) == sandbox.N_TRIES
    alone.close()


def test_a_worker_that_cannot_start_is_an_error_not_a_verdict(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"does not start here.*worker\.py"):
        Sandbox(1).run([_job("def f(): return 1")])


def test_workers_end_with_a_process_that_is_killed():
    text = (
        "import importlib.util, os, sys\n"
        "spec = importlib.util.spec_from_file_location('sandbox', sys.argv[1])\n"
        "sandbox = sys.modules['sandbox'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sandbox)\n"
        "alone = sandbox.Sandbox(1)\n"
        "alone._start(1)\n"
        "print(alone.pids()[0], flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", text, sandbox.__file__]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    _until(lambda: not _running(int(done.stdout)))


def test_threads_get_their_own_verdicts():
    verdicts = {}

    def work(n):
        completions = [f"def f(x): return sum(x) + {i % 2} * {n}" for i in range(20)]
        verdicts[n] = verify(completions, [record("code", SUM)] * 20)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for n in (1, 2, 3):
        assert [v.score for v in verdicts[n]] == [1.0, 0.0] * 10
        assert f"returned {6 + n} where" in verdicts[n][1].reason
