"""The MLP as a choice of experts for each token, with no token dropped.

Tokens are sorted by their expert and multiplied group by group (jax.lax.ragged_dot). On a mesh each
device holds some of the experts, works for its own rows' tokens, and the outcomes are summed.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gopd_jax.models.architectures import ModelConfig
from gopd_jax.models.ops import einsum, mesh_axes, shards


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
        return _own_experts(x_BLD, weight["router"], *experts, cfg=cfg, axes=())
    expert_axes = mesh_axes("experts")
    # Devices that hold other experts work for the same tokens.
    row_axes = tuple(axis for axis in mesh_axes("batch") if axis not in expert_axes)
    n_rows, lengths = x_BLD.shape[0], [mesh_axes("length")] if shards("length") > 1 else []
    # shard_map wants equal shares of rows; what is computed for the added ones is cut off again.
    missing = -n_rows % math.prod(mesh.shape[axis] for axis in row_axes)
    x_BLD = jnp.pad(x_BLD, ((0, missing), (0, 0), (0, 0)))
    out_BLD = jax.shard_map(
        functools.partial(_own_experts, cfg=cfg, axes=expert_axes),
        in_specs=(P(row_axes, *lengths), P(), *(P(expert_axes),) * 3),
        out_specs=P(row_axes, *lengths),
    )(x_BLD, weight["router"], *experts)
    return out_BLD[:n_rows]


def _own_experts(x_BLD, router_DR, gate_RDF, up_RDF, down_RFD, *, cfg: ModelConfig, axes):
    """What the experts at hand add for these tokens; summed over `axes`, it is what all add.

    x runs over pairs of a token and one of its experts, in the order of the experts.
    """
    n_own, n_active, width = gate_RDF.shape[0], cfg.num_experts_per_tok, x_BLD.shape[-1]
    tokens_nD = x_BLD.reshape(-1, width)
    router_DR = router_DR.astype(jnp.float32)
    logits_nR = einsum("nd,dr->nr", tokens_nD.astype(jnp.float32), router_DR)
    chance_nA, choice_nA = jax.lax.top_k(jax.nn.softmax(logits_nR), n_active)
    if cfg.norm_topk_prob:
        chance_nA = chance_nA / chance_nA.sum(-1, keepdims=True)

    first = jax.lax.axis_index(axes) * n_own if axes else 0
    choice_x = choice_nA.reshape(-1) - first
    # Pairs of other devices' experts go behind all groups.
    choice_x = jnp.where((choice_x >= 0) & (choice_x < n_own), choice_x, n_own)
    order_x = jnp.argsort(choice_x)
    size_R = jnp.sum(choice_x[:, None] == jnp.arange(n_own), axis=0, dtype=jnp.int32)
    own_x1 = (jnp.arange(choice_x.size) < size_R.sum())[:, None]

    # As in ops.einsum. With bfloat16, which it would not change, the TPU's kernel is an error.
    precision = "highest" if x_BLD.dtype == jnp.float32 else None

    def dot(x, weight):  # behind the groups anything may stand, also in the gradient
        product = jax.lax.ragged_dot(jnp.where(own_x1, x, 0), weight, size_R, precision=precision)
        return jnp.where(own_x1, product, 0)

    if (
        axes
    ):  # each device takes other tokens: without the cast the gradient misses the others' part
        tokens_nD = jax.lax.pcast(tokens_nD, axes, to="varying")
    sorted_xD = tokens_nD[order_x // n_active]
    hidden_xF = nn.silu(dot(sorted_xD, gate_RDF)) * dot(sorted_xD, up_RDF)
    out_xD = dot(hidden_xF, down_RFD).astype(jnp.float32)
    out_nAD = out_xD[jnp.argsort(order_x)].reshape(-1, n_active, width)
    out_nD = jnp.sum(out_nAD * chance_nA[..., None], axis=1)
    out_nD = jax.lax.psum(out_nD, axes) if axes else out_nD
    return out_nD.reshape(x_BLD.shape).astype(x_BLD.dtype)
