"""Verdicts by verifier: what is right in which forms, what is wrong."""

import json
import time
from fractions import Fraction

import numpy as np
import pytest
from judging import SUM, judge, record, returns, workers_end  # noqa: F401

from gopd_jax.verifiers import VERIFIERS, Verdict, verify
from gopd_jax.verifiers.code import code, same, source


def test_verdicts_keep_the_order_of_mixed_rows():
    rows = [
        ("def f(x): return sum(x)", record("code", SUM), 1.0),
        (r"\boxed{4}", record("math", "4"), 1.0),
        ("b", record("text", "a"), 0.0),
        ("def f(x): return 0", record("code", SUM), 0.0),
        (" a\n", record("text", "a"), 1.0),
        (r"\boxed{5}", record("math", "4"), 0.0),
    ]
    completions, records, scores = zip(*rows)
    assert [v.score for v in verify(completions, records)] == list(scores)
    assert verify([], []) == []


def test_unknown_verifier_names_the_known_ones_and_the_record():
    with pytest.raises(ValueError, match=r"memory:1.*'proof'.*code.*math.*text"):
        verify(["x"], [record("proof", "x")])
    assert list(VERIFIERS) == ["math", "code", "text"]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ([Verdict(7.5, "sure")], "'own' gives 7.5 to a completion for memory:1; .* from 0 to 1"),
        ([Verdict(-0.1, "no")], "gives -0.1 "),
        ([Verdict(float("nan"), "what")], "gives nan "),
        ([Verdict("1", "text")], "gives '1' "),
        ([Verdict(1.0, None)], "'own' gives the reason None of a completion for memory:1"),
        (
            [True],
            r"'own' says True of a completion for memory:1; return a Verdict\(score, reason\)",
        ),
        ([], "'own' returns 0 verdicts for 1 completions"),
        ([Verdict(1.0, "a"), Verdict(1.0, "b")], "returns 2 verdicts for 1 completions"),
    ],
)
def test_what_is_no_verdict_is_an_error_that_names_the_verifier(monkeypatch, said, words):
    monkeypatch.setitem(VERIFIERS, "own", lambda completions, records: said)
    with pytest.raises(ValueError, match=words):
        verify(["x"], [record("own", "x")])
    fine = [Verdict(np.float32(0.5), "half")]
    monkeypatch.setitem(VERIFIERS, "own", lambda completions, records: iter(fine))
    assert verify(["x"], [record("own", "x")]) == fine
    monkeypatch.setitem(VERIFIERS, "short", lambda texts, records: [Verdict(1.0) for _ in texts])
    with pytest.raises(ValueError, match=r"'short' raises TypeError: .*'reason'; it returns a Ver"):
        verify(["x"], [record("short", "x")])
    fine = [Verdict(Fraction(1, 2), "half")]  # a number that JSON does not take
    (verdict,) = verify(["x"], [record("own", "x")])
    assert json.loads(json.dumps(verdict.score)) == 0.5


