"""The mesh, and which logical axis of an array lies on which of its axes.

The only file that names mesh axes. Parameters and optimizer state are sharded by the TRAIN rules;
the rollout uses a copy of the student in the DECODE layout, gathered once, because a weight that
is sharded over "fsdp" would otherwise be gathered again for each token. A token that is decoded has
one position, so there the devices of "sequence" hold other rows.
"""

from __future__ import annotations

import contextlib
import math
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gopd_jax.slices import by_slice

AXES = ("data", "fsdp", "expert", "sequence", "tensor")
_SELDOM = ("expert", "sequence")  # those that are only told of where they are used
# Those that `plan --search` chooses.
SEARCHED = tuple(axis for axis in AXES if axis not in _SELDOM)
ROWS = ("data", "fsdp", "expert")
DECODE_ROWS = (*ROWS, "sequence")  # while tokens are decoded
EXPERTS = ("expert", "tensor")
# Of parameters and what belongs to them: devices that share a row need no copies of their own.
WEIGHTS = ("fsdp", "sequence")

_SHARED = (
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("experts", EXPERTS),
    ("vocab", "tensor"),
)
TRAIN = (("batch", ROWS), ("length", "sequence"), *_SHARED, ("embed", WEIGHTS))
DECODE = (("batch", DECODE_ROWS), ("length", None), *_SHARED, ("embed", None))


def make_mesh(
    data: int | None,
    fsdp: int,
    tensor: int,
    *,
    expert: int = 1,
    sequence: int = 1,
    slices: int = 1,
    devices=None,
) -> Mesh:
    """A mesh of AXES over `devices` (None: all); data None takes what is left.

    slices: outermost parts of the data axis, each with devices of one TPU slice, so that within a
    slice parameters are whole and what is summed over rows alone crosses the network between
    slices. ValueError where the axes do not multiply to the number of devices or slices do not
    divide "data".
    """
    devices = _all_devices() if devices is None else list(devices)
    n_devices = len(devices)
    sizes = dict(zip(AXES, (data, fsdp, expert, sequence, tensor)))
    others = _used({axis: size for axis, size in sizes.items() if axis != "data"})
    n_others = math.prod(others.values())
    if data is None:
        if n_devices % n_others:
            raise ValueError(
                f"{_product(others)} does not divide the {n_devices} devices; choose factors of it"
            )
        sizes["data"] = data = n_devices // n_others
    if data * n_others != n_devices:
        raise ValueError(
            f"{_product({'data': data} | others)} = {data * n_others} and there are {n_devices} "
            "devices; leave mesh.data unset to take what the others leave"
        )
    if data % slices:
        raise ValueError(
            f"mesh.slices = {slices} does not divide mesh.data = {data} (of all slices): replicas "
            f"alone lie across slices, so {_names(others)} = {n_others} has to divide the "
            f"devices of one; lower them, or set --config.mesh.slices=1"
        )
    sizes["data"] = data // slices
    grid = np.concatenate([_laid_out(sizes, group) for group in by_slice(devices, slices)])
    # Auto: Linen's logical constraints are no-ops or errors on the Explicit axes of make_mesh.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _all_devices() -> list:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where a plug-in is missing
        platforms = os.environ.get("JAX_PLATFORMS") or "unset"
        said = f" ({str(error).splitlines()[0]})" if str(error) else ""
        raise ValueError(
            f"JAX has no device where JAX_PLATFORMS is {platforms}{said}; unset it, or install "
            "jax[tpu] or jax[cuda13] on a machine that has one"
        ) from error


def shape(mesh: Mesh) -> dict[str, int]:
    """Size of each axis, as it is told: without those that few runs use, where they have 1."""
    return _used(dict(mesh.shape))


def searched(mesh: Mesh) -> tuple[int, ...]:
    """Sizes of SEARCHED."""
    return tuple(mesh.shape[axis] for axis in SEARCHED)


def parts(mesh: Mesh, name: str, rules=TRAIN) -> int:
    """Among how many devices a logical axis is divided."""
    axes = dict(rules)[name] or ()
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def _used(sizes: dict[str, int]) -> dict[str, int]:
    return {axis: size for axis, size in sizes.items() if size != 1 or axis not in _SELDOM}


def _product(sizes: dict[str, int]) -> str:
    """ "mesh.fsdp * mesh.tensor = 2 * 4"."""
    return f"{_names(sizes)} = {' * '.join(map(str, sizes.values()))}"


def _names(sizes: dict[str, int]) -> str:
    return " * ".join(f"mesh.{axis}" for axis in sizes)


def _laid_out(sizes: dict[str, int], devices: list) -> np.ndarray:
    """The devices of one slice as an array of AXES, neighbours by their links on a TPU.

    On others in their own order, as jax has none for them.
    """
    grid = np.array(devices, dtype=object)
    if devices[0].platform == "tpu":
        # An axis may take part of a torus, which jax.make_mesh refuses but on v5e.
        used = tuple(_used(sizes).values())
        grid = mesh_utils.create_device_mesh(used, devices, allow_split_physical_axes=True)
    return grid.reshape(tuple(sizes.values()))


