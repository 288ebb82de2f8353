"""Inside a jit: rows by teacher and by microbatch, and weights where and as they are wanted."""

import jax
import jax.numpy as jnp
import numpy as np

from gopd_jax import sharding
from gopd_jax.models.params import logical_axes


def resident(params, after=None):
    """params in device memory, brought there from host memory where that is where they lie.

    after: what has to be computed before, so that no two models from the host are here at once.
    """
    if not any(_on_host(x) for x in jax.tree.leaves(params)):
        return params
    params, _ = jax.lax.optimization_barrier((params, after))
    return jax.tree.map(
        lambda x: jax.device_put(x, jax.memory.Space.Device) if _on_host(x) else x, params
    )


def _on_host(x) -> bool:
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def decode_copy(mesh, decoder, params):
    """The weights in decode layout and dtype, gathered once for a whole rollout."""
    axes = sharding.shardings(mesh, logical_axes(decoder.cfg), sharding.DECODE)

    def gather(path, x, layout):
        # Norms and routers act in float32; rounding them would part the sampler from the scorer.
        is_exact = any(name in jax.tree_util.keystr(path) for name in ("norm", "router"))
        x = x if is_exact else x.astype(decoder.dtype)
        return jax.lax.with_sharding_constraint(x, layout)

    return jax.tree_util.tree_map_with_path(gather, params, axes)


def by_teacher(function, rows, *, mesh, routes, group_rows):
    """function(i, the rows of teacher i, the result before) for each, in the order of the rows.

    routes: each task's teacher; group_rows: each task's rows, which follow one another in `rows`.
    A group that the row shards do not divide is filled up with its last row, so that shapes stay
    static and even; what comes of those rows is dropped.
    """
    shards = sharding.n_row_shards(mesh)
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
