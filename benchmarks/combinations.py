"""Settings drawn at random: does a mesh of devices compute what one device does?

    python -m benchmarks.combinations --seeds=0:20

Each seed draws an objective from the tables, sampling, batches, adapters, teachers, routes,
placements and a mesh of up to eight emulated devices, of what Config.problems() allows. Two steps
of tiny models with random weights have to give the same metrics on the mesh as on one device, and
so has the second step of a run that begins on the mesh and goes on, from its checkpoint, on
another. A mesh that is refused, because something does not divide over it, counts as answered. The
exit status is 1 where one differs or ends otherwise; a process that dies is told with its seed.
Half a minute each.
"""

import argparse
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import jax
from rich.console import Console
from rich.progress import track

from gopd_jax import train
from gopd_jax.config import Config, Critic, Lora
from gopd_jax.models.params import ModelConfig
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
# Relative and absolute: of the first step, of the second, behind an update by Adam, and of how far
# a sampler of 8 bits is from the weights. To change these by 1e-7 moves that by 2 %, and by 3e-5.
CLOSE = ((2e-4, 2e-6), (5e-3, 5e-5))
EIGHT_BITS_CLOSE = (1e-1, 5e-5)


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
        return OPTIONS.get(name, name)

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
    if source != "student" and r.random() < 0.8:
        objective["advantage"] = "imitation"
    critic = "gae" in objective.get("credit", "") or objective.get("baseline") == "value"
    models = often("dense", "experts")
    targets = {"targets": "self_attn"} if models == "experts" else {}
    routes = dict(often(*ROUTES))
    mixed = any("," in route for route in routes.values())  # their teachers have to read alike
    context = None if mixed else often(None, None, "solution", "answer")
    follows = often(None, None, 0.5)
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
            # A teacher that follows is the student itself until that has learnt.
            "warmup_steps": often(0, 1) if follows is None else 0,
            "moment_dtype": often("float32", "bfloat16"),
        },
        # Where teacher and student are one, shares of their differences are those of rounding.
        "diagnostics": {"every": often(None, 1) if follows is None else None, "rows": 64},
        "routes": routes,
        "critic": Critic(width=8, closed_form=often(True, False)) if critic else None,
        "lora": often(None, Lora(rank=2, alpha=4.0, **targets)),
    }
    axes = AXES if models == "experts" else AXES[:-1]
    return Drawn(
        models=models,
        objective=objective,
        sections=sections,
        teacher={
            "placement": often("device", "host", "host_layers"),
            "context": context,
            "prompt_length": None if context is None else 96,
            "follows": follows,
        },
        reference=objective["lam"] != 1.0 or r.random() < 0.5,
        mesh=_mesh(r, axes),
        then=often(None, _mesh(r, axes)),
    )


def _mesh(r: random.Random, axes: tuple[str, ...]) -> dict:
    """2, 4 or 8 devices along axes that the models' four heads and four experts allow."""
    mesh, n = dict.fromkeys(axes, 1), r.choice((2, 4, 8))
    while math.prod(mesh.values()) < n:
        wider = mesh | {(axis := r.choice(axes)): 2 * mesh[axis]}
        shares = wider["sequence"], wider.get("expert", 1)
        if max(share * wider["tensor"] for share in shares) <= 4:
            mesh = wider
    return mesh | {"slices": 2 if mesh["data"] > 1 and r.random() < 0.3 else 1}


class Refused(Exception):
    """What is said of settings before the first compile."""


def steps(drawn: Drawn, roots: Path, *meshes: dict) -> list[dict]:
    """Rows of metrics.jsonl of two steps on the first mesh, and for each of the others that of the
    second step, made there from the checkpoint of the first; or Refused."""
    workdir, rows = Path(tempfile.mkdtemp(dir=roots)), []
    try:
        for mesh in meshes:
            run(drawn, roots, mesh, workdir)
            found = (workdir / "metrics.jsonl").read_text().splitlines()
            rows += [json.loads(line) for line in (found[-1:] if rows else found)]
            shutil.rmtree(workdir / "checkpoints" / "2")
        return rows
    finally:
        shutil.rmtree(workdir)


