"""Seconds, memory and shares of the machine's limits of a step, beside peers and its own variants.

    python -m benchmarks.speed --out=DIR [--only=GROUP ...] [--peer='NAME=COMMAND' ...] [--rounds=7]
                               [--memory]

Each contender is a process of its own (benchmarks/contender.py); those of a group are alive at the
same time and make their steps in turn, so that a busy machine slows all of them alike, and figures
are ratios of medians within a group. DIR/speed.json has every second that was measured, and
DIR/speed.md the tables. With --memory contenders run one after another, each with nothing but what
a run needs, and DIR/memory.json and DIR/memory.md have the peaks of their resident sets, up to the
second step and in the steps after it.

A peer is a command that speaks the contenders' protocol; three are there:

    --peer='torch loop=python benchmarks/peer_torch.py'
    --peer='tunix=VENV/bin/python benchmarks/peer_tunix.py'    # pip install google-tunix==0.1.7
    --peer='trl=VENV/bin/python benchmarks/peer_trl.py'        # pip install trl==1.16.0
"""

import argparse
import dataclasses
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks import workloads

ROOT = Path(__file__).resolve().parents[1]
OURS = [sys.executable, str(ROOT / "benchmarks/ours.py")]
CONSOLE = Console(stderr=True)


def workload(name: str, **changes) -> dict:
    return dataclasses.asdict(workloads.SIZES[name]) | changes


# A head of Qwen3's vocabulary behind a small body: what the vocabulary costs is most of it.
WIDE = workload("tiny", vocab=151_936, rows=8, prompt=16, new=32, head_chunk=8)
# Completions of other lengths, a quarter of the longest in the mean.
RAGGED = workload("small", rows=128, mean_length=32)
ROLLOUT = {"only": "generate"}
# What costs least beside the peers: widths of the cache, and a backward pass that keeps products.
CHOSEN = {"sampling_buckets": 4, "remat": "products"}

# {group: {variant: workload}}; the first one is what the others are divided by.
GROUPS = {
    "tiny": {"gopd_jax": workload("tiny", microbatches=4) | CHOSEN},
    "small": {"gopd_jax": workload("small", microbatches=4) | CHOSEN},
    # In pieces of 8 rows throughout.
    "batch": {
        "32 rows": workload("small", microbatches=4),
        "64 rows": workload("small", rows=64, microbatches=8),
    },
    "length": {
        "64 + 128 tokens": workload("small", microbatches=4),
        "128 + 256 tokens": workload("small", prompt=128, new=256, microbatches=4),
        "64 + 128 tokens, 8 widths, products kept": workload("small", microbatches=4)
        | (CHOSEN | {"sampling_buckets": 8}),
        "128 + 256 tokens, 8 widths, products kept": workload(
            "small", prompt=128, new=256, microbatches=4
        )
        | (CHOSEN | {"sampling_buckets": 8}),
    },
    "remat": {
        "all kept": workload("small", microbatches=4) | (CHOSEN | {"remat": None}),
        "products kept": workload("small", microbatches=4) | CHOSEN,
    },
    "teachers": {
        "1 teacher": workload("small", microbatches=4),
        "2 teachers": workload("small", n_teachers=2, microbatches=4),
    },
    "vocabulary": {
        "V = 4,096": workload("small", microbatches=4),
        "V = 8,192": workload("small", vocab=8192, microbatches=4),
    },
    "devices": {
        "1 device": workload("small", microbatches=4),
        "4 devices": workload("small", devices=4),  # pieces of 8 rows on each, as there
    },
    "exact": {
        "sampled token, lambda 1.25": WIDE | {"lam": 1.25},
        "whole vocabulary, lambda 1.25": WIDE | {"lam": 1.25, "loss": "exact"},
    },
    "slots": {
        "all 128 rows": RAGGED | ROLLOUT,
        "64 slots": RAGGED | ROLLOUT | {"slots": 64},
        "32 slots": RAGGED | ROLLOUT | {"slots": 32},
        "16 slots": RAGGED | ROLLOUT | {"slots": 16},
    },
    "cache": {
        "all slots of the cache": workload("small") | ROLLOUT,
        "of 4 widths": workload("small") | ROLLOUT | {"sampling_buckets": 4},
        "of 4 widths, int8": workload("small")
        | ROLLOUT
        | {"sampling_buckets": 4, "cache_dtype": "int8"},
        "of 4 widths, int8, weights too": workload("small")
        | ROLLOUT
        | {"sampling_buckets": 4, "cache_dtype": "int8", "sampling_dtype": "int8"},
    },
    "buckets": {
        "pieces of full length": RAGGED | {"microbatches": 16, "slots": 32},
        "of 4 widths": RAGGED | {"microbatches": 16, "slots": 32, "buckets": 4},
    },
}
WITH_PEERS = ("tiny", "small")
# {group: pieces of the batch} for --memory: more than above, for steps that take no longer.
PIECES = {"tiny": 8, "small": 16}
# The first run compiles and fills the cache that the next one starts with, as
# `python -m gopd_jax.main` has one.
OURS_IN_MEMORY = ("gopd_jax, first run", "gopd_jax")


class Contender:
    """A process that makes a step when it is asked."""

    def __init__(self, command: list[str], work: dict, log):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*command, json.dumps(work)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=env,
        )
        self.told, self.answers = self._line(), []

    def _line(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args[:2]} ended with {self.process.wait()}")
        return json.loads(line)

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.answers.append(self._line())

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def result(self) -> dict:
        return self.told | {"steps": self.answers}


