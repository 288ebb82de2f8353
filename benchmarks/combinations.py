"""Settings drawn at random: does a mesh of devices compute what one device does?

    python -m benchmarks.combinations --seeds=0:20

Each seed draws an objective from the tables, sampling, batches, adapters, routes, placements and a
mesh of up to eight emulated devices, of what Config.problems() allows. Two steps of tiny models
with random weights have to give the same metrics on the mesh as on one device. A mesh that is
refused, because something does not divide over it, counts as answered. The exit status is 1 where
one differs or ends otherwise; a process that dies is told with its seed. Half a minute each.
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
OPTIONS = WITH_OPTIONS | {
    "top_k": "top_k(k=8)",
    "linear": "linear(steps=3)",
    "cosine": "cosine(steps=3)",
}
CLOSE = (2e-4, 5e-3)  # of the first step, and of the second, behind an update by Adam


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """One combination: how to set a tiny run, and its mesh."""

    models: str
    objective: dict
    sections: dict
    placement: str
    reference: bool
    mesh: dict

    def config(self, roots: Path, mesh: dict, workdir: Path) -> Config:
        quiet = {"every": None, "problems": 1, "samples": 1, "verify_every": 1, "teachers": False}
        c = tiny.config(
            roots / self.models,
            workdir=str(workdir),
            steps=2,
            mesh=mesh,
            objective=self.objective,
            evaluation=quiet,
            **copy.deepcopy(self.sections),
        )
        for teacher in c.teachers.values():
            teacher.placement = self.placement
        if not self.reference:
            c.reference = None
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
    critic = "gae" in objective.get("credit", "") or objective.get("baseline") == "value"
    models = often("dense", "experts")
    targets = {"targets": "self_attn"} if models == "experts" else {}
    sections = {
        "batch": {
            "prompts": r.choice((8, 16)),
            "rollouts": often(1, 2),
            "updates": often(1, 2),
            "epochs": often(1, 2),
            "microbatches": r.choice((1, 2)),
            "head_chunk": r.choice((3, 6, 64)),
            "buckets": often(1, 2),
            "remat": r.choice((None, "layers", "products")),
        },
        "sampling": {
            "completion_length": 6,
            "slots": often(None, 8),
            "buckets": r.choice((1, 2)),
            "prompt_buckets": r.choice((1, 3)),
            "lag": often(0, 1),
            "cache_dtype": often(None, "int8"),
            "weights_dtype": often(None, "int8"),
        },
        "optimizer": {"learning_rate": 1e-3, "moment_dtype": often("float32", "bfloat16")},
        "diagnostics": {"every": often(None, 1), "rows": 64},
        "routes": dict(often(*ROUTES)),
        "critic": Critic(width=8) if critic else None,
        "lora": often(None, Lora(rank=2, alpha=4.0, **targets)),
    }
    return Drawn(
        models=models,
        objective=objective,
        sections=sections,
        placement=often("device", "host", "host_layers"),
        reference=objective["lam"] != 1.0 or r.random() < 0.5,
        mesh=_mesh(r, AXES if models == "experts" else AXES[:-1]),
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


class Refused(Exception):
    """What is said of settings before the first compile."""


def steps(drawn: Drawn, roots: Path, mesh: dict) -> list[dict]:
    """Rows of metrics.jsonl of two steps on as many devices as the mesh has, or Refused."""
    workdir = Path(tempfile.mkdtemp(dir=roots))
    devices = jax.devices()[: math.prod(mesh.values())]
    said = io.StringIO()
    try:
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
        return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    finally:
        shutil.rmtree(workdir)


def _near(x, y, close: float) -> bool:
    numbers = isinstance(x, (int, float)) and isinstance(y, (int, float))
    return numbers and math.isclose(x, y, rel_tol=close, abs_tol=1e-2 * close)


def differences(one: list[dict], many: list[dict]) -> list[str]:
    """What is not close, as text, of two runs' rows."""
    found = [] if len(one) == len(many) else [f"{len(one)} rows and {len(many)}"]
    for a, b, close in zip(one, many, CLOSE):
        found += [f"{key} is of one alone" for key in sorted(a.keys() ^ b.keys())]
        for key in sorted(a.keys() & b.keys()):
            x, y = a[key], b[key]
            if x != y and not _near(x, y, close):
                found.append(f"step {a['step']}: {key} is {x} and {y}")
    return found


def answer(seed: int, roots: Path) -> tuple[str, str]:
    """`compared` of what the seed draws, for which the first call makes the models."""
    for name, cfg in MODELS.items():
        if not (roots / name).exists():
            tiny.build(roots / name, cfg)
    return compared(draw(seed, roots), roots)


def compared(drawn: Drawn, roots: Path) -> tuple[str, str]:
    """("equal" | "refused" | "differs" | "fails", what there is to say)."""
    mesh = str({axis: n for axis, n in drawn.mesh.items() if n > 1})
    try:
        many = steps(drawn, roots, drawn.mesh)
        one = steps(drawn, roots, one_device(drawn.mesh))
    except Refused as error:
        return "refused", f"{mesh}\n{error}"
    except Exception as error:
        return "fails", f"{mesh}\n{type(error).__name__}: {error}\n{drawn}"
    finally:
        jax.clear_caches()
    found = differences(one, many)
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
