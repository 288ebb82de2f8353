"""The other side of `python -m benchmarks.speed`: a process that makes a step whenever it is asked.

Standard library only, so that a peer's own virtual environment can import it. A contender is
started with the workload as JSON in its first argument, warms up, says so in one line of JSON, and
answers each line of its input with one of {phase: seconds}, `step` among them.
"""

import json
import resource
import sys
import time


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


def serve(step, told: dict, *, warmup: int = 2) -> None:
    """Answer until the input ends. step: () -> {phase: seconds}; told: for the first line."""
    for _ in range(warmup):
        step()
    _say(told)
    for _ in sys.stdin:
        _say(step() | {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def _say(line: dict) -> None:
    print(json.dumps(line), flush=True)
