"""`python -m gopd_jax.plan --config=configs/qwen3.py --topology=v5p:4x4x4`: does it fit?

Compiles the step of a config, and evaluation where it samples otherwise than the step, for a slice
of TPUs that need not be there, on any CPU. Says per phase what it takes of a chip's memory and how
long a step would run. Models are read from their config.json; weights, tokenizers and data are
not needed. Where it does not fit, single changes are tried; `--search` looks for the mesh, the
microbatches and the recomputation that are fastest. Exit status: 0 if it fits, 1 if not, 2 for
wrong input, 3 where the compiler itself fails.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
from absl import app, flags
from rich.console import Console

from gopd_jax import config as settings
from gopd_jax import sharding
from gopd_jax.main import CONFIG, parse, refuse
from gopd_jax.planning import (
    abstract,
    changes,
    chips,
    evaluated,
    least,
    phases,
    search,
)
from gopd_jax.planning.chips import GIB, Topology
from gopd_jax.planning.phases import PHASES, Compiled
from gopd_jax.progress import plain

flags.declare_key_flag("config")  # for --help
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "What to compile for: v5e:4x4, 2xv5e:4x4 (two slices), v6e:8x8; or cpu:8, emulated.",
)
PHASE = flags.DEFINE_list("phase", None, f"Only these of {', '.join(PHASES)}; unset, all.")
MFU = flags.DEFINE_float("mfu", 0.5, "Of the chip's peak, that products are assumed to reach.")
JSON = flags.DEFINE_string("json", None, "File to write all figures to.")
SEARCH = flags.DEFINE_bool("search", False, "Look for mesh, microbatches and remat that fit.")
TRIES = flags.DEFINE_integer("tries", 6, "Compilations that --search makes at the most.")
CHANGES = flags.DEFINE_bool("changes", True, "Where it does not fit, look for a change that does.")

DOES_NOT_FIT, COMPILER_FAILED = 1, 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The compiler's answers for a config on a topology."""

    config: settings.Config
    run: abstract.Run
    topology: Topology
    found: tuple[Compiled, ...]
    mfu: float  # of the chip's peak, that products were assumed to reach

    @functools.cached_property
    def faster(self) -> dict[str, float]:
        """Flags -> seconds of a step that reading less would save, by the estimate."""
        return changes.faster(self.run, self.found, self.topology, mfu=self.mfu)

    @property
    def too_large(self) -> list[Compiled]:
        """The phases that do not fit, where a limit is known."""
        chip = self.topology.chip
        return [] if chip is None else [one for one in self.found if not one.fits(chip.usable)]


