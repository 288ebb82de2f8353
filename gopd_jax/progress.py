"""What a run or a command shows while it works: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise

import rich.progress as rp
from rich.console import Console
from rich.table import Column


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _figures(row: dict[str, float], timing: dict[str, float]) -> str:
    """The row's main figures in one line; those that it has not are left out. KL: to teacher."""
    shown = (
        (row.get("reward"), "reward {:.3f}"),
        (row.get("kl_teacher"), "KL {:.4f}"),
        (row.get("length"), "length {:.1f}"),
        (timing.get("tokens_per_second"), "{:,.0f} tok/s"),
    )
    return "  ".join(form.format(x) for x, form in shown if x is not None)


def plain(console: Console, text: str) -> None:
    """Print a line as it is: microworld:train:math is no emoji, and a list of names no style."""
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=True)


class Progress:
    """A live bar of a run's steps on a terminal; elsewhere a plain line every `period` seconds.

    total, start: the last step, and the one that the run continues from. unit: a step's name there.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        enabled: bool = True,
        *,
        unit: str = "step",
        console: Console | None = None,
        period: float = 5.0,
        clock=time.monotonic,
    ):
        self._unit, self._total, self._enabled = unit, total, enabled
        self._console = console or Console(stderr=True)
        self._live = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._period, self._clock = period, clock
        self._printed, self._reward = -math.inf, {}
        # When recent steps were done. The first, which compiles, only begins the count.
        self._done: deque[tuple[float, int]] = deque(maxlen=26)
        self._rich = _rich_bar(self._console)
        self._task = self._rich.add_task("", total=total, completed=start, text="compiling")

    def __enter__(self) -> Progress:
        if self._live:
            self._rich.start()
        return self

    def __exit__(self, *exception) -> None:
        if self._live:
            self._rich.stop()

    def update(self, step: int, row: dict[str, float], timing: dict[str, float]) -> None:
        """Show one step. A reward, which not every step has, stays until the next one."""
        if not self._enabled:
            return
        self._done.append((now := self._clock(), step))
        self._reward = {"reward": row["reward"]} if "reward" in row else self._reward
        text = _figures(row | self._reward, timing)
        # The median, as some steps evaluate too.
        if each := [(b - a) / max(j - i, 1) for (a, i), (b, j) in pairwise(self._done)]:
            text += f"  {_clock_text(statistics.median(each) * (self._total - step))} left"
        if self._live:
            self._rich.update(self._task, completed=step, text=text)
        elif now - self._printed >= self._period or step == self._total:
            self._printed = now
            self.note(f"{self._unit} {step}/{self._total}  {text}")

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        if self._enabled:
            plain(self._console, text)

    def bar(self, work: Iterable | int, description: str) -> Iterator:
        """As the function `bar`, below this bar."""
        rich = self._rich if self._live else None
        return bar(work, description, self._enabled, console=self._console, rich=rich)


def _rich_bar(console: Console) -> rp.Progress:
    line = Column(no_wrap=True, overflow="ellipsis")
    return rp.Progress(
        rp.SpinnerColumn(),
        rp.BarColumn(bar_width=10),
        rp.MofNCompleteColumn(),
        rp.TextColumn("{task.description}{task.fields[text]}", markup=False, table_column=line),
        console=console,
        transient=True,
    )


def bar(
    work: Iterable | int,
    description: str,
    enabled: bool = True,
    *,
    console: Console | None = None,
    rich: rp.Progress | None = None,
    period: float = 5.0,
    clock=time.monotonic,
) -> Iterator:
    """Iterate over `work` (an int n means range(n)) and show how far it is, as Progress does."""
    work = range(work) if isinstance(work, int) else work
    if not enabled:
        yield from work
        return
    console, total = console or Console(stderr=True), getattr(work, "__len__", lambda: None)()
    live, shown = console.is_terminal and not console.is_dumb_terminal, rich or _rich_bar(console)
    task = shown.add_task(f"{description}  ", total=total, text="")
    if live and rich is None:
        shown.start()
    start = printed = clock()
    try:
        for done, item in enumerate(work, 1):
            yield item
            now, text = clock(), ""
            if total is not None:
                text = f"{_clock_text((now - start) / done * (total - done))} left"
            shown.update(task, completed=done, text=text)
            if not live and now - printed >= period:
                printed = now
                plain(console, f"{description} {done}/{total or '?'}  {text}".rstrip())
    finally:
        shown.remove_task(task)
        if live and rich is None:
            shown.stop()
