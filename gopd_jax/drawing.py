"""Which token comes next: a draw from a distribution, or its likeliest id."""

import math

import jax
import jax.numpy as jnp


def chooser(*, temperature, n_vocab, greedy, top_p):
    """A function (logits_BV, keys_B, positions_B) -> (token_B, its log-prob_B).

    Its options are those of sampler.generate.
    """

    def choose(logits_BV, keys_B, t_B):
        logits_BV = logits_BV / temperature
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < n_vocab, logits_BV, -jnp.inf)
        logp_BV = jax.nn.log_softmax(logits_BV)
        if greedy:
            token_B = jnp.argmax(logp_BV, -1).astype(jnp.int32)
        else:
            drawn_BV = logp_BV if top_p is None else nucleus(logp_BV, top_p)
            keys_B = jax.vmap(jax.random.fold_in)(keys_B, t_B)
            uniform_B2 = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(keys_B)
            token_B = draw(jnp.exp(drawn_BV), uniform_B2)
        return token_B, pick(logp_BV, token_B)

    return choose


WIDEST = 8192  # ids of a block


def draw(p_BV, uniform_B2):
    """An id of each row with the probability p_BV / its sum; uniform_B2 of [0, 1).

    The inverse of the cumulative distribution in two turns: first one of 128 blocks of ids, then
    an id in it. Each turn has a uniform number of its own: one, of 24 bits, could not tell apart
    ids rarer than that. Far cheaper than noise for every id, and sums of blocks stay where a
    sharded vocabulary lies.
    """
    n_rows, n_ids = p_BV.shape
    n_blocks = math.gcd(n_ids, 128)
    if n_ids > n_blocks * WIDEST:  # an odd number of ids, say: blocks of its divisors are no help
        p_BV, n_blocks = jnp.pad(p_BV, ((0, 0), (0, -n_ids % 128))), 128
    p_BnW = p_BV.reshape(n_rows, n_blocks, -1)
    block_B = _inverse(p_BnW.sum(-1), uniform_B2[:, 0])
    p_BW = jnp.take_along_axis(p_BnW, block_B[:, None, None], 1)[:, 0]
    return block_B * p_BW.shape[1] + _inverse(p_BW, uniform_B2[:, 1])


def _inverse(p_Bn, uniform_B):
    """The index whose interval of the cumulative sum holds uniform_B of the total."""
    upto_Bn = jnp.cumsum(p_Bn, -1)
    before_B = (upto_Bn <= uniform_B[:, None] * upto_Bn[:, -1:]).sum(-1)
    # By rounding the product may reach the total: of the last that has mass, then.
    last_B = p_Bn.shape[1] - 1 - jnp.argmax(p_Bn[:, ::-1] > 0, -1)
    return jnp.minimum(before_B, last_B).astype(jnp.int32)


def nucleus(logp_xV, top_p: float):
    """logp_xV of the fewest likeliest ids whose probabilities reach top_p, -inf elsewhere.

    Not normalised anew, which a draw does not need. The likeliest id always stays; of equal ones
    the lower id is the likelier. https://arxiv.org/abs/1904.09751
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is above 0 and at most 1, None truncates nothing")
    if top_p == 1:
        return logp_xV  # a sum in float32 can reach 1 before the last ids, which would then go
    order_xV = jnp.argsort(-logp_xV, axis=-1, stable=True)
    sorted_xV = jnp.exp(jnp.take_along_axis(logp_xV, order_xV, -1))
    # An id stays if those before it have not reached top_p yet: the one that crosses it is in.
    before_xV = jnp.cumsum(sorted_xV, -1) - sorted_xV
    kept_xV = (before_xV < top_p).at[..., 0].set(True)
    rank_xV = jnp.argsort(order_xV, axis=-1)
    return jnp.where(jnp.take_along_axis(kept_xV, rank_xV, -1), logp_xV, -jnp.inf)


def pick(values_xV, ids_x):
    """values_xV at ids_x along the last axis, as a masked sum.

    A gather along a vocabulary that is sharded would fetch all of it; a sum is one small reduction.
    """
    hit_xV = jax.lax.broadcasted_iota(jnp.int32, values_xV.shape, values_xV.ndim - 1)
    return jnp.where(hit_xV == ids_x[..., None], values_xV, 0.0).sum(-1)
