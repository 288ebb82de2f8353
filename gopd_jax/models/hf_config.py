"""config.json to ModelConfig and back, in the spellings of transformers 4 and 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gopd_jax.models.architectures import ARCHITECTURES, LAYER_TYPES, SCALINGS, ModelConfig
from gopd_jax.models.hf_fields import DEFAULTS, IDS, REQUIRED, SIZES, SWITCHES, check_fields

FULL, SLIDING = LAYER_TYPES
# Gemma3ForCausalLM.from_pretrained of such a directory would warn and give random weights.
TEXT_OF_GEMMA3 = (
    "m = Gemma3ForConditionalGeneration.from_pretrained(DIR, dtype='auto'); "
    "t = Gemma3ForCausalLM(m.config.text_config); "
    "t.model, t.lm_head = m.model.language_model, m.lm_head; t.save_pretrained(OUT)"
)


def from_hf(config: dict) -> ModelConfig:
    """The model that a config.json describes, in the spelling of transformers 4 or 5.

    ValueError where a field is missing or unknown, or asks for mathematics that is not implemented.
    """
    kind = config.get("model_type")
    if kind == "gemma3":
        raise ValueError(
            "model_type 'gemma3' (Gemma3ForConditionalGeneration) reads images too, which is not "
            f"implemented; save its text part with transformers: {TEXT_OF_GEMMA3}"
        )
    if kind not in ARCHITECTURES:
        raise ValueError(f"model_type {kind!r} is not supported; there are {sorted(ARCHITECTURES)}")
    config = DEFAULTS.get(kind, {}) | config
    required = REQUIRED + ("num_key_value_heads",) * (kind != "llama")
    required += ("head_dim",) * (kind in ("qwen3", "gemma3_text"))
    if missing := [name for name in required if config.get(name) is None]:
        raise ValueError(f"the model's config has no {missing}; copy config.json again")
    sizes = {name: config[name] for name in SIZES if config.get(name) is not None}
    if wrong := {name: n for name, n in sizes.items() if type(n) is not int or n < 1}:
        raise ValueError(
            f"the model's config gives {wrong}, and each is a number of 1 or more; copy "
            "config.json again"
        )
    switches = {n: config[n] for n in SWITCHES if config.get(n) is not None}
    if wrong := {name: value for name, value in switches.items() if type(value) is not bool}:
        raise ValueError(f"the model's config gives {wrong}; each is true or false")
    _require_numbers(config, ("rms_norm_eps", "query_pre_attn_scalar"), "the model's config")
    check_fields(config, kind)
    heads, eos = config["num_attention_heads"], config.get("eos_token_id")
    window, layer_types = _windows(config, kind)
    return ModelConfig(
        architecture=kind,
        **{name: config[name] for name in REQUIRED},
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        **_rope(config, kind),
        **_experts(config, kind),
        query_pre_attn_scalar=config.get("query_pre_attn_scalar"),
        sliding_window=window,
        layer_types=layer_types,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings") or 2048,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=config.get("pad_token_id"),
    )


def _windows(config: dict, kind: str) -> tuple[int | None, tuple[str, ...] | None]:
    """(sliding_window, layer_types), both None where no layer slides; as transformers' classes."""
    n_layers, window = config["num_hidden_layers"], config.get("sliding_window")
    given = config.get("layer_types")
    if kind in ("qwen2", "qwen3"):
        if not config.get("use_sliding_window"):
            window = None
        first = config["max_window_layers"] if window is not None else n_layers
        types = [SLIDING if i >= first else FULL for i in range(n_layers)]
    elif kind == "gemma3_text":
        period = config.get("sliding_window_pattern") or 6
        types = [SLIDING if (i + 1) % period else FULL for i in range(n_layers)]
    else:  # transformers reads no layer_types here: they may only repeat what it does
        window = window if kind == "mistral" else None
        types = [FULL if window is None else SLIDING] * n_layers
        if given is not None and list(given) != types:
            raise ValueError(
                f"layer_types = {given} in a {kind} model, which is {types[0]!r} throughout with "
                f"sliding_window = {window}; remove layer_types"
            )
    types = tuple(types if given is None else given)
    if types == (FULL,) * n_layers:
        return None, None
    return window, types


