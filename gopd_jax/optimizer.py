"""The optimizer and its learning rate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


def make_optimizer(
    *,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    steps: int,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
    moment_dtype: str = "float32",
    weights_dtype: str = "float32",
    seed: int = 0,
):
    """(AdamW behind a clip of the global norm, its schedule: step -> rate).

    schedule: "constant", or "cosine" to 0 at `steps`; either after a linear warm-up from 0.
    moment_dtype: of the gradient's mean; its mean square is float32 in any case, for at b2 = 0.999
    bfloat16 would round every change of it away. weights_dtype: of the params that are updated;
    seed: of the rounding of bfloat16 ones.
    """
    rate = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1)),
    }[schedule]
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        rate = optax.join_schedules([warmup, rate], [warmup_steps])
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mu_dtype=moment_dtype)
    made = optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
    return (made if weights_dtype == "float32" else rounded(made, seed)), rate


def n_updates(opt_state):
    """Updates made so far, by which the schedule goes: a skipped one is not among them.

    0 of an optimizer that counts none, and so has no schedule.
    """
    counts = optax.tree.get_all_with_path(opt_state, "count")
    return counts[0][1] if counts else 0


class Rounded(NamedTuple):
    """State of `rounded`: updates so far, which name the draws; the inner optimizer's."""

    count: jax.Array
    inner: optax.OptState


def rounded(inner: optax.GradientTransformation, seed: int) -> optax.GradientTransformation:
    """An optimizer of bfloat16 params: inner, in float32, and what it makes rounded at random.

    An update of a params' 256th or less is lost in rounding to the nearest; at random it is kept in
    expectation (stochastic rounding, https://arxiv.org/abs/1502.02551). The updates returned are
    such that adding them to the params is exact.
    """

    def wide(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        return Rounded(jnp.int32(0), inner.init(wide(params)))

    def update(updates, state, params):
        before = wide(params)
        updates, of_inner = inner.update(wide(updates), state.inner, before)
        leaves, form = jax.tree.flatten(before)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        keys = form.unflatten([jax.random.fold_in(key, i) for i in range(len(leaves))])

        def move(key, x, change):
            return at_random(key, x + change).astype(jnp.float32) - x

        updates = jax.tree.map(move, keys, before, updates)
        return updates, Rounded(state.count + 1, of_inner)

    return optax.GradientTransformation(init, update)


def at_random(key, x):
    """float32 x as one of the two bfloat16 next to it, so that its expectation is x.

    bfloat16 is the upper half of float32's bits: a carry out of the lower half has the probability
    of what that half holds.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    high = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), high, x).astype(jnp.bfloat16)


def where(condition, new, old):
    """A tree's new values where the condition holds, and all of its old ones where it does not."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
