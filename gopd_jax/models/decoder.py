"""Qwen3 and Llama decoders: hidden states of whole rows, and cached decoding.

Every row is left-padded, right-padded or both; `valid` marks its real tokens, which alone are
attended to and count in positions. Parameters stay as they are given (float32 masters) and are cast
to the decoder's dtype where they are used; norms, softmax and logits are float32 in any case.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gopd_jax.models.params import Llama3Rope, ModelConfig, Param, table
from gopd_jax.types import Array

# Finite, so that a query without any valid key (padding) averages instead of becoming NaN.
MASKED = -1e30


@struct.dataclass
class Cache:
    """Keys and values of the tokens so far, at the same slots in every row.

    k_NBKLE, v_NBKLE after rope, in the decoder's dtype; valid_BL bool, slots that hold a row's
    token; position_B int32, rope position of the row's next token; index int32, its slot.
    """

    k_NBKLE: Array
    v_NBKLE: Array
    valid_BL: Array
    position_B: Array
    index: Array


class Block(nn.Module):
    """One layer: grouped-query attention and gated MLP, each behind an RMSNorm, each residual."""

    cfg: ModelConfig
    dtype: str

    @nn.compact
    def __call__(self, x_BLD, past, rope, mask_BxL, past_mask_BS):
        """(x_BLD, (k_BKLE, v_BKLE)): the layer's output, and its keys and values to be cached.

        past is (k_BKSE, v_BKSE) of earlier tokens, or None; rope (cos_BLE, sin_BLE) of half a
        head's width; mask_BxL True where query x sees key L; past_mask_BS where all see key S.
        """
        cfg, dtype = self.cfg, jnp.dtype(self.dtype)
        weight = {row.name: self._weight(row) for row in table(cfg) if row.stacked}

        def dot(x, name, contract=1):
            return project(x, weight[name].astype(dtype), contract)

        h_BLD = rms_norm(x_BLD, weight["attention_norm"], cfg.rms_norm_eps)
        q_BLHE = constrain(dot(h_BLD, "q"), "batch", "length", "heads", None)
        k_BLKE = constrain(dot(h_BLD, "k"), "batch", "length", "kv_heads", None)
        v_BLKE = constrain(dot(h_BLD, "v"), "batch", "length", "kv_heads", None)
        if cfg.qk_norm:
            q_BLHE = rms_norm(q_BLHE, weight["q_norm"], cfg.rms_norm_eps)
            k_BLKE = rms_norm(k_BLKE, weight["k_norm"], cfg.rms_norm_eps)
        q_BLHE = rotate(q_BLHE, rope, scale=cfg.head_dim**-0.5)
        k_BLKE = rotate(k_BLKE, rope)
        # Heads before positions: every product below is then a batched matrix product as it lies,
        # and a cache in this order is read without a transposed copy for each token.
        k_BKLE, v_BKLE = k_BLKE.swapaxes(1, 2), v_BLKE.swapaxes(1, 2)
        out_BLHE = attend(q_BLHE, k_BKLE, v_BKLE, mask_BxL, past, past_mask_BS)
        x_BLD = x_BLD + dot(out_BLHE, "o", contract=2)

        h_BLD = rms_norm(x_BLD, weight["mlp_norm"], cfg.rms_norm_eps)
        gate_BLF = constrain(dot(h_BLD, "gate"), "batch", "length", "mlp")
        up_BLF = constrain(dot(h_BLD, "up"), "batch", "length", "mlp")
        x_BLD = x_BLD + dot(nn.silu(gate_BLF) * up_BLF, "down")
        return constrain(x_BLD, "batch", "length", "embed"), (k_BKLE, v_BKLE)

    def _weight(self, row: Param):
        cfg = self.cfg
        return self.param(row.name, lambda key, s: row.initialize(key, cfg, s), row.shape(cfg)[1:])


class Decoder(nn.Module):
    """The model as a static, hashable description; params travel beside it.

    dtype: of weights and activations in products. remat: recompute layers in the backward pass.
    """

    cfg: ModelConfig
    dtype: str = "float32"
    remat: bool = False

    @nn.compact
    def __call__(self, tokens_BL, positions_BL, past, mask_BxL, past_mask_BS):
        """(x_BLD before the final norm, (k_NBKLE, v_NBKLE) of these tokens)."""
        cfg = self.cfg
        weight = {
            row.path: self.param(
                row.path, lambda k, s, r=row: r.initialize(k, cfg, s), row.shape(cfg)
            )
            for row in table(cfg)
            if not row.stacked
        }
        # Whole rows of the table at every device: a lookup along a sharded width is rematerialised.
        embed_VD = constrain(weight["embed"].astype(self.dtype), "vocab", None)
        x_BLD = constrain(jnp.take(embed_VD, tokens_BL, axis=0), "batch", "length", "embed")
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.num_hidden_layers,
        )(cfg, self.dtype, name="layers")
        rope = rope_of(positions_BL, cfg)
        return layers(x_BLD, past, rope, mask_BxL, past_mask_BS)


def hidden(decoder: Decoder, params, tokens_BL, valid_BL):
    """hidden_BLD after the final norm, in the decoder's dtype; `logits` turns it into logits.

    Position t sees the valid tokens up to t. What stands at invalid positions is finite, and
    changes nothing elsewhere.
    """
    x_BLD, _, _ = _whole_rows(decoder, params, tokens_BL, valid_BL)
    return rms_norm(x_BLD, params["final_norm"], decoder.cfg.rms_norm_eps)


def prefill(decoder: Decoder, params, tokens_BP, valid_BP, *, length: int):
    """(hidden_BD at the last position, Cache of `length` slots with the prompts in the first P).

    Prompts are left-padded, so that the last position is each row's last token.
    """
    n_prompt = tokens_BP.shape[1]
    if length < n_prompt:
        raise ValueError(f"a cache of length = {length} cannot hold prompts of {n_prompt} tokens")
    x_BPD, positions_BP, kv = _whole_rows(decoder, params, tokens_BP, valid_BP)
    room = length - n_prompt
    k_NBKLE, v_NBKLE = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, room), (0, 0))) for x in kv)
    cache = Cache(
        k_NBKLE=constrain(k_NBKLE, None, "batch", "kv_heads", "length", None),
        v_NBKLE=constrain(v_NBKLE, None, "batch", "kv_heads", "length", None),
        valid_BL=jnp.pad(valid_BP, ((0, 0), (0, room))),
        position_B=positions_BP[:, -1] + 1,
        index=jnp.int32(n_prompt),
    )
    return rms_norm(x_BPD[:, -1], params["final_norm"], decoder.cfg.rms_norm_eps), cache


def decode(decoder: Decoder, params, token_B, cache: Cache):
    """(hidden_BD, Cache) after appending one token to each row, at cache.index.

    The layers only read the cache: the token's own key and value take part in the softmax beside
    it, and are written once after the last layer. Writing inside the layer scan would copy the
    whole cache for each token. An append beyond the cache's length overwrites its last slot.
    """
    past = cache.k_NBKLE, cache.v_NBKLE
    own_B11 = jnp.ones((token_B.shape[0], 1, 1), bool)
    x_B1D, kv = decoder.apply(
        {"params": params},
        token_B[:, None],
        cache.position_B[:, None],
        past,
        own_B11,
        cache.valid_BL,
    )
    start = (0, 0, 0, cache.index, 0)
    k_NBKLE, v_NBKLE = (jax.lax.dynamic_update_slice(c, x, start) for c, x in zip(past, kv))
    slot_L = jnp.arange(cache.valid_BL.shape[1]) == cache.index
    cache = Cache(
        k_NBKLE=k_NBKLE,
        v_NBKLE=v_NBKLE,
        valid_BL=cache.valid_BL | slot_L,
        position_B=cache.position_B + 1,
        index=cache.index + 1,
    )
    return rms_norm(x_B1D[:, 0], params["final_norm"], decoder.cfg.rms_norm_eps), cache


def logits(decoder: Decoder, params, hidden_xD):
    """float32 logits of any leading shape, accumulated in float32. All of V: call it in chunks."""
    head_VD = params["embed"] if decoder.cfg.tie_word_embeddings else params["head"]
    logits_xV = einsum(
        "...d,vd->...v", hidden_xD, head_VD.astype(decoder.dtype), out_dtype=jnp.float32
    )
    leading = ("batch", *(None,) * logits_xV.ndim)[: logits_xV.ndim - 1]
    return constrain(logits_xV, *leading, "vocab")


def _whole_rows(decoder, params, tokens_BL, valid_BL):
    """(x_BLD, positions_BL, (k_NBKLE, v_NBKLE)) of rows without a past."""
    positions_BL = jnp.maximum(jnp.cumsum(valid_BL, axis=1, dtype=jnp.int32) - 1, 0)
    causal_LL = jnp.tri(tokens_BL.shape[1], dtype=bool)
    mask_BLL = causal_LL & valid_BL[:, None, :]
    tokens_BL = jnp.where(valid_BL, tokens_BL, 0)  # an id outside the table would look up NaN
    x_BLD, kv = decoder.apply({"params": params}, tokens_BL, positions_BL, None, mask_BLL, None)
    return x_BLD, positions_BL, kv


def attend(q_BLHE, k_BKLE, v_BKLE, mask_BxL, past, past_mask_BS):
    """Grouped-query attention of scaled queries to these keys and to the past ones, out_BLHE.

    Query head h reads key/value head h // (H / K); keys and values are not repeated, the heads of
    a group are rows of one product. The softmax is one over both parts, without joining them:
    joined, the past would be copied.
    """
    n_rows, n_queries, n_heads, width = q_BLHE.shape
    n_kv = k_BKLE.shape[1]
    group = n_heads // n_kv
    q_BLKGE = q_BLHE.reshape(n_rows, n_queries, n_kv, group, width)
    # x runs over the queries of a group's heads, head by head.
    q_BKxE = q_BLKGE.transpose(0, 2, 3, 1, 4).reshape(n_rows, n_kv, group * n_queries, width)
    parts = [(k_BKLE, v_BKLE, jnp.tile(mask_BxL[:, None], (1, 1, group, 1)))]
    if past is not None:
        parts.append((*past, past_mask_BS[:, None, None]))
    scores = [
        jnp.where(mask, einsum("bkxe,bkse->bkxs", q_BKxE, k, out_dtype=jnp.float32), MASKED)
        for k, _, mask in parts
    ]
    top = jax.lax.stop_gradient(jnp.stack([s.max(-1) for s in scores]).max(0))
    weights = [jnp.exp(s - top[..., None]) for s in scores]
    total = sum(w.sum(-1) for w in weights)
    out_BKxE = sum(
        einsum("bkxs,bkse->bkxe", (w / total[..., None]).astype(v.dtype), v)
        for w, (_, v, _) in zip(weights, parts)
    )
    out_BKGLE = out_BKxE.reshape(n_rows, n_kv, group, n_queries, width)
    return out_BKGLE.transpose(0, 3, 1, 2, 4).reshape(q_BLHE.shape)


def project(x, weight, contract: int = 1):
    """x times weight over x's last and weight's first `contract` axes, as one matrix product.

    The CPU backend runs higher-rank products, and above all their gradients, several times slower.
    """
    leading, out = x.shape[: x.ndim - contract], weight.shape[contract:]
    width = math.prod(weight.shape[:contract])
    product = einsum("ri,io->ro", x.reshape(-1, width), weight.reshape(width, -1))
    return product.reshape(*leading, *out)


def rms_norm(x, weight, eps):
    """x over its root mean square along the last axis, times weight; float32 inside."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * weight.astype(jnp.float32)).astype(x.dtype)