def _experts(config: dict, kind: str) -> dict:
    if not ARCHITECTURES[kind].routed:
        return {}
    numbers = {config[k] for k in ("num_experts", "num_local_experts") if config.get(k) is not None}
    if len(numbers) > 1:
        raise ValueError(f"the model's config gives two num_experts, {sorted(numbers)}; keep one")
    return {
        "num_experts": numbers.pop() if numbers else None,
        "num_experts_per_tok": config.get("num_experts_per_tok"),
        "moe_intermediate_size": config.get("moe_intermediate_size"),
        "norm_topk_prob": bool(config.get("norm_topk_prob", False)),
    }


def _rope(config: dict, kind: str) -> dict:
    """rope_theta, rope_scaling and rope_local_base_freq of ModelConfig, from either spelling."""
    if kind != "gemma3_text":
        theta, scaling = _one_rope(config)
        return {"rope_theta": theta, "rope_scaling": scaling}
    # transformers 5 has one dict for each type of layer.
    new = config.get("rope_parameters") or {}
    if left_over := sorted(new.keys() - set(LAYER_TYPES)):
        raise ValueError(
            f"rope_parameters of a gemma3_text model has {left_over}; it has one dict for each of "
            f"{list(LAYER_TYPES)}"
        )
    theta, scaling = _one_rope(config | {"rope_parameters": new.get(FULL)}, default_theta=1e6)
    sliding = {
        "rope_parameters": new.get(SLIDING),
        "rope_theta": config.get("rope_local_base_freq"),
    }
    local, local_scaling = _one_rope(sliding, default_theta=1e4)
    linear = scaling is None or isinstance(scaling, SCALINGS["linear"])
    if not linear or local_scaling is not None:
        raise ValueError(
            "of gemma3_text only rope_type 'linear' on the full layers is implemented, and "
            f"'default' on the sliding ones; this model asks for {scaling} and {local_scaling}"
        )
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_base_freq": local}


