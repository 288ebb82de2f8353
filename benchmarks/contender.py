"""The other side of `python -m benchmarks.speed`: a process that makes a step whenever it is asked.

Standard library only, so that a peer's own virtual environment can import it. A contender is
started with the workload as JSON in its first argument, warms up, says so in one line of JSON, and
answers each line of its input with one of {phase: seconds}, `step` among them.
"""

import json
import re
import sys
import time
from pathlib import Path


def workload() -> dict:
    """{student: {hidden, ..}, teacher: {..}, vocab, rows, prompt, new}, from the command line."""
    return json.loads(sys.argv[1])


class Watch:
    """Seconds of the phases of one step, each from the end of the one before."""

    def __init__(self):
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now

    def all(self) -> dict[str, float]:
        return self.seconds | {"step": time.perf_counter() - self.start}


def serve(step, told: dict, *, warmup: int = 2, to=None) -> None:
    """Answer until the input ends. step: () -> {phase: seconds}; told: for the first line, which
    also has start_mib, the peak so far; the answers' peak_mib is that of the steps since.

    to: the answers' stream, where standard output is something else's.
    """
    for _ in range(warmup):
        step()
    _say(told | {"start_mib": peak_mib()}, to)
    forget_peak()
    for _ in sys.stdin:
        _say(step() | {"peak_mib": peak_mib()}, to)


def peak_mib() -> float:
    """MiB that lay in memory at most (resident set) since the start or the last forget_peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def forget_peak() -> None:
    """The peak is from now on that of what comes: proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")


def _say(line: dict, to=None) -> None:
    print(json.dumps(line), flush=True, file=to)