def run(drawn: Drawn, roots: Path, mesh: dict, workdir: Path) -> None:
    """Begin or go on in the workdir, on as many devices as the mesh has; Refused where it is."""
    devices = jax.devices()[: math.prod(mesh[axis] for axis in mesh if axis != "slices")]
    said = io.StringIO()
    with (
        mock.patch.object(jax, "devices", return_value=devices),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            begun = train.begin(drawn.config(roots, mesh, workdir))
        except ValueError as error:
            raise Refused(error) from error
        train.finish(train.check(begun))


def _near(x, y, close: tuple[float, float]) -> bool:
    numbers = isinstance(x, (int, float)) and isinstance(y, (int, float))
    return numbers and math.isclose(x, y, rel_tol=close[0], abs_tol=close[1])


def differences(one: list[dict], many: list[dict], *, eight_bits: bool = False) -> list[str]:
    """What is not close, as text, of two runs' rows. eight_bits: that is what they sampled with."""
    found = [] if len(one) == len(many) else [f"{len(one)} rows and {len(many)}"]
    for a, b in zip(one, many):
        close = CLOSE[a["step"] - 1]
        found += [f"{key} is of one alone" for key in sorted(a.keys() ^ b.keys())]
        for key in sorted(a.keys() & b.keys()):
            x, y = a[key], b[key]
            rounded = eight_bits and key.startswith("sampler_")
            if x != y and not _near(x, y, EIGHT_BITS_CLOSE if rounded else close):
                found.append(f"step {a['step']}: {key} is {x} and {y}")
    return found


def answer(seed: int, roots: Path) -> tuple[str, str]:
    """`compared` of what the seed draws, for which the first call makes the models."""
    for name, cfg in MODELS.items():
        if not (roots / name).exists():
            build(roots / name, cfg)
    return compared(draw(seed, roots), roots)


def build(root: Path, cfg: ModelConfig) -> None:
    """The tiny models and problems, and under data/ once more for a run that learns from texts."""
    for place in (root, root / "data"):
        tiny.build(place, cfg)
        rows = map(json.loads, (place / "train.jsonl").read_text().splitlines())
        told = [json.dumps(row | {"lam": 0.5 + i % 4 / 4}) + "\n" for i, row in enumerate(rows)]
        (place / "lams.jsonl").write_text("".join(told))
    # Of the many ends that tiny models sample, some are in every text.
    for name in tiny.MODELS:
        ends = {"eos_token_id": cfg.eos_token_id}
        (root / "data" / name / "generation_config.json").write_text(json.dumps(ends))


def compared(drawn: Drawn, roots: Path) -> tuple[str, str]:
    """("equal" | "refused" | "differs" | "fails", what there is to say)."""
    meshes = [drawn.mesh] if drawn.then is None else [drawn.mesh, drawn.then]
    mesh = ", then ".join(str({axis: n for axis, n in m.items() if n > 1}) for m in meshes)
    try:
        many = steps(drawn, roots, *meshes)
        one = steps(drawn, roots, one_device(drawn.mesh))
        one += one[1:] * (len(meshes) - 1)
    except Refused as error:
        return "refused", f"{mesh}\n{error}"
    except Exception as error:
        return "fails", f"{mesh}\n{type(error).__name__}: {error}\n{drawn}"
    finally:
        jax.clear_caches()
    found = differences(one, many, eight_bits=drawn.eight_bits)
    return ("differs", "\n".join([mesh, *found, str(drawn)])) if found else ("equal", mesh)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:20", help="first:end")
    first, end = map(int, parser.parse_args().seeds.split(":"))
    words = []
    # Of the workers, whose JAX starts with it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
    os.environ.setdefault("XLA_FLAGS", tiny.CHEAP)
    with tempfile.TemporaryDirectory() as roots:
        pool = None
        screen = Console(stderr=True)
        seeds = range(first, end)
        for seed in track(seeds, "combinations", console=screen, disable=not screen.is_terminal):
            pool = pool or ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            try:
                word, said = pool.submit(answer, seed, Path(roots)).result()
            except BrokenProcessPool:
                pool, word, said = None, "fails", "the process died"
            words.append(word)
            print(f"{word}: seed {seed}: {said}", flush=True)
    counts = {word: words.count(word) for word in sorted({*words})}
    print(", ".join(f"{n} {word}" for word, n in counts.items()))
    return int(bool({"differs", "fails"} & counts.keys()))


if __name__ == "__main__":
    sys.exit(main())
