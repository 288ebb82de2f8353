"""The study's lines as tables and plots of docs/RESULTS.md, between the page's own sentences.

A group's table and plot stand between <!-- study:NAME:begin --> and <!-- study:NAME:end -->; what
is outside of such pairs is left as it is. Intervals are Student's t over seeds, 95 %; differences
are paired by seed.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gopd_jax.microworld import statistics
from gopd_jax.microworld.statistics import Interval
from gopd_jax.microworld.study_cells import GROUPS, METHODS, Group

COLUMNS = ("mean", "math", "code")
# Heading of a column -> value of a result line; the mean over seeds is shown. Where the target is
# tilted (lambda = 1.25) the divergence is from it.
OF_CELLS = {
    "exopd": {
        "KL(S‖T_λ)": lambda r: r["probe"]["kl_target"],
        "steps": lambda r: r["steps"],
    },
    "support": {
        "KL(S‖T_λ)": lambda r: r["probe"]["kl_target"],
        "student's mass outside the target's 16": lambda r: r["probe"]["tail_mass"],
    },
    "lag": {
        "KL(S‖T)": lambda r: r["probe"]["kl_teacher"],
        "effective share of tokens": lambda r: math.exp(r["train"]["log_ess"]),
    },
}
KL = {"KL(S‖T)": lambda r: r["probe"]["kl_teacher"]}
OF_GRADIENTS = {"variance": "variance", "cosine": "cosine", "cosine of means": "cosine_mean"}
DOT = {"mean": "#333333", "math": "#1f6fb4", "code": "#d1611c"}


def write(rows: Sequence[dict], docs: Path) -> None:
    """docs/RESULTS.md's tables, docs/study/*.png and docs/study/results.jsonl.

    ValueError where the page or a pair of marks is missing.
    """
    page = docs / "RESULTS.md"
    if not page.is_file():
        raise ValueError(f"there is no {page} to write tables into; run from the repository's root")
    text = page.read_text()
    (docs / "study").mkdir(exist_ok=True)
    for name, group in GROUPS.items():
        found = _of_group(rows, group)
        if not found:
            continue
        shown = ["\n".join(table(rows, name))]
        if name != "start":
            plot(found, group).savefig(docs / "study" / f"{name}.png", dpi=110)
            shown.append(f"![{group.title}](study/{name}.png)")
        text = replaced(text, name, "\n\n".join(shown))
    page.write_text(text)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (docs / "study" / "results.jsonl").write_text(lines)


def replaced(text: str, name: str, inside: str) -> str:
    """The page with `inside` between the group's marks. ValueError where they are not there."""
    begin, end = f"<!-- study:{name}:begin -->", f"<!-- study:{name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page has no single pair {begin} ... {end}; add these two lines")
    head, rest = text.split(begin)
    return f"{head}{begin}\n{inside}\n{end}{rest.split(end)[1]}"


def _of_group(rows: Sequence[dict], group: Group) -> dict[str, dict[int, dict]]:
    """method -> seed -> line of a cell, in the group's order."""
    cells = [r for r in rows if r["kind"] == "cell" and r["method"] in group.methods]
    found = statistics.by_method(cells)
    return {method: found[method] for method in group.methods if method in found}


def table(rows: Sequence[dict], name: str) -> list[str]:
    """The group's lines of Markdown: accuracy in percent with intervals, and what else it asks."""
    group, found = GROUPS[name], _of_group(rows, GROUPS[name])
    gradients = {r["method"]: r for r in rows if r["kind"] == "gradient"}
    freed = next((r["freed"] for r in rows if "freed" in r), {})
    seconds = next((r["step_seconds"] for r in rows if r["kind"] == "timing"), {})
    extra = {} if name == "start" else OF_CELLS.get(name, KL)
    header = ["method", "seeds", *COLUMNS, f"− {_short(group.against)}", "length", *extra]
    header += list(OF_GRADIENTS) if group.gradients else []
    header += ["freed to T > S"] if name == "routing" else []
    header += ["ms a step"] if group.timed else []
    lines = []
    for method, seeds in found.items():
        line = [METHODS[method].label, str(len(seeds))]
        line += [_interval(statistics.values(found, method, c)) for c in COLUMNS]
        deltas = statistics.differences(found, method, group.against, "mean")
        line.append("" if method == group.against or not deltas else _interval(deltas, "+"))
        line.append(f"{np.mean(statistics.values(found, method, 'length')):.1f}")
        line += [_mean(value, seeds.values()) for value in extra.values()]
        if group.gradients:
            seen = gradients.get(method, {})
            line += [_number(seen.get(key), method in gradients) for key in OF_GRADIENTS.values()]
        if name == "routing":
            key = {"opd": "policy_gradient"}.get(method, method)
            line.append(f"{100 * freed[key]:.1f} %" if key in freed else "")
        if group.timed:
            taken = seconds.get(method)
            line.append("" if taken is None else f"{1000 * taken:.0f}")
        lines.append(line)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (header, rule, *lines)]


def _short(method: str) -> str:
    short = {"opd": "plain OPD", "exopd": "sampled", "exopd_exact": "whole vocabulary"}
    return short.get(method, method)


def _interval(values: Sequence[float], sign: str = "") -> str:
    found = Interval.of(values)
    text = f"{100 * found.mean:{sign}.1f}".replace("-", "−")
    text = text if found.half is None else f"{text} ± {100 * found.half:.1f}"
    return text + (" *" if sign and found.excludes_zero else "")


def _mean(value, seeds) -> str:
    return _number(float(np.mean([value(result) for result in seeds])), True)


def _number(value: float | None, there: bool) -> str:
    """Three digits; empty where nothing was measured, a dash where there is only noise."""
    if not there:
        return ""
    return "–" if value is None else f"{value:.3g}".replace("-", "−")


def plot(found: dict, group: Group) -> Figure:
    """Accuracy of each method with its interval, a faint dot for each seed."""
    import matplotlib

    with matplotlib.rc_context(statistics.PLOT_STYLE):
        figure = Figure(figsize=(8.4, 1.2 + 0.36 * len(found)), layout="constrained")
        axes = figure.subplots()
        for i, method in enumerate(found):
            for j, column in enumerate(COLUMNS):
                seen = 100 * np.array(statistics.values(found, method, column))
                y = i + 0.22 * (j - 1)
                axes.plot(seen, [y] * len(seen), ".", color=DOT[column], alpha=0.3, markersize=4)
                middle = Interval.of(seen)
                axes.errorbar(
                    [middle.mean],
                    [y],
                    xerr=None if middle.half is None else [middle.half],
                    color=DOT[column],
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=column if i == 0 else None,
                )
        against = statistics.values(found, group.against, "mean")
        if against:
            axes.axvline(100 * float(np.mean(against)), color="#b5b5b5", linewidth=1.0, zorder=0)
        axes.set_yticks(range(len(found)), [METHODS[method].label for method in found])
        axes.invert_yaxis()
        axes.set_xlabel("held-out problems solved, %")
        axes.legend(frameon=False, fontsize=8, loc="best")
    return figure
