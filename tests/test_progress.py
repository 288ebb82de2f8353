"""Bars and progress: plain lines in a file, a bar on a terminal that leaves only its notes."""

import io

from rich.console import Console

from gopd_jax.progress import Progress, bar


class Clock:
    """A clock that the test turns."""

    now = 0.0

    def __call__(self):
        return self.now


def test_progress_in_a_file_is_a_plain_line_every_few_seconds():
    clock, file = Clock(), io.StringIO()
    with Progress(10, 4, console=Console(file=file), period=5.0, clock=clock) as progress:
        for step in range(5, 11):
            clock.now += 20.0 if step == 5 else 2.0  # the first compiles, and tells of no other
            row = {"kl_teacher": 0.25 / step} | ({"reward": 0.5} if step == 5 else {})
            progress.update(step, row, {"tokens_per_second": 1234.5})
            if step == 6:
                progress.note("[bold] 0.5")
    assert file.getvalue().splitlines() == [
        "step 5/10  reward 0.500  KL 0.0500  1,234 tok/s",
        "[bold] 0.5",
        "step 8/10  reward 0.500  KL 0.0312  1,234 tok/s  0:04 left",
        "step 10/10  reward 0.500  KL 0.0250  1,234 tok/s  0:00 left",
    ]


def test_progress_on_a_terminal_keeps_notes_and_erases_its_bar():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, legacy_windows=False)
    with Progress(3, console=console) as progress:
        progress.update(1, {"reward": 0.5}, {})
        progress.note("saved step 1")
        assert [*progress.bar(3, "evaluating")] == [0, 1, 2]
    text = file.getvalue()
    assert "saved step 1\n" in text
    assert text.endswith("\x1b[2K")  # the line that held the bar is cleared


def test_what_rich_would_take_for_an_emoji_stays_the_name_of_a_source():
    clock, file = Clock(), io.StringIO()
    console, name = Console(file=file), "microworld:train:math"
    Progress(3, console=console).note(f"give {name}")
    for _ in bar("a", name, console=console, clock=clock):
        clock.now += 6.0
    assert file.getvalue().splitlines() == [f"give {name}", f"{name} 1/1  0:00 left"]


def test_a_disabled_progress_and_bar_print_nothing():
    file = io.StringIO()
    with Progress(3, enabled=False, console=Console(file=file, force_terminal=True)) as progress:
        progress.update(1, {"reward": 0.5}, {})
        progress.note("hidden")
        assert [*progress.bar("ab", "hidden")] == ["a", "b"]
    assert file.getvalue() == ""


def test_a_bar_passes_items_on_and_reports_slow_work_in_a_file():
    clock, file, got = Clock(), io.StringIO(), []
    for item in bar(iter("abc"), "loading", console=Console(file=file), clock=clock):
        clock.now += 4.0
        got.append(item)
    assert got == ["a", "b", "c"]
    assert file.getvalue() == "loading 2/?\n"
