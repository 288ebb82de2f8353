"""The key/value cache of decoding: a ring of slots that all rows write at one place.

Every row's next token goes to the same slot, `index`, whatever the row's length, so that an append
is one contiguous write. A row that ends may give its place to another prompt in the middle of the
loop: the prompt takes the slots before `index`, wherever that stands, and where it came from does
not show, because keys carry their positions (rope) and a slot that holds none of the row's tokens
is not valid.

Slots are filled from the first on, so that until the ring closes all that is in it stands in the
first `index` slots. Reading is therefore cut to the least of a few static widths that holds them.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from gopd_jax.models.ops import constrain, platform
from gopd_jax.models.quantized import Quantized, quantize
from gopd_jax.types import Array


@struct.dataclass
class Cache:
    """Keys and values of each row's tokens so far.

    k_NBKLE, v_NBKLE after rope, in the decoder's dtype or Quantized token by token; valid_BL bool,
    slots that hold a token of the row; position_BL int32, its rope position; next_B int32, that of
    the row's next token; index int32, appends so far and the prompt's length: the next one goes to
    slot index % L. widths: those up to which slots are read, the last is L. slots: the axis of
    slots in keys and in values; where it is (4, 3), keys are k_NBKEL.
    """

    k_NBKLE: Array | Quantized
    v_NBKLE: Array | Quantized
    valid_BL: Array
    position_BL: Array
    next_B: Array
    index: Array
    widths: tuple[int, ...] = struct.field(pytree_node=False)
    slots: tuple[int, int] = struct.field(pytree_node=False)


def widths(length: int, n: int) -> tuple[int, ...]:
    """n widths, evenly spaced up to `length`."""
    return tuple(sorted({-(-length * k // n) for k in range(1, n + 1)}))


def filled(kv, valid_BP, position_BP, *, length: int, buckets: int, dtype: str | None) -> Cache:
    """A cache of `length` slots with prompts in the first P. kv: (k_NBKPE, v_NBKPE).

    buckets: widths at which it may be read. dtype: of quantized.DTYPES, or None: kv's own.
    """
    room = length - valid_BP.shape[1]
    # A CPU's products want their second factor so: else it turns the keys round for each token,
    # which takes longer than the product. On a TPU a token would be a column in 128 slots' tile.
    slots = (4, 3) if platform() == "cpu" else (3, 3)

    def fill(axis, x):
        x = jnp.pad(x, [(0, room if i == axis else 0) for i in range(x.ndim)])
        names = {1: "batch", 2: "kv_heads", axis: "length"}
        return constrain(x, *(names.get(i) for i in range(x.ndim)))

    k_NBKLE, v_NBKLE = _by_slots(fill, slots, _as_stored(kv, slots, dtype))
    return Cache(
        widths=widths(length, buckets),
        slots=slots,
        k_NBKLE=k_NBKLE,
        v_NBKLE=v_NBKLE,
        valid_BL=jnp.pad(valid_BP, ((0, 0), (0, room))),
        position_BL=jnp.pad(position_BP, ((0, 0), (0, room))),
        next_B=position_BP[:, -1] + 1,
        index=jnp.int32(valid_BP.shape[1]),
    )


def read(cache: Cache, layer, width: int):
    """(k_BKSE, v_BKSE) of a layer in the first `width` slots, each Quantized if it is stored so."""

    def one(axis, x):
        shape = 1, *x.shape[1:axis], width, *x.shape[axis + 1 :]
        return jax.lax.dynamic_slice(x, (layer, 0, 0, 0, 0), shape)[0]

    k, v_BKSE = _by_slots(one, cache.slots, (cache.k_NBKLE, cache.v_NBKLE))
    if cache.slots[0] == 4:
        k = jax.tree.map(lambda x: x.swapaxes(2, 3), k)  # products take it so: nothing is moved
    return k, v_BKSE


def at_width(function, cache: Cache):
    """function(width) of the least of the cache's widths that holds all that is in it."""
    if len(cache.widths) == 1:
        return function(*cache.widths)
    which = (jnp.array(cache.widths[:-1], jnp.int32) < cache.index).sum()
    return jax.lax.switch(which, [functools.partial(function, width) for width in cache.widths])


