"""Every method on the microworld, over seeds: `python -m gopd_jax.microworld.compare --out=DIR`.

The seed of a cell is that of its training, and it chooses the held-out problems and the sampling
of its evaluation, so that methods are compared seed by seed. Finished cells are lines of
DIR/results.jsonl: a stopped comparison goes on where it was, in the middle of a training too.
DIR/table.md, sweep.png, sweep.svg and compare.json are made of those lines.
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
from rich.console import Console

from gopd_jax import command, compiling, data, expo, metrics, microworld, sharding, step, train
from gopd_jax.evaluate import evaluate
from gopd_jax.microworld import make, statistics
from gopd_jax.microworld.cells import GROUPS, Cell, Scope, cells, identity, preset
from gopd_jax.models import hf
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.models.decoder import Decoder
from gopd_jax.progress import bar
from gopd_jax.reader import Reader
from gopd_jax.recipe import Recipe

EVALUATION_ROWS = 256  # sampled at a time
ONLY = "groups or methods, separated by commas; default: all"
HELP = {
    "seeds": "of the methods that share two teachers",
    "strong_seeds": "of strong to weak",
    "sweep_seeds": "of the lambdas other than OPD's and ExOPD's",
    "problems": "held-out problems of each task",
    "samples": "completions of each problem",
    "steps": "of every training; default: the presets'",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """What every evaluation shares."""

    scope: Scope
    recipe: Recipe
    reader: Reader
    test: data.Dataset


def bench(scope: Scope) -> Bench:
    """Load the held-out problems and the tokenizer."""
    c = preset("exopd")
    chat = tokenizers.load(c.student.path)
    # Of a recipe, sampling uses the mesh, the end tokens and what is replaced here.
    recipe = make.recipe_of(make.STAGES[0], chat, sharding.make_mesh(None, 1, 1))
    recipe = dataclasses.replace(
        recipe,
        temperature=c.sampling.temperature,
        completion_length=c.sampling.completion_length,
    )
    test = data.load(c.data.test, c.data.tasks)
    reader = Reader(tokenizer=chat, length=c.data.prompt_length)
    return Bench(scope=scope, recipe=recipe, reader=reader, test=test)


def held_out(test: data.Dataset, n_problems: int, seed: int) -> data.Dataset:
    """n_problems of each task, drawn by the seed."""
    drawn = {}
    for task, records in test.records.items():
        if len(records) < n_problems:
            raise ValueError(f"{test.source} has {len(records)} of {task}; ask for fewer problems")
        drawn[task] = tuple(random.Random(f"{task}/{seed}").sample(records, n_problems))
    return dataclasses.replace(test, records=drawn, identity=f"{test.identity} drawn by {seed}")


@functools.cache
def _sampler(recipe: Recipe, decoder: Decoder):
    return step.sampling(recipe, decoder)


def judge(cell: Cell, shared: Bench) -> dict:
    """The cell's model on the problems of its seed: {accuracy, stderr, length, truncated}."""
    cfg = hf.load_config(cell.model)
    rows = evaluate(
        _sampler(shared.recipe, Decoder(cfg)),
        hf.load_params(cell.model, cfg),
        held_out(shared.test, shared.scope.problems, cell.seed),
        shared.reader,
        mesh=shared.recipe.mesh,
        n_problems=shared.scope.problems,
        n_samples=shared.scope.samples,
        n_rows=EVALUATION_ROWS,
        seed=cell.seed,
        step=0,
        model=cell.name,
        bar=bar,
    ).rows
    keys = ("accuracy", "stderr", "length", "truncated")
    return {key: {row["task"]: row[key] for row in rows} for key in keys}


class Stopped(Exception):
    """A training was ended by this signal, and saved."""


def run_cell(cell: Cell, shared: Bench) -> dict:
    """The cell's result. Stopped where a signal ended its training."""
    start = time.monotonic()
    if cell.config is not None and (number := train.run(cell.config).stopped_by):
        raise Stopped(number)
    if cell.alpha is not None and not cell.model.is_dir():
        base, *teachers = (microworld.path(n) for n in ("base", "teacher_math", "teacher_code"))
        expo.write(base, teachers, cell.model, alpha=cell.alpha)
    trained = time.monotonic()
    found = judge(cell, shared)
    seconds = {"train": trained - start, "evaluate": time.monotonic() - trained}
    return {**found, "seconds": {key: round(value, 1) for key, value in seconds.items()}}


def results(file: Path) -> list[dict]:
    """The finished cells' lines; one that a kill tore is cut off."""
    rows = metrics.read_rows(file)
    text = "".join(map(_line, rows))
    if file.exists() and file.read_text() != text:
        part = file.with_name(file.name + ".part")
        part.write_text(text)
        os.replace(part, file)
    return rows


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"


