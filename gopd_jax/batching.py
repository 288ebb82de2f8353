"""Inside a jit: rows by teacher and by microbatch, and weights where and as they are wanted."""

import jax
import jax.numpy as jnp
import numpy as np

from gopd_jax import sharding
from gopd_jax.models import quantized
from gopd_jax.models.ops import on_device, on_host
from gopd_jax.models.params import logical_axes, table
from gopd_jax.scoring import state_width


def resident(decoder, params, after=None):
    """params in device memory, brought there from host memory where that is where they lie.

    Of a decoder by layer the stacks of matrices stay where they are: it brings in each layer's.
    after: what has to be computed before, so that no two models from the host are here at once.
    """
    if not any(map(on_host, jax.tree.leaves(params))):
        return params
    params, _ = jax.lax.optimization_barrier((params, after))
    stay, rows = stacks_by_layer(decoder), {row.path: row for row in table(decoder.cfg)}

    def bring(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return x if name in stay else on_device(x, *rows[name].axes)

    return jax.tree_util.tree_map_with_path(bring, params)


def stacks_by_layer(decoder) -> set[str]:
    """Paths of the stacks of which a decoder by layer brings in one layer at a time: matrices.

    Norms and biases are small, and TPUs cannot copy a row of such a stack out of host memory.
    """
    rows = table(decoder.cfg) if decoder.by_layer else ()
    return {row.path for row in rows if row.stacked and len(row.groups) > 1}


def decode_copy(mesh, decoder, params, weights_dtype: str | None = None):
    """The weights in decode layout and dtype, gathered once for a whole rollout.

    Layers that are brought in one by one stay as they are, for each token anew. weights_dtype: of
    quantized.DTYPES, in which matrices are gathered and kept; None: the model's.
    """
    axes, train = (
        sharding.shardings(mesh, logical_axes(decoder.cfg), rules)
        for rules in (sharding.DECODE, sharding.TRAIN)
    )
    if weights_dtype is not None:
        params = quantized.matrices(params, decoder.cfg, weights_dtype)

    held = jax.lax.with_sharding_constraint

    def gather(path, x, layout, before):
        if isinstance(x, quantized.Quantized):
            # Where the masters lie first, or the partitioner would gather these and round then.
            values = held(held(x.values, before), layout)
            scale = held(x.scale, sharding.narrowed(layout, x.scale.shape))
            return quantized.Quantized(values, scale)
        if on_host(x):
            return x
        # Norms and routers act in float32; rounding them would part the sampler from the scorer.
        is_exact = any(name in jax.tree_util.keystr(path) for name in ("norm", "router"))
        x = x if is_exact else x.astype(decoder.dtype)
        return held(x, layout)

    return jax.tree_util.tree_map_with_path(
        gather, params, axes, train, is_leaf=lambda x: isinstance(x, quantized.Quantized)
    )


def by_teacher(function, rows, *, mesh, routes, group_rows, shards: int | None = None):
    """function(i, the rows of teacher i, the result before) for each, in the order of the rows.

    routes: each task's teacher; group_rows: each task's rows, which follow one another in `rows`.
    A group that the row shards (or that many `shards`) do not divide is filled up with its last
    row, so that shapes stay static and even; what comes of those rows is dropped.
    """
    shards = sharding.n_row_shards(mesh) if shards is None else shards
    teacher_B = np.repeat(routes, group_rows)
    results, order = [], []
    for i in range(max(routes) + 1):
        mine = np.flatnonzero(teacher_B == i)
        if not len(mine):
            continue
        index = np.pad(mine, (0, -len(mine) % shards), mode="edge")
        group = sharding.constrain_rows(jax.tree.map(lambda x, j=index: x[j], rows))
        result = function(i, group, results[-1] if results else None)
        n_rows = len(mine)
        results.append(jax.tree.map(lambda x, n=n_rows: x[:n], result))
        order.append(mine)
    joined = jax.tree.map(lambda *xs: jnp.concatenate(xs), *results)
    back = np.argsort(np.concatenate(order))
    if (back == np.arange(len(back))).all():
        return joined
    return jax.tree.map(lambda x: x[back], joined)


def split(rows, n: int):
    """Rows -> [n, rows / n]: strided, so that each device keeps the rows that it holds."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), rows)


def join(rows, n: int):
    """What `split` took apart."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1] * n, *x.shape[2:]), rows)


# --- short completions among long ones


def sorted_by_length(mesh, rows, mask_BT, n: int, sizes: tuple[int, ...]):
    """(rows in an order in which `split` by n gives pieces of completions of like length, what
    brings results back into the old one). Rows stay on their shards.

    sizes: those of `at_width`; of a single one nothing is gained, and rows stay as they are.
    """
    if len(sizes) == 1:
        return rows, lambda tree: tree
    shards = sharding.n_row_shards(mesh)
    length_Gm = mask_BT.sum(1).reshape(shards, -1)
    order_Gm = jnp.argsort(length_Gm, axis=1)
    # `split` takes every n-th row: rows of one piece stand n apart.
    order_Gm = order_Gm.reshape(shards, n, -1).swapaxes(1, 2).reshape(order_Gm.shape)

    def take(tree, order_Gm):
        def one(x):
            apart = x.reshape(shards, -1, *x.shape[1:])
            moved = jax.vmap(lambda a, i: a[i])(apart, order_Gm).reshape(x.shape)
            return sharding.constrain_rows(moved)

        return jax.tree.map(one, tree)

    return take(rows, order_Gm), lambda tree: take(tree, jnp.argsort(order_Gm, axis=1))


def at_width(function, rows, mask_BT, sizes: tuple[int, ...]):
    """function(rows) of the narrowest of sizes that holds these rows' completions.

    rows: a tree whose names tell what is cut: _BL and _BT lose their ends, as do hidden states.
    function gives (anything, a tree by rows); the latter is filled up with zeros again: its [B, T]
    and the hidden states' [B, C + 1, D].
    """
    full, length = mask_BT.shape[1], sizes[-1]
    before = full - length  # positions of the prompt

    def cut(path, x, size):
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        if names[-1].endswith("_BL"):
            return x[:, : before + 1 + size]
        if names[-1].endswith("_BT"):
            return x[:, : before + size]
        return x[:, : state_width(size)] if any(name.endswith("hidden") for name in names) else x

    def fill(x, size):
        missing = length - size if x.ndim > 1 else 0
        missing = state_width(length) - x.shape[1] if x.ndim > 2 else missing
        return jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2))) if missing else x

    def narrowed(size):
        def run(rows):
            short = jax.tree_util.tree_map_with_path(lambda path, x: cut(path, x, size), rows)
            found, by_row = function(short)
            return found, jax.tree.map(lambda x: fill(x, size), by_row)

        return run

    if len(sizes) == 1:
        return function(rows)
    longest = mask_BT.sum(1).max()
    index = (jnp.array(sizes[:-1], jnp.int32) < longest).sum()
    return jax.lax.switch(index, [narrowed(size) for size in sizes], rows)