def test_lists_of_different_lengths_and_malformed_answers_are_errors():
    with pytest.raises(ValueError, match="2 completions and 1 records"):
        verify(["a", "b"], [record("text", "a")])
    no_want = {"entry": "f", "tests": [{"args": []}]}
    for answer in ("6", "{", {"entry": "f", "tests": []}, {"entry": "f()", "tests": [1]}, no_want):
        with pytest.raises(ValueError, match=r"answer of memory:1.*needs JSON"):
            verify(["x"], [record("code", answer)])
    for answer in (r"so \boxed{14}", "#### 18"):
        with pytest.raises(ValueError, match=r"the answer of memory:1, '.*give the value alone"):
            verify([r"\boxed{14}"], [record("math", answer)])
    with pytest.raises(ValueError, match="memory:1 has the entry 'lambda', a word of Python's own"):
        verify(["x"], [record("code", {"entry": "lambda", "tests": [{"args": [], "want": 1}]})])
    with pytest.raises(ValueError, match=r"cpu_s = 0.5"):
        code([], [], cpu_s=0.5)
    for option in ("wall_s='5'", "cpu_s=None", "memory_mb='256'", "memory_mb=256.5", "wall_s=True"):
        told = f"verifier of memory:1: code has .*{option.replace('=', ' = ')}.*; give whole"
        with pytest.raises(ValueError, match=told):
            verify(["x"], [record(f"code({option})", SUM)])


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("42", "42"),
        (" $42$ ", "42"),
        ("-7", "-7"),
        ("\N{MINUS SIGN}7", "-7"),
        ("+7", "7"),
        ("007", "7"),
        ("1,234,567", "1234567"),
        ("1{,}234{,}567", "1234567"),
        (r"1\,234\,567", "1234567"),
        (r"\$12", "12"),
        ("0.5", "1/2"),
        (".5", "0.50"),
        ("5.", "5"),
        ("-0.25", r"-\frac{1}{4}"),
        (r"\frac{2}{4}", "0.5"),
        (r"\dfrac{-1}{3}", "-1/3"),
        ("10/5", "2"),
        ("1,000.5", "2001/2"),
        (r"x^2 + 1", "x^2  +  1"),
        ("(1,2)", "(1, 2)"),
        (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt{3}}{2}"),
    ],
)
def test_one_value_in_many_forms(written, answer):
    assert judge(rf"so \boxed{{{written}}}.", answer, "math").score == 1.0


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("43", "42"),
        ("1,23", "123"),
        ("1 2", "12"),
        ("0.3333", "1/3"),
        ("1/0", "0"),
        (r"\frac{1}{0}", "0"),
        ("1/2/3", "1/6"),
        ("", "0"),
        ("-", "0"),
        (".", "0"),
        ("1e3", "1000"),
        ("٤٢", "42"),
        ("6*7", "42"),
        ("__import__('os')", "42"),
        ("9**9**9", "42"),
        ("4" * 257, "4" * 256),
        ("y", "x"),
        ("12", "1 2"),
        ("NewYork", "New York"),
        ("nan", "0"),
    ],
)
def test_other_values_are_wrong(written, answer):
    assert judge(rf"so \boxed{{{written}}}.", answer, "math").score == 0.0