def plan(
    config: settings.Config,
    topology: Topology,
    *,
    names: tuple[str, ...] = PHASES,
    mfu: float = 0.5,
    say=lambda text: None,
) -> Plan:
    """Compile the phases. say gets a line before and after each compilation.

    ValueError with every problem of config, models and mesh.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"--mfu is {mfu}; it is above 0 and at most 1")
    chips.require_slices(topology.name, config.mesh.slices)
    run = abstract.prepare(config, topology.devices)
    names = phases.possible(run, names)
    found = []
    say(f"tracing {', '.join(names)}")
    for program in phases.programs(run, names):
        say(f"compiling {program.name} ({len(found) + 1}/{len(names)}) for {topology.name}")
        found.append(phases.compiled(run, program, topology, mfu=mfu))
        say(f"{program.name}: {_outcome(found[-1], topology)}, {found[-1].seconds:.0f} s")
    return Plan(config=config, run=run, topology=topology, found=tuple(found), mfu=mfu)


def first_that_fits(this: Plan, *, say) -> tuple[str | None, list[str]]:
    """(flags of the first change under which all that failed fits, those that do not)."""

    def compile(config: settings.Config, names: tuple[str, ...]) -> Plan:
        return plan(config, this.topology, names=names, mfu=this.mfu, say=say)

    return changes.first_that_fits(this, compile, say=say)


# --- what is told


def report(this: Plan) -> str:
    """The figures as text."""
    run, topology = this.run, this.topology
    c, mesh, chip = this.config, run.recipe.mesh, topology.chip
    axes = " x ".join(f"{name} {size}" for name, size in sharding.shape(mesh).items())
    rows, n = sum(run.recipe.group_rows), len(topology.devices)
    limit = "no limit is known" if chip is None else f"of {chip.usable / GIB:.2f} GiB"
    lines = [
        f"{topology.name}: {n} device{'' if n == 1 else 's'}, mesh {axes}; {rows} rows of "
        f"{c.data.prompt_length} + {c.sampling.completion_length} tokens",
        *(f"  {name:<18} {_role(role)}" for name, role in run.roles.items()),
        "",
        f"GiB of a device   arguments  temporaries  output  beside    peak {limit}",
    ]
    for one in this.found:
        if (m := one.memory) is None:
            needs = "" if one.needed is None else f"needs {one.needed / GIB:.2f} and "
            lines.append(f"{one.name:<17} {needs}does not fit: {one.exhausted}")
            lines += [f"                    {what}" for what in one.buffers]
            continue
        sizes = m.arguments, m.temporaries, m.output - m.aliased, m.beside, m.peak
        shown = [f"{size / GIB:{width}.3f}" for size, width in zip(sizes, (9, 13, 8, 8, 8))]
        verdict = "" if chip is None else ("  fits" if one.fits(chip.usable) else "  does not fit")
        lines.append(f"{one.name:<17} {''.join(shown)}{verdict}")
    if "evaluate" in (one.name for one in this.found):
        several = f", which needs most of {names}" if len(names := evaluated.names(run)) > 1 else ""
        one = evaluated.largest(run)
        few = f", {one.at_once} rows at a time" if one.at_once < rows else ""
        lines.append(f"evaluate samples from {one.name}{several}{few}")
    if away := max((one.memory.host for one in this.found if one.memory is not None), default=0):
        lines.append(f"in host memory{away / GIB:12.3f} beside these, for each device")
    lines += ["", "FLOPs of all devices; bytes that one device receives (HLO, a cross-check)"]
    for one in this.found:
        sent = ", ".join(f"{kind} {n / GIB:.3f} GiB" for kind, n in one.sent.items() if n > 2**20)
        sent += least.sent_told(run, one)
        lines.append(f"{one.name:<17} {one.work.total / 1e12:10.3f} TFLOP  {sent}".rstrip())
    lines += least.decode_told(run, this.found)
    return "\n".join([*lines, *_estimate(this)])


def _estimate(this: Plan) -> list[str]:
    """Seconds of the step, of the fused program or of the stages, and what takes most of them."""
    parts = phases.parts(this.found)
    if not parts:
        return []
    total = sum(parts.values())
    recipe = this.run.recipe
    tokens = sum(recipe.group_rows) * recipe.completion_length
    lines = ["", "ESTIMATE of seconds, a roofline (nothing was run)"]
    lines += [f"{name:<26} {_seconds(seconds):>12}" for name, seconds in parts.items()]
    worst = max(parts, key=parts.get)
    lines.append(
        f"{'all of these':<26} {_seconds(total):>12}, {tokens / total:,.0f} sampled tokens/s; "
        f"most of it is {worst}"
    )
    if large := [one.name for one in this.too_large]:
        lines.append(f"  as if {', '.join(large)} did fit")
    if this.faster:
        lines.append("faster by this estimate, each alone and not compiled:")
        for told, seconds in this.faster.items():
            other = "; another sampler, docs/eight_bits.md" if "int8" in told else ""
            lines.append(f"  {told}: {_seconds(seconds)} less{other}")
    return [*lines, *(f"  assumed: {text}" for text in phases.assumed(this.run))]


def _seconds(x: float) -> str:
    return f"{x:.2f} s" if x >= 0.1 else f"{1e3 * x:.3g} ms"


def to_json(this: Plan, verdict: str, change: str | None) -> dict:
    """Everything that `report` tells, as plain values in bytes, FLOPs and seconds."""
    chip, mesh = this.topology.chip, this.run.recipe.mesh
    rows = {}
    for one in this.found:
        memory = None if one.memory is None else dataclasses.asdict(one.memory)
        rows[one.name] = {
            "compile_seconds": one.seconds,
            "memory": memory and memory | {"peak": one.memory.peak},
            "fits": None if chip is None else one.fits(chip.usable),
            "needed": one.needed,
            "exhausted": one.exhausted,
            "buffers": list(one.buffers),
            "flops": {"narrow": one.work.narrow, "float32": one.work.float32},
            "collective_bytes_from_hlo": one.sent,
            "least_collective_bytes": least.sent(this.run, one.name),
            "decode": _decode(this.run, one),
            "loops_from_hlo": [dataclasses.asdict(loop) for loop in one.loops],
            "estimated_seconds": one.estimate,
        }
    return {
        "topology": this.topology.name,
        "devices": len(this.topology.devices),
        "mesh": sharding.shape(mesh),
        "usable_bytes": None if chip is None else chip.usable,
        "phases": rows,
        "estimated_seconds": phases.parts(this.found),
        "faster": this.faster,
        "assumed": list(phases.assumed(this.run)),
        "verdict": verdict,
        "change_that_fits": change,
        "config": settings.to_dict(this.config),
    }


def _decode(run: abstract.Run, one: Compiled) -> dict | None:
    it = least.decode(run, one.loops) if one.name in phases.STEP else None
    return it and dataclasses.asdict(it)


def _role(role: abstract.Role) -> str:
    cfg = role.decoder.cfg
    shape = f"{cfg.architecture}, {cfg.num_hidden_layers} layers of {cfg.hidden_size}"
    n = sum(x.size for x in abstract.leaves(role.params))
    size = f"{n / 1e9:.2f} G" if n >= 1e7 else f"{n / 1e6:.2f} M"
    kept = "follows the student" if role.params is None else f"{size} params, {role.kept}"
    computes = f"computes in {role.decoder.dtype}, attends by {role.decoder.attention}"
    return f"{shape}, {kept}, {computes}"


def _outcome(one: Compiled, topology: Topology) -> str:
    if one.memory is None:
        return "does not fit"
    of = "" if topology.chip is None else f" of {topology.chip.usable / GIB:.2f}"
    return f"compiled, {one.memory.peak / GIB:.3f}{of} GiB"


def verdict_of(this: Plan) -> str:
    """One line: whether what was compiled fits, and what training would run."""
    chip, names = this.topology.chip, [one.name for one in this.found]
    if chip is None:
        return f"compiled for {this.topology.name}, which says nothing about a chip's memory"
    runs = [name for name in phases.used_by(this.run) if name not in names]
    unseen = f"; training runs {runs}, which --phase left out" if runs else ""
    if large := [one.name for one in this.too_large]:
        return f"does not fit: {', '.join(large)} on {this.topology.name}{unseen}"
    return f"fits: {', '.join(names)} on {this.topology.name}{unseen}"


# --- the command


def main(argv):
    """The plan of --config on --topology."""
    if len(argv) > 1:
        refuse(f"unexpected arguments {argv[1:]}; settings are --config.key=value")
    console = Console(stderr=True)

    def say(text: str) -> None:
        plain(console, text)

    try:
        if TOPOLOGY.value is None:
            raise ValueError(f"--topology has to be given; {chips.FORM}")
        if PHASE.value == []:
            raise ValueError(f"--phase names none; the phases are {list(PHASES)}")
        if unknown := [name for name in PHASE.value or () if name not in PHASES]:
            raise ValueError(f"--phase has {unknown}; the phases are {list(PHASES)}")
        if JSON.value:  # before minutes of compiling for it
            with Path(JSON.value).open("a"):
                pass
        chips.without_accelerator(TOPOLOGY.value)
        topology = chips.topology(TOPOLOGY.value)
        told, fits = (_search if SEARCH.value else _plan)(CONFIG.value, topology, say)
    except (ValueError, OSError) as error:
        refuse(error)
    except jax.errors.JaxRuntimeError as error:
        say(f"the compiler failed on the phase above, which is no verdict: {str(error).strip()}")
        sys.exit(COMPILER_FAILED)
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(told, indent=2) + "\n")
    sys.exit(0 if fits else DOES_NOT_FIT)


def _plan(config: settings.Config, topology: Topology, say) -> tuple[dict, bool]:
    """Print the plan, and a change that would fit where it does not: (for --json, does it fit)."""
    names = PHASES if PHASE.value is None else tuple(n for n in PHASES if n in PHASE.value)
    this = plan(config, topology, names=names, mfu=MFU.value, say=say)
    print(report(this), flush=True)
    verdict, change = verdict_of(this), None
    print(f"\n{verdict}", flush=True)
    if this.too_large and CHANGES.value:
        change, tried = first_that_fits(this, say=say)
        if tried:
            print("does not fit with:\n" + "\n".join(f"  {told}" for told in tried))
        print(f"fits with: {change}" if change else "no single change that was tried fits")
    return to_json(this, verdict, change), not this.too_large


def _search(config: settings.Config, topology: Topology, say) -> tuple[dict, bool]:
    """Print what was tried and the best that fits with its plan: (for --json, is there one)."""

    def compile(config: settings.Config, names: tuple[str, ...]) -> Plan:
        return plan(config, topology, names=names, mfu=MFU.value, say=say)

    names = None if PHASE.value is None else tuple(n for n in PHASES if n in PHASE.value)
    options = {"names": names, "mfu": MFU.value, "tries": TRIES.value}
    found = search.search(config, topology, compile, say=say, **options)
    print(search.report(found, topology), flush=True)
    told = {"topology": topology.name, "search": search.to_json(found)}
    if (best := found.best) is None:
        return told, False
    verdict = verdict_of(best.plan)
    print(f"\n{report(best.plan)}\n\n{verdict}", flush=True)
    return to_json(best.plan, verdict, None) | told, True


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse)
    except KeyboardInterrupt:
        sys.exit(130)
