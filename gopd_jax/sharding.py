"""The mesh, and which logical axis of an array lies on which of its axes.

The only file that names mesh axes. Parameters and optimizer state are sharded by the TRAIN rules;
the rollout uses a copy of the student in the DECODE layout, gathered once, because a weight that
is sharded over "fsdp" would otherwise be gathered again for each token.
"""

from __future__ import annotations

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

_SHARED = (
    ("batch", ROWS),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", "tensor"),
    ("vocab", "tensor"),
)
TRAIN = (*_SHARED, ("embed", "fsdp"))
DECODE = (*_SHARED, ("embed", None))


def make_mesh(data: int | None, fsdp: int, tensor: int, *, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (None: all); data None takes what is left.

    ValueError where the axes do not multiply to the number of devices.
    """
    n_devices = jax.device_count() if devices is None else len(devices)
    if data is None:
        if n_devices % (fsdp * tensor):
            raise ValueError(
                f"mesh.fsdp * mesh.tensor = {fsdp} * {tensor} does not divide the {n_devices} "
                "devices; choose factors of it"
            )
        data = n_devices // (fsdp * tensor)
    if data * fsdp * tensor != n_devices:
        raise ValueError(
            f"mesh data * fsdp * tensor = {data} * {fsdp} * {tensor} = {data * fsdp * tensor} and "
            f"there are {n_devices} devices; leave mesh.data unset to take what the others leave"
        )
    # Auto: Linen's logical constraints are no-ops or errors on the Explicit axes of make_mesh.
    auto = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=auto, devices=devices)


@contextlib.contextmanager
def use(mesh: Mesh, rules=TRAIN):
    """Trace inside this: the mesh for constraints, the rules for logical names."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def shardings(mesh: Mesh, logical_axes, rules=TRAIN):
    """NamedShardings for a tree of tuples of logical names."""
    table = dict(rules)
    return jax.tree.map(
        lambda names: NamedSharding(mesh, P(*(table.get(name) for name in names))),
        logical_axes,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def on_host(tree):
    """The same NamedShardings, in the memory of the devices' hosts."""
    return jax.tree.map(lambda where: where.with_memory_kind("pinned_host"), tree)


def mesh_problems(mesh: Mesh, abstract_params, logical_axes, *, role: str) -> list[str]:
    """Dimensions of a model that the mesh does not divide, by parameter."""
    found: dict[str, str] = {}
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params)
    specs = jax.tree.leaves(shardings(mesh, logical_axes), is_leaf=lambda s: hasattr(s, "spec"))
    names = jax.tree.leaves(logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    for (_, leaf), sharding, logical in zip(leaves, specs, names):
        for size, axis, name in zip(leaf.shape, sharding.spec, logical):
            if axis is not None and size % mesh.shape[axis]:
                found[name] = (
                    f"{role} has {size} along {name!r}, which mesh.{axis} = {mesh.shape[axis]} "
                    f"does not divide; choose a divisor of {size}"
                )
    return list(found.values())


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Axis 0 over the data and fsdp axes: every array of a batch."""
    return NamedSharding(mesh, P(ROWS))


def n_row_shards(mesh: Mesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]


def require_rows(mesh: Mesh, n_rows: int) -> int:
    """Rows of each shard. ValueError where the rows do not divide over the mesh."""
    if n_rows % n_row_shards(mesh):
        raise ValueError(
            f"{n_rows} rows (batch.prompts * batch.rollouts) do not divide over mesh.data * "
            f"mesh.fsdp = {mesh.shape['data']} * {mesh.shape['fsdp']}"
        )
    return n_rows // n_row_shards(mesh)


def process_share(mesh: Mesh, n_rows: int) -> tuple[int, int]:
    """(i, n): this process feeds the i-th of n equal runs of rows.

    ValueError where the rows do not divide over the mesh.
    """
    require_rows(mesh, n_rows)
    spans = by_rows(mesh).addressable_devices_indices_map((n_rows,)).values()
    starts = sorted({span[0].start or 0 for span in spans})
    stops = sorted({n_rows if span[0].stop is None else span[0].stop for span in spans})
    size = stops[-1] - starts[0]
    if n_rows % size or starts[0] % size or size != len(starts) * (stops[0] - starts[0]):
        raise ValueError("this process's devices do not hold one run of rows: reorder the mesh")
    return starts[0] // size, n_rows // size


def to_global(mesh: Mesh, rows):
    """A tree of this process's rows (NumPy, axis 0) -> global arrays sharded by rows."""
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(by_rows(mesh), np.asarray(x)), rows
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
    return jax.jit(jnp.max, out_shardings=replicated(everyone))(n_D)


def constrain_rows(tree):
    """Inside a jit: hold every array of the tree to row sharding."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(ROWS)), tree)
