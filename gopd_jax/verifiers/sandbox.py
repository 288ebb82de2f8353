"""Long-lived worker processes that run untrusted Python, one forked child for each job.

worker.py says how a child is confined. Here: workers are started when first needed, as many as
there are cores; each has one job at a time; a dead or silent worker is replaced and its job tried
again; all end with this process. Starting an interpreter for each job would cost 20 ms, and
forking this process is unsafe, as JAX is multithreaded: a worker's fork takes about 1 ms.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from pathlib import Path

MAX_WORKERS = 16
START_S = 120.0  # a worker starts in 0.1 s; this is for a machine in trouble
GRACE_S = 30.0  # a worker answers by itself within wall_s; later than this it is taken for dead
N_TRIES = 3  # of a job whose worker dies


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """source defines entry, which is called once for each element of args."""

    source: str
    entry: str
    args: Sequence[list]
    cpu_s: int  # of processor time, whatever else the machine does
    wall_s: float
    memory_mb: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a child wrote, unread and untrusted, and how it ended.

    stopped is None where it ended by itself, "wall" or "output" where it was over a limit, "dead"
    where its worker died with it N_TRIES times; status is an exit code, or minus a signal.
    """

    output: str
    stopped: str | None
    status: int


class _Silent(Exception):
    """A worker died, or did not answer in time."""


class _Worker:
    """One worker process and the socket to it."""

    def __init__(self):
        self._socket, theirs = socket.socketpair()
        # Not -I: hash randomisation would let the order of a set, and so a verdict, differ between
        # runs, and -I ignores PYTHONHASHSEED. -s -S -P and an empty environment isolate as well.
        environment = {"PYTHONHASHSEED": "0"}
        if path := os.environ.get("LD_LIBRARY_PATH"):
            environment["LD_LIBRARY_PATH"] = path
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", str(Path(__file__).with_name("worker.py"))],
                stdin=theirs,
                stdout=theirs,
                env=environment,
                start_new_session=True,  # Ctrl-C is this process's to handle
            )
        self._buffer = bytearray()
        self.overdue = time.monotonic() + START_S

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, job: Job) -> None:
        """Hand over a job. The worker is idle, so it reads at once."""
        self._socket.settimeout(GRACE_S)
        self.overdue = time.monotonic() + job.wall_s + GRACE_S
        try:
            self._socket.sendall(json.dumps(dataclasses.asdict(job)).encode() + b"\n")
        except OSError:
            self.overdue = 0.0  # it is dead, and the next wait finds it so

    def receive(self, *, wait: bool = False) -> dict | None:
        """The answer, or None where it is not all there and `wait` is False."""
        while not self._buffer.endswith(b"\n"):
            self._socket.settimeout(max(self.overdue - time.monotonic(), 0.001) if wait else 0)
            try:
                data = self._socket.recv(1 << 18)
            except BlockingIOError:
                return None
            except OSError as error:
                raise _Silent from error
            if not data:
                raise _Silent
            self._buffer += data
        answer = json.loads(self._buffer)
        self._buffer.clear()
        return answer

    def end(self) -> None:
        self._socket.close()
        self.process.kill()
        self.process.wait()


class Sandbox:
    """Workers, started when first needed. Safe to use from several threads, one batch at a time."""

    def __init__(self, n_workers: int | None = None):
        if n_workers is None:
            n_workers = min(_n_cores(), MAX_WORKERS)
        self._n_workers = n_workers
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcome of every job, in order. RuntimeError where no worker can be started."""
        with self._lock:
            try:
                return self._run(jobs)
            except BaseException:
                self._end()  # answers still under way would be taken for those of the next batch
                raise

    def close(self) -> None:
        """End the workers. The next run starts new ones."""
        with self._lock:
            self._end()

    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers]

    def _run(self, jobs: Sequence[Job]) -> list[Outcome]:
        self._start(min(self._n_workers, len(jobs)))
        outcomes: dict[int, Outcome] = {}
        waiting, tries = deque(range(len(jobs))), Counter()
        job_of: dict[_Worker, int] = {}
        while len(outcomes) < len(jobs):
            for worker in self._workers:
                if waiting and worker not in job_of:
                    job_of[worker] = waiting.popleft()
                    worker.send(jobs[job_of[worker]])
            for worker, answer in _wait(job_of):
                row = job_of.pop(worker)
                if answer is not None:
                    outcomes[row] = Outcome(**answer)
                    continue
                self._workers.remove(worker)
                worker.end()
                tries[row] += 1
                if tries[row] < N_TRIES:
                    waiting.append(row)
                else:
                    outcomes[row] = Outcome(output="", stopped="dead", status=0)
                self._start(min(self._n_workers, len(job_of) + len(waiting)))
        return [outcomes[row] for row in range(len(jobs))]

    def _start(self, n: int) -> None:
        """Have at least n workers."""
        new = [_Worker() for _ in range(n - len(self._workers))]
        self._workers += new
        for worker in new:
            try:
                hello = worker.receive(wait=True)
            except _Silent:
                raise RuntimeError(
                    "the sandbox for code verdicts needs a POSIX system and does not start here; "
                    f"run by hand, to see why: {' '.join(worker.process.args)}"
                ) from None
            _warn(hello)

    def _end(self) -> None:
        for worker in self._workers:
            worker.end()
        self._workers.clear()


def _wait(workers: Iterable[_Worker]) -> list[tuple[_Worker, dict | None]]:
    """The busy workers that have answered, with None for those dead or overdue. Waits for one."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            selector.register(worker, selectors.EVENT_READ)
        left = min(worker.overdue for worker in workers) - time.monotonic()
        ready = [key.fileobj for key, _ in selector.select(max(left, 0.0))]
    done = []
    for worker in workers:
        try:
            answer = worker.receive() if worker in ready else None
            if answer is not None or time.monotonic() >= worker.overdue:
                done.append((worker, answer))
        except _Silent:
            done.append((worker, None))
    return done


def _warn(hello: dict) -> None:
    """Say, once, which walls of the sandbox this machine does not give."""
    if hello["stopped"] or hello["status"]:
        raise RuntimeError(f"the sandbox's first child did not end well: {hello}")
    missing = json.loads(hello["output"])["missing"]
    # Without a socket call there is no network to leave.
    if "seccomp" in missing and not hello["offline"]:
        missing.append("a network namespace")
    if missing:
        warnings.warn(
            f"the sandbox for code verdicts has no {', '.join(missing)} on this machine; use "
            "Linux on x86_64 or aarch64 for completions that you do not trust",
            RuntimeWarning,
            stacklevel=2,
        )


def _n_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_shared: Sandbox | None = None
_shared_lock = threading.Lock()


def shared() -> Sandbox:
    """This process's sandbox, ended at exit. A forked copy of the process gets one of its own."""
    global _shared
    with _shared_lock:
        if _shared is None:
            _shared = Sandbox()
            atexit.register(close)
            os.register_at_fork(after_in_child=_forget)
        return _shared


def close() -> None:
    """End the workers of the shared sandbox, if there are any. The next use starts new ones."""
    if _shared is not None:
        _shared.close()


def _forget() -> None:
    global _shared, _shared_lock
    _shared, _shared_lock = None, threading.Lock()
