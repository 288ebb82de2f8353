"""config.json of some published models, by name: shapes can be asked about without a download.

The fields are those that `hf_config` reads, as their repositories on the Hugging Face hub have
them (Qwen3: arXiv 2505.09388, table 1).
"""

from __future__ import annotations

_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "use_sliding_window": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}


def _dense(layers: int, width: int, heads: int, mlp: int, tied: bool) -> dict:
    return _QWEN3 | {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "intermediate_size": mlp,
        "tie_word_embeddings": tied,
    }


PUBLISHED = {
    "Qwen/Qwen3-0.6B": _dense(28, 1024, 16, 3072, True),
    "Qwen/Qwen3-1.7B": _dense(28, 2048, 16, 6144, True),
    "Qwen/Qwen3-4B": _dense(36, 2560, 32, 9728, True),
    "Qwen/Qwen3-8B": _dense(36, 4096, 32, 12288, False),
    "Qwen/Qwen3-14B": _dense(40, 5120, 40, 17408, False),
    "Qwen/Qwen3-32B": _dense(64, 5120, 64, 25600, False),
    "Qwen/Qwen3-30B-A3B": _dense(48, 2048, 32, 6144, False)
    | {
        "model_type": "qwen3_moe",
        "num_key_value_heads": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
