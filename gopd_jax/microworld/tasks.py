"""The microworld's problems: two skills, each with a right and a wrong strategy of one form.

math: a sum with a product in it, written in steps. The wrong strategy works from left to right and
adds before it multiplies.
code: a Python function that filters a list, maps it and returns a result. The wrong strategy tests
the mapped value where the problem speaks of the element itself.

Both strategies give well-formed answers, so a model that was shown both chooses between them, and
the choice is another one in each task. Every problem's verifier tells the two apart.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from typing import NamedTuple

TASKS = ("math", "code")
SPLITS = ("train", "test")
N_SPLIT = 10  # one problem in ten belongs to the test split, by the hash of what it asks
LARGEST = 29  # term of a sum: arithmetic that a model of a million parameters learns in minutes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One problem, how it is verified, and an answer by each strategy (without end token)."""

    messages: tuple[dict[str, str], ...]  # one user turn
    task: str
    answer: str  # math: the number; code: JSON {"entry": name, "tests": [{"args", "want"}]}
    verifier: str
    right: str
    wrong: str
    key: str  # what is asked, whatever the wording: equal keys are one problem


def problem(task: str, seed: int, index: int, *, split: str) -> Problem:
    """Problem `index` of the stream that `seed` names; a pure function of its arguments.

    No key occurs in both splits. Two indices may ask the same.
    """
    if task not in DRAW:
        raise ValueError(f"there is no task {task!r}; there are {list(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; there are {list(SPLITS)}")
    rng = random.Random(f"{task}/{split}/{seed}/{index}")
    while True:
        drawn = DRAW[task](rng)
        if split_of(str(drawn)) == split and (made := MAKE[task](rng, drawn)) is not None:
            return made


def split_of(key: str) -> str:
    """The split to which the problem of this key belongs."""
    digest = hashlib.sha256(key.encode()).digest()
    return SPLITS[int.from_bytes(digest[:8], "big") % N_SPLIT == 0]


def record(problem: Problem, *, completion: str | None = None, source: str = "microworld"):
    """The problem as a `gopd_jax.types.Record`, with `completion` as the answer to imitate."""
    from gopd_jax.types import Record  # imports JAX, which drawing problems does not need

    return Record(
        messages=problem.messages,
        task=problem.task,
        answer=problem.answer,
        verifier=problem.verifier,
        source=source,
        completion=completion,
    )


# --- math


class Expression(NamedTuple):
    """first + times * each, then op last where op is "+" or "-": "7+3*4-5"."""

    first: int
    times: int
    each: int
    op: str
    last: int

    def __str__(self):
        return f"{self.first}+{self.times}*{self.each}" + (f"{self.op}{self.last}" * bool(self.op))

    def steps(self, *, left_to_right: bool) -> tuple[int, str]:
        """The result and the written answer: the product first, or, wrongly, the sum first."""
        a, b, c = self.first, self.times, self.each
        if left_to_right:
            value, lines = (a + b) * c, [f"{a}+{b}={a + b}", f"{a + b}*{c}={(a + b) * c}"]
        else:
            value, lines = a + b * c, [f"{b}*{c}={b * c}", f"{a}+{b * c}={a + b * c}"]
        if self.op:
            after = value + self.last if self.op == "+" else value - self.last
            lines.append(f"{value}{self.op}{self.last}={after}")
            value = after
        return value, "\n".join([*lines, f"\\boxed{{{value}}}"])


def _draw_math(rng: random.Random) -> Expression:
    op = rng.choices(("", "+", "-"), (1, 4, 4))[0]
    last = rng.randint(2, LARGEST) if op else 0
    return Expression(rng.randint(2, LARGEST), rng.randint(2, 9), rng.randint(2, 9), op, last)


def _make_math(rng: random.Random, asked: Expression) -> Problem | None:
    value, right = asked.steps(left_to_right=False)
    # (a + b) * c exceeds a + b * c by a * (c - 1) > 0: the strategies never agree.
    _, wrong = asked.steps(left_to_right=True)
    if value < 0:
        return None
    return Problem(
        messages=({"role": "user", "content": _word_math(rng, asked)},),
        task="math",
        answer=str(value),
        verifier="math",
        right=right,
        wrong=wrong,
        key=str(asked),
    )


