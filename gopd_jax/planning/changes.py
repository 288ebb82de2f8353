"""Single settings that would change a plan: those that take less memory, and the first under which
it fits; those that read less."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator

from gopd_jax import config as settings
from gopd_jax import problems, sharding
from gopd_jax.evaluate import rows_at_once
from gopd_jax.planning import abstract, phases, space, streamed
from gopd_jax.planning.chips import Topology
from gopd_jax.planning.phases import Compiled

# Under `sampling`, so that a token reads less: the same completions, then those of 8 bits.
NARROWER = {"buckets": 8, "cache_dtype": "int8", "weights_dtype": "int8"}
WORTH = 0.05  # of the step's seconds: less is not told

Change = tuple[str, settings.Config]  # as flags, and the config that they make


def smaller(c: settings.Config, mesh) -> Iterator[Change]:
    """Single changes of the step that take less memory, the mildest first."""
    return (changed(c, values) for values in _smaller(c, mesh))


def smaller_evaluation(c: settings.Config, mesh) -> Iterator[Change]:
    """Those that leave the step as it is: fewer rows of an evaluation at one time, down to one a
    shard, of which nothing but its seconds changes; then no teachers in it.
    """
    shards = sharding.n_decode_shards(mesh)
    each = rows_at_once(c) // shards
    while each := each // 2:
        yield changed(c, {"evaluation.rows": each * shards})
    if c.evaluation.teachers and c.teachers:
        yield changed(c, {"evaluation.teachers": False})


def _smaller(c: settings.Config, mesh) -> Iterator[dict]:
    pieces, chunk, prompts = c.batch.microbatches, c.batch.head_chunk, c.batch.prompts
    length, shards = c.sampling.completion_length, sharding.n_row_shards(mesh)
    n_data, n_fsdp, _, _, n_tensor = mesh.devices.shape
    for name in {None: ("products", "layers"), "products": ("layers",)}.get(c.batch.remat, ()):
        yield {"batch.remat": name}
    for factor in (2, 4):
        yield {"batch.microbatches": pieces * factor}
    for factor in (2, 4):
        if chunk % factor == 0:
            yield {"batch.head_chunk": chunk // factor}
    if n_data % 2 == 0:
        yield {"mesh.data": n_data // 2, "mesh.fsdp": 2 * n_fsdp}
    if n_fsdp % 2 == 0:  # half of the heads to a device, and as few rows at one time
        axes = {"mesh.fsdp": n_fsdp // 2, "mesh.tensor": 2 * n_tensor}
        yield axes | {"batch.microbatches": 2 * pieces}
    for placement in ("host", "host_layers"):
        if away := streamed.moved(c, placement):
            yield away
    for factor in (2, 4):
        if prompts % factor == 0:
            fewer = {"batch.prompts": prompts // factor}
            rows = prompts * c.batch.rollouts // (factor * c.batch.updates)
            if rows % (pieces * shards) and pieces % factor == 0:  # less than one a device
                fewer["batch.microbatches"] = pieces // factor
            yield fewer
    for factor in (2, 4):  # another experiment: the last resort
        if length % factor == 0:
            yield {"sampling.completion_length": length // factor}


def changed(c: settings.Config, values: dict) -> Change:
    """(as flags, the config). What no flag can name, a teacher with a dot, as a preset has it."""
    told = []
    for key, value in values.items():
        teacher = re.fullmatch(r"teachers\.(.*\..*)\.(\w+)", key)
        preset = teacher and f"c.teachers[{teacher[1]!r}].{teacher[2]} = {value!r} in the preset,"
        told.append(preset or f"--config.{key}={value}")
    return " ".join(told).removesuffix(","), problems.changed(c, values)


def first_that_fits(this, compile: Callable, *, say) -> tuple[str | None, list[str]]:
    """(flags of the first single change under which all that failed fits, those that do not).

    this: a Plan, and compile: (config, names of phases) -> that of another config. Where a step and
    its evaluation fail, the first for the step and, if it needs one still, another for the
    evaluation beside it. Changes that make no sense with the mesh or the batch are left out, and
    those that cannot fit or by a guess take no less.
    """
    names, tried = tuple(one.name for one in this.too_large), []
    step, mesh = tuple(name for name in names if name != "evaluate"), this.run.recipe.mesh
    candidates = smaller(this.config, mesh)
    if not step:
        candidates = itertools.chain(smaller_evaluation(this.config, mesh), candidates)
    found = _first(this, step or names, candidates, compile, tried, say)
    if found is not None and step and step != names:
        told, config = found
        mesh = abstract.prepare(config, this.topology.devices).recipe.mesh
        more = smaller_evaluation(config, mesh)
        beside = [found, *((f"{told} {flag}", then) for flag, then in more)]
        found = _first(this, ("evaluate",), beside, compile, tried, say)
    return found and found[0], tried


def _first(this, names, candidates: Iterable[Change], compile, tried: list[str], say):
    """The first Change under which these phases fit, or None; `tried` gets those that do not."""
    usable = this.topology.chip.usable
    for told, config in candidates:
        try:
            run = abstract.prepare(config, this.topology.devices)
        except ValueError:
            continue
        if not (left := phases.kept(run, names)):  # nothing that did not fit is run any longer
            return told, config
        if space.bound(run, left) > usable:
            continue
        if space.guess(run, left) > 0.995 * space.guess(this.run, left):
            continue
        say(f"trying {told}")
        if not compile(config, left).too_large:
            return told, config
        tried.append(told)
    return None


def faster(
    run: abstract.Run, found: Iterable[Compiled], topology: Topology, *, mfu: float
) -> dict[str, float]:
    """Flags -> seconds of a step that decoding would take less, where reading takes most of it.

    Of single changes, by the same roofline: what each token reads, down to what its products take.
    Nothing is compiled. Left out is what is set already, what is refused beside the other settings
    or not corrected by a token's importance weight, and what is little of the step.
    """
    parts = phases.parts(found)
    if "decode: HBM" not in parts:
        return {}
    c, now, better = run.config, parts["decode: HBM"], {}
    looped = next(one.work.looped for one in found if one.work.looped.total)
    floor = phases.seconds_computed(looped, topology, mfu)
    corrected = (
        c.objective.importance in ("none", "token") and not run.recipe.objective.needs_vocabulary
    )
    for name, value in NARROWER.items():
        if getattr(c.sampling, name) != getattr(settings.Sampling(), name):
            continue
        values = {f"sampling.{name}": value}
        if value == "int8":  # another policy's completions
            if not corrected:
                continue
            values["objective.importance"] = "token"
        told, config = changed(c, values)
        try:
            narrower = abstract.prepare(config, topology.devices)
        except ValueError:
            continue
        less = now - max(floor, phases.seconds_read(narrower, topology))
        if less > WORTH * sum(parts.values()):
            better[told] = less
    return better
