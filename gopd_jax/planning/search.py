"""`plan --search`: which mesh, microbatches and recomputation of layers a config takes on a slice.

Every factorization of the devices that the models divide, with every division of the batch, with
layers kept and recomputed. What cannot fit by the shardings alone is left out (`bound`); the rest
is in the order of the roofline's seconds, and the first few are compiled. What is chosen changes
results by rounding alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax

from gopd_jax import config as settings
from gopd_jax.planning import phases
from gopd_jax.planning.chips import GIB, Topology
from gopd_jax.planning.space import Candidate, ranked, space

# A faster candidate is still compiled after one that fits if it is guessed to be over by less.
DOUBT = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tried:
    """A candidate as it was compiled. peak None: refused, for `said`."""

    candidate: Candidate
    fits: bool
    peak: int | None
    needed: int | None
    seconds: float  # estimated, now that its arguments are known
    compile_seconds: float
    said: str = ""
    plan: object = None  # of the compile function


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """What was looked at. left: those that were not compiled, though their bound fits."""

    names: tuple[str, ...]
    pruned: tuple[Candidate, ...]
    tried: tuple[Tried, ...]
    left: tuple[Candidate, ...]

    @property
    def best(self) -> Tried | None:
        fitting = [one for one in self.tried if one.fits]
        return min(fitting, key=lambda one: (one.seconds, one.candidate.rank), default=None)


def search(
    config: settings.Config,
    topology: Topology,
    compile: Callable,
    *,
    names: tuple[str, ...] | None = None,
    mfu: float = 0.5,
    tries: int = 6,
    say=lambda text: None,
) -> Search:
    """Compile up to `tries` candidates, the most promising first.

    compile(config, names) -> plan.Plan. names: the phases that have to fit; None: those that
    training runs. Stops once nothing that is left can be faster than the best that fits.
    ValueError where the chip's memory is not known, or no mesh goes with the models and the batch.
    """
    if topology.chip is None:
        raise ValueError(
            f"--search asks what fits a chip, and {topology.name} has no limit that is known; give "
            "a slice: --topology=v5e:4x4"
        )
    if tries < 1:
        raise ValueError(f"--tries is {tries}; it is the number of compilations, at least 1")
    start = time.perf_counter()
    say(f"meshes of {len(topology.devices)} devices, and a step traced for each kind of them")
    runs = space(config, topology.devices, say)
    names = phases.used_by(runs[0]) if names is None else phases.possible(runs[0], names)
    found = ranked(runs, names, topology, mfu=mfu)
    usable = topology.chip.usable
    ahead = [one for one in found if one.bound <= usable]
    pruned = tuple(one for one in found if one.bound > usable)
    say(
        f"{len(found)} combinations of mesh, microbatches and remat; {len(pruned)} cannot fit; "
        f"{time.perf_counter() - start:.0f} s"
    )
    tried: list[Tried] = []
    while ahead and len(tried) < tries:
        best = Search(names=names, pruned=(), tried=tuple(tried), left=()).best
        if (one := _next(ahead, best, usable)) is None:
            break
        say(f"trying {len(tried) + 1}/{tries}: {one.flags}, about {one.seconds:.1f} s a step")
        ahead.remove(one)
        tried.append(_try(one, compile, names))
        say(f"  {outcome(tried[-1])}, {tried[-1].compile_seconds:.0f} s")
        if tried[-1].plan is not None and not tried[-1].fits:
            ahead = [other for other in ahead if not other.needs_no_less(one)]
    kept = {id(one.candidate) for one in tried}
    left = tuple(one for one in found if one.bound <= usable and id(one) not in kept)
    return Search(names=names, pruned=pruned, tried=tuple(tried), left=left)


def _next(ahead: list[Candidate], best: Tried | None, usable: int) -> Candidate | None:
    """The fastest that will likely fit; where none will, or one does, the least beyond of the
    faster ones."""
    if best is not None:
        limit = 0.99 * best.candidate.seconds
        ahead = [one for one in ahead if one.seconds < limit and one.guess < DOUBT * usable]
    if likely := [one for one in ahead if one.guess <= usable]:
        return min(likely, key=lambda one: one.rank)
    return min(ahead, key=lambda one: one.guess, default=None)


def _try(one: Candidate, compile: Callable, names: tuple[str, ...]) -> Tried:
    start = time.perf_counter()
    try:
        this = compile(one.config, names)
    except jax.errors.JaxRuntimeError as error:  # of this mesh alone, it may be
        said = f"the compiler failed: {str(error).strip().splitlines()[0][:200]}"
        spent = time.perf_counter() - start
        options = {"seconds": one.seconds, "compile_seconds": spent, "said": said}
        return Tried(candidate=one, fits=False, peak=None, needed=None, **options)
    known = [part.memory.peak for part in this.found if part.memory is not None]
    needed = [part.needed for part in this.found if part.needed is not None]
    refused = [part.exhausted for part in this.found if part.memory is None]
    return Tried(
        candidate=one,
        fits=not this.too_large,
        peak=None if refused else max(known),
        needed=max(needed, default=None),
        seconds=sum(phases.parts(this.found).values()),
        compile_seconds=time.perf_counter() - start,
        said=refused[0] if refused else "",
        plan=this,
    )


# --- what is told


def report(this: Search, topology: Topology) -> str:
    """The table of what was tried, and the flags of the best."""
    usable = topology.chip.usable / GIB
    lines = [
        f"{topology.name}: searched for what {', '.join(this.names)} takes of "
        f"{usable:.2f} GiB; seconds are an estimate",
        f"{'data x fsdp x tensor':<22}{'microbatches':>12}  {'remat':<9}{'at least':>9}"
        f"{'GiB':>10}{'seconds':>10}  ",
    ]
    for one in this.tried:
        c = one.candidate
        size = one.peak if one.peak is not None else one.needed
        shown = "?" if size is None else f"{size / GIB:.2f}"
        batch = c.config.batch
        lines.append(
            f"{' x '.join(map(str, c.mesh)):<22}{batch.microbatches:>12}  "
            f"{batch.remat or 'none':<9}{c.bound / GIB:>9.2f}{shown:>10}{one.seconds:>10.2f}  "
            f"{'fits' if one.fits else 'does not fit'}"
        )
    lines.append(
        f"{len(this.pruned)} more cannot fit by their shardings alone; {len(this.left)} were not "
        "compiled: slower than the best, or beyond --tries, or like one that did not fit"
    )
    if this.best is not None:
        lines += ["", f"the best that fits: {this.best.candidate.flags}"]
    elif this.tried:
        more = "a larger --tries, " if this.left else ""
        lines += ["", f"none that was compiled fits; {more}{CURES}"]
    else:
        least = min(one.bound for one in this.pruned) / GIB
        lines += ["", f"nothing fits: the least that is needed is {least:.2f} GiB; {CURES}"]
    return "\n".join(lines)


CURES = (
    "a larger slice, a smaller --config.batch.prompts or --config.sampling.completion_length, "
    "--config.evaluation.rows=N where evaluate is what does not fit (or teachers=False), or "
    "--config.teachers.NAME.placement=host, or host_layers"
)


def outcome(one: Tried) -> str:
    if one.peak is None and one.needed is None:
        return one.said
    size = one.peak if one.peak is not None else one.needed
    return f"{'fits' if one.fits else 'does not fit'}, {size / GIB:.3f} GiB"


def to_json(this: Search) -> dict:
    """The same as plain values, bytes and seconds."""

    def of(one: Candidate) -> dict:
        b = one.config.batch
        return {
            "mesh": list(one.mesh),
            "microbatches": b.microbatches,
            "remat": b.remat,
            "at_least_bytes": one.bound,
            "guessed_bytes": one.guess,
            "flags": one.flags,
        }

    return {
        "phases": list(this.names),
        "tried": [
            of(one.candidate)
            | {
                "fits": one.fits,
                "peak": one.peak,
                "needed": one.needed,
                "estimated_seconds": one.seconds,
                "compile_seconds": one.compile_seconds,
                "said": one.said,
            }
            for one in this.tried
        ],
        "cannot_fit": len(this.pruned),
        "not_compiled": [of(one) | {"estimated_seconds": one.seconds} for one in this.left],
        "best": None if this.best is None else this.best.candidate.flags,
    }
