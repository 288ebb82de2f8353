"""Settings drawn at random: does a mesh of devices compute what one device does?

    python -m benchmarks.combinations --seeds=0:20

Each seed draws an objective from the tables, sampling, batches, adapters, teachers, routes,
placements and a mesh of up to eight emulated devices, of what Config.problems() allows. Two steps
of tiny models with random weights have to give the same metrics on the mesh as on one device, and
so has the second step of a run that begins on the mesh and goes on, from its checkpoint, on
another. A mesh that is refused, because something does not divide over it, counts as answered. The
exit status is 1 where one differs or ends otherwise; a process that dies is told with its seed.
Half a minute to a minute each.
"""

import argparse
import contextlib
import io
import json
import math
import os
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

from benchmarks.combinations_drawn import MODELS, Drawn, draw, one_device
from gopd_jax import setup, train
from gopd_jax.models.params import ModelConfig
from tests import tiny

# Relative and absolute: of the first step, of the second, behind an update by Adam, and of how far
# a sampler of 8 bits is from the weights. To change these by 1e-7 moves that by 2 %, and by 3e-5.
CLOSE = ((2e-4, 2e-6), (5e-3, 5e-5))
EIGHT_BITS_CLOSE = (1e-1, 5e-5)


def steps(drawn: Drawn, roots: Path, *meshes: dict) -> list[dict]:
    """Rows of metrics.jsonl of two steps on the first mesh, and for each of the others that of the
    second step, made there from the checkpoint of the first."""
    workdir, rows = Path(tempfile.mkdtemp(dir=roots)), []
    try:
        for mesh in meshes:
            if rows:  # as after a kill: a run that is at its last step has nothing left to do
                shutil.rmtree(workdir / "checkpoints" / "2")
            with devices_of(mesh):
                train.run(drawn.config(roots, mesh, workdir))
            found = (workdir / "metrics.jsonl").read_text().splitlines()
            rows += [json.loads(line) for line in (found[-1:] if rows else found)]
        return rows
    finally:
        shutil.rmtree(workdir)


@contextlib.contextmanager
def devices_of(mesh: dict):
    """JAX with as many devices as the mesh has, and nothing on the screen."""
    devices = jax.devices()[: math.prod(mesh.values())]
    said = io.StringIO()
    with (
        mock.patch.object(jax, "devices", return_value=devices),
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        yield


def refusal(drawn: Drawn, roots: Path, mesh: dict) -> str | None:
    """What is said of a run on a mesh before anything is restored or compiled."""
    with devices_of(mesh):
        try:
            setup.prepare(drawn.config(roots, mesh, roots / "none"))
        except ValueError as error:
            return str(error)


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
        for m in meshes:
            if said := refusal(drawn, roots, m):
                either = refusal(drawn, roots, one_device(m))
                return "fails" if either else "refused", f"{mesh}\n{said}"
        many = steps(drawn, roots, *meshes)
        one = steps(drawn, roots, one_device(drawn.mesh))
        one += one[1:] * (len(meshes) - 1)
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
