"""A run's rows as one HTML page that opens without a network: curves, tables, samples, settings.

`python -m gopd_jax.report --workdir=DIR` writes DIR/report.html, and its tables as report.json.
Given several times, --workdir compares the runs: the first one's comparison.html and .json.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import jinja2

from gopd_jax.metrics import EVALUATION, METRICS, SAMPLES, TIMING, read_rows
from gopd_jax.reporting import plots, watch
from gopd_jax.reporting.charts import DIAGNOSTICS
from gopd_jax.reporting.checklist import UNREAD, checklist, recovered
from gopd_jax.reporting.plots import Run

N_SAMPLES = 6  # problems of each task whose completions are shown
MINUS = "\u2212"
CHECK = ("role", "name", "value", "limit", "verdict", "says")  # a check's fields
BEFORE, AFTER, OTHER = range(3)  # the order of the results' rows


def write(*workdirs: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of one run, or the comparison of several; the path of the page.

    Without `out` it goes into the first workdir. A workdir without metrics.jsonl is a ValueError, a
    damaged run.json too; every other file may be missing, and so is then what would be shown of it.
    Beside the page, under its name with .json, is what its tables hold.
    """
    paths = [Path(workdir) for workdir in workdirs]
    default = paths[0] / ("report.html" if len(paths) == 1 else "comparison.html")
    path = Path(out) if out is not None else default
    if path.suffix == ".json":
        raise ValueError(f"{path} is the page, and its tables are beside it as .json; give .html")
    if out is not None and (path.is_dir() or not path.parent.is_dir()):
        raise ValueError(f"{path} is no file in a directory that is there; give DIR/report.html")
    names = [path.resolve().name for path in paths]
    runs = [
        _read(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(paths, names)
    ]
    tasks = plots.tasks_of(runs)
    tables = {
        "overview": _overview(runs, tasks),
        "results": _results(runs, tasks),
        "advice": _advice(runs),
        "checklist": _checklist(runs),
        "settings": _settings(runs),
    }
    page = _template().render(
        title=" and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs",
        runs=runs,
        tasks=tasks,
        accuracy=plots.accuracy_figures(runs, tasks),
        training=plots.training_figures(runs, tasks),
        diagnostics=plots.training_figures(runs, tasks, DIAGNOSTICS, name="d"),
        smoothed=any(len(run.metrics) >= plots.SMOOTH_FROM for run in runs),
        counts=sorted({(r["samples"], r["problems"]) for run in runs for r in run.evaluation}),
        samples=_samples(runs, tasks),
        **tables,
    )
    # Half of a surrogate pair, which a model can write, has no UTF-8.
    path.write_bytes(page.encode(errors="replace"))
    facts = {"runs": [run.name for run in runs], "tasks": tasks} | tables
    text = json.dumps(_plain(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    path.with_suffix(".json").write_bytes(text.encode(errors="backslashreplace"))
    return path


def _plain(value):
    """The same for strict JSON, which has no NaN and no infinity: both become null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "change": _change}
    return environment.get_template("report.html.jinja")


def _read(workdir: Path, name: str) -> Run:
    if not (workdir / METRICS).is_file():
        raise ValueError(
            f"{workdir} has no {METRICS}; give the workdir of a run, --workdir=DIR, that "
            "`python -m gopd_jax.main` has trained in"
        )
    described = _object(workdir / "run.json", "start the run's command again, which writes it")
    file, cure = workdir / "preflight.json", "put back an undamaged copy, or remove it"
    try:
        found = _object(file, cure).get("checks", [])
        checks = [{key: check[key] for key in CHECK} for check in found]
        described["preflight"] = {
            f"{check['role']}: {check['name']}": f"{check['value']} ({check['limit']}): "
            f"{check['verdict']} {check['says']}".rstrip()
            for check in checks
        }
    except ValueError as error:  # a whole run's report is not lost with it
        checks, described["preflight"] = [], {UNREAD: str(error)}
    except (KeyError, TypeError):
        checks, described["preflight"] = [], {UNREAD: f"{file} has checks without {CHECK}; {cure}"}
    return Run(
        name=name,
        metrics=read_rows(workdir / METRICS),
        timing=read_rows(workdir / TIMING),
        evaluation=read_rows(workdir / EVALUATION),
        samples=read_rows(workdir / SAMPLES),
        info=described,
        checks=checks,
    )


def _object(file: Path, cure: str) -> dict:
    """The object of a JSON file, {} where there is no file. ValueError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        if not isinstance(found := json.loads(file.read_text()), dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except ValueError as error:
        raise ValueError(f"{file} is no JSON object ({error}); {cure}") from error


def _mean(by_task: dict[str, dict], tasks: list[str]) -> tuple[float, float | None] | None:
    """Mean accuracy over the tasks and its standard error; None unless each has been evaluated."""
    rows = [by_task.get(task) for task in tasks]
    if not rows or None in rows:
        return None
    errors = [row["stderr"] for row in rows]
    error = None if None in errors else math.hypot(*errors) / len(rows)
    return statistics.fmean(row["accuracy"] for row in rows), error


def _results(runs: list[Run], tasks: list[str]) -> list[dict]:
    """The table's rows: every student before and after, then the other models; equal rows once."""
    rows = []
    for run in runs:
        student, others = run.student(), run.others()
        steps = [*dict.fromkeys([min(student), max(student)])] if student else []
        for step in steps:
            cells, before = student[step], student[steps[0]]
            gains = {
                task: {
                    "points": cells[task]["accuracy"] - before[task]["accuracy"],
                    "gap": recovered(before[task], cells[task], run.judge(task)),
                }
                for task in cells
                if step != steps[0] and task in before
            }
            prefix = f"{run.name}: " if len(runs) > 1 and step != steps[0] else ""
            kind = AFTER if step != steps[0] else BEFORE
            rows.append((kind, run.name, f"{prefix}student, step {step}", cells, gains))
        rows += [(OTHER, run.name, model, cells, {}) for model, cells in others.items()]
    unique: dict[str, tuple] = {}
    for row in sorted(rows, key=lambda row: row[0]):
        unique.setdefault(json.dumps([row[2], row[3]], sort_keys=True), row)
    names = [name for _, _, name, *_ in unique.values()]
    return [
        {
            # What two runs measured differently bears the run's name.
            "name": name if names.count(name) == 1 else f"{run}: {name}",
            **{"cells": cells, "gains": gains, "after": kind == AFTER},
            "mean": _mean(cells, tasks),
        }
        for kind, run, name, cells, gains in unique.values()
    ]


def _samples(runs: list[Run], tasks: list[str]) -> list[dict]:
    """Completions of the same prompts side by side: before, after, and the task's teacher."""
    groups = []
    for task in tasks:
        columns: dict[str, dict[str, dict]] = {}  # heading -> prompt -> row
        for run in runs:
            rows = [row for row in run.samples if row["task"] == task]
            steps = sorted({row["step"] for row in rows if row["model"] == "student"})
            for step in dict.fromkeys([steps[0], steps[-1]] if steps else []):
                later = len(runs) > 1 and step != steps[0]
                heading = f"{run.name}, step {step}" if later else f"student, step {step}"
                shown = [row for row in rows if (row["model"], row["step"]) == ("student", step)]
                columns.setdefault(heading, _by_prompt(shown))
            for name in run.teachers(task):
                if teacher := [row for row in rows if row["model"] == name]:
                    columns.setdefault(name, _by_prompt(teacher))
        # The teacher last, whichever run brought it.
        columns = dict(sorted(columns.items(), key=lambda column: column[0].startswith("teacher:")))
        prompts = [*dict.fromkeys(p for heading in columns for p in columns[heading])]
        if prompts:
            shown = [
                (prompt, [(heading, columns[heading].get(prompt)) for heading in columns])
                for prompt in prompts[:N_SAMPLES]
            ]
            groups.append({"task": task, "shown": shown, "n_prompts": len(prompts)})
    return groups


def _by_prompt(rows: list[dict]) -> dict[str, dict]:
    """The first row of each prompt."""
    found: dict[str, dict] = {}
    for row in rows:
        found.setdefault(row["prompt"], row)
    return found


def _overview(runs: list[Run], tasks: list[str]) -> list[dict]:
    """A run's main figures: name, one text for each run, and what it is."""
    figures = [_figures(run, tasks) for run in runs]
    names = dict.fromkeys(name for run in figures for name in run)
    return [{"name": name, "values": [run.get(name, "–") for run in figures]} for name in names]


def _figures(run: Run, tasks: list[str]) -> dict[str, str]:
    """Name -> text, of what the run's rows can tell."""
    means = [_mean(by_task, tasks) for by_task in run.student().values()]
    means = [100 * mean[0] for mean in means if mean is not None]
    found = {
        "accuracy, mean of tasks": _ends(means, "{:.1f}"),
        "KL to teacher, nats a token": _ends(run.values("kl_teacher"), "{:.4f}"),
        "completion length, tokens": _ends(run.values("length"), "{:.1f}"),
    }
    if run.metrics:
        steps, wanted = run.metrics[-1]["step"], run.info.get("config", {}).get("steps")
        found["steps"] = f"{steps} of {wanted}" if wanted else str(steps)
    if skipped := run.values("skipped"):
        found["updates skipped"] = f"{sum(skipped):.0f}"
    if tokens := run.values("tokens"):
        found["completion tokens"] = _count(sum(tokens))
    if rates := run.values("tokens_per_second", "timing"):
        found["tokens a second, median"] = f"{statistics.median(rates):,.0f}"
        minutes = sum(run.values("seconds", "timing")) / 60
        found["wall clock"] = f"{minutes / 60:.1f} h" if minutes >= 120 else f"{minutes:.1f} min"
    return {name: text for name, text in found.items() if text is not None}


def _ends(values: list[float], form: str) -> str | None:
    """The first value, and the last where there is more than one."""
    return " → ".join(form.format(value) for value in [*values[:1], *values[1:][-1:]]) or None


def _advice(runs: list[Run]) -> list[dict]:
    """What each run had to be told, and at which step."""
    return [
        {"run": run.name, "step": step, "name": name, "sentence": sentence}
        for run in runs
        for step, name, sentence in watch.history(run.metrics, run.info.get("config", {}))
    ]


def _checklist(runs: list[Run]) -> list[dict]:
    """Section, item, a text for each run (None: does not apply), and whether these differ."""
    told = [{(section, item): text for section, item, text in checklist(run)} for run in runs]
    # A section's items together, also those that only a later run has.
    sections = list(dict.fromkeys(section for run in told for section, _ in run))
    keys = dict.fromkeys(key for run in told for key in run)
    rows = []
    for section, item in sorted(keys, key=lambda key: sections.index(key[0])):
        values = [run.get((section, item)) for run in told]
        row = {"section": section, "item": item, "values": values}
        rows.append(row | {"differs": len(set(values)) > 1})
    return rows


def _flat(value, prefix: str = "") -> dict[str, str]:
    """A nested value's leaves: dotted key -> text."""
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}


def _settings(runs: list[Run]) -> list[dict]:
    """The tables of run.json and preflight.json.

    A title, and rows of a key, a text for each run, and whether these differ.
    """
    found = []
    for title, key in (
        ("Settings", "config"),
        ("Models", "models"),
        ("Preflight", "preflight"),
        ("Environment", "environment"),
        ("Identity", "identity"),
    ):
        flat = [_flat(run.info[key]) if run.info.get(key) else {} for run in runs]
        rows = []
        for name in dict.fromkeys(name for run in flat for name in run):
            values = [run.get(name, "–") for run in flat]
            rows.append({"key": name, "values": values, "differs": len(set(values)) > 1})
        if rows:
            found.append({"title": title, "rows": rows})
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _change(share: float) -> str:
    """A difference of two shares in points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", MINUS)


def _count(number: float) -> str:
    """A count to three digits: 950, 12.3 k, 4.56 M."""
    for unit in ("", " k", " M", " G"):
        if number < 999.5 or unit == " G":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if unit else f"{number:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gopd_jax.report", description=__doc__)
    parser.add_argument("--workdir", action="append", required=True, help="a run; may be repeated")
    parser.add_argument("--out", help="the page to write, if not in the first workdir")
    flags = parser.parse_args(argv)
    try:
        print(write(*flags.workdir, out=flags.out))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error}; --out=FILE.html puts the page elsewhere")


if __name__ == "__main__":
    main()
