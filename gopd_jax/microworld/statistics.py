"""What a comparison's results say: means over seeds, paired differences, tables, the sweep's plot.

A result is a dict of method, seed, and by task accuracy, length, truncated and stderr. Intervals
are Student's t over seeds, 95 %; differences are taken seed by seed, where both methods saw the
same problems and the same sampling seed. Accuracies are shares here and percent in the tables.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student_t

from gopd_jax.microworld.tasks import TASKS

LEVEL = 0.95
COLUMNS = (*TASKS, "mean", "length")
# The best teacher of each task, as one row: nobody can be asked to choose better.
DOMAIN_TEACHERS = "domain_teachers"

METHODS = {
    "base": "base",
    "teacher_math": "math teacher",
    "teacher_code": "code teacher",
    "sft": "SFT on the teachers' samples",
    "expo_0.25": "ExPO, α = 0.25",
    "expo_0.5": "ExPO, α = 0.5",
    "grpo": "more RL (GRPO)",
    "opd": "OPD, λ = 1",
    "exopd": "ExOPD, λ = 1.25",
}
STRONG = {
    "large_base": "large base",
    "large_teacher": "large teacher",
    "strong_sft": "SFT on the large teacher's samples",
    "strong_opd": "OPD, λ = 1",
    "strong_exopd": "ExOPD, λ = 1.25, R = student's base",
    "strong_exopd_corrected": "ExOPD, λ = 1.25, R = teacher's base",
}
LABELS = METHODS | STRONG | {DOMAIN_TEACHERS: "each task's own teacher"}
DIFFERENCES = (
    ("exopd", "opd"),
    ("exopd", DOMAIN_TEACHERS),
    ("opd", DOMAIN_TEACHERS),
    ("exopd", "sft"),
    ("exopd", "expo_0.25"),
    ("exopd", "expo_0.5"),
    ("exopd", "grpo"),
)
STRONG_DIFFERENCES = (
    ("strong_opd", "strong_sft"),
    ("strong_exopd", "strong_opd"),
    ("strong_exopd_corrected", "strong_opd"),
    ("strong_exopd_corrected", "strong_exopd"),
)
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)


def sweep_method(lam: float) -> str:
    """The method whose results the sweep shows at lam; 1 and 1.25 are OPD's and ExOPD's own."""
    return {1.0: "opd", 1.25: "exopd"}.get(lam, f"lam_{lam:g}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """mean ± half over n values: Student's t at LEVEL. half is None of a single value."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """ValueError where there is no value."""
        if not len(values):
            raise ValueError("an interval needs at least one value")
        half, n = None, len(values)
        if n > 1:
            half = float(student_t.ppf((1 + LEVEL) / 2, n - 1)) * standard_error(values)
        return cls(mean=float(np.mean(values)), half=half, n=n)

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, from the sample's own spread; NaN for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def value(result: dict, column: str) -> float:
    """A task's accuracy, their mean, or the mean completion length in tokens."""
    if column == "mean":
        return float(np.mean([result["accuracy"][task] for task in TASKS]))
    if column == "length":
        return float(np.mean([result["length"][task] for task in TASKS]))
    return result["accuracy"][column]


def by_method(results: Sequence[dict]) -> dict[str, dict[int, dict]]:
    """method -> seed -> result, and DOMAIN_TEACHERS where both teachers are.

    ValueError for two results of one method and seed.
    """
    found: dict[str, dict[int, dict]] = {}
    for result in results:
        seeds = found.setdefault(result["method"], {})
        if result["seed"] in seeds:
            raise ValueError(
                f"{result['method']} seed {result['seed']} has two results; delete one of the lines"
            )
        seeds[result["seed"]] = result
    own = {task: found.get(f"teacher_{task}", {}) for task in TASKS}
    if shared := set.intersection(*(set(seeds) for seeds in own.values())):
        found[DOMAIN_TEACHERS] = {
            seed: {
                key: {task: own[task][seed][key][task] for task in TASKS}
                for key in ("accuracy", "length")
            }
            for seed in sorted(shared)
        }
    return found


def values(found: dict, method: str, column: str) -> list[float]:
    """One value a seed, in the order of seeds."""
    seeds = found.get(method, {})
    return [value(seeds[seed], column) for seed in sorted(seeds)]


def differences(found: dict, a: str, b: str, column: str) -> list[float]:
    """a - b at each seed that both have, in the order of seeds."""
    ours, theirs = found.get(a, {}), found.get(b, {})
    shared = sorted(ours.keys() & theirs.keys())
    return [value(ours[seed], column) - value(theirs[seed], column) for seed in shared]


def figures(results: Sequence[dict]) -> dict:
    """Every number of the tables as plain values: {methods, differences, sweep}."""
    found = by_method(results)

    def described(numbers):
        return {**dataclasses.asdict(Interval.of(numbers)), "values": numbers}

    pairs = [
        {
            "difference": f"{a} - {b}",
            **{
                column: described(deltas) | {"excludes_zero": Interval.of(deltas).excludes_zero}
                for column in COLUMNS
                if (deltas := differences(found, a, b, column))
            },
        }
        for a, b in (*DIFFERENCES, *STRONG_DIFFERENCES)
        if differences(found, a, b, "mean")
    ]
    methods = {
        method: {column: described(values(found, method, column)) for column in COLUMNS}
        for method in found
    }
    sweep = {f"{lam:g}": sweep_method(lam) for lam in SWEEP if sweep_method(lam) in found}
    return {"level": LEVEL, "methods": methods, "differences": pairs, "sweep": sweep}


# --- tables


