"""The MLP as a choice of experts for each token, with no token dropped.

Tokens are sorted by their expert and multiplied group by group (jax.lax.ragged_dot). On a mesh each
device holds some of the experts. Where the devices that share the experts hold different tokens,
each gathers the others' tokens, adds up what its own experts make of them, and the sums go back to
whose tokens they are; where they hold the same tokens, the sums alone are added.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gopd_jax.models.architectures import ModelConfig
from gopd_jax.models.ops import einsum, mesh_axes

# Tokens that a device works for at one time: any of its experts may be chosen by all of them, so
# arrays are num_experts_per_tok as long. Of Qwen3-30B-A3B in bfloat16 8192 take 1.6 GiB, and the
# experts' weights are still read once for some hundred tokens each.
AT_ONCE = 8192


def routed_mlp(x_BLD, weight, cfg: ModelConfig):
    """Sum of each token's num_experts_per_tok likeliest experts by their probabilities, x_BLD.

    weight: router [D, experts], used in float32; expert_gate and expert_up [experts, D, F] and
    expert_down [experts, F, D], used in x's dtype.
    """
    experts = [
        weight[name].astype(x_BLD.dtype) for name in ("expert_gate", "expert_up", "expert_down")
    ]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _in_chunks(x_BLD, weight["router"], *experts, cfg=cfg, token_axes=(), expert_axes=())
    rows, length, expert_axes = (
        tuple(axis for axis in mesh_axes(name) if mesh.shape[axis] > 1)
        for name in ("batch", "length", "experts")
    )
    n_rows, n_positions = x_BLD.shape[:2]
    # shard_map wants equal shares; what is computed for the added tokens is cut off again.
    missing = [
        (0, -n % math.prod(mesh.shape[axis] for axis in axes))
        for n, axes in ((n_rows, rows), (n_positions, length))
    ]
    x_BLD = jnp.pad(x_BLD, (*missing, (0, 0)))
    tokens = P(rows, length)
    out_BLD = jax.shard_map(
        functools.partial(
            _in_chunks, cfg=cfg, token_axes=(*rows, *length), expert_axes=expert_axes
        ),
        in_specs=(tokens, P(), *(P(expert_axes),) * 3),
        out_specs=tokens,
    )(x_BLD, weight["router"], *experts)
    return out_BLD[:n_rows, :n_positions]


def _in_chunks(x_BLD, router_DR, *experts, cfg: ModelConfig, token_axes, expert_axes):
    """x_BLD of this device's tokens, AT_ONCE of those of all that meet here at a time.

    token_axes: mesh axes along which tokens differ; expert_axes: along which experts do.
    """
    met = tuple(axis for axis in expert_axes if axis in token_axes)
    tokens_nD = x_BLD.reshape(-1, x_BLD.shape[-1])
    n_tokens = tokens_nD.shape[0]
    n_chunks = -(-n_tokens * jax.lax.axis_size(met) // AT_ONCE) if met else -(-n_tokens // AT_ONCE)
    own = functools.partial(
        _own_experts, cfg=cfg, met=met, expert_axes=expert_axes, dtype=x_BLD.dtype
    )
    if n_chunks <= 1:
        return own(tokens_nD, router_DR, *experts).reshape(x_BLD.shape)
    size = -(-n_tokens // n_chunks)
    # Or the backward pass would keep what is as long as the pairs, of all chunks.
    own = jax.checkpoint(own, prevent_cse=False)

    @jax.checkpoint  # so that of the weights nothing is kept but what came in
    def chunks(tokens_nD, router_DR, *experts):
        # Or the gradients of each chunk would be added over the devices on their own.
        router_DR = _differing(router_DR, token_axes)
        others = tuple(axis for axis in token_axes if axis not in expert_axes)
        # Cast back where they are used: their gradient is added up over the chunks in float32.
        experts = [_differing(x, others).astype(jnp.float32) for x in experts]
        tokens_nD = jnp.pad(tokens_nD, ((0, n_chunks * size - n_tokens), (0, 0)))
        tokens_CnD = tokens_nD.reshape(n_chunks, size, -1)
        return jax.lax.map(lambda tokens_nD: own(tokens_nD, router_DR, *experts), tokens_CnD)

    out_nD = chunks(tokens_nD, router_DR, *experts).reshape(-1, x_BLD.shape[-1])
    return out_nD[:n_tokens].reshape(x_BLD.shape)


def _own_experts(
    tokens_nD, router_DR, gate_RDF, up_RDF, down_RFD, *, cfg: ModelConfig, met, expert_axes, dtype
):
    """What all experts add for these tokens, of which those at hand work here, for the tokens of
    all devices along `met`.

    x runs over pairs of a token and one of its experts, in the order of the experts.
    """
    n_own, n_active, width = gate_RDF.shape[0], cfg.num_experts_per_tok, tokens_nD.shape[-1]
    router_DR = router_DR.astype(jnp.float32)
    logits_nR = einsum("nd,dr->nr", tokens_nD.astype(jnp.float32), router_DR)
    chance_nA, choice_nA = jax.lax.top_k(jax.nn.softmax(logits_nR), n_active)
    if cfg.norm_topk_prob:
        chance_nA = chance_nA / chance_nA.sum(-1, keepdims=True)
    # Along the other axes of experts the tokens are the same.
    alike = tuple(axis for axis in expert_axes if axis not in met)
    # Without the cast the gradient misses what the others' experts add to it.
    tokens_nD, chance_nA = _differing(tokens_nD, alike), _differing(chance_nA, alike)
    if met:
        tokens_nD, chance_nA, choice_nA = (
            jax.lax.all_gather(x, met, tiled=True) for x in (tokens_nD, chance_nA, choice_nA)
        )

    first = jax.lax.axis_index(expert_axes) * n_own if expert_axes else 0
    choice_x = choice_nA.reshape(-1) - first
    # Pairs of other devices' experts go behind all groups.
    choice_x = jnp.where((choice_x >= 0) & (choice_x < n_own), choice_x, n_own)
    order_x = jnp.argsort(choice_x)
    size_R = jnp.sum(choice_x[:, None] == jnp.arange(n_own), axis=0, dtype=jnp.int32)
    own_x1 = (jnp.arange(choice_x.size) < size_R.sum())[:, None]

    # As in ops.einsum. With bfloat16, which it would not change, the TPU's kernel is an error.
    precision = "highest" if dtype == jnp.float32 else None

    def dot(x, weight):  # behind the groups anything may stand, also in the gradient
        x, weight = jnp.where(own_x1, x, 0), weight.astype(dtype)
        product = jax.lax.ragged_dot(x, weight, size_R, precision=precision)
        return jnp.where(own_x1, product, 0)

    sorted_xD = tokens_nD[order_x // n_active]
    hidden_xF = nn.silu(dot(sorted_xD, gate_RDF)) * dot(sorted_xD, up_RDF)
    out_xD = dot(hidden_xF, down_RFD).astype(jnp.float32)
    out_nAD = out_xD[jnp.argsort(order_x)].reshape(-1, n_active, width)
    out_nD = jnp.sum(out_nAD * chance_nA[..., None], axis=1)
    if met:
        out_nD = jax.lax.psum_scatter(out_nD, met, tiled=True)
    out_nD = jax.lax.psum(out_nD, alike) if alike else out_nD
    return out_nD.astype(dtype)


def _differing(x, axes):
    """x, which is the same along these axes, as one that may differ: its gradient is their sum."""
    return jax.lax.pcast(x, axes, to="varying") if axes else x
