"""The cells of the comparison: each method at each seed, as the training that makes its model.

Trainings are the presets of configs/, each for as many steps of as many rows as the preset of its
group, exopd or strong_to_weak, has. More RL takes those rows as fewer prompts with several
completions each.
"""

import dataclasses
import functools
import importlib.util
from pathlib import Path

from gopd_jax import config as settings
from gopd_jax import microworld
from gopd_jax.config import Config, Diagnostics, Evaluation, Model
from gopd_jax.microworld import dataset, statistics
from gopd_jax.models import hf

ALPHAS = (0.25, 0.5)
GROUPS = ("methods", "strong_to_weak", "sweep")
PRESETS = Path(__file__).resolve().parents[2] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What is compared, and how precisely."""

    out: Path
    seeds: int = 5
    strong_seeds: int = 3
    sweep_seeds: int = 2  # OPD and ExOPD, which are points of the sweep, have `seeds`
    problems: int = 384  # of each task
    samples: int = 4  # of each problem
    steps: int | None = None  # of every training; None: the presets'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeded:
    """A method at a seed, in the group that needs it first."""

    group: str
    method: str
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        return self.method, self.seed

    @property
    def name(self) -> str:
        return f"{self.method}, seed {self.seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell(Seeded):
    """The directory that is evaluated, and how it comes about."""

    model: Path
    config: Config | None = None  # the training that writes `model`
    alpha: float | None = None  # of the extrapolation that writes `model`


def preset(name: str) -> Config:
    """configs/<name>.py's own run. ValueError where there is no checkout around the package."""
    file = PRESETS / f"{name}.py"
    if not file.is_file():
        raise ValueError(f"there is no preset {file}; run this from a checkout of the repository")
    spec = importlib.util.spec_from_file_location(f"configs.{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def cells(scope: Scope) -> list[Cell]:
    """Every cell, in the order in which they run: seed by seed within each group."""
    found = []
    for group, methods in (("methods", _methods), ("strong_to_weak", _strong), ("sweep", _sweep)):
        n_seeds = {"methods": scope.seeds, "strong_to_weak": scope.strong_seeds}
        for seed in range(n_seeds.get(group, scope.sweep_seeds)):
            found += methods(scope, group, seed)
    return found


def _methods(scope: Scope, group: str, seed: int) -> list[Cell]:
    goal = preset("exopd")
    fixed = [
        Cell(group=group, method=name, seed=seed, model=Path(microworld.path(name)))
        for name in ("base", "teacher_math", "teacher_code")
    ]
    fixed += [
        Cell(
            group=group,
            method=f"expo_{alpha:g}",
            seed=seed,
            model=scope.out / "models" / f"expo_{alpha:g}",
            alpha=alpha,
        )
        for alpha in ALPHAS
    ]
    trained = {name: preset(name) for name in ("grpo", "opd")}
    trained |= {"sft": _imitation(goal.teachers), "exopd": goal}
    return fixed + [
        _training(scope, group, name, seed, config, goal) for name, config in trained.items()
    ]


def _strong(scope: Scope, group: str, seed: int) -> list[Cell]:
    names = ("large_base", "large_teacher")
    large_base, large_teacher = (Model(path=microworld.path(name)) for name in names)
    base = Model(path=microworld.path("base"))
    goal, imitation = preset("strong_to_weak"), _imitation({})
    changes = {
        "strong_sft": (imitation, 1.0, None),
        "strong_opd": (goal, 1.0, None),
        "strong_exopd": (goal, 1.25, base),
        "strong_exopd_corrected": (goal, 1.25, large_base),
    }
    fixed = [
        Cell(group=group, method=name, seed=seed, model=Path(microworld.path(name)))
        for name in names
    ]
    if seed >= scope.seeds:  # the student's own row, where the methods have none of this seed
        fixed.append(Cell(group=group, method="base", seed=seed, model=Path(base.path)))
    trained = []
    for name, (config, lam, reference) in changes.items():
        config = dataclasses.replace(
            config,
            student=base,
            teachers={task: large_teacher for task in config.data.tasks},
            reference=reference,
            objective=dataclasses.replace(config.objective, lam=lam),
        )
        trained.append(_training(scope, group, name, seed, config, goal))
    return fixed + trained


def _imitation(teachers: dict[str, Model]) -> Config:
    """The sft preset, learning from what the teachers write as it trains."""
    config = preset("sft")
    objective = dataclasses.replace(config.objective, source="teacher", advantage="imitation")
    return dataclasses.replace(config, teachers=teachers, objective=objective)


def _sweep(scope: Scope, group: str, seed: int) -> list[Cell]:
    found = []
    for lam in statistics.SWEEP:
        method, goal = statistics.sweep_method(lam), preset("exopd")
        config = dataclasses.replace(goal, objective=dataclasses.replace(goal.objective, lam=lam))
        if method.startswith("lam_"):
            found.append(_training(scope, group, method, seed, config, goal))
    return found


def _training(scope: Scope, group, method, seed, config: Config, goal: Config) -> Cell:
    """The preset at this seed, with the steps and rows of `goal`, and nothing but training."""
    rows, rollouts = goal.batch.prompts * goal.batch.rollouts, config.batch.rollouts
    if rows % rollouts:
        raise ValueError(
            f"the {rows} rows of a step do not divide into the {rollouts} rollouts of {method}; "
            "change batch.rollouts of its preset"
        )
    steps = goal.steps if scope.steps is None else scope.steps
    # A longer or shorter training is another one: it must not continue this one's checkpoint.
    workdir = scope.out / "runs" / f"{steps}-steps" / f"{method}-{seed}"
    config = dataclasses.replace(
        config,
        workdir=str(workdir),
        seed=seed,
        steps=steps,
        batch=dataclasses.replace(config.batch, prompts=rows // rollouts),
        diagnostics=Diagnostics(),
        evaluation=Evaluation(problems=8, samples=1, every=None, verify_every=None, teachers=False),
    )
    return Cell(group=group, method=method, seed=seed, model=workdir / "export", config=config)


def identity(cell: Cell, scope: Scope) -> str:
    """Digest of all that the cell's result is a function of, the code apart."""
    if (c := cell.config) is not None:
        roles = {"student": c.student, "reference": c.reference, **c.teachers}
        models = {role: model.path for role, model in roles.items() if model is not None}
        # A run's identity lets it be made longer, which here makes another result.
        made_by = {**settings.identity(c), "steps": c.steps, "data": [c.data.train, c.data.test]}
    elif cell.alpha is not None:
        models = {name: microworld.path(name) for name in ("base", "teacher_math", "teacher_code")}
        made_by = {"alpha": cell.alpha}
    else:
        models, made_by = {"model": cell.model}, {}
    return settings.digest(
        {
            "models": {role: _weights(str(path)) for role, path in models.items()},
            "settings": made_by,
            "evaluation": [scope.problems, scope.samples, cell.seed],
            "data": dataset.VERSION,
        }
    )


_weights = functools.cache(hf.weights_digest)
