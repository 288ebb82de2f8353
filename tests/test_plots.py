"""Figures of what a step and a probe measure: which there are, and what they draw."""

import re

import numpy as np
import pytest

from gopd_jax.reporting import plots
from gopd_jax.reporting.charts import CHARTS, DIAGNOSTICS
from gopd_jax.reporting.plots import Run

QUANTILES = {"p01": -4.0, "p10": -1.0, "p50": 0.0, "p90": 1.0, "p99": 2.0}
FAN = {f"token_reward_{name}": value for name, value in QUANTILES.items()}


def made(name="run", n=5, **keys):
    rows = [
        {"step": i + 1}
        | {key: (value(i) if callable(value) else value) for key, value in keys.items()}
        for i in range(n)
    ]
    return Run(name=name, metrics=rows, timing=[], evaluation=[], samples=[], info={})


def figures(*runs):
    tasks = plots.tasks_of(list(runs))
    return plots.training_figures(list(runs), tasks, DIAGNOSTICS, name="d")


def paths(svg, colour):
    """Points of each line in a colour, in the drawing's units; y grows downwards."""
    found = re.findall(r'<path d="([^"]*)"[^>]*style="([^"]*)"', str(svg))
    return [
        np.array(re.findall(r"([\d.]+) ([\d.]+)", data), float)
        for data, style in found
        if f"stroke: var(--{colour})" in style and "fill: none" in style
    ]


@pytest.mark.parametrize("chart", DIAGNOSTICS, ids=lambda chart: chart.title)
def test_a_figure_appears_for_its_first_key_alone_and_for_no_other(chart):
    # Half a unit more at each step: neither calm nor constant.
    (figure,) = figures(made(**{chart.keys[0]: lambda i: 0.5 * i}))
    assert figure["title"] == chart.title
    assert figures(made(loss=1.0)) == []
    assert len(chart.labels) == len(chart.keys)


def test_no_key_is_drawn_twice():
    keys = [key for chart in (*CHARTS, *DIAGNOSTICS) for key in chart.keys]
    assert len(keys) == len(set(keys))


def test_figures_without_news_are_left_out():
    calm = {
        "advantage_clipped": 0.0,
        "log_ess": -1e-5,
        "staleness": 0.0,
        "lam": 1.25,
        "rejected": 0.0,
    }
    assert figures(made(**calm)) == []
    moved = {"advantage_clipped": 0.1, "log_ess": -0.1, "rejected": 0.1}
    assert len(figures(made(**moved, lam=lambda i: 1.0 + i))) == 4


def test_the_keys_of_a_probe_are_no_tasks():
    run = made(**{"probe/overlap": 0.5, "kl_teacher/math": 0.1, "reward/code": 1.0})
    assert plots.tasks_of([run]) == ["math", "code"]


def test_quarters_are_four_lines_of_four_colours():
    (figure,) = figures(made(**{f"probe/overlap_{q}": 0.9 - 0.1 * q for q in (1, 2, 3, 4)}))
    assert [label for label, *_ in figure["legend"]] == ["1st quarter", "2nd", "3rd", "4th"]
    heights = [paths(figure["svg"], f"s{k}")[0][:, 1].mean() for k in range(4)]
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], rtol=1e-4)
    assert heights == sorted(heights)  # less overlap is lower on the page


def test_in_a_comparison_the_first_and_the_last_key_stand_for_all():
    keys = {f"probe/overlap_{q}": 0.9 - 0.1 * q for q in (1, 2, 3, 4)}
    (figure,) = figures(made("a", **keys), made("b", **keys))
    assert figure["legend"] == [
        ("a, 1st quarter", "var(--s0)", False),
        ("a, 4th", "var(--s0)", True),
        ("b, 1st quarter", "var(--s1)", False),
        ("b, 4th", "var(--s1)", True),
    ]


def test_the_areas_of_the_token_reward_end_at_its_quantiles():
    """Heights read back from the drawing are linear in the quantiles."""
    (figure,) = figures(made(**FAN))
    svg = str(figure["svg"])
    filled = re.findall(r'id="[^"]*FillBetween[^"]*">(.*?)</g>\s*</g>', svg, re.DOTALL)
    shapes = re.findall(r'<path[^>]* d="([^"]*)"|<path d="([^"]*)"', "".join(filled))
    heights = set()
    for shape in shapes:
        ys = [float(y) for _, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", "".join(shape))]
        heights |= {round(min(ys), 3), round(max(ys), 3)}
    low, inner_low, inner_high, high = sorted(heights, reverse=True)
    per_nat = (low - high) / 6
    np.testing.assert_allclose(inner_low, low - 3 * per_nat, atol=0.02)
    np.testing.assert_allclose(inner_high, low - 5 * per_nat, atol=0.02)


def test_an_area_without_one_of_its_quantiles_is_left_out():
    keys = FAN | {"token_reward_p99": lambda i: None if i == 2 else 2.0}
    (figure,) = figures(made(**keys))
    (whole,) = figures(made(**FAN))
    count = re.compile(r"FillBetween")
    assert 0 < len(count.findall(str(figure["svg"]))) < len(count.findall(str(whole["svg"])))


def test_a_curve_without_change_is_drawn_level_with_plain_numbers():
    for n in (5, plots.SMOOTH_FROM + 1):  # a running mean rounds
        (figure,) = figures(made(n=n, eos_probability=0.01))
        labels = re.findall(r">([^<>]*)</text>", str(figure["svg"]))
        assert not [label for label in labels if "e" in label or len(label) > 8], labels
        (line, *_) = paths(figure["svg"], "ink")
        assert np.ptp(line[:, 1]) < 1e-3