def _one_rope(config: dict, *, default_theta: float | None = None):
    """(theta, scaling) from rope_parameters, or from rope_theta and rope_scaling."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if not isinstance(old, dict) or not isinstance(new, dict):
        raise ValueError(f"rope_scaling is {old!r} and rope_parameters {new!r}; each is an object")
    if old and "rope_theta" in new.keys() - old.keys() and config.get("rope_theta") is None:
        raise ValueError(
            "the model's config gives rope_scaling, beside which transformers does not read the "
            "rope_theta of rope_parameters; remove rope_scaling, or set rope_theta itself"
        )
    if clash := sorted(key for key in old.keys() & new.keys() if old[key] != new[key]):
        raise ValueError(
            f"the model's config gives rope_scaling {old} and rope_parameters {new}, which differ "
            f"in {clash}; keep one"
        )
    rope = {key: value for key, value in (old | new).items() if value is not None}
    for where in (config, rope):
        _require_numbers(where, ("rope_theta",), "the model's config")
    thetas = {float(d["rope_theta"]) for d in (config, rope) if d.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ValueError(f"the model's config gives two rope_theta, {sorted(thetas)}; keep one")
    theta = thetas.pop() if thetas else default_theta
    if theta is None:
        raise ValueError("the model's config has no rope_theta; add it (10000.0 for old Llamas)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and kind not in SCALINGS:
        raise ValueError(
            f"rope_type {kind!r} is not implemented; there are {['default', *SCALINGS]}: use a "
            "model without it, or remove the scaling if the original context length is enough"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor = {rope['partial_rotary_factor']} (only 1.0 is implemented); "
            "use a model without it"
        )
    fields = dataclasses.fields(SCALINGS[kind]) if kind != "default" else ()
    given = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown := sorted(given - {field.name for field in fields}):
        raise ValueError(
            f"rope_type {kind!r} has unknown field {', '.join(unknown)} beside it in the model's "
            "config; remove it if it changes nothing"
        )
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in rope]:
        raise ValueError(f"rope_type {kind!r} needs {missing} beside it in the model's config")
    numbers = given - {"truncate", "mscale", "mscale_all_dim"}
    _require_numbers(rope, sorted(numbers), f"rope_type {kind!r} in the model's config")
    return theta, SCALINGS[kind](**{name: rope[name] for name in given}) if fields else None


def _require_numbers(config: dict, names: Sequence[str], where: str) -> None:
    numbers = {name: config[name] for name in names if config.get(name) is not None}
    if wrong := {n: x for n, x in numbers.items() if type(x) not in (int, float) or not x > 0}:
        raise ValueError(f"{where} gives {wrong}; each is a number above 0")


def to_hf(cfg: ModelConfig) -> dict:
    """config.json of the model, readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
    traits, kind = cfg.traits, cfg.architecture
    names = (*REQUIRED, *IDS, "num_key_value_heads", "head_dim", "rope_theta")
    names += ("tie_word_embeddings", "max_position_embeddings")
    out = {name: getattr(cfg, name) for name in names} | {"rope_scaling": None}
    if isinstance(cfg.eos_token_id, tuple):
        out["eos_token_id"] = list(cfg.eos_token_id)
    rope = {"rope_type": "default"}
    if cfg.rope_scaling is not None:
        name = next(k for k, v in SCALINGS.items() if isinstance(cfg.rope_scaling, v))
        fields = {f.name: f.default for f in dataclasses.fields(cfg.rope_scaling)}
        given = {k: getattr(cfg.rope_scaling, k) for k in fields}
        rope = {"rope_type": name} | {k: v for k, v in given.items() if v != fields[k]}
        out["rope_scaling"] = dict(rope)
    rope |= {"rope_theta": cfg.rope_theta}
    out |= {
        "architectures": [traits.class_name],
        "model_type": kind,
        "rope_parameters": rope,
        "attention_dropout": 0.0,
    }
    out["hidden_activation" if kind == "gemma3_text" else "hidden_act"] = traits.activation
    if kind not in ("mistral", "qwen2"):  # transformers' classes of those have no such field
        out["attention_bias"] = False
    if kind == "qwen2" and cfg.head_dim * cfg.num_attention_heads == cfg.hidden_size:
        del out["head_dim"]  # nor this one; it is honoured where it says something else
    if kind == "llama":
        out["mlp_bias"] = False
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": cfg.rope_local_base_freq}
        out["rope_parameters"] = {FULL: rope, SLIDING: local}
        out["rope_local_base_freq"] = cfg.rope_local_base_freq
        out["query_pre_attn_scalar"] = cfg.query_pre_attn_scalar
    if traits.routed:
        out |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
        sizes = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
        out |= {name: getattr(cfg, name) for name in sizes}
    return out | _windows_to_hf(cfg)


def _windows_to_hf(cfg: ModelConfig) -> dict:
    """The fields that say which layers slide, in every spelling that can say it."""
    n_layers, slides = cfg.num_hidden_layers, cfg.slides
    if cfg.architecture == "llama":
        return {}
    if cfg.architecture == "mistral":
        return {"sliding_window": cfg.sliding_window}
    if cfg.architecture == "gemma3_text":
        types = {"layer_types": [SLIDING if s else FULL for s in slides]}
        if not any(slides):
            return types | {"sliding_window_pattern": 1}
        periods = (n for n in range(2, n_layers + 2))
        fits = [n for n in periods if slides == tuple(bool((i + 1) % n) for i in range(n_layers))]
        pattern = {"sliding_window_pattern": fits[0]} if fits else {}
        return types | pattern | {"sliding_window": cfg.sliding_window}
    if not any(slides):
        return {"use_sliding_window": False}
    return {
        "use_sliding_window": True,
        "sliding_window": cfg.sliding_window,
        "max_window_layers": slides.index(True),
        "layer_types": list(cfg.layer_types),
    }
