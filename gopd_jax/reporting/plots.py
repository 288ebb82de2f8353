"""A run's curves as inline <svg> whose colours are CSS variables of the page that holds them."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gopd_jax.reporting.charts import CHARTS, Chart

N_SERIES = 6  # colours --s0 ... of the page; further series begin again
SMOOTH_FROM = 60  # points of a curve from which its running mean is drawn over it
OF_TASKS = ("reward/", "kl_teacher/")  # keys that end in a task's name; a probe's do not
FEW = 12  # points of a curve up to which each is marked
# What is drawn in these colours takes the page's --ink, --muted, --grid, --s0 ... instead.
INK, MUTED, GRID, SERIES = "#010101", "#020202", "#030303", "#0102"
STYLE = {
    **{"svg.fonttype": "none", "svg.hashsalt": "gopd_jax", "font.size": 8.5},
    **{"text.parse_math": False, "text.color": INK, "axes.axisbelow": True},
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID, "grid.linewidth": 0.6},
    **{"axes.edgecolor": GRID, "axes.spines.top": False, "axes.spines.right": False},
    **{"axes.spines.left": False, "xtick.color": GRID, "xtick.labelcolor": MUTED},
    **{"ytick.color": GRID, "ytick.labelcolor": MUTED, "ytick.major.size": 0},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a workdir holds; `info` is run.json, `checks` those of preflight.json."""

    name: str
    metrics: list[dict]
    timing: list[dict]
    evaluation: list[dict]
    samples: list[dict]
    info: dict
    checks: list[dict] = dataclasses.field(default_factory=list)

    def values(self, key: str, rows: str = "metrics") -> list[float]:
        """The values under `key` of the rows that have one."""
        return [value for _, value in curve(getattr(self, rows), key)]

    def student(self) -> dict[int, dict[str, dict]]:
        """The student's evaluations: step -> task -> row, in the order of steps."""
        found: dict[int, dict[str, dict]] = {}
        for row in sorted(self.evaluation, key=lambda row: row["step"]):
            if row["model"] == "student":
                found.setdefault(row["step"], {})[row["task"]] = row
        return found

    def others(self) -> dict[str, dict[str, dict]]:
        """The other models' last evaluations: model -> task -> row."""
        found: dict[str, dict[str, dict]] = {}
        for row in self.evaluation:
            if row["model"] != "student":
                found.setdefault(row["model"], {})[row["task"]] = row
        return found

    def teachers(self, task: str) -> list[str]:
        """Names under which the task's own teachers are evaluated: one, or those of a mixture."""
        routes = self.info.get("config", {}).get("routes", {})
        parts = routes.get(task, task).split(",")
        return [f"teacher:{part.split('=')[0].strip()}" for part in parts]

    def judge(self, task: str) -> dict | None:
        """The last evaluation of the task's teacher; None without one, or of several teachers."""
        rows = [self.others().get(name, {}).get(task) for name in self.teachers(task)]
        return rows[0] if len(rows) == 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: (step, value) points; the (low, high) of its bands at each; how it looks."""

    label: str
    points: list[tuple[float, float]]
    colour: str
    dashed: bool = False
    level: bool = False  # one value for all steps, drawn from side to side
    bands: tuple[list[tuple[float, float]], ...] = ()


def series(i: int) -> str:
    """The colour of the i-th task or run."""
    return f"{SERIES}{i % N_SERIES:02x}"


def css(colour: str) -> str:
    """The page's variable that a colour stands for."""
    fixed = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
    return fixed.get(colour) or f"var(--s{int(colour.removeprefix(SERIES), 16)})"


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about a 25th of the values, five at least; over fewer at both ends."""
    half = max(2, len(values) // 50)
    total, at = np.concatenate([[0.0], np.cumsum(values)]), np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def draw(lines: list[Line], *, name: str, percent: bool) -> Markup:
    """The lines in one plot; `name` begins its ids, which have to differ within a page.

    Curves of SMOOTH_FROM points or more: thin as they are, thick their running mean.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.3), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _add(axes, line)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(x=0.02, y=0.08)
        axes.ticklabel_format(axis="y", useOffset=False)
        low, high = axes.get_ylim()
        # A curve without change shows none: its ends would be rounding.
        if high - low < 1e-6 * (size := max(abs(low), abs(high))):
            axes.set_ylim(low - 0.1 * size, high + 0.1 * size)
        if percent:
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        page = io.StringIO()
        unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(page, format="svg", transparent=True, metadata=unsaid)
    svg = page.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return Markup(re.sub(rf"#0[123]0[123]0\d|{SERIES}0\d", lambda match: css(match[0]), svg))


def _add(axes, line: Line) -> None:
    style = {"color": line.colour, "linestyle": (0, (4, 2.5)) if line.dashed else "-"}
    x, y = np.array(line.points, float).T
    if line.level:
        axes.axhline(y[0], linewidth=1.3, **style)
        return
    smooth = running_mean if len(x) >= SMOOTH_FROM else np.asarray
    for band in line.bands:
        low, high = map(smooth, np.array(band, float).T)
        axes.fill_between(x, low, high, color=line.colour, alpha=0.12, linewidth=0)
    if len(x) >= SMOOTH_FROM and not line.dashed:
        axes.plot(x, y, color=line.colour, linewidth=0.7, alpha=0.25)
    y = smooth(y)
    marks = {"marker": "o", "markersize": 3} if len(x) <= FEW else {}
    axes.plot(x, y, linewidth=1.6, **marks, **style)