def test_the_last_box_counts_and_its_braces_balance():
    assert judge(r"\boxed{1} and \boxed{2}", "2", "math").score == 1.0
    assert judge(r"\boxed{1} and \boxed{2}", "1", "math").score == 0.0
    assert judge(r"\boxed {\frac{1}{2}} {", "1/2", "math").score == 1.0
    assert judge(r"\boxed{\{1\}\}}", r"\{1\}\}", "math").score == 1.0
    for completion, reason in [
        ("the answer is 2", "no"),
        (r"\boxed{1} \boxed{2", "not closed"),
        (r"\boxed 2", "has no {"),
        (r"\boxed{2\}", "not closed"),
        ("\\boxed{2\\", "not closed"),
    ]:
        verdict = judge(completion, "2", "math")
        assert verdict.score == 0.0
        assert reason in verdict.reason


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{" * 100_000,
        r"\boxed{" + "{" * 200_000 + "}" * 200_000 + "}",
        r"\boxed{" + "9" * 1_000_000 + "}",
        r"\boxed{" + "1/" * 100_000 + "}",
        r"\boxed{" + "1," * 100 + "}",
        r"\boxed{" + "$ " * 500_000 + "}",
        r"\boxed{" + r"\frac{1}" * 30 + "}",
        r"\boxed" + " " * 1_000_000 + "7",
        "\ud800\\boxed{\udfff\x00}",
    ],
)
def test_hostile_boxes_are_judged_at_once(completion):
    started = time.process_time()
    assert judge(completion, "7", "math").score == 0.0
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "def f(x): return sum(x)",
        "   def f(x): return sum(x)",
        "\n\n  def f(x):\n      return sum(x)\n",
        "f = sum",
        "def f(x: list): return sum(x) if f.__annotations__['x'] is list else None",
        "f = lambda x: sum(x)",
        "Here:\n```python\ndef f(x):\n    return sum(x)\n```\nIt adds.",
        "Here: ```\ndef f(x):\n    return sum(x)\n``` done",
        "```python\ndef f(x):\n    return sum(x)",
        "```def f(x): return sum(x)```",
        "1.\n   ```py\n   def f(x):\n       return sum(x)\n   ```",
        "```python\ndef f(x): return 1\n```\nNo:\n```python\ndef f(x): return sum(x)\n```",
        "```python\ndef f(x): return sum(x)\n```\nUse it:\n```python\nprint(f([1]))\n```",
        "from functools import reduce as r\nimport operator as o\ndef f(x): return r(o.add, x, 0)",
        "from collections.abc import Iterable\ndef f(x: Iterable) -> int: return sum(x)",
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: 'list'\n"
        "def f(x): return sum(A(x).x)",
        "import collections as c\nP = c.namedtuple('P', 'x')\ndef f(x): return sum(P(x).x)",
        "print('hello')\ndef f(x):\n    print(x, flush=True)\n    return sum(x)",
        "def f(x):\n    total = 0\n    while x: total += x.pop()\n    return total",
        "import datetime as d\ndef f(x):\n    d.datetime.strptime('2026', '%Y')\n    return sum(x)",
        "import time\ndef f(x):\n    time.strptime('2026', '%Y')\n    return sum(x)",
        "def f(x):\n    assert '\\N{DEGREE SIGN}' == chr(176)\n    return sum(x)",
        "def f(x):\n    'a'.encode('cp1252').decode('utf-16-le', 'ignore')\n    return sum(x)",
        "import sys\nsys.setrecursionlimit(5000)\n"
        "def f(x): return x[0] + f(x[1:]) if x else 0\nif __name__ == '__main__': 1 / 0",
    ],
)
def test_a_function_that_adds_passes(completion):
    assert judge(completion, SUM).reason == "passed 2 tests"
    assert judge(completion, SUM).score == 1.0


def test_source_without_a_defining_fence_is_the_last_fence():
    assert source("a ```\nx\n``` b ```\ny\n```", "f") == "y\n"
    assert source("no fence", "f") == "no fence"


@pytest.mark.parametrize(
    ("written", "want"),
    [
        ("3", 3.0),
        ("3.0", 3),
        ("True", 1),
        ("1", True),
        ("0", False),
        ("None", False),
        ("(1, 2)", [1, 2]),
        ("[1, True]", [1, 1]),
        ("[1, 2, 3]", [1, 2]),
        ("{'a': 1.0}", {"a": 1}),
        ("{1: 2}", {"1": 2}),
        ("{'a': 1, 'b': 2}", {"a": 1}),
        ("'6'", 6),
        ("b'6'", "6"),
        ("{1, 2}", [1, 2]),
        ("(x for x in [1])", [1]),
        ("0.1 + 0.2", 0.3),
    ],
)
def test_a_result_of_another_type_or_value_is_wrong(written, want):
    assert judge(f"def f(): return {written}", returns(want)).score == 0.0


@pytest.mark.parametrize(
    "want", [None, True, 10**30, -0.5, "é\n\ud800", [], {"a": [1, {"b": None}], "": []}, [[[]]]]
)
def test_plain_values_arrive_as_they_are(want):
    assert judge("def f(x): return x", returns(want, want)).score == 1.0


def test_nan_is_nan_and_nothing_else():
    assert judge("def f(): return float('nan')", returns(float("nan"))).score == 1.0
    assert not same(float("nan"), 0.0)
    assert not same(float("inf"), float("-inf"))


def test_every_test_has_arguments_of_its_own():
    tests = [{"args": [[1]], "want": [1, 0]}, {"args": [[1]], "want": [1, 0]}]
    completion = "def f(x):\n    x.append(0)\n    return x"
    assert judge(completion, {"entry": "f", "tests": tests}).score == 1.0


def test_the_reason_names_the_test_that_failed():
    verdict = judge("def f(x): return 6", SUM)
    assert verdict.reason == "test 2 of 2: returned 6 where 0 is wanted"
