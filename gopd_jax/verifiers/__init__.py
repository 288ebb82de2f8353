"""Judges of completions: verdicts in order, for any completion at all, in bounded time."""

from __future__ import annotations

from collections.abc import Sequence

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
    unknown name, a malformed answer, or lists of different lengths; no completion raises. Safe to
    call from several threads.
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
        judged = judges[spec]([completions[r] for r in rows], [records[r] for r in rows])
        verdicts.update(zip(rows, judged, strict=True))
    return [verdicts[row] for row in range(len(records))]
