"""A watch over a run's rows: what it says, when again, and what a continued run hears."""

from test_advice import CONFIG, flat

from gopd_jax.reporting import evidence
from gopd_jax.reporting.advice import advise
from gopd_jax.reporting.watch import Watch, history


def test_a_watch_says_a_thing_once_and_again_after_ten_quiet_steps():
    # A skip applies while it is among the last 20 rows: that of step 1 up to step 20.
    for again, told in ((30, [1]), (31, [1, 31])):
        watch, said = Watch({}), []
        for i in range(1, 70):
            said += [i] * len(watch.see({"step": i, "skipped": float(i in (1, again))}))
        assert said == told


def test_a_continued_run_is_told_what_the_uninterrupted_one_is():
    rows = flat(30, truncated=0.6) + [{"step": i, "skipped": float(i == 40)} for i in range(31, 60)]
    whole = Watch(CONFIG)
    told = [(row["step"], text) for row in rows for text in whole.see(row)]
    assert [step for step, _ in told] == [10, 40]
    for cut in (5, 20, 45):
        watch = Watch(CONFIG, rows[:cut])
        rest = [(row["step"], text) for row in rows[cut:] for text in watch.see(row)]
        assert rest == [(step, text) for step, text in told if step > rows[cut - 1]["step"]]
    assert [(step, text) for step, _, text in history(rows, CONFIG)] == told


def test_a_watch_forgets_the_middle_and_sees_what_the_whole_shows():
    n = 3 * evidence.WINDOW
    rows = flat(n, entropy=[1.0, 0.1], truncated=[0.0, 0.7], advantage_absmax=[30.0, 1.0])
    rows = [row | {"probe/overlap": 0.2 if row["step"] % 50 == 0 else None} for row in rows]
    watch = Watch(CONFIG)
    for i, row in enumerate(rows):
        watch.see(row)
        if i % 37 == 0 or i == n - 1:
            seen = [*watch._begin, *watch._end]
            assert advise(seen, CONFIG) == advise(rows[: i + 1], CONFIG)
    assert len(seen) == 2 * evidence.WINDOW