def run(scope: Scope, only: tuple[str, ...] = ()) -> None:
    """Do the cells that are not done, of the groups and methods in `only` where it names some.

    Stopped where a signal ended a training. ValueError for an unknown name, where no cell is left
    to compare, and for results that other settings or models made.
    """
    planned = cells(scope)
    known = {*GROUPS, *(cell.method for cell in planned)}
    if unknown := set(only) - known:
        raise ValueError(f"there is no {sorted(unknown)}; there are {sorted(known)}")
    wanted = [c for c in planned if not only or c.group in only or c.method in only]
    if not wanted:
        seeds = ("seeds", "strong_seeds", "sweep_seeds")
        said = ", ".join(f"--{n.replace('_', '-')}={getattr(scope, n)}" for n in seeds)
        raise ValueError(f"{said} leave nothing to run; give one that is wanted at least 1")
    scope.out.mkdir(parents=True, exist_ok=True)
    file = scope.out / "results.jsonl"
    done = _finished(file, planned, scope)
    left = [c for c in wanted if c.key not in done]
    console = Console(stderr=True)
    shared = bench(scope) if left else None
    for i, cell in enumerate(left):
        place = f"cell {len(wanted) - len(left) + i + 1}/{len(wanted)}"
        time_left = _clock(_seconds_left(left[i:], planned, done))
        console.print(f"{place}  {cell.name}  {time_left} left", highlight=False)
        found = run_cell(cell, shared)
        done[cell.key] = {
            "method": cell.method,
            "seed": cell.seed,
            "identity": identity(cell, scope),
            **found,
        }
        with file.open("a") as stream:
            stream.write(_line(done[cell.key]))
        if cell.config is not None:
            shutil.rmtree(Path(cell.config.workdir) / "checkpoints", ignore_errors=True)
        write(scope, list(done.values()))
        shown = "   ".join(f"{task} {100 * x:.1f} %" for task, x in found["accuracy"].items())
        console.print(f"{cell.name}  {shown}", highlight=False)
    write(scope, list(done.values()))
    statistics.plot(list(done.values()), scope.out)


def _finished(file: Path, planned: list[Cell], scope: Scope) -> dict[tuple[str, int], dict]:
    """(method, seed) -> the line of it, of the cells that are planned."""
    lines = {(row["method"], row["seed"]): row for row in results(file)}
    done = {cell.key: lines[cell.key] for cell in planned if cell.key in lines}
    for cell in planned:
        if cell.key in done and done[cell.key]["identity"] != identity(cell, scope):
            raise ValueError(
                f"{file} has a result of {cell.name} that other settings or models made; give "
                "another --out, or delete that line and runs/ and models/ beside it"
            )
    return done


def write(scope: Scope, rows: list[dict]) -> None:
    """DIR/table.md and DIR/compare.json of the results so far."""
    if not rows:
        return
    goals = {"two teachers": preset("exopd"), "strong to weak": preset("strong_to_weak")}
    trainings = "; ".join(
        f"{name}: {c.steps if scope.steps is None else scope.steps} steps of "
        f"{c.batch.prompts * c.batch.rollouts} rows"
        for name, c in goals.items()
    )
    notes = (
        f"Trained methods have equal steps and rows ({trainings}); GRPO takes the rows as fewer "
        "prompts with several completions each.",
        f"Evaluation: {scope.problems} held-out problems of each task, drawn by the seed, "
        f"{scope.samples} samples of each at temperature 1.",
    )
    (scope.out / "table.md").write_text(statistics.tables(rows, notes))
    described = {
        **statistics.figures(rows),
        "settings": {**dataclasses.asdict(scope), "out": scope.out.name},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "flax", "optax", "numpy", "scipy")},
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
            "cores": os.cpu_count(),
        },
        "results": rows,
    }
    (scope.out / "compare.json").write_text(json.dumps(described, indent=1) + "\n")


def _seconds_left(left: list[Cell], planned: list[Cell], done: dict) -> float | None:
    """Each cell as its method took on average, or else its kind; None while a kind is unknown."""
    methods: dict[str, list[float]] = {}
    kinds: dict[bool, list[float]] = {}
    for cell in planned:
        if cell.key in done:
            seconds = sum(done[cell.key]["seconds"].values())
            methods.setdefault(cell.method, []).append(seconds)
            kinds.setdefault(cell.config is not None, []).append(seconds)
    total = 0.0
    for cell in left:
        known = methods.get(cell.method) or kinds.get(cell.config is not None)
        if known is None:
            return None
        total += sum(known) / len(known)
    return total


def _clock(seconds: float | None) -> str:
    return "?" if seconds is None else f"{round(seconds) // 60}:{round(seconds) % 60:02d}"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m gopd_jax.microworld.compare"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--only", type=command.names, default=[], help=ONLY)
    for field in dataclasses.fields(Scope):
        if field.name != "out":
            flag = f"--{field.name.replace('_', '-')}"
            # Without seeds of one part, the others are compared.
            kind = command.at_least(0 if field.name.endswith("seeds") else 1)
            parser.add_argument(flag, type=kind, default=field.default, help=HELP[field.name])
    args = vars(parser.parse_args(argv))
    only = tuple(args.pop("only"))
    compiling.keep_compiled()
    scope = Scope(**args)
    try:
        run(scope, only)
    except (ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(command.WRONG_INPUT)
    except (Stopped, KeyboardInterrupt) as stopped:
        given = sys.argv[1:] if argv is None else argv
        again = shlex.join(["python", "-m", "gopd_jax.microworld.compare", *given])
        print(f"\nstopped; continue with: {again}", file=sys.stderr)
        sys.exit(128 + (stopped.args[0] if isinstance(stopped, Stopped) else signal.SIGINT))
    print((scope.out / "table.md").read_text())


if __name__ == "__main__":
    main()