def race(group: str, peers: dict[str, list[str]], rounds: int, log, advance) -> dict[str, dict]:
    """{contender: what it told, and its steps}, of contenders that take turns."""
    running = {}
    try:
        for name, work in GROUPS[group].items():
            running[name] = Contender(OURS, work, log)
        if group in WITH_PEERS:
            plain = {k: v for k, v in workload(group).items() if k not in ("microbatches",)}
            for name, command in peers.items():
                running[name] = Contender(command, plain, log)
        for _ in range(rounds):
            for one in running.values():
                one.step()
            advance()
    finally:
        for one in running.values():
            one.end()
    return {name: one.result() for name, one in running.items()}


def peaks(group: str, peers: dict[str, list[str]], rounds: int, log, advance) -> dict[str, dict]:
    """{contender: what it told, and its steps}, of contenders that run one after another."""
    found = {}

    def alone(name, command, work):
        one = Contender(command, work, log)
        try:
            for _ in range(rounds):
                one.step()
        finally:
            one.end()
        found[name] = one.result()
        advance(found)

    with tempfile.TemporaryDirectory() as cache:
        of_ours = {"memory": True, "cache": cache, "microbatches": PIECES[group]}
        for name in OURS_IN_MEMORY:
            alone(name, OURS, workload(group, **of_ours))
    for name, command in peers.items():
        alone(name, command, workload(group))
    return found


def whole_peak(result: dict) -> float:
    """MiB of a process at most, from its start to its last step."""
    return max([result["start_mib"], *(step["peak_mib"] for step in result["steps"])])


def memory_table(group: str, results: dict[str, dict]) -> str:
    """Each contender's peaks, and their ratio to the leanest peer's where there is one."""
    from_start = {name: whole_peak(result) for name, result in results.items()}
    in_steps = {name: max(s["peak_mib"] for s in r["steps"]) for name, r in results.items()}
    lines = [
        f"### {group}",
        "",
        "| | from the start, MiB | of the leanest peer's | in the steps, MiB",
    ]
    lines[-1] += " | of the leanest peer's |"
    lines.append("|---" * 5 + "|")
    for name in results:
        cells = [name]
        for found in (from_start, in_steps):
            least = min((found[peer] for peer in found if peer not in OURS_IN_MEMORY), default=None)
            cells.append(f"{found[name]:,.0f}")
            cells.append("" if least is None else f"{found[name] / least:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def median(result: dict, phase: str) -> float | None:
    seconds = [step[phase] for step in result["steps"] if phase in step]
    return statistics.median(seconds) if seconds else None


PHASES = ("step", "generate", "score", "update")


def table(group: str, results: dict[str, dict]) -> str:
    """The group's medians and least seconds, and each step's ratio to the first."""
    first = next(iter(results.values()))
    lines = [f"### {group}", ""]
    head = ["", "step s", "generate", "score", "update", "tokens/s", "step, ratio", "peak MiB"]
    lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, result in results.items():
        cells = [name]
        for phase in PHASES:
            middle = median(result, phase)
            least = min((s[phase] for s in result["steps"] if phase in s), default=None)
            cells.append("" if middle is None else f"{middle:.3f} / {least:.3f}")
        tokens, seconds = median(result, "tokens"), median(result, "step")
        cells.append("" if tokens is None else f"{tokens / seconds:,.0f}")
        cells.append(f"{seconds / median(first, 'step'):.2f}")
        cells.append(f"{whole_peak(result):,.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for name, result in results.items():
        if "gflop" not in result:
            continue
        peak = result["peak_gflops"]
        shares = [
            f"{phase} {100 * work / median(result, phase) / peak:.0f} %"
            for phase, work in sorted(result["gflop"].items())
        ]
        cpu = median(result, "cpu")
        told = f"{name}: of {peak:.0f} GFLOP/s {', '.join(shares) or 'not counted'}; "
        told += f"{cpu:.2f} CPU seconds a step, the first one after {result['first_step']:.1f} s"
        lines.append(told)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for speed.json and .md")
    parser.add_argument("--only", nargs="*", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=7, help="steps of each contender")
    parser.add_argument("--memory", action="store_true", help="peaks of memory, of tiny and small")
    options = parser.parse_args()
    name, measure, show = "speed", race, table
    if options.memory:
        name, measure, show = "memory", peaks, memory_table
        options.only = [group for group in options.only if group in WITH_PEERS]
    peers = dict(one.split("=", 1) for one in options.peer if "=" in one)
    if len(peers) != len(options.peer):
        parser.error(f"--peer takes NAME=COMMAND, each name once: {options.peer}")
    peers = {name: shlex.split(command) for name, command in peers.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}

    def keep():
        file.write_text(json.dumps(found, indent=1) + "\n")

    def advance(so_far=None):
        progress.advance(task)
        if so_far is not None:
            found[group] = so_far
            keep()

    with (
        Progress(console=CONSOLE) as progress,
        (options.out / "stderr.log").open("a") as log,
    ):
        turns = len(OURS_IN_MEMORY) + len(peers) if options.memory else options.rounds
        task = progress.add_task("groups", total=len(options.only) * turns)
        for group in options.only:
            progress.update(task, description=group)
            found[group] = measure(group, peers, options.rounds, log, advance)
            keep()
    title = f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}; "
    title += "peaks of the resident set" if options.memory else "seconds as median / least"
    tables = [show(group, found[group]) for group in GROUPS if group in found]
    text = "\n".join([title, "", *tables])
    (options.out / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