def tasks_of(runs: list[Run]) -> list[str]:
    """Task names in the order of their first appearance, in evaluations and in metric keys."""
    names = [row["task"] for run in runs for row in run.evaluation]
    keys = dict.fromkeys(key for run in runs for row in run.metrics for key in row)
    names += [key.split("/", 1)[1] for key in keys if key.startswith(OF_TASKS)]
    return list(dict.fromkeys(names))


def curve(rows: Iterable[dict], key: str) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a value under `key`."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _figure(title: str, unit: str, lines: list[Line], *, name: str, percent: bool) -> dict:
    """What the page needs of one plot."""
    legend = dict.fromkeys((line.label, css(line.colour), line.dashed) for line in lines)
    svg = draw(lines, name=name, percent=percent)
    return {"title": title, "unit": unit, "svg": svg, "legend": [*legend]}


def accuracy_figures(runs: list[Run], tasks: list[str]) -> list[dict]:
    """A plot for each task: the student's accuracy by step, the other models' as levels."""
    figures, unit = [], "held-out problems; band: ± 1 standard error"
    for i, task in enumerate(tasks):
        lines, levels = [], {}
        for j, run in enumerate(runs):
            rows = [by_task[task] for by_task in run.student().values() if task in by_task]
            label, colour = (run.name, series(j)) if len(runs) > 1 else ("student", INK)
            heights = [(row["accuracy"], row["stderr"] or 0.0) for row in rows]
            band = [(value - error, value + error) for value, error in heights]
            points = curve(rows, "accuracy")
            lines.append(Line(label=label, points=points, colour=colour, bands=(band,)))
            levels |= {m: by_task[task] for m, by_task in run.others().items() if task in by_task}
        for model, row in levels.items():
            if len(runs) > 1 and all(model not in run.teachers(task) for run in runs):
                continue
            own = [t for t in tasks if model in runs[0].teachers(t)]
            colour = series(tasks.index(own[0])) if len(runs) == 1 and len(own) == 1 else MUTED
            points = [(row["step"], row["accuracy"])]
            lines.append(Line(label=model, points=points, colour=colour, dashed=True, level=True))
        if lines := [line for line in lines if line.points]:
            figures.append(_figure(task, unit, lines, name=f"a{i}", percent=True))
    return figures


def training_figures(runs: list[Run], tasks: list[str], charts=CHARTS, name="t") -> list[dict]:
    """The plots of `charts` whose keys some row has: of one run by task, of several by run.

    name: begins the ids within the plots.
    """
    figures = []
    for i, chart in enumerate(charts):
        lines = []
        for j, run in enumerate(runs):
            lines += _curves(chart, run, series(j)) if len(runs) > 1 else _alone(chart, run, tasks)
        lines = [line for line in lines if line.points]
        values = {value for line in lines for _, value in line.points}
        quiet = chart.calm is not None and all(abs(value) <= chart.calm for value in values)
        if lines and not quiet and not (chart.varies and len(values) == 1):
            figures.append(
                _figure(chart.title, chart.unit, lines, name=f"{name}{i}", percent=chart.percent)
            )
    return figures


def _curves(chart: Chart, run: Run, colour: str) -> list[Line]:
    """A run among several: its first key, and its last one dashed."""
    rows, lines = getattr(run, chart.rows), []
    for key, label in dict(
        [*zip(chart.keys, chart.labels)][:: max(1, len(chart.keys) - 1)]
    ).items():
        label = f"{run.name}, {label}" if len(chart.keys) > 1 else run.name
        dashed, bands = key != chart.keys[0], chart.bands[:1]
        lines.append(_line(rows, key, bands, label=label, colour=colour, dashed=dashed))
    return lines


def _alone(chart: Chart, run: Run, tasks: list[str]) -> list[Line]:
    """The only run: two keys as solid and dashed, more in colours; the first one's tasks."""
    rows, lines, few = getattr(run, chart.rows), [], len(chart.keys) <= 2
    for k, (key, label) in enumerate(zip(chart.keys, chart.labels)):
        look = {"colour": INK if few else series(k), "dashed": few and k > 0}
        lines.append(_line(rows, key, chart.bands, label=label, **look))
    for k, task in enumerate(tasks):
        points = curve(rows, f"{chart.keys[0]}/{task}")
        lines.append(Line(label=task, points=points, colour=series(k)))
    return lines


def _line(rows: list[dict], key: str, bands: tuple[tuple[str, str], ...], **look) -> Line:
    """The curve of a key, with its bands where every row that has it has theirs too."""
    whole = [row for row in rows if row.get(key) is not None]
    areas = [[(row.get(low), row.get(high)) for row in whole] for low, high in bands]
    areas = [area for area in areas if None not in {x for pair in area for x in pair}]
    return Line(points=curve(whole, key), bands=tuple(areas), **look)
