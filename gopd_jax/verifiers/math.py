r"""Answers in the last \boxed{...} of a completion, compared exactly as rational numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from gopd_jax.types import Record
from gopd_jax.verifiers.verdict import Verdict

# Longer contents are compared as text alone: no int() or pattern ever sees more than this.
N_CHARS = 256

_NUMBER = re.compile(r"([+-]?)\s*([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.([0-9]*))?")
_RATIO = re.compile(r"([+-]?)([^/]+)/([^/]+)")
_SPACES = re.compile(r"(?<!\w)\s+|\s+(?!\w)")  # "1 2" is not 12, and "(1, 2)" is "(1,2)"
_FRAC = re.compile(r"([+-]?)\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")


def math(completions: Sequence[str], records: Sequence[Record]) -> list[Verdict]:
    r"""1 where the last \boxed{...} holds the value of record.answer, else 0.

    Values are integers, decimals and fractions (a/b, \frac{a}{b}), with thousands separators,
    a sign and surrounding $ allowed: 0.5, 1/2 and \frac{2}{4} are one value. Anything else has to
    be the same text up to white space beside signs. ValueError for an answer that still stands in
    a solution's \boxed{...} or behind GSM8K's ####, which the value in a completion's box is not.
    """
    for record in records:
        if mark := next((m for m in (r"\boxed", "####") if m in record.answer), None):
            raise ValueError(
                f"the answer of {record.source}, {record.answer[-40:]!a}, has {mark}; give the "
                "value alone, 42 say"
            )
    return [_judge(c, r.answer) for c, r in zip(completions, records, strict=True)]


def _judge(completion: str, answer: str) -> Verdict:
    contents, problem = boxed(completion)
    if contents is None:
        return Verdict(0.0, problem)
    got, want = _plain(contents), _plain(answer)
    shown = f"{got[:40]!a} where the answer is {want[:40]!a}"
    got_value, want_value = rational(got), rational(want)
    if want_value is not None and got_value is None:
        return Verdict(0.0, f"not a number: {shown}")
    if want_value is None:
        right = _SPACES.sub("", got) == _SPACES.sub("", want)
    else:
        right = got_value == want_value
    return Verdict(1.0, "equal") if right else Verdict(0.0, f"wrong: {shown}")


def boxed(completion: str) -> tuple[str | None, str]:
    r"""(contents of the last \boxed{...}, "") or (None, why there is none). One pass."""
    start = completion.rfind(r"\boxed")
    if start < 0:
        return None, r"no \boxed{} in the completion"
    rest = completion[start + len(r"\boxed") :].lstrip()
    if not rest.startswith("{"):
        return None, r"the last \boxed has no {"
    depth, at = 0, 0
    while at < len(rest):
        char = rest[at]
        if char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return rest[1:at], ""
        at += 2 if char == "\\" else 1  # an escaped brace does not count
    return None, r"the last \boxed{ is not closed"


def rational(value: str) -> Fraction | None:
    """The number that `value` writes, or None where it is not a number of at most N_CHARS."""
    if len(value) > N_CHARS:
        return None
    if match := _FRAC.fullmatch(value) or _RATIO.fullmatch(value):
        sign, above, below = match[1], _decimal(match[2].strip()), _decimal(match[3].strip())
        if above is None or not below:
            return None
        return -above / below if sign == "-" else above / below
    return _decimal(value)


def _decimal(value: str) -> Fraction | None:
    """An integer or decimal, thousands separators allowed."""
    match = _NUMBER.fullmatch(value)
    if not match or not (match[2] or match[3]):
        return None
    whole, digits = (match[2] or "").replace(",", ""), match[3] or ""
    return Fraction(int(f"{match[1]}{whole}{digits}"), 10 ** len(digits))


def _plain(value: str) -> str:
    """Without surrounding $, LaTeX spacing and repeated white space."""
    value = value.replace("{,}", ",").replace("\N{MINUS SIGN}", "-")
    for mark in (r"\$", r"\,", r"\!", r"\;"):
        value = value.replace(mark, "")
    return " ".join(value.strip().strip("$").split())
