"""What the processes of a run do together besides stepping, and global arrays to and from hosts."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gopd_jax import sharding


def shared_work() -> dict:
    """Options for work that the processes divide: share (i, n) of this one, add over all of them.

    Every process has to take part.
    """

    def add(x):
        return multihost_utils.process_allgather(x).reshape(-1, *x.shape).sum(0, dtype=x.dtype)

    return {"share": (jax.process_index(), jax.process_count()), "add": add}


def largest(n: int) -> jax.Array:
    """The largest n of all processes, int32, on each of them; every process has to ask.

    It is computed behind what the devices are at: reading it waits for that, asking does not.
    """
    everyone = Mesh(np.array(jax.devices()), ("everyone",))
    n_D = jax.make_array_from_callback(
        (jax.device_count(),),
        NamedSharding(everyone, P("everyone")),
        lambda _: np.full(1, n, np.int32),
    )
    return jax.jit(jnp.max, out_shardings=NamedSharding(everyone, P()))(n_D)


def agreed(values_B: np.ndarray, share: tuple[int, int]) -> np.ndarray:
    """The least, row by row, of what the processes that hold share (i, n) of the rows found.

    For what a clock may decide, such as a verdict on code: an array that processes hold copies of
    has to be one. Every process has to take part.
    """
    i, n = share
    if n == jax.process_count():  # each has rows of its own
        return values_B
    i_P, values_PB = multihost_utils.process_allgather((np.int32(i), values_B))
    return values_PB[i_P == i].min(0)


def in_turn(tree):
    """The tree, waited for where two programs must not be under way at the same time.

    CPUs of several processes run what is dispatched in any order: two programs whose collectives
    meet the other way round on another process would wait for each other for ever.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def to_global(mesh: Mesh, rows):
    """A tree of this process's rows (NumPy, axis 0) -> global arrays sharded by rows."""
    where = sharding.by_rows(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), rows
    )


def to_host(tree):
    """A tree of global arrays sharded by rows -> this process's rows as NumPy arrays."""

    def rows(x):
        if x.is_fully_addressable:
            return np.asarray(x)
        shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
        return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])

    return jax.tree.map(rows, tree)


def gather(tree):
    """A tree of global arrays sharded by rows -> all rows as NumPy arrays, on every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def whole(tree):
    """A tree of global arrays of any sharding -> NumPy arrays, on every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.tree.map(np.asarray, tree)

    def copy(x):
        everywhere = NamedSharding(x.sharding.mesh, P())
        return np.asarray(jax.device_put(x, everywhere).addressable_data(0))

    return jax.tree.map(copy, tree)
