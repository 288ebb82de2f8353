"""What each part of an objective does on the microworld: `python -m gopd_jax.microworld.study`.

    python -m gopd_jax.microworld.study --out=DIR                      # every group, five seeds
    python -m gopd_jax.microworld.study --out=DIR --only=credit,exopd  # groups, or methods
    python -m gopd_jax.microworld.study --out=DIR --write              # docs/RESULTS.md of DIR

docs/RESULTS.md is of a whole study: the first command writes it at its end, with every flag at its
default, and --write of lines that are all there; a part of a study leaves it as it is.
Finished cells are lines of DIR/results.jsonl, and a stopped study goes on with the next one. Beside
cells ("kind": "cell") there are lines of gradients at the initial student ("gradient"), once a
method, and of the seconds of a step ("timing"), once a group that asks for them.
"""

import argparse
import dataclasses
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from gopd_jax import command, compiling, microworld
from gopd_jax.microworld import study_cells, study_tables
from gopd_jax.microworld.cells import Seeded
from gopd_jax.microworld.compare import ONLY, results
from gopd_jax.microworld.study_bench import Bench, Gradients, Trainer, step_seconds
from gopd_jax.microworld.study_cells import GROUPS, METHODS, Scope, cells, identity
from gopd_jax.models import hf
from gopd_jax.objectives.losses import LOSSES
from gopd_jax.objectives.objective import build

BATCHES = 8  # whose gradients are compared
TIMED_STEPS = 9
GRADIENT_SEED = 0
HELP = {
    "seeds": "of every method",
    "steps": "of every training",
    "rows": "of a step",
    "learning_rate": "of every training",
    "problems": "held-out problems of each task",
    "samples": "completions of each problem",
}


class Study:
    """A study under way: what is done, and what is compiled."""

    def __init__(self, scope: Scope):
        self.scope, self.file = scope, scope.out / "results.jsonl"
        scope.out.mkdir(parents=True, exist_ok=True)
        self.rows = results(self.file)
        self.bench: Bench | None = None
        self.gradients: Gradients | None = None
        self.trainers: dict[str, Trainer] = {}
        self.console, self.compiled = Console(stderr=True), 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, duration: float, **_) -> None:
        self.compiled += event.endswith("backend_compile_duration")

    def found(self, kind: str, **keys) -> dict | None:
        """The line of this kind and these keys."""
        want = {"kind": kind, **keys}
        return next((r for r in self.rows if all(r.get(k) == v for k, v in want.items())), None)

    def finished(self, cell: Seeded) -> bool:
        """Whether there is a result. ValueError where other settings or models made it."""
        line = self.found("cell", method=cell.method, seed=cell.seed)
        if line is None:
            return False
        steps = self.steps(cell.method)
        if line["identity"] != identity(cell.method, self.scope, cell.seed, steps):
            raise ValueError(
                f"{self.file} has a result of {cell.name} that other settings or models made; give "
                "another --out, or delete that line"
            )
        return True

    def steps(self, name: str) -> int | None:
        """Steps of a method that has another's time; None where it has the scope's, or not yet."""
        of = METHODS[name].steps_of
        line = None if of is None else self.found("timing", group=_timed_in(of))
        if line is None:
            return None
        seconds = line["step_seconds"]
        return max(round(self.scope.steps * seconds[of] / seconds[name.removesuffix("_time")]), 1)

    def add(self, line: dict) -> None:
        self.rows.append(line)
        with self.file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def trainer(self, name: str) -> Trainer:
        if self.bench is None:
            self.bench = Bench(study_cells.config("exopd", self.scope))
        if name not in self.trainers:
            config = study_cells.config(name, self.scope, steps=self.steps(name))
            self.trainers[name] = Trainer(self.bench.of(config))
        return self.trainers[name]

    # --- the kinds of lines

    def run_cell(self, cell: Seeded) -> None:
        start, compiled, scope = time.monotonic(), self.compiled, self.scope
        trainer, found, seconds = self.trainer(cell.method), {}, {}
        if (model := METHODS[cell.method].model) is not None:
            path = microworld.path(model)
            params = hf.load_params(path, hf.load_config(path))
        else:
            stepper, state, found = trainer.train(cell.seed)
            params = state.params
        seconds["train"] = time.monotonic() - start
        found |= self.bench.judge(params, cell.seed, scope.problems, scope.samples)
        seconds["evaluate"] = time.monotonic() - start - seconds["train"]
        if model is None:
            found["probe"] = self.bench.probe(stepper.run, state)
        seconds["probe"] = time.monotonic() - start - sum(seconds.values())
        steps = self.steps(cell.method)
        self.add(
            {
                "kind": "cell",
                **dataclasses.asdict(cell),
                "identity": identity(cell.method, scope, cell.seed, steps),
                "steps": 0 if model else steps or scope.steps,
                **found,
                "compiled": self.compiled - compiled,
                "seconds": {key: round(value, 1) for key, value in seconds.items()},
            }
        )
        shown = "   ".join(f"{task} {100 * x:.1f}" for task, x in found["accuracy"].items())
        taken = sum(seconds.values())
        self.console.print(f"{cell.group}: {cell.name}  {shown}  {taken:.0f} s", highlight=False)

    def look(self, group: str, name: str) -> None:
        """The method's gradient at the initial student."""
        start, this = time.monotonic(), self.trainer(name).run
        if self.gradients is None:
            self.gradients = Gradients(self.bench, BATCHES)
        found = self.gradients.of(this, GRADIENT_SEED)
        if group == "routing" and name == "opd":
            losses = {n: LOSSES[n] for n in ("policy_gradient", "cr_opd")}
            found["freed"] = self.gradients.freed(
                this, losses | {"exact": build(loss="exact").loss}
            )
        made_by = identity(name, self.scope, GRADIENT_SEED)
        seconds = round(time.monotonic() - start, 1)
        line = {"kind": "gradient", "group": group, "method": name, "identity": made_by}
        self.add({**line, **found, "batches": BATCHES, "seconds": seconds})
        self.console.print(f"{group}: gradient of {name}  {found}", highlight=False)

    def timed(self, group: str) -> None:
        """Time the group's methods, unless that is done."""
        if self.found("timing", group=group) is None:
            self.time(group)

    def time(self, group: str) -> None:
        names = GROUPS[group].timed
        taken = step_seconds({name: self.trainer(name) for name in names}, TIMED_STEPS)
        self.add({"kind": "timing", "group": group, "step_seconds": taken})
        self.console.print(f"{group}: seconds of a step  {taken}", highlight=False)

    def release(self, group: str) -> None:
        """Forget the programs of a group that is done, but those of the next ones."""
        names = list(GROUPS)
        later = {m for other in names[names.index(group) + 1 :] for m in GROUPS[other].methods}
        kept = {name: t for name, t in self.trainers.items() if name in later}
        if len(kept) < len(self.trainers):  # looking through all that JAX keeps takes half a second
            self.trainers = kept
            gc.collect()


