"""Whether the published sizes of configs/qwen3.py fit slices of TPUs, phase by phase.

    python -m benchmarks.plans                      # all; writes docs/plans.md and docs/plans.jsonl
    python -m benchmarks.plans --only="8b on v6e"   # some of them
    python -m benchmarks.plans --phase fused        # the verdicts first

Each phase is compiled by `python -m gopd_jax.plan` in a process of its own, one after another, so
that one which crashes or is killed for its memory is told as such and the others go on. An answer
is a line of the record: what has one is not compiled again, so a run that was stopped continues,
and what failed is tried again. Answers to another preset than configs/qwen3.py is now are passed
over; delete the record to begin anew all the same. Needs libtpu, and hours; the
compiler takes several GB. The exit status is 1 while a phase has no answer.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from benchmarks.plans_record import ANSWERED, Record
from gopd_jax.planning.chips import GIB
from gopd_jax.planning.phases import PHASES, STEP

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 3600.0  # seconds for a process: a phase, or all changes that are tried where one fails
PRESETS = ("1.7b", "4b_moe", "8b")
# The preset's mesh is for 64 chips; on 256, as many ways along the heads as all models divide.
WIDE = ("--config.mesh.fsdp=32", "--config.mesh.tensor=8", "--config.batch.microbatches=32")
WIDE_MOE = ("--config.mesh.fsdp=64", "--config.mesh.tensor=4", "--config.batch.microbatches=16")
WHAT = (*PHASES, "change")
# On v6e:16x16 this preset's step takes 15.78 GiB, 0.03 more than a v5e has: the teacher's 61 GiB in
# bfloat16 are 0.24 of them, and it works for the scores alone.
OFFLOADED = ("--config.teachers.large.placement=host",)
SLICES = ("v5e:16x16", "v5p:4x4x4", "v6e:16x16")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A preset on a slice."""

    preset: str
    topology: str

    @property
    def name(self) -> str:
        return f"{self.preset} on {self.topology}"

    @property
    def flags(self) -> tuple[str, ...]:
        if self.topology == "v5p:4x4x4":
            return ()
        if "moe" in self.preset:
            return WIDE_MOE
        return WIDE + OFFLOADED if (self.preset, self.topology) == ("8b", "v5e:16x16") else WIDE


CELLS = tuple(Cell(preset, topology) for topology in SLICES for preset in PRESETS)


def asked(cell: Cell, what: str) -> list[str]:
    """The command of a phase; what = "change": of what would fit where the step does not."""
    phase = [f"--phase={what}", "--nochanges"] if what in PHASES else ["--phase=fused"]
    return [
        *(sys.executable, "-m", "gopd_jax.plan", f"--config=configs/qwen3.py:{cell.preset}"),
        *(f"--topology={cell.topology}", *cell.flags, *phase),
    ]


def answer(cell: Cell, what: str, limit: float, run=subprocess.run) -> dict:
    """The record's line. ValueError where the command refuses its input, which is ours."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    start, status, said, told = time.perf_counter(), None, "", None
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        command = [*asked(cell, what), f"--json={file}"]
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        try:
            done = run(command, timeout=limit, **options)
            status, said = done.returncode, done.stderr
        except subprocess.TimeoutExpired:
            said = f"no answer after {limit:.0f} s"
        if status in ANSWERED and file.is_file():
            told = json.loads(file.read_text())
    if status == 2:
        raise ValueError(f"{' '.join(command)}\n{said.strip()}")
    if status in ANSWERED and told is None:  # an exception of Python's, not a verdict
        status = None
    return {
        **dataclasses.asdict(cell),
        "flags": list(cell.flags),
        "what": what,
        "status": status,
        "said": "" if told else why(status, said),
        "seconds": time.perf_counter() - start,
        "versions": {name: metadata.version(name) for name in ("jax", "libtpu")},
        "plan": told,
    }


def why(status: int | None, said: str) -> str:
    """What became of a process that gave no answer."""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    if status is not None and status < 0:
        memory = ", as for lack of memory" if status == -9 else ""
        return f"killed by signal {-status}{memory}"
    lines = [line for line in said.splitlines() if line.startswith("the compiler failed")]
    return (lines[0] if lines else last)[:300]


def wanted(cell: Cell, record: Record, names=WHAT) -> Iterator[str]:
    """Of names, the phases that have no answer yet, and then a change, where the step does not
    fit."""
    for name in PHASES:
        if name in names and not record.answered(cell, name):
            yield name
    fused = record.get(cell, "fused") if "change" in names else None
    if fused is not None and fused["status"] == 1 and not record.answered(cell, "change"):
        yield "change"


# --- the document

HEAD = """# Plans of the published sizes