def tables(results: Sequence[dict], notes: Sequence[str] = ()) -> str:
    """The comparison as Markdown, without the parts that have no results. notes come first."""
    found = by_method(results)
    intervals = (
        "Percent of held-out problems solved; length in tokens. ± is the 95 % interval over seeds "
        "(Student's t)."
    )
    pairs = (
        "Differences are taken seed by seed, on the same problems and sampling seeds; "
        "`*`: the 95 % interval excludes 0. Nothing is corrected for the number of comparisons."
    )
    sweep = {sweep_method(lam): f"{lam:g}" for lam in SWEEP}
    parts = [
        ("## Two teachers into one student", _methods(found, METHODS)),
        ("", _differences(found, DIFFERENCES)),
        ("## Strong to weak", _methods(found, {"base": "base"} | STRONG)),
        ("", _differences(found, STRONG_DIFFERENCES)),
        ("## λ", _methods(found, sweep, first="λ")),
    ]
    if not any(method in found for method in STRONG):
        del parts[2:4]
    if not any(m in found for m in sweep if m not in METHODS):
        parts.pop()
    text = [f"{intervals} {pairs}", *(f"- {note}" for note in notes)]
    lines = ["\n".join(text[:1]), "\n".join(text[1:])]
    for heading, rows in parts:
        lines += [part for part in (heading, "\n".join(rows)) if part]
    return "\n\n".join(line for line in lines if line) + "\n"


def _methods(found: dict, labels: dict[str, str], first: str = "method") -> list[str]:
    """method | seeds | each column."""
    rows = [
        [label, str(len(found[method]))]
        + [_cell(Interval.of(values(found, method, c)), _scale(c)) for c in COLUMNS]
        for method, label in labels.items()
        if method in found
    ]
    return _table([first, "seeds", *COLUMNS], rows)


def _differences(found: dict, pairs) -> list[str]:
    """a - b | seeds | each column."""
    rows = []
    for a, b in pairs:
        deltas = {column: differences(found, a, b, column) for column in COLUMNS}
        if not deltas["mean"]:
            continue
        cells = []
        for column in COLUMNS:
            interval = Interval.of(deltas[column])
            mark = " *" if interval.excludes_zero else ""
            cells.append(_cell(interval, _scale(column), sign="+") + mark)
        rows.append([f"{LABELS[a]} − {LABELS[b]}", str(len(deltas["mean"])), *cells])
    return _table(["paired difference", "seeds", *COLUMNS], rows)


def _scale(column: str) -> float:
    return 1.0 if column == "length" else 100.0


def _cell(interval: Interval, scale: float, sign: str = "") -> str:
    text = f"{scale * interval.mean:{sign}.1f}".replace("-", "−")
    return text if interval.half is None else f"{text} ± {scale * interval.half:.1f}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(row) + " |" for row in (header, rule, *rows)]


# --- plot

COLOURS = {"math": "#1f6fb4", "code": "#d1611c", "length": "#4a4a4a"}
PLOT_STYLE = {
    **{"font.size": 10, "axes.grid": True, "grid.color": "#e3e3e3", "grid.linewidth": 0.8},
    **{"axes.axisbelow": True, "axes.edgecolor": "#9a9a9a", "text.parse_math": False},
    **{"axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "gopd_jax"},
}


def plot(results: Sequence[dict], directory: Path) -> list[Path]:
    """Accuracy of each task and length against lambda, as sweep.png and sweep.svg.

    Bars are ± 1 standard error over seeds, faint points single seeds, dashed lines each task's
    teacher. No files where fewer than two lambdas have results.
    """
    import matplotlib

    found = by_method(results)
    lams = [lam for lam in SWEEP if sweep_method(lam) in found]
    if len(lams) < 2:
        return []
    with matplotlib.rc_context(PLOT_STYLE):
        figure = Figure(figsize=(7.2, 6.0), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        levels = {}
        for task in TASKS:
            _curve(top, found, lams, task, label=task)
            if level := values(found, f"teacher_{task}", task):
                levels[task] = 100 * float(np.mean(level))
        for task, height in levels.items():
            # The higher line's name goes above it, another's below: they may lie close together.
            above = height == max(levels.values())
            top.axhline(height, color=COLOURS[task], linewidth=1.2, linestyle=(0, (5, 3)))
            top.annotate(
                f"{task} teacher",
                (1.0, height),
                xycoords=("axes fraction", "data"),
                xytext=(0, 3 if above else -3),
                textcoords="offset points",
                ha="right",
                va="bottom" if above else "top",
                color=COLOURS[task],
                fontsize=8.5,
            )
        _curve(bottom, found, lams, "length", label="length")
        top.set_ylabel("held-out problems solved, %")
        top.legend(frameon=False, loc="lower right")
        bottom.set_ylabel("completion, tokens")
        bottom.set_xlabel("λ   (0: reference, 1: OPD, > 1: ExOPD)")
        bottom.set_xticks(lams, [f"{lam:g}" for lam in lams])
        for axes in (top, bottom):
            axes.axvline(1.0, color="#b5b5b5", linewidth=1.0, zorder=0)
        files = [directory / "sweep.png", directory / "sweep.svg"]
        figure.savefig(files[0], dpi=160)
        figure.savefig(files[1], metadata={"Date": None})
    return files


def _curve(axes, found: dict, lams: list[float], column: str, label: str) -> None:
    colour, scale = COLOURS[column], _scale(column)
    at = {lam: scale * np.array(values(found, sweep_method(lam), column)) for lam in lams}
    for lam, seen in at.items():
        axes.plot([lam] * len(seen), seen, ".", color=colour, alpha=0.3, markersize=5, zorder=2)
    axes.errorbar(
        lams,
        [seen.mean() for seen in at.values()],
        yerr=[standard_error(seen) for seen in at.values()],
        color=colour,
        label=label,
        marker="o",
        markersize=5,
        linewidth=1.8,
        capsize=3,
        zorder=3,
    )
