"""What a turn of decoding is about: who writes, from which weights, how much of which cache."""

from __future__ import annotations

import math

import jax

from gopd_jax import sharding
from gopd_jax.models import lora, quantized
from gopd_jax.models.cache import widths
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import abstract_params, logical_axes
from gopd_jax.planning import abstract, streamed
from gopd_jax.recipe import Recipe


def turns_and_slots(run: abstract.Run) -> tuple[int, float, float]:
    """(turns of the loop, slots of the cache read in the mean of them, slots filled in the mean).

    Every row runs to its full length. A turn reads the width that holds what is there.
    """
    made, turns = run.recipe, run.recipe.completion_length - 1
    for _, n_rows, at_once in writers(run):
        if at_once < n_rows:
            turns = -(-n_rows * made.completion_length // at_once)
    sizes = widths(run.length, made.sampling_buckets)
    filled = [min(run.n_prompt + i, run.length) for i in range(max(turns, 1))]
    read = sum(next(w for w in sizes if w >= n) for n in filled)
    return turns, read / len(filled), sum(filled) / len(filled)


def decode_reads(run: abstract.Run) -> tuple[int, int]:
    """(turns of the loop where every row runs to its full length, bytes of HBM that one reads).

    Weights in decode layout once, without an embedding that is only looked up in; of the cache as
    many slots as the width that holds what is there, in the mean over the turns.
    """
    turns, slots, _ = turns_and_slots(run)
    return turns, weights_of(run) + round(cache_of(run) * slots / run.length)


def weights_of(run: abstract.Run) -> int:
    """Bytes of the writers' weights as a token reads them, of one device."""
    dtype = sampling_dtype(run.recipe, "weights")
    return sum(weights_read(run.recipe.mesh, decoder, dtype) for decoder, *_ in writers(run))


def cache_of(run: abstract.Run) -> int:
    """Bytes of the writers' whole caches, of one device."""
    made, dtype = run.recipe, sampling_dtype(run.recipe, "cache")
    each = writers(run)
    return sum(cache_bytes(made.mesh, one, at_once, run.length, dtype) for one, _, at_once in each)


def sampling_dtype(made: Recipe, what: str) -> str | None:
    """The 8 bits in which the rollout keeps its weights or its cache; None: the decoder's dtype."""
    if made.source != "student":
        return None
    return made.sampling_dtype if what == "weights" else made.cache_dtype


def writers(run: abstract.Run) -> list[tuple[Decoder, int, int]]:
    """(who writes completions, of how many rows, of how many at one time), one after another."""
    made = run.recipe
    each = [(made.student, sum(made.group_rows))]
    if made.source == "teacher":
        (routes,) = made.routes
        each = [(made.teachers[i], n) for i, n in streamed.rows_of(made, routes).items()]
    return [(decoder, n, min(n, made.slots or n)) for decoder, n in each]


def cache_bytes(mesh, decoder, n_rows: int, length: int, dtype: str | None = None) -> int:
    """Keys and values of one device's rows and heads, of 8 bits with a float32 scale a token."""
    cfg, shards = decoder.cfg, sharding.n_decode_shards(mesh)
    n_rows = -(-n_rows // shards) * shards
    names = {"cache": (None, "batch", "kv_heads", None, None)}
    layout = sharding.shardings(mesh, names, sharding.DECODE)["cache"]
    shape = cfg.num_hidden_layers, n_rows, cfg.num_key_value_heads, length, cfg.head_dim
    numbers = 2 * math.prod(layout.shard_shape(shape))
    if dtype is None:
        return numbers * jax.numpy.dtype(decoder.dtype).itemsize
    return numbers + 4 * numbers // cfg.head_dim


def weights_read(mesh, decoder, dtype: str | None = None) -> int:
    """Bytes of one device's weights in decode layout, as a token reads them."""
    cfg = lora.base_config(decoder.cfg)
    shapes, axes = abstract_params(cfg), logical_axes(cfg)
    if dtype is not None:
        shapes = jax.eval_shape(lambda params: quantized.matrices(params, cfg, dtype), shapes)
    if not cfg.tie_word_embeddings:
        shapes, axes = ({k: x for k, x in tree.items() if k != "embed"} for tree in (shapes, axes))
    layout = sharding.shardings(mesh, axes, sharding.DECODE)

    def size(where, x):
        if isinstance(x, quantized.Quantized):
            return math.prod(where.shard_shape(x.values.shape)) + 4 * x.scale.size
        return math.prod(where.shard_shape(x.shape)) * jax.numpy.dtype(decoder.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(size, layout, shapes)))
