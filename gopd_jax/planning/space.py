"""The configs that `plan --search` chooses from: their order, and what each needs at the least."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re

import numpy as np

from gopd_jax import config as settings
from gopd_jax import sharding
from gopd_jax.models import lora
from gopd_jax.models.decoder import Decoder
from gopd_jax.planning import abstract, evaluated, flops, phases, reads, streamed
from gopd_jax.planning.chips import Topology
from gopd_jax.planning.phases import Compiled, Memory

# float32 arrays of attention's scores that exist at one time: in a forward pass, and in a backward
# pass that recomputes a layer; of one that does not, for each layer. Read off plans that were made;
# they order what is tried and decide nothing.
FORWARD, RECOMPUTED, KEPT = 1.2, 3.5, 2.2

# What is recomputed, more and more of it. Products that are kept depend on the attention that runs.
REMATS = (None, "products", "layers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A config of the space. bound: bytes that a device needs at the least; guess: will likely."""

    config: settings.Config
    mesh: tuple[int, int, int]  # sizes of sharding.SEARCHED; the other axes are the config's
    bound: int
    guess: int
    seconds: float  # of the roofline, before anything is compiled

    @property
    def flags(self) -> str:
        b = self.config.batch
        axes = [f"--config.mesh.{axis}={size}" for axis, size in zip(sharding.SEARCHED, self.mesh)]
        remat = b.remat or "none"
        batch = f"--config.batch.microbatches={b.microbatches} --config.batch.remat={remat}"
        return f"{' '.join(axes)} {batch}"

    @property
    def rank(self) -> tuple:
        """Seconds; then, as these leave collectives out, what gathers weights less often."""
        b = self.config.batch
        return self.seconds, b.microbatches, REMATS.index(b.remat), -self.mesh[1]

    def needs_no_less(self, other: Candidate) -> bool:
        """Than another one, whose rows of a microbatch and shards are no larger than this one's."""
        mine, its = self.config.batch, other.config.batch
        return (
            self.mesh[2] == other.mesh[2]
            and self.mesh[1] <= other.mesh[1]
            and mine.microbatches <= its.microbatches
            and REMATS.index(mine.remat) <= REMATS.index(its.remat)
        )