def _timed_in(method: str) -> str:
    return next(name for name, group in GROUPS.items() if method in group.timed)


def run(scope: Scope, only: tuple[str, ...] = ()) -> None:
    """Do what is not done, of the groups and methods in `only` where it names some.

    ValueError for an unknown name, and for results that other settings or models made.
    """
    if unknown := set(only) - {*GROUPS, *METHODS}:
        raise ValueError(f"there is no {sorted(unknown)}; there are {[*GROUPS, *METHODS]}")
    study, planned = Study(scope), cells(scope)
    wanted = [c for c in planned if not only or c.method in only or _among(c.method, only)]
    of_equal_time = [cell for cell in wanted if METHODS[cell.method].steps_of is not None]
    left = {c.key for c in wanted if c not in of_equal_time and not study.finished(c)}
    # Which results of these count, and how long they are trained, these lines tell.
    for group in dict.fromkeys(_timed_in(METHODS[cell.method].steps_of) for cell in of_equal_time):
        study.timed(group)
    left |= {cell.key for cell in of_equal_time if not study.finished(cell)}
    for group, of in GROUPS.items():
        mine = [c for c in wanted if c.group == group and c.key in left]
        whole = not only or group in only
        if whole and of.timed:
            study.timed(group)
        for cell in mine:
            study.run_cell(cell)
        for name in of.gradients if whole else ():
            own = _line_of(group, name)
            if study.found("gradient", method=name, group=own) is None:
                study.look(own, name)
        study.release(group)


def _among(method: str, only: tuple[str, ...]) -> bool:
    return any(method in GROUPS[name].methods for name in only if name in GROUPS)


def _line_of(group: str, method: str) -> str:
    """The group of a gradient's line: a method of several groups has one, in the first."""
    if (group, method) == ("routing", "opd"):  # where the freed mass is looked at, too
        return group
    return next(name for name, other in GROUPS.items() if method in other.gradients)


def lacking(scope: Scope, rows: Sequence[dict]) -> list[str]:
    """What a whole study has lines of and `rows` have not."""
    there = {(r["kind"], r.get("group"), r.get("method")) for r in rows}
    done = {(r["method"], r["seed"]) for r in rows if r["kind"] == "cell"}
    found = [cell.name for cell in cells(scope) if cell.key not in done]
    for group, of in GROUPS.items():
        if of.timed and ("timing", group, None) not in there:
            found.append(f"seconds of a step, {group}")
        found += [
            f"gradient of {name}"
            for name in of.gradients
            if ("gradient", _line_of(group, name), name) not in there
        ]
    return found


def publish(scope: Scope, docs: Path) -> None:
    """The page of a whole study. ValueError where lines are missing: the page would lose theirs."""
    file = scope.out / "results.jsonl"
    if not (rows := results(file)):
        raise ValueError(f"{file} is missing or empty; give the --out of a study that has ended")
    if absent := lacking(scope, rows):
        raise ValueError(
            f"{file} lacks {len(absent)} lines that the page shows, first that of {absent[0]}; run "
            f"the study to its end, with --out={scope.out} and neither --only nor --write"
        )
    study_tables.write(rows, docs)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m gopd_jax.microworld.study"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--only", type=command.names, default=[], help=ONLY)
    parser.add_argument("--write", action="store_true", help="write the page alone")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where RESULTS.md lies")
    for field in dataclasses.fields(Scope):
        if field.name != "out":
            flag = f"--{field.name.replace('_', '-')}"
            kind = command.positive if isinstance(field.default, float) else command.at_least(1)
            parser.add_argument(flag, type=kind, default=field.default, help=HELP[field.name])
    args = vars(parser.parse_args(argv))
    only, docs, write = args.pop("only"), args.pop("docs"), args.pop("write")
    compiling.keep_compiled()
    scope = Scope(**args)
    try:
        if not write:
            run(scope, tuple(only))
        if write or (not only and scope == Scope(out=scope.out)):
            publish(scope, docs)
        else:
            print(f"results: {scope.out / 'results.jsonl'}; {docs / 'RESULTS.md'} is left as it is")
    except (ValueError, OSError) as error:
        print(f"\n{error}", file=sys.stderr)
        sys.exit(command.WRONG_INPUT)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
