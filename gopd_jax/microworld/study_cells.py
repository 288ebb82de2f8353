"""The cells of the study: each method at each seed, as what it changes of one common training.

The common training is plain on-policy distillation of the preset exopd's models, shorter and with
fewer rows. A method that belongs to several groups is trained once: at lambda = 1 the reverse KL's
policy gradient is the start of most of them.
"""

import dataclasses
import functools
from pathlib import Path

from gopd_jax import config as settings
from gopd_jax import microworld
from gopd_jax.config import Config, Evaluation
from gopd_jax.microworld import dataset
from gopd_jax.microworld.cells import Seeded, preset
from gopd_jax.models import hf

CLIP = {"objective.log_u_clip": 5.0}
EXTRAPOLATED = {"objective.lam": 1.25}
EXACT = {"objective.loss": "exact"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scope:
    """What every cell shares."""

    out: Path
    seeds: int = 5
    steps: int = 16
    rows: int = 64  # of a step, half of each task
    learning_rate: float = 2e-4  # tuned on plain OPD and ExOPD alone, on a seed outside the study
    problems: int = 192  # held out, of each task, drawn by the seed
    samples: int = 2  # of each problem


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One row of a table: what it is called, and the settings that it changes."""

    label: str
    changes: dict = dataclasses.field(default_factory=dict)
    preset: str | None = None  # a preset's own settings, at the study's budget; None: plain OPD's
    model: str | None = None  # a shipped checkpoint that is evaluated as it is
    steps_of: str | None = None  # the method whose wall-clock it is given, in place of its steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Methods that are compared with each other, and with `against` seed by seed."""

    title: str
    methods: tuple[str, ...]
    against: str
    gradients: tuple[str, ...] = ()  # methods whose gradient is looked at, at the initial student
    timed: tuple[str, ...] = ()  # methods whose steps are timed in turn


def _divergences() -> dict[str, Method]:
    return {
        f"{divergence}_{estimator}": Method(
            label=f"{name}, {said}",
            changes={"objective.divergence": divergence, "objective.estimator": estimator, **CLIP},
        )
        for divergence, name in (("forward_kl", "forward KL"), ("jsd", "JSD"))
        for estimator, said in (("corrected", "corrected"), ("stop_gradient", "stop-gradient"))
    }


def _credits() -> dict[str, Method]:
    found = {
        f"discounted_{gamma}": Method(
            label=f"discounted, γ = {gamma}",
            changes={"objective.credit": f"discounted(gamma={gamma})"},
        )
        for gamma in (0.5, 0.9)
    }
    found["return_to_go"] = Method(
        label="return to go, γ = 1", changes={"objective.credit": "return_to_go"}
    )
    for closed in (True, False):
        for lam in (0.0, 0.95, 1.0):
            found[f"gae_{lam}_{'closed' if closed else 'learnt'}"] = Method(
                label=f"GAE, λ = {lam:g}, V {'with −KL' if closed else 'learnt alone'}",
                changes={
                    "objective.credit": f"gae(gamma=1.0, lam={lam})",
                    "critic.closed_form": closed,
                },
            )
    return found


def _supports() -> dict[str, Method]:
    whole = EXTRAPOLATED | EXACT
    found = {
        f"top4_{of}_rest": Method(
            label=f"4 likeliest of {said}, rest in a bucket",
            changes=whole | {"objective.support": f'top_k(k=4, of="{of}")'},
        )
        for of, said in (
            *(("teacher", "the target"), ("student", "the student")),
            *(("union", "either"), ("intersection", "both")),
        )
    }
    for mass in ("renormalised", "raw"):
        changes = {"objective.support": 'top_k(k=4, of="teacher")', "objective.mass": mass}
        found[f"top4_teacher_{mass}"] = Method(
            label=f"4 likeliest of the target, {mass}", changes=whole | changes
        )
    return found


def _lags() -> dict[str, Method]:
    return {
        f"lag_{lag}_{weights}": Method(
            label=f"lag {lag}, {'token weights up to 5' if weights == 'token' else 'no weights'}",
            changes={
                "sampling.lag": lag,
                "objective.importance": "token(cap=5.0)" if weights == "token" else "none",
            },
        )
        for lag in (0, 1, 4, 16)
        for weights in ("none", "token")
        if (lag, weights) != (0, "none")  # that is opd
    }


def _presets() -> dict[str, Method]:
    names = ("gkd", "distillm", "minillm", "vopd", "eopd", "reopold", "kdrl")
    return {f"preset_{name}": Method(label=f"configs/{name}.py", preset=name) for name in names}


METHODS = {
    "base": Method(label="base, the start of all", model="base"),
    "teacher_math": Method(label="math teacher", model="teacher_math"),
    "teacher_code": Method(label="code teacher", model="teacher_code"),
    "opd": Method(label="policy gradient, reverse KL, immediate credit (plain OPD)"),
    **_divergences(),
    **_credits(),
    "cr_opd": Method(label="CR-OPD", changes={"objective.loss": "cr_opd"}),
    "exact": Method(label="exact reverse KL", changes=EXACT),
    "exopd": Method(label="policy gradient of the sampled token", changes=EXTRAPOLATED),
    "exopd_top16": Method(
        label="exact, 16 likeliest of the target, rest in a bucket",
        changes=EXTRAPOLATED | EXACT | {"objective.support": 'top_k(k=16, of="teacher")'},
    ),
    "exopd_exact": Method(label="exact, whole vocabulary", changes=EXTRAPOLATED | EXACT),
    **_supports(),
    **_lags(),
    **_presets(),
}
for _name in ("exopd_top16", "exopd_exact"):
    METHODS[f"{_name}_time"] = dataclasses.replace(
        METHODS[_name], label=f"{METHODS[_name].label}, equal time", steps_of="exopd"
    )

GROUPS = {
    "start": Group(
        title="Where it starts", methods=("base", "teacher_math", "teacher_code"), against="base"
    ),
    "divergence": Group(
        title="Divergence and estimator",
        methods=("opd", *_divergences()),
        against="opd",
        gradients=("opd", *_divergences()),
    ),
    "credit": Group(
        title="Credit",
        methods=("opd", *_credits()),
        against="opd",
        gradients=("opd", *_credits()),
    ),
    "routing": Group(
        title="CR-OPD, plain suppression and the exact gradient",
        methods=("opd", "cr_opd", "exact"),
        against="opd",
        gradients=("opd", "cr_opd", "exact"),
    ),
    "exopd": Group(
        title="ExOPD: sampled, over 16 ids, over the vocabulary",
        methods=("exopd", "exopd_top16", "exopd_exact", "exopd_top16_time", "exopd_exact_time"),
        against="exopd",
        gradients=("exopd", "exopd_top16", "exopd_exact"),
        timed=("exopd", "exopd_top16", "exopd_exact"),
    ),
    "support": Group(
        title="Support and mass outside of it, λ = 1.25",
        methods=("exopd_exact", *_supports()),
        against="exopd_exact",
        gradients=("exopd_exact", *_supports()),
    ),
    "lag": Group(
        title="Stale rollouts and importance weights", methods=("opd", *_lags()), against="opd"
    ),
    "presets": Group(
        title="Presets at this budget",
        methods=("opd", "jsd_corrected", "cr_opd", "gae_0.95_closed", *_presets()),
        against="opd",
        gradients=("preset_vopd",),
    ),
}


def cells(scope: Scope) -> list[Seeded]:
    """Every cell once, in the order in which they run: seed by seed within each group."""
    found: dict[tuple, Seeded] = {}
    for group, of in GROUPS.items():
        for seed in range(scope.seeds):
            for method in of.methods:
                cell = Seeded(group=group, method=method, seed=seed)
                found.setdefault(cell.key, cell)
    return list(found.values())


def config(name: str, scope: Scope, seed: int = 0, steps: int | None = None) -> Config:
    """The method's settings; those of a checkpoint that is not trained are the common ones."""
    method = METHODS[name]
    c = preset(method.preset or "exopd")
    c.workdir = str(scope.out / "none")  # of a run, which writes there; a cell has none
    c.seed, c.steps = seed, steps or scope.steps
    if method.preset is None:
        c.objective.lam = 1.0
    c.batch.prompts, c.batch.microbatches = (
        scope.rows // c.batch.rollouts,
        max(scope.rows // 16, 1),
    )
    c.optimizer.learning_rate = scope.learning_rate
    c.evaluation = Evaluation(
        problems=scope.problems, samples=scope.samples, every=None, verify_every=None
    )
    for key, value in method.changes.items():
        section, field = key.split(".")
        if section == "critic" and c.critic is None:
            c.critic = settings.Critic()
        setattr(getattr(c, section), field, value)
    if c.objective.lam == 1:
        c.reference = None
    return c


def identity(name: str, scope: Scope, seed: int, steps: int | None = None) -> str:
    """Digest of all that a result is a function of, the code apart."""
    c = config(name, scope, seed, steps)
    model = METHODS[name].model
    models = {"student": c.student.path, **{t: m.path for t, m in c.teachers.items()}}
    if c.reference is not None:
        models["reference"] = c.reference.path
    if model is not None:
        models = {"model": microworld.path(model)}
    return settings.digest(
        {
            "models": {role: _weights(str(path)) for role, path in models.items()},
            "settings": {} if model else {**settings.identity(c), "steps": c.steps},
            "evaluation": [scope.problems, scope.samples, seed],
            "data": dataset.VERSION,
        }
    )


_weights = functools.cache(hf.weights_digest)