def space(c: settings.Config, devices, say=lambda text: None) -> list[abstract.Run]:
    """Every mesh and division of the batch that config, models and rows allow.

    say is told what leaves meshes out, such as heads or sampling.slots that they do not divide.
    ValueError, where there is none, with what is wrong with all of them, or with the first.
    """
    found, wrong, refused = [], [], {}
    rows = c.batch.prompts * c.batch.rollouts
    beside = c.mesh.expert * c.mesh.sequence
    if beside < 1 or len(devices) % beside:
        raise ValueError(
            f"mesh.expert * mesh.sequence = {c.mesh.expert} * {c.mesh.sequence} does not divide "
            f"the {len(devices)} devices; --search takes them as they are: choose factors of it"
        )
    for sizes in factorizations(len(devices) // beside):
        shards = sizes[0] * sizes[1] * c.mesh.expert
        share = rows // (c.batch.updates * shards) if c.batch.updates > 0 else 0
        for pieces, remat in itertools.product(divisors(max(share, 1)), REMATS):
            made = copy.deepcopy(c)
            made.mesh.data, made.mesh.fsdp, made.mesh.tensor = sizes
            made.batch.microbatches, made.batch.remat = pieces, remat
            try:
                found.append(abstract.prepare(made, devices))
            except ValueError as error:
                wrong.append(str(error).splitlines())
                if pieces == 1:  # it is the mesh
                    first = wrong[-1][0].removeprefix("- ")
                    kind = re.split(r"\d", first)[0]  # the rest has this mesh's numbers
                    refused.setdefault(kind, []).append((sizes, first))
                    break
    if not found:
        common = [line for line in wrong[0] if all(line in lines for lines in wrong)]
        raise ValueError("\n".join(common or ["no mesh does; the first of them:", *wrong[0]]))
    for meshes in refused.values():
        sizes, first = meshes[0]
        them = f"{len(meshes)} meshes" if len(meshes) > 1 else "a mesh"
        say(f"{them} left out, {' x '.join(map(str, sizes))} for one: {first}")
    return found


def factorizations(n: int) -> list[tuple[int, int, int]]:
    """(data, fsdp, tensor) of product n."""
    return [(n // (f * t), f, t) for t in divisors(n) for f in divisors(n // t)]


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def ranked(runs, names: tuple[str, ...], topology: Topology, *, mfu: float) -> list[Candidate]:
    """Candidates by rank. A step is traced once for all that compute the same."""
    works, found = {}, []
    for run in runs:
        # Products of the whole mesh; experts' tokens are repeated along its last axis.
        key = sharding.parts(run.recipe.mesh, "heads"), run.config.batch.remat
        if key not in works:
            works[key] = {
                program.name: flops.count((program.counted or program.traced).jaxpr)
                for program in phases.programs(run, tuple(n for n in names if n != "evaluate"))
            }
        parts = [
            Compiled(
                name=name,
                seconds=0.0,
                work=work,
                estimate=phases.roofline(run, name, work, _read(run, name), topology, mfu=mfu),
            )
            for name, work in works[key].items()
        ]
        found.append(
            Candidate(
                config=run.config,
                mesh=sharding.searched(run.recipe.mesh),
                bound=bound(run, names),
                guess=guess(run, names),
                seconds=sum(phases.parts(parts).values()),
            )
        )
    return sorted(found, key=lambda one: one.rank)


def _read(run: abstract.Run, name: str) -> Memory | None:
    """What the whole step reads and writes of its arguments; not known of a stage."""
    if name != "fused":
        return None
    none = {"temporaries": 0, "aliased": 0, "beside": 0}
    return Memory(arguments=_held(run), output=phases.bytes_of(abstract.state(run)), **none)


# --- bytes of a device, before anything is compiled


def bound(run: abstract.Run, names: tuple[str, ...]) -> int:
    """Bytes of a device that no compilation of these phases can do without.

    What the run holds there, and the larger of two arrays that nothing can divide further: the
    cache, which is the decoding loop's own state, and the gradient, of which the norm is taken
    before any of it is applied.
    """
    extra = [0]
    if {"generate", "fused"} & {*names} and run.recipe.source != "data":
        cache = max(_cache(run, decoder, rows) for decoder, _, rows in reads.writers(run))
        extra.append(phases.bytes_of(run.prompts) + cache)
    if {"update", "fused"} & {*names}:
        extra.append(phases.bytes_of(abstract.state(run).params))
    if "evaluate" in names and (one := evaluated.largest(run)) is not None:
        extra.append(phases.bytes_of(evaluated.prompts(run, one)) + one.cache)
    return _held(run) + max(extra)


def guess(run: abstract.Run, names: tuple[str, ...]) -> int:
    """Bytes of a device that these phases will take or so. It decides what is tried first."""
    made, c = run.recipe, run.config
    shards = sharding.n_row_shards(made.mesh)
    rows = -(-sum(made.group_rows) // (made.pieces * shards))
    extra = [0]
    if {"generate", "fused"} & {*names} and made.source != "data":
        for decoder, _, n_rows in reads.writers(run):
            copied = reads.weights_read(made.mesh, decoder, reads.sampling_dtype(made, "weights"))
            scores = FORWARD * _scores(made.mesh, decoder, -(-n_rows // shards), run.n_prompt)
            extra.append(_cache(run, decoder, n_rows) + copied + scores)
    if {"score", "fused"} & {*names}:
        judges = zip((*made.teachers, made.reference), (*run.frozen.teachers, run.frozen.reference))
        for decoder, params in judges:
            if decoder is not None:
                brought = 0 if params is None else streamed.at_once(decoder, params)
                extra.append(brought + FORWARD * _scores(made.mesh, decoder, rows, run.length))
    if {"update", "fused"} & {*names}:
        cfg = made.student.cfg
        state = rows * run.length * cfg.hidden_size * np.dtype(made.student.dtype).itemsize
        kept = RECOMPUTED if c.batch.remat else max(RECOMPUTED, KEPT * cfg.num_hidden_layers)
        scores = kept * _scores(made.mesh, made.student, rows, run.length)
        gradient = phases.bytes_of(abstract.state(run).params)
        n_vocab = cfg.vocab_size // sharding.parts(made.mesh, "vocab")
        logits = 2 * 4 * rows * min(made.head_chunk, made.completion_length) * n_vocab
        positions = sharding.parts(made.mesh, "length")
        activations = (cfg.num_hidden_layers * state + logits) // positions
        extra.append(2 * gradient + activations + scores)
    if "evaluate" in names and (one := evaluated.largest(run)) is not None:
        scores = _scores(made.mesh, one.decoder, -(-one.at_once // shards), one.n_prompt)
        extra.append(one.cache + one.copied + FORWARD * scores)
    return int(_held(run) + max(extra))


def _held(run: abstract.Run) -> int:
    return phases.bytes_of((abstract.state(run), abstract.loaded(run)))


def _cache(run: abstract.Run, decoder: Decoder, rows: int) -> int:
    dtype = reads.sampling_dtype(run.recipe, "cache")
    return reads.cache_bytes(run.recipe.mesh, decoder, rows, run.length, dtype)


def _scores(mesh, decoder: Decoder, rows: int, length: int) -> int:
    """Attention's float32 scores of one layer, of these rows of a device."""
    heads = lora.base_config(decoder.cfg).num_attention_heads
    heads //= sharding.parts(mesh, "heads") * sharding.parts(mesh, "length")
    return 4 * rows * heads * length**2
