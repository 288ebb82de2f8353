"""config.json as published for models of each family, and what it means."""

import dataclasses

import families
import pytest
from families import FULL, SLIDING

from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.models.params import LinearRope, Llama3Rope, YarnRope

QWEN25_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
LLAMA32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
EVERY_SIXTH_FULL = tuple(FULL if i % 6 == 5 else SLIDING for i in range(26))
PUBLISHED = {
    "Qwen2.5-7B": (QWEN25_7B, {"head_dim": 128, "sliding_window": None, "layer_types": None}),
    "Qwen2.5-7B for long contexts": (
        QWEN25_7B | {"rope_scaling": YARN},
        {"rope_scaling": YarnRope(factor=4.0, original_max_position_embeddings=32768)},
    ),
    "Qwen2 whose last layers slide": (
        QWEN25_7B | {"use_sliding_window": True, "max_window_layers": 21},
        {"sliding_window": 131072, "layer_types": (FULL,) * 21 + (SLIDING,) * 7},
    ),
    "Qwen2 with a window that no layer has": (
        QWEN25_7B | {"use_sliding_window": True},
        {"sliding_window": None, "layer_types": None},
    ),
    "Qwen3-30B-A3B": (
        QWEN3_30B_A3B,
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128},
    ),
    "Qwen3-30B-A3B, saved by transformers 5": (
        {k: v for k, v in QWEN3_30B_A3B.items() if k != "num_experts"} | {"num_local_experts": 128},
        {"num_experts": 128},
    ),
    "Llama-3.2-1B": (
        LLAMA32_1B,
        {
            "tie_word_embeddings": True,
            "eos_token_id": (128001, 128008, 128009),
            "rope_scaling": Llama3Rope(
                factor=32.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        },
    ),
    "Mistral-7B-v0.1": (
        MISTRAL_7B,
        {"sliding_window": 4096, "layer_types": (SLIDING,) * 32, "head_dim": 128},
    ),
    "Mistral-7B-v0.3": (
        MISTRAL_7B | {"sliding_window": None},
        {"sliding_window": None, "layer_types": None},
    ),
    "gemma-3-1b": (
        GEMMA3_1B,
        {
            "layer_types": EVERY_SIXTH_FULL,
            "sliding_window": 512,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": None,
            "tie_word_embeddings": True,  # not in the file: the class's default
        },
    ),
    "gemma-3 with a stretched context": (
        GEMMA3_1B | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        {"rope_scaling": LinearRope(factor=8.0)},
    ),
}


@pytest.mark.parametrize(("config", "want"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_a_published_config_is_read_as_it_is_meant(config, want):
    cfg = lm_params.from_hf(config)
    assert {name: getattr(cfg, name) for name in want} == want
    assert lm_params.from_hf(lm_params.to_hf(cfg)) == cfg


@pytest.mark.torch
@pytest.mark.parametrize(("config", "want"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_transformers_reads_and_writes_the_same_model(config, want, tmp_path):
    """Its class reads a published file and ours as one; what it writes we read as the same."""
    from transformers import CONFIG_MAPPING

    cfg = lm_params.from_hf(config)
    read = CONFIG_MAPPING[cfg.architecture].from_dict
    theirs, ours = (read(c).to_dict() for c in (config, lm_params.to_hf(cfg)))
    # Neutral, or a window that no layer has.
    neutral = ["dtype", "cache_implementation", "max_window_layers", "transformers_version"]
    neutral += ["sliding_window", "use_sliding_window"] if cfg.sliding_window is None else []
    for name in neutral:
        theirs.pop(name, None), ours.pop(name, None)
    theirs["rope_parameters"].pop("type", None)  # the older name of rope_type
    assert ours == theirs
    read(config).save_pretrained(tmp_path)
    assert hf.load_config(tmp_path) == cfg


def test_absent_fields_have_the_defaults_of_transformers():
    def without(config, *names):
        return lm_params.from_hf({k: v for k, v in config.items() if k not in names})

    assert without(MISTRAL_7B, "sliding_window").sliding_window == 4096
    gone = ("rope_theta", "rope_local_base_freq", "sliding_window_pattern", "query_pre_attn_scalar")
    want = lm_params.from_hf(GEMMA3_1B)
    assert without(GEMMA3_1B, *gone) == want
    assert without(GEMMA3_1B, "sliding_window").sliding_window == 4096
    slides = QWEN25_7B | {"use_sliding_window": True, "num_hidden_layers": 30}
    got = without(slides, "sliding_window", "max_window_layers")
    assert (got.sliding_window, got.slides) == (4096, (False,) * 28 + (True,) * 2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen3_moe", {"num_experts": 0}, r"needs sizes of its experts; \{'num_experts': 0\}"),
        ("qwen3", {"num_experts": 4}, r"qwen3 has no experts; leave \['num_experts'\] unset"),
        ("gemma3_text", {"layer_types": (SLIDING,)}, "names 1 layers and num_hidden_layers is 3"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window = None and layer_types"),
        ("mistral", {"sliding_window": 5}, "sliding_window = 5 and layer_types = None"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(families.MODELS[name], **changes)
