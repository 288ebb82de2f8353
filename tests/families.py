"""A tiny model of every family and of every variant that computes something else."""

import dataclasses

import jax
import numpy as np

from gopd_jax.models import decoder as lm
from gopd_jax.models import params as lm_params
from gopd_jax.models.params import LinearRope, Llama3Rope, ModelConfig, YarnRope

QWEN3 = ModelConfig(
    architecture="qwen3",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=(2, 3),
    pad_token_id=0,
)
replace = dataclasses.replace
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA = replace(
    QWEN3,
    architecture="llama",
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=500.0,
    rope_scaling=Llama3Rope(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    tie_word_embeddings=False,
    eos_token_id=2,
)
# A context of 16 positions, so that rows of 20 go beyond it; at theta 10 pairs of each kind.
YARN = YarnRope(factor=4.0, original_max_position_embeddings=16, beta_fast=2.0)
QWEN2 = replace(QWEN3, architecture="qwen2", head_dim=8)
MISTRAL = replace(LLAMA, architecture="mistral", head_dim=12, rope_scaling=None)
MOE = replace(
    QWEN3,
    architecture="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
GEMMA3 = replace(
    QWEN3,
    architecture="gemma3_text",
    num_hidden_layers=3,
    rope_theta=1e6,
    rope_scaling=LinearRope(factor=8.0),
    rope_local_base_freq=1e4,
    query_pre_attn_scalar=20,
    sliding_window=5,
    layer_types=(SLIDING, FULL, SLIDING),
)
MODELS = {
    "qwen2": QWEN2,
    "qwen2, sliding": replace(
        QWEN2, num_hidden_layers=3, sliding_window=5, layer_types=(FULL, SLIDING, SLIDING)
    ),
    "qwen2, yarn": replace(QWEN2, rope_theta=10.0, rope_scaling=YARN, tie_word_embeddings=False),
    "qwen3": QWEN3,
    "qwen3, untied": replace(QWEN3, tie_word_embeddings=False),
    "qwen3, yarn": replace(
        QWEN3,
        rope_theta=10.0,
        rope_scaling=replace(YARN, mscale=2.0, mscale_all_dim=0.5, truncate=False),
    ),
    "qwen3_moe": MOE,
    "qwen3_moe, not normalised": replace(MOE, norm_topk_prob=False, num_experts_per_tok=3),
    "llama 3.1": LLAMA,
    "llama 3.2 (tied)": replace(LLAMA, tie_word_embeddings=True),
    "llama, plain rope": replace(LLAMA, rope_scaling=None, tie_word_embeddings=True),
    "mistral": MISTRAL,
    "mistral, sliding": replace(MISTRAL, sliding_window=5, layer_types=(SLIDING, SLIDING)),
    "gemma3_text": GEMMA3,
    "gemma3_text, plain rope": replace(GEMMA3, rope_scaling=None, head_dim=8),
}
LEFT, N_PROMPT, LENGTH = np.array([0, 2, 5, 3]), 8, 20


def random_params(cfg, seed=0):
    """Large weights, so that every part of the model shows in its logits."""
    draw = np.random.default_rng(seed).normal
    return lm_params.tree(
        cfg,
        lambda row: draw(row.name.endswith("norm"), 0.2, row.shape(cfg)).astype(np.float32),
    )


def batch():
    """(tokens_BL, valid_BL), left-padded, longer than every window."""
    tokens_BL = np.random.default_rng(1).integers(4, 97, (len(LEFT), LENGTH), np.int32)
    return tokens_BL, np.arange(LENGTH) >= LEFT[:, None]


def our_logits(cfg, params):
    tokens_BL, valid_BL = batch()
    decoder = lm.Decoder(cfg)
    hidden_BLD = jax.jit(lm.hidden, static_argnums=0)(decoder, params, tokens_BL, valid_BL)
    return np.asarray(lm.logits(decoder, params, hidden_BLD))


def our_greedy(cfg, params):
    """Tokens decoded with the cache after the first N_PROMPT of each row, up to LENGTH."""
    tokens_BP, valid_BP = (x[:, :N_PROMPT] for x in batch())
    decoder, decode = lm.Decoder(cfg), jax.jit(lm.decode, static_argnums=0)
    hidden_BD, cache = lm.prefill(decoder, params, tokens_BP, valid_BP, length=LENGTH)
    got = []
    for _ in range(LENGTH - N_PROMPT):
        got.append(lm.logits(decoder, params, hidden_BD).argmax(-1).astype(np.int32))
        hidden_BD, cache = decode(decoder, params, got[-1], cache)
    return np.stack(got, 1)


def torch_random(cfg):
    """transformers' own model of this config, with sizeable random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[cfg.architecture].from_dict(lm_params.to_hf(cfg))
    model = getattr(transformers, cfg.traits.class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def torch_load(path):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype="float32", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def torch_logits(model):
    import torch

    tokens_BL, valid_BL = (torch.tensor(x) for x in batch())
    position_BL = (valid_BL.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(tokens_BL.long(), attention_mask=valid_BL.long(), position_ids=position_BL)
    return out.logits.numpy()


def torch_greedy(model):
    """As our_greedy; no token ends a row."""
    import torch

    model.generation_config.eos_token_id = None
    tokens_BP, valid_BP = (x[:, :N_PROMPT] for x in batch())
    tokens_BL = model.generate(
        torch.tensor(tokens_BP).long(),
        attention_mask=torch.tensor(valid_BP).long(),
        do_sample=False,
        max_new_tokens=LENGTH - N_PROMPT,
    )
    return tokens_BL[:, N_PROMPT:].numpy()
