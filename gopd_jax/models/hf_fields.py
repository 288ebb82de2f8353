"""Every field that a config.json may have, of each architecture.

A field is read (by hf_config), or has only one value that is implemented, or is known to leave the
mathematics of evaluation alone. One that is none of them is an error: it might ask for something
that would silently not be done.
"""

from __future__ import annotations

from gopd_jax.models.architectures import ARCHITECTURES

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)
SIZES = tuple(name for name in REQUIRED if name != "rms_norm_eps")
SIZES += ("num_key_value_heads", "head_dim", "max_position_embeddings")
SWITCHES = ("tie_word_embeddings", "norm_topk_prob")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
READ = {
    *REQUIRED,
    *IDS,
    "model_type",
    "architectures",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
}
_WINDOWS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_EXPERTS = {"num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"}
READ_TOO = {
    "gemma3_text": {
        "query_pre_attn_scalar",
        "sliding_window",
        "sliding_window_pattern",
        "layer_types",
        "rope_local_base_freq",
    },
    "llama": set(),
    "mistral": {"sliding_window", "layer_types"},
    "qwen2": _WINDOWS,
    "qwen3": _WINDOWS,
    "qwen3_moe": {*_EXPERTS, "norm_topk_prob", "layer_types"},
}

# Fields that change the mathematics, with the only value implemented; an absent field has it, and
# null says the same as absent.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_mrope": False,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "quantization_config": None,
    "auto_map": None,
    "per_layer_config": None,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
}
ONLY_TOO = {
    "gemma3_text": {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    "llama": {"use_sliding_window": False},
    "mistral": {"use_sliding_window": False},
    "qwen2": {"attention_bias": True},
    "qwen3": {},
    # transformers 4 and 5 differ in which layers would slide.
    "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
}

NEUTRAL = {
    # where the file comes from, and how transformers runs it
    *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "tokenizer_class"),
    *("dtype", "torch_dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "unsloth_fixed"),
    *("unsloth_version", "attn_implementation", "_attn_implementation", "experts_implementation"),
    *("_attn_implementation_autoset", "_experts_implementation", "chunk_size_feed_forward"),
    *("is_llama_config", "transformers.js_config"),
    "pretraining_tp",  # the same products in pieces
    # what is returned, and the losses and heads of other tasks
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("use_return_dict", "use_cache", "router_aux_loss_coef", "tie_last_hidden_states"),
    *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task"),
    *("task_specific_params", "prefix", "sep_token_id", "decoder_start_token_id"),
    # only training: initialisation and dropout, which is 0 in all of these models
    *("initializer_range", "attention_dropout", "keys_to_ignore_at_inference"),
    # sampling, which generation_config.json and this program's own settings speak of
    *("do_sample", "temperature", "top_k", "top_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("max_length", "min_length", "max_new_tokens", "num_beams", "num_beam_groups"),
    *("num_return_sequences", "diversity_penalty", "early_stopping", "length_penalty"),
    *("repetition_penalty", "encoder_repetition_penalty", "exponential_decay_length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "output_scores"),
    *("remove_invalid_values", "return_dict_in_generate", "cache_implementation"),
}
NEUTRAL_TOO = {
    "gemma3_text": {"_sliding_window_pattern"},  # layer_types stands beside it
    "llama": {"sliding_window"},  # transformers' class has no such layers
    "mistral": {"max_window_layers"},
    "qwen2": set(),
    "qwen3": set(),
    "qwen3_moe": {"sliding_window", "max_window_layers"},
}
# What transformers' class reads where the field is absent, if it is not what ours has.
DEFAULTS = {
    "gemma3_text": {
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "mistral": {"sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28},
}


def check_fields(config: dict, kind: str) -> None:
    """ValueError that names every field which is unknown, or has a value not implemented."""
    only = ONLY | ONLY_TOO[kind]
    known = {*READ, *READ_TOO[kind], *NEUTRAL, *NEUTRAL_TOO[kind], *only}
    if unknown := sorted(config.keys() - known):
        raise ValueError(
            f"unknown field {', '.join(unknown)} in the config of this {kind} model, which may ask "
            "for something that is not implemented; remove it from config.json if it changes "
            "nothing in what the model computes"
        )
    wrong = {k: config[k] for k, v in only.items() if config.get(k, v) not in (v, None)}
    problems = [f"{k} = {v!r} (only {only[k]!r} is implemented)" for k, v in wrong.items()]
    name = ARCHITECTURES[kind].class_name
    if config.get("architectures") and name not in config["architectures"]:
        problems.append(f"architectures = {config['architectures']} (only {name!r} is implemented)")
    if problems:
        raise ValueError(f"this {kind} model needs {'; '.join(problems)}; use a model without it")
