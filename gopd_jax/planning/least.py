"""What a step cannot do without on its mesh, to hold what was compiled against: bytes of HBM for a
turn of decoding, bytes that a device receives from others.
"""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np

from gopd_jax import sharding
from gopd_jax.models import lora
from gopd_jax.models.cache import widths
from gopd_jax.planning import abstract, evaluated, phases, reads, streamed
from gopd_jax.planning.chips import GIB
from gopd_jax.planning.phases import STEP, Compiled
from gopd_jax.planning.traffic import Loop


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Bytes of one device: of a turn as it is compiled, and of what it is about.

    moved: in the mean of the turns where every row runs to its full length, with the width of the
    cache that each reads; least: of a turn that reads the narrowest. live: what the cache holds in
    the mean of these turns.
    """

    turns: int
    moved: float
    least: float
    weights: int
    cache: int
    live: float

    @property
    def of_all(self) -> float:
        """Times the weights and the whole cache."""
        return self.moved / (self.weights + self.cache)

    @property
    def of_live(self) -> float:
        """Times the weights and what the cache holds."""
        return self.moved / (self.weights + self.live)


def decode(run: abstract.Run, loops: tuple[Loop, ...]) -> Decode | None:
    """Of the loops of a step's program that generates; None where it has none.

    One loop for each model that writes, or several of rising bounds, which go on one after another.
    """
    writers = reads.writers(run) if run.recipe.source != "data" else []
    if not writers or not loops or len(loops) % len(writers):
        return None
    n = len(loops) // len(writers)
    each = [loops[i : i + n] for i in range(0, len(loops), n)]
    most, least = (sum(_mean(part, name) for part in each) for name in ("moved", "least"))
    turns, read, filled = reads.turns_and_slots(run)
    cache, narrowest = reads.cache_of(run), widths(run.length, run.recipe.sampling_buckets)[0]
    # Branches differ by the slots that they read, from the narrowest width to the whole cache.
    share = 1.0 if narrowest == run.length else (read - narrowest) / (run.length - narrowest)
    return Decode(
        turns=turns,
        moved=least + (most - least) * share,
        least=least,
        weights=reads.weights_of(run),
        cache=cache,
        live=cache * filled / run.length,
    )


def _mean(loops: tuple[Loop, ...], name: str) -> float:
    """Of loops that follow one another, weighed by the turns of each: bounds are of one counter."""
    bounds = [0, *(loop.turns for loop in loops)]
    turns = [after - before for before, after in itertools.pairwise(bounds)]
    if min(turns) <= 0:
        turns = bounds[1:]
    return float(np.average([getattr(loop, name) for loop in loops], weights=turns))


def decode_told(run: abstract.Run, found: tuple[Compiled, ...]) -> list[str]:
    """Lines of the plan: of what decodes, the bytes a turn and what they are made of."""
    if run.recipe.source == "data":
        return []
    turns, size = reads.turns_and_slots(run)[0], reads.weights_of(run) + reads.cache_of(run)
    lines = [
        f"{'decode':<17} in each of {turns} turns weights and the whole cache would be "
        f"{size / GIB:.3f} GiB of HBM a device"
    ]
    for one in found:
        if one.name in STEP and (it := decode(run, one.loops)) is not None:
            to = f" ({it.least / GIB:.3f} at the least)" if it.least < 0.99 * it.moved else ""
            lines.append(
                f"  {one.name:<15} reads and writes {it.moved / GIB:.3f} GiB a turn{to}, "
                f"{it.of_all:.2f} times that; {it.of_live:.2f} times weights and what the cache "
                "holds on average"
            )
            most = one.loops[0].parts[:4]
    if len(lines) > 1:
        lines += [f"{'':<18}{n / GIB:.3f} GiB {what}" for n, what in most]
    return lines


def sent_told(run: abstract.Run, one: Compiled) -> str:
    """ "; 1.18 times the least" of the collectives of a phase; "" where it needs or has none."""
    total, least = sum(one.sent.values()), sent(run, one.name)
    if min(total, least) < 2**20:
        return ""
    return f"; {total / least:.2f} times the {least / GIB:.3f} GiB that the sharding asks for"


def sent(run: abstract.Run, name: str) -> float:
    """Bytes that one device receives in a phase, at the least that its shardings ask for.

    Weights that lie over "fsdp" come in whole where they are used: once for a rollout, once for a
    microbatch that is scored or learnt from, and once more for the backward pass; the gradient goes
    out as often, in the dtype of the computation. Replicas add their gradients once an update. Over
    "tensor" two sums a layer, and one of the embedding or of the head, of each position's state, in
    either direction. As in `collectives.sent` an array counts as it is when it has arrived. Norms,
    ids, statistics and the heads that a loss over the vocabulary asks for are left out.
    """
    if name == "fused":
        return sum(sent(run, other) for other in STEP[:3])
    stages = {"generate": _generate, "score": _score, "update": _update, "evaluate": _evaluate}
    return stages[name](run)


def _generate(run: abstract.Run) -> float:
    made = run.recipe
    if made.source == "data":
        return 0
    dtype = reads.sampling_dtype(made, "weights")
    return sum(
        _gathered(made.mesh, decoder, dtype) + _sums(made.mesh, decoder, rows * (run.length - 1))
        for decoder, rows, _ in reads.writers(run)
    )


def _evaluate(run: abstract.Run) -> float:
    if (one := evaluated.largest(run)) is None:
        return 0
    made, length = run.recipe, one.n_prompt + run.recipe.completion_length
    tokens = one.n_rows * (length - 1)
    return _gathered(made.mesh, one.decoder) + _sums(made.mesh, one.decoder, tokens)


def _score(run: abstract.Run) -> float:
    made, total = run.recipe, 0.0
    microbatch = sum(made.group_rows) // made.pieces
    judged = [] if not made.objective.needs_reference else [(made.reference, sum(made.group_rows))]
    for routes in made.routes if made.objective.needs_teacher else ():
        judged += [(made.teachers[i], n) for i, n in streamed.rows_of(made, routes).items()]
    for decoder, rows in judged:
        total += -(-rows // microbatch) * _gathered(made.mesh, decoder)
        total += _sums(made.mesh, decoder, rows * run.length)
    return total


def _update(run: abstract.Run) -> float:
    made, decoder = run.recipe, run.recipe.student
    passes, tokens = made.pieces * made.epochs, sum(made.group_rows) * run.length
    weights, trained = _gathered(made.mesh, decoder), abstract.state(run).params
    gradient = weights
    if run.frozen.base is not None:  # adapters alone
        size = np.dtype(decoder.dtype).itemsize
        gradient = size * sum(x.size for x in jax.tree.leaves(trained)) if weights else 0
    total = passes * (2 * weights + gradient)
    total += 2 * made.epochs * _sums(made.mesh, decoder, tokens)
    if sharding.n_parts(made.mesh)[0] > 1:
        total += made.updates * made.epochs * phases.bytes_of(trained)
    if made.prescored:
        total += made.pieces * weights + _sums(made.mesh, decoder, tokens)
    return total


def _gathered(mesh, decoder, dtype: str | None = None) -> int:
    """A model's weights as they come in from the devices of "fsdp"; dtype: as in weights_read."""
    return reads.weights_read(mesh, decoder, dtype) if sharding.n_parts(mesh)[1] > 1 else 0


def _sums(mesh, decoder, tokens: int) -> float:
    """Of a forward pass over the tokens of all rows, what is added over "tensor".

    Over "sequence" a device has some of the positions, or some more of the rows where it decodes.
    """
    cfg = lora.base_config(decoder.cfg)
    state = cfg.hidden_size * np.dtype(decoder.dtype).itemsize
    if sharding.n_parts(mesh)[2] == 1:
        return 0
    shards = sharding.n_row_shards(mesh) * sharding.parts(mesh, "length")
    return (2 * cfg.num_hidden_layers + 1) * tokens * state / shards
