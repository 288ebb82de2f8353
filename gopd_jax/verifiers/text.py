"""Answers that are a text."""

from __future__ import annotations

from collections.abc import Sequence

from gopd_jax.types import Record
from gopd_jax.verifiers.verdict import Verdict


def text(completions: Sequence[str], records: Sequence[Record]) -> list[Verdict]:
    """1 where the completion is record.answer, white space around either aside."""
    return [_judge(c.strip(), r.answer.strip()) for c, r in zip(completions, records, strict=True)]


def _judge(got: str, want: str) -> Verdict:
    if got == want:
        return Verdict(1.0, "equal")
    return Verdict(0.0, f"{got[:40]!a} is not {want[:40]!a}")
