"""Decoders of every family in architectures: hidden states of whole rows, and cached decoding.

Every row is left-padded, right-padded or both; `valid` marks its real tokens, which alone are
attended to and count in positions. Parameters stay as they are given (float32 masters) and are cast
to the decoder's dtype where they are used; norms, softmax and logits are float32 in any case.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gopd_jax.models import attention, moe, quantized
from gopd_jax.models import cache as caching
from gopd_jax.models.cache import Cache
from gopd_jax.models.ops import attend, constrain, einsum, on_device, project, rms_norm, shards
from gopd_jax.models.params import ModelConfig, Param, table
from gopd_jax.models.rope import rope_of, rotate
from gopd_jax.types import Array

ACTIVATIONS = {
    "silu": nn.silu,
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}
# What of a layer is kept for the backward pass, besides its input; the rest is computed again.
REMAT = {
    "layers": None,  # nothing
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # not attention's scores
}


@struct.dataclass
class View:
    """What the queries of a kind of layer see.

    rope (cos_BLE, sin_BLE) of half a head's width; mask_BxL True where query x sees key L, or as
    attention.whole_rows wants it; past_mask_BS where all see key S of the past, or None.
    """

    rope: tuple[Array, Array]
    mask_BxL: Array
    past_mask_BS: Array | None


class Block(nn.Module):
    """One layer: grouped-query attention and an MLP, each behind an RMSNorm, each residual."""

    cfg: ModelConfig
    dtype: str
    attention: str

    @nn.compact
    def __call__(self, x_BLD, layer, slides, past: Cache | None, views):
        """(x_BLD, (k_BKLE, v_BKLE)): the layer's output, and its keys and values to be cached.

        past holds earlier tokens of all layers, of which this is number `layer`. views is one View;
        or a full and a sliding layer's, of which the bool `slides` chooses this one's.
        """
        cfg, traits, dtype = self.cfg, self.cfg.traits, jnp.dtype(self.dtype)
        weight = {row.name: self._weight(row) for row in table(cfg) if row.stacked}
        view = views[0]
        if slides is not None:
            view = jax.tree.map(lambda full, near: jnp.where(slides, near, full), *views)

        def dot(x, name, contract=1):
            y = project(x, weight[name], contract)
            if (a := weight.get(f"{name}_lora_a")) is None:
                return y
            low = project(x, a, contract)
            return y + cfg.lora.scale * project(low, weight[f"{name}_lora_b"])

        def norm(x, name):
            return rms_norm(x, weight[name], cfg.rms_norm_eps, traits.norm_offset)

        def heads(x_BLD, name, axis):
            y_BLHE = dot(x_BLD, name)
            if traits.qkv_bias:
                y_BLHE = y_BLHE + weight[f"{name}_bias"].astype(dtype)
            return constrain(y_BLHE, "batch", "length", axis, None)

        h_BLD = norm(x_BLD, "attention_norm")
        q_BLHE = heads(h_BLD, "q", "heads")
        k_BLKE, v_BLKE = heads(h_BLD, "k", "kv_heads"), heads(h_BLD, "v", "kv_heads")
        if traits.qk_norm:
            q_BLHE, k_BLKE = norm(q_BLHE, "q_norm"), norm(k_BLKE, "k_norm")
        q_BLHE = rotate(
            q_BLHE, view.rope, scale=(cfg.query_pre_attn_scalar or cfg.head_dim) ** -0.5
        )
        k_BLKE = rotate(k_BLKE, view.rope)
        # Heads before positions: every product below is then a batched matrix product as it lies,
        # those with the cache too, which has them in this order.
        k_BKLE, v_BKLE = k_BLKE.swapaxes(1, 2), v_BLKE.swapaxes(1, 2)
        if past is None:
            out_BLHE = attention.whole_rows(
                self.attention,
                *(q_BLHE, k_BKLE, v_BKLE, view.mask_BxL),
                window=cfg.sliding_window,
                slides=slides,
            )
        else:

            def attended(width):
                own = q_BLHE, k_BKLE, v_BKLE, view.mask_BxL
                before = caching.read(past, layer, width), view.past_mask_BS[:, :width]
                return attend(*own, *before)

            out_BLHE = caching.at_width(attended, past)
        out_BLD = dot(out_BLHE, "o", contract=2)
        x_BLD = x_BLD + (norm(out_BLD, "attention_post_norm") if traits.post_norms else out_BLD)

        h_BLD = norm(x_BLD, "mlp_norm")
        if traits.routed:
            out_BLD = moe.routed_mlp(h_BLD, weight, cfg)
        else:
            gate_BLF = constrain(dot(h_BLD, "gate"), "batch", "length", "mlp")
            up_BLF = constrain(dot(h_BLD, "up"), "batch", "length", "mlp")
            out_BLD = dot(ACTIVATIONS[traits.activation](gate_BLF) * up_BLF, "down")
        x_BLD = x_BLD + (norm(out_BLD, "mlp_post_norm") if traits.post_norms else out_BLD)
        return constrain(x_BLD, "batch", "length", "embed"), (k_BKLE, v_BKLE)

    def _weight(self, row: Param):
        cfg = self.cfg
        own = self.param(row.name, lambda key, s: row.initialize(key, cfg, s), row.shape(cfg)[1:])
        # Of a stack in host memory this layer's slice comes to the device, here inside the scan.
        return on_device(own, *row.axes[1:])


class Decoder(nn.Module):
    """The model as a static, hashable description; params travel beside it.

    dtype: of weights and activations in products. remat: what the backward pass computes again, one
    of REMAT. attention: of whole rows, one of attention.NAMES. by_layer: its layers stay in host
    memory, and each is brought to the device where it is used.
    """

    cfg: ModelConfig
    dtype: str = "float32"
    remat: str | None = None
    attention: str = "xla"
    by_layer: bool = False

    @nn.compact
    def __call__(self, tokens_BL, positions_BL, valid_B1L, cache: Cache | None):
        """(x_BLD before the final norm, (k_NBKLE, v_NBKLE) of these tokens).

        valid_B1L True where a key of these tokens may be seen, by itself and later ones. cache:
        earlier tokens, of which a row's valid ones are seen by all of its queries. Sliding windows
        narrow both.
        """
        cfg = self.cfg
        weight = {
            row.path: self.param(
                row.path, lambda k, s, r=row: r.initialize(k, cfg, s), row.shape(cfg)
            )
            for row in table(cfg)
            if not row.stacked
        }
        # Whole rows of the table at every device: a lookup along a sharded width is rematerialised.
        embed = weight["embed"]
        if not isinstance(embed, quantized.Quantized):
            embed = constrain(embed.astype(self.dtype), "vocab", None)
        found = jax.tree.map(lambda x: jnp.take(x, tokens_BL, axis=0), embed)
        x_BLD = constrain(quantized.full(found, self.dtype), "batch", "length", "embed")
        if cfg.traits.scaled_embedding:
            # The root itself is rounded to the dtype: Gemma was trained so.
            x_BLD = x_BLD * jnp.asarray(cfg.hidden_size**0.5, self.dtype)
        block = Block
        if self.remat is not None:
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=cfg.num_hidden_layers,
        )(cfg, self.dtype, self.attention, name="layers")
        layer_N = None if cache is None else jnp.arange(cfg.num_hidden_layers)
        kernel = cache is None and self.attention != "xla"
        slides_N, views = _views(cfg, positions_BL, valid_B1L, cache, kernel)
        return layers(x_BLD, layer_N, slides_N, cache, views)


def _views(cfg: ModelConfig, positions_BL, valid_B1L, cache: Cache | None, kernel: bool):
    """(None, (view of all layers,)), or (slides_N, (a full layer's view, a sliding one's)).

    kernel: attention masks what is later or too far itself.
    """
    mask_BxL = valid_B1L if kernel else valid_B1L & jnp.tri(positions_BL.shape[1], dtype=bool)
    rope = rope_of(positions_BL, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    past_mask_BS = None if cache is None else cache.valid_BL
    full = View(rope, mask_BxL, past_mask_BS)
    if cfg.sliding_window is None:
        return None, (full,)
    if cfg.rope_local_base_freq is not None:
        rope = rope_of(positions_BL, cfg.head_dim, cfg.rope_local_base_freq, None)
    # Positions, not slots of the cache: padding does not count.
    near_BxL = mask_BxL
    if not kernel:
        apart_BxL = positions_BL[:, :, None] - positions_BL[:, None, :]
        near_BxL = mask_BxL & (apart_BxL < cfg.sliding_window)
    near_BS = past_mask_BS
    if cache is not None:
        near_BS = past_mask_BS & (positions_BL - cache.position_BL < cfg.sliding_window)
    sliding = View(rope, near_BxL, near_BS)
    if all(cfg.slides):
        return None, (sliding,)
    return jnp.array(cfg.slides), (full, sliding)


def hidden(decoder: Decoder, params, tokens_BL, valid_BL):
    """hidden_BLD after the final norm, in the decoder's dtype; `logits` turns it into logits.

    Position t sees the valid tokens up to t. What stands at invalid positions is finite, and
    changes nothing elsewhere.
    """
    # Positions that lie on several devices do so in equal numbers.
    n = tokens_BL.shape[1]
    missing = (0, 0), (0, -n % shards("length"))
    tokens_BL, valid_BL = (jnp.pad(x, missing) for x in (tokens_BL, valid_BL))
    x_BLD, _, _ = _whole_rows(decoder, params, tokens_BL, valid_BL)
    return _final_norm(decoder, params, x_BLD)[:, :n]


def prefill(
    decoder: Decoder,
    params,
    tokens_BP,
    valid_BP,
    *,
    length: int,
    buckets: int = 1,
    prompt_buckets: int = 1,
    all_RP=None,
    cache_dtype: str | None = None,
):
    """(hidden_BD at the last position, Cache of `length` slots with the prompts in the first P).

    Prompts are left-padded, so that the last position is each row's last token. buckets: widths
    at which the cache is read; prompt_buckets: widths to which prompts are cut, the least that
    holds the longest of all_RP: bool, the valid tokens of all prompts that this cache will hold,
    those that `admit` puts there among them; None: valid_BP. cache_dtype: of quantized.DTYPES, or
    None.
    """
    n_prompt = tokens_BP.shape[1]
    if length < n_prompt:
        raise ValueError(f"a cache of length = {length} cannot hold prompts of {n_prompt} tokens")

    def at(width):
        tokens_BW, valid_BW = (x[:, n_prompt - width :] for x in (tokens_BP, valid_BP))
        x_BWD, positions_BW, kv = _whole_rows(decoder, params, tokens_BW, valid_BW)
        cache = caching.filled(
            kv, valid_BW, positions_BW, length=length, buckets=buckets, dtype=cache_dtype
        )
        return _final_norm(decoder, params, x_BWD[:, -1]), cache

    sizes = caching.widths(n_prompt, prompt_buckets)
    if len(sizes) == 1:
        return at(n_prompt)
    # A longer prompt, admitted behind shorter ones, would begin before the first slot: at the end
    # of the ring, which is not read until all of it is.
    all_RP = valid_BP if all_RP is None else all_RP
    longest = n_prompt - jnp.argmax(all_RP.any(0))
    which = (jnp.array(sizes[:-1], jnp.int32) < longest).sum()
    return jax.lax.switch(which, [functools.partial(at, width) for width in sizes])


def decode(decoder: Decoder, params, token_B, cache: Cache):
    """(hidden_BD, Cache) after appending one token to each row.

    The layers only read the cache: the token's own key and value take part in the softmax beside
    it, and are written once after the last layer. Writing inside the layer scan would copy the
    whole cache for each token. Of more appends than the cache has room for, the oldest slots are
    overwritten.
    """
    own_B11 = jnp.ones((token_B.shape[0], 1, 1), bool)
    x_B1D, kv = decoder.apply(
        {"params": params}, token_B[:, None], cache.next_B[:, None], own_B11, cache
    )
    return _final_norm(decoder, params, x_B1D[:, 0]), caching.append(cache, kv)


def admit(decoder: Decoder, params, tokens_FP, valid_FP, cache: Cache, taken_B, from_lanes):
    """(hidden_FD at the last position, Cache in which the rows of taken_B hold new prompts).

    F lanes of left-padded prompts are prefilled. from_lanes: takes [F, ...] to [B, ...], each row's
    lane; what it gives for other rows does not matter.
    """
    x_FPD, position_FP, kv = _whole_rows(decoder, params, tokens_FP, valid_FP)

    def at(p):
        here = (jax.lax.dynamic_slice_in_dim(x, p, 1, axis=3) for x in kv)
        return tuple(from_lanes(x.swapaxes(0, 1)).swapaxes(0, 1) for x in here)

    rows = from_lanes(valid_FP), from_lanes(position_FP)
    return _final_norm(decoder, params, x_FPD[:, -1]), caching.admit(cache, at, *rows, taken_B)


def head_params(decoder: Decoder, params) -> dict:
    """What of params `logits` needs."""
    name = "embed" if decoder.cfg.tie_word_embeddings else "head"
    return {name: params[name]}


def logits(decoder: Decoder, params, hidden_xD):
    """float32 logits of any leading shape, accumulated in float32. All of V: call it in chunks."""
    (head_VD,) = head_params(decoder, params).values()
    head_VD, scale_V1 = quantized.parts(head_VD, decoder.dtype)
    logits_xV = einsum("...d,vd->...v", hidden_xD, head_VD, out_dtype=jnp.float32)
    if scale_V1 is not None:
        logits_xV = logits_xV * scale_V1[:, 0]
    leading = ("batch", *(None,) * logits_xV.ndim)[: logits_xV.ndim - 1]
    return constrain(logits_xV, *leading, "vocab")


def _whole_rows(decoder, params, tokens_BL, valid_BL):
    """(x_BLD, positions_BL, (k_NBKLE, v_NBKLE)) of rows without a past."""
    positions_BL = jnp.maximum(jnp.cumsum(valid_BL, axis=1, dtype=jnp.int32) - 1, 0)
    tokens_BL = jnp.where(valid_BL, tokens_BL, 0)  # an id outside the table would look up NaN
    whole = tokens_BL, positions_BL, valid_BL[:, None], None
    x_BLD, kv = decoder.apply({"params": params}, *whole)
    return x_BLD, positions_BL, kv


def _final_norm(decoder, params, x):
    cfg = decoder.cfg
    return rms_norm(x, params["final_norm"], cfg.rms_norm_eps, cfg.traits.norm_offset)
