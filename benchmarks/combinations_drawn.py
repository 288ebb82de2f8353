"""What benchmarks/combinations.py draws: settings of a tiny run, and meshes."""

import copy
import dataclasses
import math
import random
from pathlib import Path

from gopd_jax.config import Config, Critic, Lora
from gopd_jax.objectives.objective import TABLES
from tests import tiny
from tests.feeding import WITH_OPTIONS

MODELS = {"dense": tiny.CFG, "experts": tiny.with_experts()}
AXES = ("data", "fsdp", "sequence", "tensor", "expert")
ROUTES = (
    {},  # each task has the teacher of its name
    {"math": "math", "code": "math"},
    {"math": "math=0.7, code=0.3", "code": "code"},
    {"math": "math=0.5, code=0.5", "code": "math=0.5, code=0.5"},
)
# How often a setting of the objective is drawn: most draws of everything at once contradict each
# other, and what contradicts is drawn anew as a whole.
CHANCES = (
    {"loss": 0.7, "support": 0.5, "divergence": 0.4}
    | dict.fromkeys(("mass", "credit", "baseline", "importance", "reduction"), 0.35)
    | dict.fromkeys(("advantage", "rejection", "gates", "regularizers", "lam_schedule"), 0.15)
)
# Settings of the objective that no table holds, each drawn now and then.
OTHERS = {
    "source": ("teacher", "data"),
    "task_lam": ({"math": 0.5}, {"math": 1.5, "code": 1.0}),
    "lam_by_row": (True,),
    "ratio_cap": (1.0,),
    "mixture": ("log",),
    "estimator": ("stop_gradient",),
    "log_u_clip": (2.0,),
    "advantage_clip": (1.0,),
    "veto": (-0.5,),
}
OPTIONS = WITH_OPTIONS | {
    "top_k": "top_k(k=8)",
    "linear": "linear(steps=3)",
    "cosine": "cosine(steps=3)",
}
# Entries of which one form or another is drawn.
FORMS = {
    "top_k": ("top_k(k=3)", *(f"top_k(k=8, of='{of}')" for of in ("union", "intersection"))),
    "jsd": ("jsd(beta=0.2)",),
    "alpha": ("alpha(alpha=-0.5)", "alpha(alpha=1.5)"),
    "sequence": ("sequence(cap=1.5, geometric=True)",),
    "teacher_entropy": ("teacher_entropy(at_least=0.5)",),
    "cr_opd": ("cr_opd(threshold=0.1, teacher_k=None, margin=0.2, clip=1.0)",),
    "ppo": ("ppo(low=0.1, high=0.1, dual=None)",),
    "gae": ("gae(gamma=0.9, lam=0.8)",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """One combination: how to set a tiny run, and its mesh."""

    models: str
    objective: dict
    sections: dict
    teacher: dict  # settings of every teacher
    reference: bool
    mesh: dict
    then: dict | None = None  # the mesh on which step 2 is made again from the checkpoint of step 1

    @property
    def eight_bits(self) -> bool:
        sampling = self.sections["sampling"]
        return "int8" in (sampling.get("cache_dtype"), sampling.get("weights_dtype"))

    def config(self, roots: Path, mesh: dict, workdir: Path) -> Config:
        quiet = {"every": None, "problems": 1, "samples": 1, "verify_every": 1, "teachers": False}
        root = roots / self.models
        if self.objective.get("source") == "data":
            root = root / "data"
        c = tiny.config(
            root,
            workdir=str(workdir),
            steps=2,
            mesh=mesh,
            objective=self.objective,
            evaluation=quiet,
            checkpoints={"every": 1},
            **copy.deepcopy(self.sections),
        )
        for teacher in c.teachers.values():
            for key, value in self.teacher.items():
                setattr(teacher, key, value)
            if teacher.follows is not None:
                teacher.path = c.student.path
        if not self.reference:
            c.reference = None
        if c.objective.lam_by_row:
            c.data.train = str(root / "lams.jsonl")
        if c.routes and not any("code" in route for route in c.routes.values()):
            del c.teachers["code"]
        return c


def draw(seed: int, roots: Path) -> Drawn:
    """The first combination of the seed's that is allowed on one device."""
    r = random.Random(seed)
    while True:
        drawn = _draw(r)
        if not drawn.config(roots, one_device(drawn.mesh), roots / "run").problems(files=False):
            return drawn


def one_device(mesh: dict) -> dict:
    return dict.fromkeys(mesh, 1)


def _draw(r: random.Random) -> Drawn:
    def entry(key):
        name = r.choice(sorted(TABLES[key]))
        return r.choice((OPTIONS.get(name, name), *FORMS.get(name, ())))

    def often(default, *others):
        return r.choice((default, default, *others))

    objective = {"lam": r.choice((1.0, 1.25))}
    for key, chance in CHANCES.items():
        if r.random() < chance:
            value = entry(key)
            objective[key] = (value,) if key in ("gates", "regularizers") else value
    for key, values in OTHERS.items():
        if r.random() < 0.12:
            objective[key] = r.choice(values)
    source = objective.get("source", "student")
    critic = "gae" in objective.get("credit", "") or objective.get("baseline") == "value"
    models = often("dense", "experts")
    targets = {"targets": "self_attn"} if models == "experts" else {}
    routes = dict(often(*ROUTES))
    mixed = any("," in route for route in routes.values())  # their teachers have to read alike
    context = None if mixed else often(None, "solution")
    # A teacher that is the student and reads what it reads leaves Adam a gradient of rounding.
    follows = None if context is None else often(None, 0.5)
    sections = {
        "batch": {
            "prompts": often(16, 8),
            "rollouts": often(1, 2),
            "updates": often(1, 2),
            "epochs": often(1, 2),
            "microbatches": r.choice((1, 2)),
            "head_chunk": r.choice((3, 6, 64)),
            "buckets": often(1, 2),
            "remat": r.choice((None, "layers", "products")),
        },
        "sampling": {
            "temperature": often(1.0, 0.7),
            "completion_length": 48 if source == "data" else 6,
            "slots": often(None, 8),
            "buckets": r.choice((1, 2)),
            "prompt_buckets": r.choice((1, 3)),
            "lag": often(0, 1),
            "cache_dtype": often(None, "int8"),
            "weights_dtype": often(None, "int8"),
        },
        "optimizer": {
            "learning_rate": 1e-3,
            "schedule": often("constant", "cosine"),
            "warmup_steps": often(0, 1),
            "moment_dtype": often("float32", "bfloat16"),
        },
        "diagnostics": {"every": often(None, 1), "rows": 64},
        "routes": routes,
        "critic": Critic(width=8, closed_form=often(True, False)) if critic else None,
        "lora": often(None, Lora(rank=2, alpha=4.0, **targets)),
    }
    teacher = {
        "placement": often("device", "host", "host_layers"),
        "context": context,
        "prompt_length": None if context is None else 128,
        "follows": follows,
    }
    if source != "student":
        # Nothing that was sampled is there to be corrected, nor how it was sampled.
        for key in ("importance", "rejection", "veto"):
            objective.pop(key, None)
        sections["sampling"] |= {"lag": 0, "cache_dtype": None, "weights_dtype": None}
        objective["advantage"] = "imitation"
    if source == "teacher":  # one teacher of its own writes a row, with all its layers at hand
        sections["routes"] = {} if mixed else routes
        teacher |= {"follows": None, "placement": often("device", "host")}
    axes = AXES if models == "experts" else AXES[:-1]
    mesh, then = _mesh(r, axes), often(None, _mesh(r, axes))
    return Drawn(
        models=models,
        objective=objective,
        sections=sections,
        teacher=teacher,
        reference=objective["lam"] != 1.0 or r.random() < 0.5,
        mesh=mesh,
        then=None if then == mesh else then,
    )


def _mesh(r: random.Random, axes: tuple[str, ...]) -> dict:
    """2, 4 or 8 devices along axes that the models' four heads and four experts allow."""
    mesh, n = dict.fromkeys(axes, 1), r.choice((2, 4, 8))
    while math.prod(mesh.values()) < n:
        wider = mesh | {(axis := r.choice(axes)): 2 * mesh[axis]}
        shares = wider["sequence"], wider.get("expert", 1)
        if max(share * wider["tensor"] for share in shares) <= 4:
            mesh = wider
    return mesh