def rope_of(positions_BL, cfg: ModelConfig):
    """(cos_BLE, sin_BLE) float32 of the rotation angles, over half of a head's width."""
    frequency_E = frequencies(cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    angle_BLE = positions_BL[..., None].astype(jnp.float32) * frequency_E
    return jnp.cos(angle_BLE), jnp.sin(angle_BLE)


def frequencies(head_dim: int, theta: float, scaling: Llama3Rope | None) -> np.ndarray:
    """Radians per position of each rotated pair, float32 [head_dim / 2].

    With Llama 3's scaling, wavelengths beyond the original context are stretched by `factor`,
    short ones kept, and those between interpolated in frequency. https://arxiv.org/abs/2407.21783
    """
    exponent_E = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency_E = (1.0 / np.power(np.float32(theta), exponent_E)).astype(np.float32)
    if scaling is None:
        return frequency_E
    turns_E = scaling.original_max_position_embeddings * frequency_E / (2 * np.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_E = np.clip((turns_E - low) / (high - low), 0.0, 1.0)
    return (frequency_E * (kept_E + (1 - kept_E) / scaling.factor)).astype(np.float32)


def rotate(x_BLHE, rope, scale: float = 1.0):
    """Pairs (i, i + E/2) of each head turned by the position's angle, times scale."""
    cos_BLE, sin_BLE = (scale * part[:, :, None] for part in rope)
    a, b = jnp.split(x_BLHE.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos_BLE - b * sin_BLE, b * cos_BLE + a * sin_BLE], axis=-1)
    return turned.astype(x_BLHE.dtype)


def einsum(equation, x, y, out_dtype=None):
    """Product accumulated in float32, rounded to x's dtype (or out_dtype).

    HIGHEST: float32 means float32. TPUs and GPUs would otherwise use bfloat16 or TF32 passes, whose
    error is as large as the log-ratios being trained on. It has no effect on bfloat16 operands.
    """
    accumulate = out_dtype or x.dtype
    return jnp.einsum(equation, x, y, precision="highest", preferred_element_type=accumulate)


def constrain(x, *names):
    """Sharding by logical names where rules and a mesh are set; nothing otherwise."""
    return nn.with_logical_constraint(x, names)
