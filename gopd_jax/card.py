"""The model card of an export: what it was made from, how, and how well it did."""

from __future__ import annotations

import json
from pathlib import Path

from gopd_jax import __version__, metrics

RUN = "run.json"  # in the workdir: settings, identity and models of the run
# What decides the numbers of a run most; the rest is in the settings at the end.
SHOWN = (
    *("sampling.temperature", "sampling.completion_length", "batch.prompts", "batch.rollouts"),
    *("optimizer.learning_rate", "optimizer.schedule", "objective.loss", "objective.reduction"),
)


def read_run(workdir) -> dict:
    """workdir/run.json. ValueError where it is missing or broken."""
    file = Path(workdir) / RUN
    try:
        return json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(
            f"{workdir} has no {RUN}, so it is no run's workdir; give the --config.workdir of one"
        ) from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); start the run's command again") from error


def text(workdir, step: int) -> str:
    """README.md of the student after `step`, from what its run wrote into the workdir."""
    run = read_run(workdir)
    config, identity = run["config"], run["identity"]
    objective = config["objective"]
    lam = f"{_lam(config)}; " if objective["advantage"] == "gopd" else ""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gopd_jax, on-policy-distillation]",
        "---",
        "",
        f"# {Path(run['models']['student']['path']).name.split('@')[0]}, trained with gopd_jax",
        "",
        f"{step} steps of {config['batch']['prompts']} x {config['batch']['rollouts']} completions "
        f"by gopd_jax {__version__}.",
        "",
        f"- Method: {objective['advantage']}, `{run['formula']}`",
        f"- {lam}completions written by: {objective['source']}",
        *(f"- {key}: {_at(config, key)}" for key in SHOWN),
        "",
        "| role | model | parameters | sha256 of config and weights |",
        "|---|---|---:|---|",
        *(
            f"| {role} | {model['path']} | {model['parameters']:,} | {model['digest']} |"
            for role, model in run["models"].items()
        ),
        "",
        "| data | source | identity of its content |",
        "|---|---|---|",
        *(
            f"| {name} | {config['data'][name]} | {identity[f'data.{name} content']} |"
            for name in ("train", "test")
        ),
        *_accuracies(workdir, step),
        "",
        "All settings:",
        "",
        "```json",
        json.dumps(config, indent=1),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _lam(config: dict) -> str:
    """Lambda as it was: a task's or a row's own takes the place of objective.lam."""
    o = config["objective"]
    own = o.get("task_lam", {})
    told = f"λ = {o['lam']}"
    if own:
        lams = {task: own.get(task, o["lam"]) for task in config["data"]["tasks"]}
        told = "λ = " + ", ".join(f"{lam} on {task}" for task, lam in lams.items())
    if (schedule := o.get("lam_schedule", "constant")) != "constant":
        told += f", {schedule}"
    return told + (", or a row's own" if o.get("lam_by_row", False) else "")


def _at(config: dict, key: str):
    for part in key.split("."):
        config = config[part]
    return config


def _accuracies(workdir, step: int) -> list[str]:
    """A table of the evaluations before the first step and after this one."""
    rows = metrics.read_rows(Path(workdir) / metrics.EVALUATION)
    rows = [row for row in rows if row["step"] in (0, step)]
    if not rows:
        return []
    return [
        "",
        "Accuracy on held-out problems, ± standard error:",
        "",
        "| model | step | task | accuracy | problems x samples |",
        "|---|---:|---|---:|---:|",
        *(
            f"| {row['model']} | {row['step']} | {row['task']} | {_percent(row)} | "
            f"{row['problems']} x {row['samples']} |"
            for row in rows
        ),
    ]


def _percent(row: dict) -> str:
    """One problem has no standard error."""
    error = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['accuracy']:.1f}{error} %"
