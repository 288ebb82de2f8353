"""Judges of completions: verdicts in order, for any completion at all, in bounded time."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from gopd_jax.spec import resolve, table
from gopd_jax.types import Record
from gopd_jax.verifiers.code import code
from gopd_jax.verifiers.math import math
from gopd_jax.verifiers.sandbox import close
from gopd_jax.verifiers.text import text
from gopd_jax.verifiers.verdict import Verdict

VERIFIERS = table(math, code, text)

__all__ = ["VERIFIERS", "Verdict", "close", "verify"]


def verify(completions: Sequence[str], records: Sequence[Record]) -> list[Verdict]:
    """The verdict on each completion by its record's verifier, in order.

    record.verifier is "name" or "name(key=value)" with a name of VERIFIERS. ValueError for an
    unknown name, a malformed answer, lists of different lengths, or what is no verdict: a score has
    to be from 0 to 1. No completion raises. Safe to call from several threads.
    """
    if len(completions) != len(records):
        raise ValueError(f"{len(completions)} completions and {len(records)} records; give pairs")
    rows_of: dict[str, list[int]] = {}
    for row, record in enumerate(records):
        rows_of.setdefault(record.verifier, []).append(row)
    judges = {}
    for spec, rows in rows_of.items():
        try:
            judges[spec] = resolve(spec, VERIFIERS)
        except ValueError as error:
            raise ValueError(f"verifier of {records[rows[0]].source}: {error}") from error
    verdicts: dict[int, Verdict] = {}
    for spec, rows in rows_of.items():
        try:
            judged = [*judges[spec]([completions[r] for r in rows], [records[r] for r in rows])]
        except (ValueError, RuntimeError):  # of an answer, of the sandbox
            raise
        except Exception as error:  # a user's function may raise anything
            raise ValueError(
                f"verifier {spec!r} raises {type(error).__name__}: {error}; it returns a "
                "Verdict(score, reason) for each completion, whatever that is"
            ) from error
        if len(judged) != len(rows):
            raise ValueError(
                f"verifier {spec!r} returns {len(judged)} verdicts for {len(rows)} completions"
            )
        for row, verdict in zip(rows, judged):
            verdicts[row] = _checked(verdict, spec, records[row])
    return [verdicts[row] for row in range(len(records))]


def _checked(verdict, spec: str, record: Record) -> Verdict:
    """The verdict with its score as a float, which any number may be: rows of JSON take no other.

    A score that is not a number stops all learning, one above 1 is an accuracy above 100 %.
    """
    if not isinstance(verdict, Verdict):
        raise ValueError(
            f"verifier {spec!r} says {verdict!r:.60} of a completion for {record.source}; return a "
            "Verdict(score, reason) for each"
        )
    if not isinstance(verdict.score, Real) or not 0 <= verdict.score <= 1:
        raise ValueError(
            f"verifier {spec!r} gives {verdict.score!r} to a completion for {record.source}; a "
            "score is a number from 0 to 1"
        )
    if not isinstance(verdict.reason, str):
        raise ValueError(
            f"verifier {spec!r} gives the reason {verdict.reason!r:.60} of a completion for "
            f"{record.source}; a reason is a str"
        )
    return Verdict(float(verdict.score), verdict.reason)