@contextlib.contextmanager
def use(mesh: Mesh, rules=TRAIN):
    """Trace inside this: the mesh for constraints, the rules for logical names."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def decoding():
    """Trace inside this what decodes tokens: the rules of the copy that batching.decode_copy makes.

    Rows that go in lie as `constrain_decode_rows` puts them.
    """
    return nn.logical_axis_rules(DECODE)


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
            axes = (axis,) if isinstance(axis, str) else axis or ()
            if name == "heads":  # which attention hands around for positions
                axes = ("sequence", *axes)
            of = _used({one: mesh.shape[one] for one in axes})
            if size % math.prod(of.values()):
                found[name] = (
                    f"{role} has {size} along {name!r}, which {_product(of)} "
                    f"does not divide; choose a divisor of {size}"
                )
    return list(found.values())


def require_experts(mesh: Mesh, *, routed: bool) -> None:
    """ValueError where the mesh has devices for experts, and no model has routed experts."""
    if (n := mesh.shape["expert"]) > 1 and not routed:
        raise ValueError(
            f"mesh.expert = {n}, and no model has routed experts: its devices would hold other "
            f"rows and the same weights; leave mesh.expert at 1 and multiply mesh.fsdp by {n}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
    """Axis 0 over ROWS: every array of a batch, but while tokens are decoded."""
    return NamedSharding(mesh, P(ROWS))


def by_positions(mesh: Mesh) -> NamedSharding:
    """Axis 0 as `by_rows`, axis 1 over "sequence": hidden states, too large to be whole."""
    return NamedSharding(mesh, P(ROWS, "sequence"))


def n_row_shards(mesh: Mesh) -> int:
    return parts(mesh, "batch")


def n_decode_shards(mesh: Mesh) -> int:
    """Runs of rows while tokens are decoded; a multiple of n_row_shards."""
    return parts(mesh, "batch", DECODE)


def told_shards(mesh: Mesh, axes: tuple[str, ...] = ROWS) -> str:
    """ "mesh.data * mesh.fsdp = 2 * 4", for sentences about rows."""
    return _product(_used({axis: mesh.shape[axis] for axis in axes}))


def n_parts(mesh: Mesh) -> tuple[int, int, int]:
    """(replicas, parts of a replica's weights that meet for every use, parts that never do)."""
    return mesh.shape["data"], parts(mesh, "embed"), parts(mesh, "vocab")


def require_rows(mesh: Mesh, n_rows: int) -> int:
    """Rows that a device decodes. ValueError where the rows do not divide over the mesh."""
    if n_rows % n_decode_shards(mesh):
        decoded = ", over which tokens are decoded" if mesh.shape["sequence"] > 1 else ""
        raise ValueError(
            f"{n_rows} rows (batch.prompts * batch.rollouts) do not divide over "
            f"{told_shards(mesh, DECODE_ROWS)}{decoded}"
        )
    return n_rows // n_decode_shards(mesh)


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


def over_shards(function, weights, positions, rows, *, apart: bool = True):
    """Inside a jit: function(weights, positions, rows), each shard of rows and positions by itself.

    positions: a tree of [B, C, ...]; rows: of [B, ...]; function gives a tree of [B, C] for what it
    is given of them, and asks nothing of other rows (apart False: may ask for those of all shards)
    or positions. Weights are gathered along these axes once, before, and their gradient is added
    over them once, after, however often the function uses them; left to the partitioner, a loop
    inside would do both in every turn. Other axes of the mesh stay the partitioner's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else mesh.shape
    n = sizes.get("sequence", 1)
    axes = ROWS if apart and any(sizes.get(axis, 1) > 1 for axis in ROWS) else ()
    of_rows = axes or None
    rules = dict(TRAIN) | {"batch": None if axes else ROWS, "length": None, "embed": None}
    if n > 1:
        axes = (*axes, "sequence")
    if not axes:
        return function(weights, positions, rows)

    def one(weights, positions, rows):
        # Marked as differing between shards, or each use's gradient would be added on its own.
        weights = jax.tree.map(lambda x: jax.lax.pcast(x, axes, to="varying"), weights)
        with nn.logical_axis_rules((*rules.items(),)):
            return function(weights, positions, rows)

    here = P(of_rows) if n == 1 else P(of_rows, "sequence")
    specs = P(), here, P(of_rows)
    mapped = jax.shard_map(one, in_specs=specs, out_specs=here, axis_names={*axes})
    if n == 1:
        return mapped(weights, positions, rows)
    length = jax.tree.leaves(positions)[0].shape[1]

    def filled(x):  # shard_map wants equal shares of positions
        return jnp.pad(x, ((0, 0), (0, -length % n), *((0, 0),) * (x.ndim - 2)))

    found = mapped(weights, jax.tree.map(filled, positions), rows)
    # A number a position is small: whole rows of them, for what sums along a row.
    return constrain_rows(jax.tree.map(lambda x: x[:, :length], found))


def rows_apart(function, *arrays):
    """Inside a jit, and inside of `over_shards`: function(*arrays), a tree of [B, ...] of such
    arrays, each shard of rows by itself if it is not alone with them already.

    For what picks single ids out of distributions: XLA's partitioner ends the process where rows,
    positions and ids of what is picked from lie on three axes and it has to divide the rows itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = {} if mesh.empty else mesh.shape
    left = [axis for axis in ROWS if sizes.get(axis, 1) > 1 and axis not in mesh.manual_axes]
    if not left or sizes["sequence"] == 1:
        return function(*arrays)
    # What the backward pass needs is made again there: JAX lays out such residuals of a shard_map
    # within another one wrongly.
    kept = jax.checkpoint(function)
    return jax.shard_map(kept, in_specs=P(ROWS), out_specs=P(ROWS), axis_names={*ROWS})(*arrays)


def constrain_rows(tree):
    """Inside a jit: hold every array of the tree to row sharding."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(ROWS)), tree)


def constrain_positions(tree):
    """Inside a jit: hold every array [B, L, ...] to sharding by rows and positions."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(ROWS, "sequence")), tree)


def constrain_decode_rows(mesh: Mesh, tree):
    """Inside a jit: rows over all devices that decode; nothing where they lie so in training."""
    if mesh.shape["sequence"] == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(DECODE_ROWS)), tree)
