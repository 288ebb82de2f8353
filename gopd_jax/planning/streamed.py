"""Frozen models in host memory: what of them is there, on the device at one time, and on the way.

Bytes of one device's shards. As `batching.resident` and the decoder have it: a model is brought in
whole; by layer all but its stacks of matrices is, and of these one layer after another.
"""

from __future__ import annotations

import math

import jax

from gopd_jax import batching, method, problems, sharding, step
from gopd_jax import config as settings
from gopd_jax.models import decoder as lm
from gopd_jax.planning import abstract
from gopd_jax.recipe import Recipe

HOST = "pinned_host"


def shard_bytes(x) -> int:
    """Bytes of one device's shard of an abstract array, wherever it lies."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def there(tree) -> int:
    """Bytes that lie in host memory."""
    return sum(shard_bytes(x) for x in jax.tree.leaves(tree) if x.sharding.memory_kind == HOST)


def at_once(decoder, params) -> int:
    """Bytes on the device while the model is at work: by layer, of its stacks two layers.

    The next layer comes in beside the work of this one.
    """
    whole, stacks = _parts(decoder, params)
    return whole + 2 * stacks // decoder.cfg.num_hidden_layers


def brought(run: abstract.Run, name: str) -> tuple[int, int]:
    """(before a model's work, beside it): bytes that a phase brings in, each as often as it does.

    Layers come in anew for each microbatch, a whole model once.
    """
    made, frozen = run.recipe, run.frozen
    before = beside = 0
    if name in ("generate", "fused") and made.source == "teacher":
        (routes,) = made.routes
        before += sum(there(frozen.teachers[i]) for i in {*routes})
    if name in ("score", "fused"):
        for decoder, params, n_rows in _judges(run):
            whole, stacks = _parts(decoder, params)
            before += whole
            beside += stacks * step.judging_turns(made, n_rows)
    if name in ("update", "fused") and made.needs_vocabulary:
        used = [*zip(made.teachers, frozen.teachers)] if made.objective.needs_teacher else []
        used += [(made.reference, frozen.reference)] if made.objective.needs_reference else []
        before += sum(there(lm.head_params(*one)) for one in used if one[1] is not None)
    return before, beside


def moved(c: settings.Config, placement: str) -> dict:
    """Settings under which the frozen models lie there, of those that lie nearer to the device."""
    order = problems.PLACEMENTS
    moved = {
        f"{role}.placement": placement
        for role, model in method.roles(c).items()
        if role != "student" and model.follows is None
        if order.index(model.placement) < order.index(placement)
    }
    teachers = any(key.startswith("teachers.") for key in moved)
    if teachers and placement == "host_layers" and c.evaluation.teachers:
        moved["evaluation.teachers"] = False  # a model by layer is too slow a writer
    return moved


def rows_of(made: Recipe, routes: tuple[int, ...]) -> dict[int, int]:
    """Index of a teacher -> rows of a batch that `routes`, one of Recipe.routes, gives it."""
    return {i: sum(n for j, n in zip(routes, made.group_rows) if i == j) for i in sorted({*routes})}


def _judges(run: abstract.Run):
    """(decoder, params, rows) of each time that a frozen model scores."""
    made, frozen = run.recipe, run.frozen
    shards = sharding.n_row_shards(made.mesh)
    if made.objective.needs_teacher:
        for routes in made.routes:
            for i, rows in rows_of(made, routes).items():
                yield made.teachers[i], frozen.teachers[i], -(-rows // shards) * shards
    if made.objective.needs_reference:
        yield made.reference, frozen.reference, sum(made.group_rows)


def _parts(decoder, params) -> tuple[int, int]:
    """(bytes that come in whole, bytes of the stacks that come in by layer)."""
    whole = stacks = 0
    by_layer = batching.stacks_by_layer(decoder)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if x.sharding.memory_kind != HOST:
            continue
        if jax.tree_util.keystr(path, simple=True, separator="/") in by_layer:
            stacks += shard_bytes(x)
        else:
            whole += shard_bytes(x)
    return whole, stacks
