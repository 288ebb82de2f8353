"""When a run is told its advice: once, and again when its cause has been away."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from gopd_jax.reporting.advice import advise
from gopd_jax.reporting.evidence import WINDOW

QUIET = 10  # steps without a cause after which its return is said again


class Watch:
    """Says each advice when it first applies, and again once it has not applied for QUIET steps.

    config: settings as plain values. rows: those of an interrupted run that is continued; what
    they had to say has been said.
    """

    def __init__(self, config: dict, rows: Iterable[dict] = ()):
        self._config, self._begin, self._end = config, [], deque(maxlen=WINDOW)
        self._applied: dict[str, int] = {}  # name -> step at which it last applied
        for row in rows:
            self.see(row)

    def see(self, row: dict) -> list[str]:
        """The sentences that are new with the row of a step, which holds its "step"."""
        return list(self.news(row).values())

    def news(self, row: dict) -> dict[str, str]:
        """As `see`, by name."""
        # Both together are all that an entry looks at of the whole.
        (self._begin if len(self._begin) < WINDOW else self._end).append(row)
        told, step = advise([*self._begin, *self._end], self._config), row["step"]
        new = {n: s for n, s in told.items() if step - self._applied.get(n, -math.inf) > QUIET}
        self._applied |= dict.fromkeys(told, step)
        return new


def history(rows: Iterable[dict], config: dict) -> list[tuple[int, str, str]]:
    """(step, name, sentence) of all that a run had to be told, in order."""
    watch = Watch(config)
    return [(row["step"], *item) for row in rows for item in watch.news(row).items()]
