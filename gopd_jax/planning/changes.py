"""Single settings that would change a plan: those that take less memory, those that read less."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from gopd_jax import config as settings
from gopd_jax import problems, sharding
from gopd_jax.planning import abstract, phases, streamed
from gopd_jax.planning.chips import Topology
from gopd_jax.planning.phases import Compiled

# Under `sampling`, so that a token reads less: the same completions, then those of 8 bits.
NARROWER = {"buckets": 8, "cache_dtype": "int8", "weights_dtype": "int8"}
WORTH = 0.05  # of the step's seconds: less is not told


def smaller(
    c: settings.Config, mesh, names: tuple[str, ...] = ()
) -> Iterator[tuple[str, settings.Config]]:
    """(as flags, the config) of single changes that take less memory, the mildest first.

    names: phases that do not fit. Where one is the evaluation, teachers are left out of it: first
    alone, which changes nothing of the step; beside each other change where the step needs one.
    """
    fewer = {}
    if "evaluate" in names and c.evaluation.teachers:
        fewer = {"evaluation.teachers": False}
        if names == ("evaluate",):
            yield changed(c, fewer)
            fewer = {}
    for values in _smaller(c, mesh):
        yield changed(c, values | fewer)


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


def changed(c: settings.Config, values: dict) -> tuple[str, settings.Config]:
    told = " ".join(f"--config.{key}={value}" for key, value in values.items())
    return told, problems.changed(c, values)


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
    corrected = c.objective.importance in ("none", "token") and not run.recipe.objective.vocabulary
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
