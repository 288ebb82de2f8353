"""Answers that are a Python function, run on tests in the sandbox."""

from __future__ import annotations

import json
import keyword
import re
import signal
import textwrap
from collections.abc import Sequence
from typing import Any

from gopd_jax.types import Record
from gopd_jax.verifiers.sandbox import Job, Outcome, shared
from gopd_jax.verifiers.verdict import Verdict

N_CHARS = 1 << 16  # of source; a longer completion is wrong
N_DIGITS = 4300  # of an integer in an answer: int() is quadratic in them

_TAG = re.compile(r"[\w+.-]{0,20}[ \t\r]*\n")


def code(
    completions: Sequence[str],
    records: Sequence[Record],
    *,
    cpu_s: int = 1,
    wall_s: float = 2.0,
    memory_mb: int = 256,
) -> list[Verdict]:
    """1 where the completion's function passes every test of its record, else 0.

    record.answer is JSON, {"entry": "f", "tests": [{"args": [[1, 2]], "want": 3}, ...]}. The
    completion is Python source, or prose with it in a ``` fence: the last that defines the entry.
    A result has to be the wanted value in the wanted types: 3.0 is not 3, True is not 1. Limits
    hold for one completion with all its tests: cpu_s whole seconds of processor time, wall_s
    seconds, memory_mb MiB of address space, of which the interpreter has about 18. ValueError for
    limits or an answer that make no sense; RuntimeError where the sandbox cannot be started.
    """
    _check_limits(records, cpu_s=cpu_s, wall_s=wall_s, memory_mb=memory_mb)
    answers = {r.answer: None for r in records}
    for record in records:
        answers[record.answer] = answers[record.answer] or _answer(record)
    # Rollouts of one prompt are often equal: each pair of source and answer runs once.
    pairs = [(c, r.answer) for c, r in zip(completions, records, strict=True)]
    verdicts, jobs = {}, {}
    for completion, answer in dict.fromkeys(pairs):
        entry, tests = answers[answer]
        text = source(completion, entry)
        if len(text) > N_CHARS:
            reason = f"source of {len(text)} characters, more than {N_CHARS}"
            verdicts[completion, answer] = Verdict(0.0, reason)
            continue
        jobs[completion, answer] = Job(
            source=text,
            entry=entry,
            args=[test["args"] for test in tests],
            cpu_s=cpu_s,
            wall_s=wall_s,
            memory_mb=memory_mb,
        )
    for pair, outcome in zip(jobs, shared().run(list(jobs.values())), strict=True):
        verdicts[pair] = _judge(outcome, answers[pair[1]][1], jobs[pair])
    return [verdicts[pair] for pair in pairs]


def _check_limits(records: Sequence[Record], *, cpu_s, wall_s, memory_mb) -> None:
    """ValueError names the limits and the first record that has them."""
    whole = type(cpu_s) is int and type(memory_mb) is int
    number = isinstance(wall_s, int | float) and not isinstance(wall_s, bool)
    if not whole or not number or cpu_s < 1 or not 0 < wall_s < 3600 or memory_mb < 64:
        of = f"verifier of {records[0].source}: " if records else ""
        raise ValueError(
            f"{of}code has cpu_s = {cpu_s!r}, wall_s = {wall_s!r}, memory_mb = {memory_mb!r}; give "
            "whole seconds from 1, seconds between 0 and 3600, and whole MiB from 64"
        )


def _answer(record: Record) -> tuple[str, list[dict]]:
    """(entry, tests) of a record."""
    try:
        answer = json.loads(record.answer)
        entry, tests = answer["entry"], answer["tests"]
        good = isinstance(entry, str) and entry.isidentifier() and isinstance(tests, list)
        good = good and tests and all(isinstance(t["args"], list) and "want" in t for t in tests)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if good and keyword.iskeyword(entry):
        raise ValueError(
            f"answer of {record.source} has the entry {entry!r}, a word of Python's own that no "
            "function can be called; give it another name"
        )
    if not good:
        raise ValueError(
            f"answer of {record.source} is {record.answer[:80]!r}; the code verifier needs JSON "
            '{"entry": "f", "tests": [{"args": [[1, 2]], "want": 3}]} with at least one test'
        )
    return entry, tests


def source(completion: str, entry: str) -> str:
    """The Python source in a completion: its last ``` fence that defines `entry`, or all of it.

    Where no fence defines it, the last one; a fence that is not closed ends with the completion.
    """
    blocks = completion.split("```")[1::2] or [completion]
    chosen = blocks[-1]
    if len(blocks) > 1:
        # Anchored to the line and without \s, which would cross lines: one pass over any text.
        defines = re.compile(rf"^[ \t]*(?:def[ \t]+{entry}\b|{entry}[ \t]*=)", re.MULTILINE)
        chosen = next((block for block in reversed(blocks) if defines.search(block)), chosen)
    if len(chosen) > N_CHARS:
        return chosen
    if "```" in completion and (tag := _TAG.match(chosen)):
        chosen = chosen[tag.end() :]
    return textwrap.dedent(chosen)


def _judge(outcome: Outcome, tests: list[dict], job: Job) -> Verdict:
    """Compare what the child says that its function returned with what the tests want."""
    lines = outcome.output.split("\n")[:-1]
    for i, test in enumerate(tests):
        where = f"test {i + 1} of {len(tests)}: "
        if i >= len(lines):
            return Verdict(0.0, where + _ending(outcome, job))
        said = _parse(lines[i])
        if "value" not in said:
            error = said.get("error")
            error = error if isinstance(error, str) else "no readable result"
            return Verdict(0.0, where + ascii(error[:300])[1:-1])
        if not same(said["value"], test["want"]):
            got, want = _shown(said["value"]), _shown(test["want"])
            return Verdict(0.0, f"{where}returned {got} where {want} is wanted")
    return Verdict(1.0, f"passed {len(tests)} tests")


def _parse(line: str) -> dict:
    """One line of a child, which may hold anything."""
    try:
        said = json.loads(line, parse_int=_parse_int)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _parse_int(digits: str) -> int:
    if len(digits) > N_DIGITS:
        raise ValueError(f"{len(digits)} digits")
    return int(digits)


def same(got: Any, want: Any) -> bool:
    """Equal in value and in type, all the way down. NaN is NaN."""
    if type(got) is not type(want):
        return False
    if isinstance(want, list):
        return len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[k], want[k]) for k in want)
    return got == want or (got != got and want != want)


def _shown(value: Any) -> str:
    """A value in few characters of ASCII."""
    try:
        return ascii(value) if len(ascii(value)) <= 80 else ascii(value)[:77] + "..."
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


def _ending(outcome: Outcome, job: Job) -> str:
    """Why there is no result."""
    if outcome.stopped == "wall":
        return f"no result within {job.wall_s} s"
    if outcome.stopped == "output":
        return "returned more than the sandbox takes"
    if outcome.stopped == "dead":
        return "the sandbox died while running it, several times"
    if outcome.status == -signal.SIGXCPU:
        return f"no result within {job.cpu_s} s of processor time"
    if outcome.status < 0:
        return f"the process died of {signal.Signals(-outcome.status).name}"
    return f"the process exited with status {outcome.status}"