NAMES = ("Ana", "Tom", "Mia", "Sam")
THINGS = ("cards", "coins", "eggs", "pens")
GAIN = ("gets {}", "finds {}", "buys {}")
LOSS = ("loses {}", "sells {}", "gives away {}")


def _word_math(rng: random.Random, asked: Expression) -> str:
    """One of five wordings of the expression."""
    first, times, each, op, last = asked
    kind = rng.randrange(5)
    if kind < 2:
        flat = f"{first} + {times} * {each}" + (f" {op} {last}" if op else "")
        return f"Work out {flat}." if kind == 0 else f"What is {flat}?"
    if kind == 2:
        then = {"": "", "+": f", then add {last}", "-": f", then take away {last}"}[op]
        return f"Start with {first}, add {times} times {each}{then}."
    if kind == 3:
        then = {"": "", "+": f", then {last} get on", "-": f", then {last} get off"}[op]
        return f"A bus has {first} people; {times} groups of {each} get on{then}. How many now?"
    who, what = rng.choice(NAMES), rng.choice(THINGS)
    then = f", then {rng.choice(GAIN if op == '+' else LOSS).format(last)}" if op else ""
    return f"{who} has {first} {what}, buys {times} boxes of {each}{then}. How many now?"


# --- code


class Filter(NamedTuple):
    """`words` name the elements; `test` is the condition on {x}; `keeps` decides it."""

    words: str
    test: str
    keeps: Callable[[int, int], bool]
    ks: range
    weight: int


class Map(NamedTuple):
    """`words` with the verb first; `value` is the new value of x."""

    words: str
    value: str
    apply: Callable[[int, int], int]
    ks: range
    weight: int


class Final(NamedTuple):
    """`words` name the result; `code` makes it of the generator {}; `of` makes it of a list."""

    words: str
    code: str
    of: Callable[[list[int]], object]


NO_K = range(1)
FILTERS = {
    "even": Filter("even numbers", "{x}%2==0", lambda x, k: x % 2 == 0, NO_K, 6),
    "odd": Filter("odd numbers", "{x}%2==1", lambda x, k: x % 2 == 1, NO_K, 6),
    "positive": Filter("positive numbers", "{x}>0", lambda x, k: x > 0, NO_K, 4),
    "negative": Filter("negative numbers", "{x}<0", lambda x, k: x < 0, NO_K, 4),
    "above": Filter("numbers above {k}", "{x}>{k}", lambda x, k: x > k, range(1, 21), 12),
    "below": Filter("numbers below {k}", "{x}<{k}", lambda x, k: x < k, range(1, 21), 12),
    "at_least": Filter("numbers at least {k}", "{x}>={k}", lambda x, k: x >= k, range(1, 21), 12),
    "at_most": Filter("numbers at most {k}", "{x}<={k}", lambda x, k: x <= k, range(1, 21), 12),
    "multiples": Filter("multiples of {k}", "{x}%{k}==0", lambda x, k: x % k == 0, range(3, 10), 8),
}
MAPS = {
    "add": Map("add {k}", "x+{k}", lambda x, k: x + k, range(1, 21), 12),
    "subtract": Map("subtract {k}", "x-{k}", lambda x, k: x - k, range(1, 21), 12),
    "double": Map("double them", "x*2", lambda x, k: 2 * x, NO_K, 3),
    "triple": Map("triple them", "x*3", lambda x, k: 3 * x, NO_K, 3),
    "times": Map("multiply by {k}", "x*{k}", lambda x, k: x * k, range(4, 10), 6),
    "square": Map("square them", "x*x", lambda x, k: x * x, NO_K, 3),
    "negate": Map("negate them", "-x", lambda x, k: -x, NO_K, 3),
}
FINALS = {
    "list": Final("the list", "[{}]", list),
    "sum": Final("the sum", "sum({})", sum),
    "max": Final("the largest or 0", "max(({}),default=0)", lambda ys: max(ys, default=0)),
    "min": Final("the smallest or 0", "min(({}),default=0)", lambda ys: min(ys, default=0)),
    "count": Final("the count", "len([{}])", len),
    "sorted": Final("them sorted", "sorted({})", sorted),
    "reversed": Final("them reversed", "[{}][::-1]", lambda ys: ys[::-1]),
    "three": Final("the first three", "[{}][:3]", lambda ys: ys[:3]),
}
PIPELINES = (
    "Write f(xs): keep {filter}, {map}, return {final}.",
    "Write a Python function f(xs) to keep {filter}, {map} and return {final}.",
    "Code f(xs). Take {filter}, {map}. Return {final}.",
    "Define f(xs): keep the {filter}, {map} and return {final}.",
)


