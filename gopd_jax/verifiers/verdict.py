"""What a verifier says of one completion."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """score in [0, 1], 1 for a right answer; reason in words, printable ASCII."""

    score: float
    reason: str
