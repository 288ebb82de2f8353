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
from jax.experimental import mesh_utils, multihost_utils
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
_WITHIN_ROWS = (*(rule for rule in _SHARED if rule[0] != "batch"), ("batch", None), ("embed", None))


def make_mesh(data: int | None, fsdp: int, tensor: int, *, slices: int = 1, devices=None) -> Mesh:
    """A (data, fsdp, tensor) mesh over `devices` (None: all); data None takes what is left.

    slices: outermost parts of the data axis, each with devices of one TPU slice, so that within a
    slice parameters are whole and what is summed over rows alone crosses the network between
    slices. ValueError where the axes do not multiply to the number of devices or slices do not
    divide "data".
    """
    devices = jax.devices() if devices is None else list(devices)
    n_devices = len(devices)
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
    if data % slices:
        raise ValueError(
            f"mesh.slices = {slices} does not divide mesh.data = {data} (of all slices): replicas "
            f"alone lie across slices, so fsdp * tensor = {fsdp * tensor} has to divide the "
            f"devices of one; lower them, or set --config.mesh.slices=1"
        )
    shape = data // slices, fsdp, tensor
    grid = np.concatenate([_laid_out(shape, group) for group in _by_slice(devices, slices)])
    # Auto: Linen's logical constraints are no-ops or errors on the Explicit axes of make_mesh.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid_out(shape: tuple[int, ...], devices: list) -> np.ndarray:
    """The devices of one slice as an array of that shape, neighbours by their links on a TPU.

    Not jax.make_mesh elsewhere: it has no order for GPUs but theirs, and refuses several hosts.
    """
    if devices[0].platform == "tpu":
        # Axes may part a ring of links: jax.make_mesh allows that on v5e alone, and refuses 32 x 8
        # of 16 x 16 elsewhere.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return np.array(devices, dtype=object).reshape(shape)


def _by_slice(devices: list, slices: int) -> list[list]:
    """The devices of each slice: as the platform tells, else equal runs of them in their order.

    ValueError where the platform tells of another number of slices, or of unequal ones.
    """
    known = _slice_indices(devices)
    if known is None:
        size = len(devices) // slices
        return [devices[i * size : (i + 1) * size] for i in range(slices)]
    groups = [[d for d, i in zip(devices, known) if i == one] for one in sorted({*known})]
    if len(groups) != slices:
        raise ValueError(
            f"mesh.slices = {slices} and the devices lie on {len(groups)} slices; set "
            f"--config.mesh.slices={len(groups)} (a plan names them: --topology=2xv5e:4x4)"
        )
    if len(sizes := {len(group) for group in groups}) > 1:
        raise ValueError(f"slices have {sorted(sizes)} devices; give each the same number")
    return groups


def _slice_indices(devices: list) -> list[int] | None:
    """The slice of each device; None where the platform has none.

    A GPU's slice_index is its host or its NVLink domain, over which parameters may be sharded. A
    topology of one slice, for compiling, leaves it out.
    """
    if devices[0].platform != "tpu":
        return None
    return [getattr(device, "slice_index", 0) for device in devices]


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


def narrowed(layout: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """The layout, for an array that has a single place along some of its axes."""
    spec = (*layout.spec, *(None,) * (len(shape) - len(layout.spec)))
    spec = (axis if size > 1 else None for axis, size in zip(spec, shape))
    return NamedSharding(layout.mesh, P(*spec))


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


def n_parts(mesh: Mesh) -> tuple[int, int, int]:
    """(replicas, parts of a replica's weights that meet for every use, parts that never do)."""
    return mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"]


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


def in_turn(tree):
    """The tree, waited for where two programs must not be under way at the same time.

    CPUs of several processes run what is dispatched in any order: two programs whose collectives
    meet the other way round on another process would wait for each other for ever.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(tree)
    return tree


def over_rows(function, weights, rows):
    """function(weights, rows), each row shard by itself; inside a jit.

    Weights are gathered along the row axes once, before, and their gradient is added over them
    once, after, however often the function uses them; left to the partitioner, a loop inside would
    do both in every turn. Other axes of the mesh stay the partitioner's. function keeps axis 0 of
    rows and asks nothing of other rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in ROWS):
        return function(weights, rows)

    def one(weights, rows):
        # Marked as differing between shards, or each use's gradient would be added on its own.
        weights = jax.tree.map(lambda x: jax.lax.pcast(x, ROWS, to="varying"), weights)
        with nn.logical_axis_rules(_WITHIN_ROWS):
            return function(weights, rows)

    specs = P(), P(ROWS)
    mapped = jax.shard_map(one, in_specs=specs, out_specs=P(ROWS), axis_names={*ROWS})
    return mapped(weights, rows)


def constrain_rows(tree):
    """Inside a jit: hold every array of the tree to row sharding."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(ROWS)), tree)