class Pipeline(NamedTuple):
    """Names in FILTERS, MAPS and FINALS, and their constants (0 where there is none)."""

    filter: str
    filter_k: int
    map: str
    map_k: int
    final: str

    def __str__(self):
        return f"{self.filter} {self.filter_k} | {self.map} {self.map_k} | {self.final}"

    def run(self, xs: list[int], *, test_mapped: bool):
        """The result on xs, the filter testing the element or, wrongly, its mapped value."""
        keeps, apply = FILTERS[self.filter].keeps, MAPS[self.map].apply
        pairs = [(x, apply(x, self.map_k)) for x in xs]
        kept = [y for x, y in pairs if keeps(y if test_mapped else x, self.filter_k)]
        return FINALS[self.final].of(kept)

    def program(self, *, test_mapped: bool) -> str:
        """The Python function that computes `run`."""
        value = MAPS[self.map].value.format(k=self.map_k)
        subject = f"({value})" if test_mapped else "x"
        test = FILTERS[self.filter].test.format(x=subject, k=self.filter_k)
        result = FINALS[self.final].code.format(f"{value} for x in xs if {test}")
        return f"def f(xs):\n    return {result}"


def _draw_code(rng: random.Random) -> Pipeline:
    def part(entries):
        (name,) = rng.choices(list(entries), [entry.weight for entry in entries.values()])
        return name, rng.choice(entries[name].ks)

    return Pipeline(*part(FILTERS), *part(MAPS), rng.choice(list(FINALS)))


def _make_code(rng: random.Random, asked: Pipeline) -> Problem | None:
    if (inputs := _inputs(rng, asked)) is None:
        return None
    tests = [{"args": [xs], "want": asked.run(xs, test_mapped=False)} for xs in inputs]
    content = rng.choice(PIPELINES).format(
        filter=FILTERS[asked.filter].words.format(k=asked.filter_k),
        map=MAPS[asked.map].words.format(k=asked.map_k),
        final=FINALS[asked.final].words,
    )
    return Problem(
        messages=({"role": "user", "content": content},),
        task="code",
        answer=json.dumps({"entry": "f", "tests": tests}),
        verifier="code",
        right=asked.program(test_mapped=False),
        wrong=asked.program(test_mapped=True),
        key=str(asked),
    )


def _inputs(rng: random.Random, asked: Pipeline) -> list[list[int]] | None:
    """Eight argument lists, four of which the strategies answer differently; None if they agree."""
    keeps, apply = FILTERS[asked.filter].keeps, MAPS[asked.map].apply
    k, map_k = asked.filter_k, asked.map_k
    disputed = [x for x in range(-40, 41) if keeps(x, k) != keeps(apply(x, map_k), k)]
    if not disputed:
        return None

    def element():
        pool = rng.random()
        if pool < 0.4:
            return rng.choice(disputed)
        # The filter's own boundary, where > and >= part.
        return rng.randint(k - 1, k + 1) if pool < 0.6 else rng.randint(-30, 30)

    telling = []
    for _ in range(100):  # a filter that is met by zeros alone never changes a sum
        xs = [element() for _ in range(rng.randint(1, 6))]
        if asked.run(xs, test_mapped=False) != asked.run(xs, test_mapped=True):
            telling.append(xs)
        if len(telling) == 4:
            return [[], *telling, *([element() for _ in range(n)] for n in (5, 6, 7))]
    return None


DRAW = {"math": _draw_math, "code": _draw_code}
MAKE = {"math": _make_math, "code": _make_code}