def append(cache: Cache, kv) -> Cache:
    """The cache with one token more in every row. kv: (k_NBK1E, v_NBK1E) of them."""
    slot = cache.index % cache.valid_BL.shape[1]

    def put(axis, c, x):
        return jax.lax.dynamic_update_slice_in_dim(c, x, slot, axis)

    past = cache.k_NBKLE, cache.v_NBKLE
    new = _as_stored(kv, cache.slots, _dtype(cache))
    k_NBKLE, v_NBKLE = _by_slots(put, cache.slots, past, new)
    here_L = jnp.arange(cache.valid_BL.shape[1]) == slot
    return cache.replace(
        k_NBKLE=k_NBKLE,
        v_NBKLE=v_NBKLE,
        valid_BL=cache.valid_BL | here_L,
        position_BL=jnp.where(here_L, cache.next_B[:, None], cache.position_BL),
        next_B=cache.next_B + 1,
        index=cache.index + 1,
    )


def _by_slots(function, slots: tuple[int, int], *of_kv):
    """(keys, values): function(axis of slots, an array of each) of what keys and values hold."""
    return tuple(
        jax.tree.map(functools.partial(function, axis), *own) for axis, *own in zip(slots, *of_kv)
    )


def _dtype(cache: Cache) -> str | None:
    k = cache.k_NBKLE
    return str(k.values.dtype) if isinstance(k, Quantized) else None


def _as_stored(kv, slots: tuple[int, int], dtype: str | None):
    """(k_NBKLE, v_NBKLE) as a cache with such slots has them, each token in 8 bits if so told."""
    k, v = kv if dtype is None else (quantize(x, dtype, axes=(4,)) for x in kv)
    if slots[0] == 4:
        k = jax.tree.map(lambda x: x.swapaxes(3, 4), k)
    return k, v


def admit(cache: Cache, kv, valid_BP, position_BP, taken_B) -> Cache:
    """The cache with new prompts in the rows of taken_B, and nothing else of these rows' past.

    kv: a function of a prompt's position p: (k_NBK1E, v_NBK1E) there. They are written a position
    at a time, in place: as one block, turned round the ring, they would be as large as the cache.
    """
    n_prompt, n_slots = valid_BP.shape[1], cache.valid_BL.shape[1]
    first = cache.index - n_prompt

    def write(p, caches):
        slot = (first + p) % n_slots

        def put(axis, c, x):
            old = jax.lax.dynamic_slice_in_dim(c, slot, 1, axis)
            new = jnp.where(taken_B[None, :, None, None, None], x, old)
            return jax.lax.dynamic_update_slice_in_dim(c, new, slot, axis)

        new = _as_stored(kv(p), cache.slots, _dtype(cache))
        return _by_slots(put, cache.slots, caches, new)

    caches = cache.k_NBKLE, cache.v_NBKLE
    k_NBKLE, v_NBKLE = jax.lax.fori_loop(0, n_prompt, write, caches)
    # Slot l holds position (l - first) of the prompt, where it has one.
    of_L = (jnp.arange(n_slots) - first) % n_slots
    within_L = of_L < n_prompt
    of_L = jnp.minimum(of_L, n_prompt - 1)
    taken_B1 = taken_B[:, None]
    return cache.replace(
        k_NBKLE=k_NBKLE,
        v_NBKLE=v_NBKLE,
        valid_BL=jnp.where(taken_B1, valid_BP[:, of_L] & within_L, cache.valid_BL),
        position_BL=jnp.where(taken_B1, position_BP[:, of_L], cache.position_BL),
        next_B=jnp.where(taken_B, position_BP[:, -1] + 1, cache.next_B),
    )
