"""The key/value cache of decoding: a ring of slots that all rows write at one place.

Every row's next token goes to the same slot, `index`, whatever the row's length, so that an append
is one contiguous write. A row that ends may give its place to another prompt in the middle of the
loop: the prompt takes the slots before `index`, wherever that stands, and where it came from does
not show, because keys carry their positions (rope) and a slot that holds none of the row's tokens
is not valid.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from gopd_jax.models.ops import constrain
from gopd_jax.types import Array


@struct.dataclass
class Cache:
    """Keys and values of each row's tokens so far.

    k_NBKLE, v_NBKLE after rope, in the decoder's dtype; valid_BL bool, slots that hold a token of
    the row; position_BL int32, its rope position; next_B int32, that of the row's next token;
    index int32, appends so far and the prompt's length: the next one goes to slot index % L.
    """

    k_NBKLE: Array
    v_NBKLE: Array
    valid_BL: Array
    position_BL: Array
    next_B: Array
    index: Array


def filled(kv, valid_BP, position_BP, *, length: int) -> Cache:
    """A cache of `length` slots with prompts in the first P. kv: (k_NBKPE, v_NBKPE)."""
    room = length - valid_BP.shape[1]
    kv = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0))) for x in kv]
    k_NBKLE, v_NBKLE = (constrain(x, None, "batch", "kv_heads", "length", None) for x in kv)
    return Cache(
        k_NBKLE=k_NBKLE,
        v_NBKLE=v_NBKLE,
        valid_BL=jnp.pad(valid_BP, ((0, 0), (0, room))),
        position_BL=jnp.pad(position_BP, ((0, 0), (0, room))),
        next_B=position_BP[:, -1] + 1,
        index=jnp.int32(valid_BP.shape[1]),
    )


def append(cache: Cache, kv) -> Cache:
    """The cache with one token more in every row. kv: (k_NBK1E, v_NBK1E) of them."""
    slot = cache.index % cache.valid_BL.shape[1]
    start = (0, 0, 0, slot, 0)
    past = cache.k_NBKLE, cache.v_NBKLE
    k_NBKLE, v_NBKLE = (jax.lax.dynamic_update_slice(c, x, start) for c, x in zip(past, kv))
    here_L = jnp.arange(cache.valid_BL.shape[1]) == slot
    return Cache(
        k_NBKLE=k_NBKLE,
        v_NBKLE=v_NBKLE,
        valid_BL=cache.valid_BL | here_L,
        position_BL=jnp.where(here_L, cache.next_B[:, None], cache.position_BL),
        next_B=cache.next_B + 1,
        index=cache.index + 1,
    )


def admit(cache: Cache, kv, valid_BP, position_BP, taken_B) -> Cache:
    """The cache with new prompts in the rows of taken_B, and nothing else of these rows' past.

    kv: a function of a prompt's position p: (k_NBK1E, v_NBK1E) there. They are written a position
    at a time, in place: as one block, turned round the ring, they would be as large as the cache.
    """
    n_prompt, n_slots = valid_BP.shape[1], cache.valid_BL.shape[1]
    first = cache.index - n_prompt

    def write(p, caches):
        start = (0, 0, 0, (first + p) % n_slots, 0)

        def put(c, x):
            shape = (*c.shape[:3], 1, c.shape[4])
            old = jax.lax.dynamic_slice(c, start, shape)
            new = jnp.where(taken_B[None, :, None, None, None], x, old)
            return jax.lax.dynamic_update_slice(c, new, start)

        return tuple(put(c, x) for c, x in zip(caches, kv(p)))

    caches = cache.k_NBKLE, cache.v_NBKLE
    k_NBKLE, v_NBKLE = jax.lax.fori_loop(0, n_prompt, write, caches)
    # Slot l holds position (l - first) of the prompt, where it has one.
    of_L = (jnp.arange(n_slots) - first) % n_slots
    within_L = of_L < n_prompt
    of_L = jnp.minimum(of_L, n_prompt - 1)
    taken_B1 = taken_B[:, None]
    return Cache(
        k_NBKLE=k_NBKLE,
        v_NBKLE=v_NBKLE,
        valid_BL=jnp.where(taken_B1, valid_BP[:, of_L] & within_L, cache.valid_BL),
        position_BL=jnp.where(taken_B1, position_BP[:, of_L], cache.position_BL),
        next_B=jnp.where(taken_B, position_BP[:, -1] + 1, cache.next_B),
        index=cache.index,
    )