Each preset of `configs/qwen3.py` with prompts of 2048 and completions of up to 16384 tokens, 1024
rows a step, compiled for slices of TPUs on a CPU. **Nothing was run**: GiB are the compiler's own
account of one device, seconds a roofline under the assumptions below, that leaves collectives out.
Under *decode* is what a turn of the compiled loop reads and writes in HBM, over weights and the
whole cache (over weights and what the cache holds on average); under *received* what a device gets
from others in the step, over what the sharding asks for. Training runs `fused`, and `evaluate` for
its teacher before the first step unless `evaluation.teachers=False`, 256 rows at one time. Verdicts
are of the step alone; where its evaluation was compiled and does not fit, they say so. Made by
`python -m benchmarks.plans`, which continues the record beside it
({versions}).
{note}"""


def document(record: Record, cells=CELLS) -> str:
    """The tables, of what has an answer so far."""
    lines = [
        line for cell in cells for what in (*PHASES, "change") if (line := record.get(cell, what))
    ]
    versions = sorted({f"{k} {v}" for line in lines for k, v in line["versions"].items()})
    note = f"\n{record.note}\n" if record.note else ""
    head = HEAD.format(versions=", ".join(versions) or "it is empty", note=note)
    rows = [
        "| preset | slice | mesh | step, GiB a device | verdict | estimated step | most of it | "
        "decode | received |",
        "|---|---|---|---:|---|---:|---|---|---|",
        *(_summary(cell, record) for cell in cells),
    ]
    parts = [part for cell in cells for part in _details(cell, record)]
    told = next((line["plan"] for line in lines if line["plan"]), {"assumed": []})
    assumed = ["", "## Assumed", "", *(f"- {text}" for text in told["assumed"])]
    return "\n".join([head, *rows, *parts, *assumed, ""])


def _summary(cell: Cell, record: Record) -> str:
    start = f"| {cell.preset} | {cell.topology} |"
    fused = record.get(cell, "fused")
    if fused is None or fused["plan"] is None:
        said = "not compiled yet" if fused is None else f"no answer: {fused['said']}"
        part = record.get(cell, "generate")
        if part is None or part["plan"] is None:
            return f"{start} | | {said} | | | | |"
        # What the run holds beside is counted, so where it does not fit, no step will.
        one, usable = part["plan"]["phases"]["generate"], part["plan"]["usable_bytes"]
        verdict = f"{said}; its rollout {'fits' if one['fits'] else 'does not fit'}"
        size = f"rollout {_size(one)} of {usable / GIB:.2f}"
        return f"{start} {_mesh(part)} | {size} | {verdict} | | | {_decode(one)} | |"
    plan, one = fused["plan"], fused["plan"]["phases"]["fused"]
    verdict = "fits" if one["fits"] else "does not fit"
    if (change := record.get(cell, "change")) and not one["fits"]:
        found = change["plan"] and change["plan"]["change_that_fits"]
        verdict += f"; fits with `{found}`" if found else "; no single change that was tried does"
    verdict += _evaluation(cell, record)
    seconds, most = _estimate(cell, record)
    parts = [record.get(cell, name) for name in ("fused", "generate")]
    told = [
        _decode(part["plan"]["phases"][part["what"]]) for part in parts if part and part["plan"]
    ]
    return (
        f"{start} {_mesh(fused)} | {_size(one)} of {plan['usable_bytes'] / GIB:.2f} | {verdict} | "
        f"{seconds} | {most} | {next(filter(None, told), '')} | {_received(one)} |"
    )


def _evaluation(cell: Cell, record: Record) -> str:
    """What the verdict of a step leaves out: that its teacher cannot be evaluated there."""
    line = record.get(cell, "evaluate")
    if line is None or line["plan"] is None:
        return ""
    one = line["plan"]["phases"]["evaluate"]
    cure = "with `evaluation.teachers=False`"
    return "" if one["fits"] else f"; {cure}, as evaluating its teacher takes {_size(one)}"


def _mesh(line: dict) -> str:
    return " × ".join(str(size) for size in line["plan"]["mesh"].values())


def _decode(one: dict) -> str:
    """HBM of a turn of the loop, over weights and cache: whole, and as full as it is on average."""
    if (it := one.get("decode")) is None:
        return ""
    whole, live = (it["moved"] / (it["weights"] + it[key]) for key in ("cache", "live"))
    return f"{it['moved'] / GIB:.2f} GiB, {whole:.2f} × ({live:.2f} ×)"


def _received(one: dict) -> str:
    """What a device receives in the step, over the least."""
    total, least = sum(one["collective_bytes_from_hlo"].values()), one.get("least_collective_bytes")
    return f"{total / GIB:,.0f} GiB, {total / least:.2f} ×" if total and least else ""


def _estimate(cell: Cell, record: Record) -> tuple[str, str]:
    """(seconds and tokens a second, the part that takes most): of the stages, else of the step."""
    lines = [record.get(cell, name) for name in STEP]
    plans = [line["plan"] if line else None for line in lines]
    chosen = plans[:3] if all(plans[:3]) else plans[3:]
    parts = {k: s for plan in chosen if plan for k, s in plan["estimated_seconds"].items()}
    if not parts:
        return "", ""
    total, worst = sum(parts.values()), max(parts, key=parts.get)
    c = next(plan["config"] for plan in chosen if plan)
    tokens = c["batch"]["prompts"] * c["batch"]["rollouts"] * c["sampling"]["completion_length"]
    share = 100 * parts[worst] / total
    return f"{total:,.0f} s, {tokens / total:,.0f} tokens/s", f"{worst}, {share:.0f} %"


def _size(one: dict) -> str:
    size = one["memory"]["peak"] if one["memory"] else one["needed"]
    return "?" if size is None else f"{size / GIB:.2f}"


def _details(cell: Cell, record: Record) -> Iterator[str]:
    if not any(record.get(cell, name) for name in PHASES):
        return
    yield f"\n## {cell.name}\n"
    yield f"`--config=configs/qwen3.py:{cell.preset} --topology={cell.topology}"
    yield f"{' '.join(('', *cell.flags))}`\n"
    yield "| phase | GiB a device | arguments | temporaries | verdict | PFLOP | compiled in |"
    yield "|---|---:|---:|---:|---|---:|---:|"
    arrays = []
    for name in PHASES:
        line = record.get(cell, name)
        if line is None or line["plan"] is None:
            said = "not compiled yet" if line is None else f"no answer: {line['said']}"
            yield f"| {name} | | | | {said} | | |"
            continue
        one = line["plan"]["phases"][name]
        memory = one["memory"] or {}
        sizes = [
            f"{memory[key] / GIB:.2f}" if memory else "" for key in ("arguments", "temporaries")
        ]
        verdict = "fits" if one["fits"] else "does not fit"
        flops = sum(one["flops"].values()) / 1e15
        yield (
            f"| {name} | {_size(one)} | {' | '.join(sizes)} | {verdict} | {flops:,.1f} | "
            f"{one['compile_seconds']:.0f} s |"
        )
        arrays += [f"- {name}: {what}" for what in one["buffers"][:3]]
    yield "\nThe largest arrays:\n"
    yield from arrays
    estimates = {
        k: s
        for name in STEP[:3]
        if (line := record.get(cell, name)) and line["plan"]
        for k, s in line["plan"]["estimated_seconds"].items()
    }
    if estimates:
        told = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in estimates.items())
        yield f"\nEstimated: {told}."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/plans.md")
    parser.add_argument("--record", type=Path, default=ROOT / "docs/plans.jsonl")
    parser.add_argument("--only", default="", help='part of a name such as "8b on v6e:16x16"')
    parser.add_argument(
        "--phase", nargs="+", choices=WHAT, default=WHAT, help="these alone; all unless given"
    )
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one process")
    given = parser.parse_args()
    cells = [cell for cell in CELLS if given.only in cell.name]
    if not cells:
        parser.error(f"--only={given.only}; there are {[cell.name for cell in CELLS]}")
    if importlib.util.find_spec("libtpu") is None:
        parser.error('the TPU compiler, libtpu, is not installed: pip install "jax[tpu]"')
    record, missing = Record(given.record), 0
    for i, cell in enumerate(cells):
        for what in wanted(cell, record, given.phase):
            print(f"{i + 1}/{len(cells)} {cell.name}: {what}", flush=True)
            line = answer(cell, what, given.limit)
            record.add(line)
            missing += line["status"] not in ANSWERED
            told = line["plan"]["verdict"] if line["plan"] else f"no answer: {line['said']}"
            print(f"  {told}, {line['seconds']:.0f} s", flush=True)
            given.out.write_text(document(record))
    given.out.write_text(document(record))
    return 1 if missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:
        sys.exit(str(error))
