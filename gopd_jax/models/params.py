"""What a model is: its configuration, and one table of its parameters.

A row of the table says where a parameter lives in the params dict, what Hugging Face calls it, and
how the two layouts relate. Shapes, logical axes (hence sharding), initialisation, import and export
are all read off that row.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from gopd_jax.types import Params

# model_type -> (class name in transformers, RMSNorm on queries and keys)
ARCHITECTURES = {"qwen3": ("Qwen3ForCausalLM", True), "llama": ("LlamaForCausalLM", False)}

REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "rms_norm_eps",
)

# Fields that change the mathematics, with the only value implemented; an absent field has it.
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "auto_map": None,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Rope frequencies stretched for long contexts, as in Llama 3.1 (rope_type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder. Names are those of Hugging Face's config.json."""

    architecture: str  # a key of ARCHITECTURES
    vocab_size: int  # rows of the embedding; a tokenizer may have fewer tokens
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Rope | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture {self.architecture!r} is not supported; there are "
                f"{sorted(ARCHITECTURES)}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}; choose a divisor"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim} is odd; rope rotates pairs, use an even")

    @property
    def qk_norm(self) -> bool:
        return ARCHITECTURES[self.architecture][1]


def from_hf(config: dict) -> ModelConfig:
    """The model that a config.json describes, in the spelling of transformers 4 or 5.

    ValueError where a field is missing, or asks for mathematics that is not implemented here.
    """
    architecture = config.get("model_type")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"model_type {architecture!r} is not supported; there are {sorted(ARCHITECTURES)}"
        )
    required = REQUIRED + (("head_dim", "num_key_value_heads") * (architecture == "qwen3"))
    if missing := [name for name in required if config.get(name) is None]:
        raise ValueError(f"the model's config has no {missing}; copy config.json again")
    rope_theta, rope_scaling, rotary = _rope(config)
    asked = {**config, "partial_rotary_factor": rotary}
    wrong = {k: asked[k] for k, v in ONLY.items() if asked.get(k, v) not in (v, None)}
    kinds = set(config.get("layer_types") or ()) - {"full_attention"}
    if wrong or kinds:
        problems = [f"{k} = {v!r} (only {ONLY[k]!r} is implemented)" for k, v in wrong.items()]
        problems += [f"layer_types {sorted(kinds)} (only 'full_attention' is)"] if kinds else []
        raise ValueError(
            f"this {architecture} model needs {'; '.join(problems)}; use a model without it"
        )
    heads, eos = config["num_attention_heads"], config.get("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        **{name: config[name] for name in REQUIRED},
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        # Both architectures' classes read an absent field as False.
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_position_embeddings=config.get("max_position_embeddings") or 2048,
        bos_token_id=config.get("bos_token_id"),
        eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
        pad_token_id=config.get("pad_token_id"),
    )


def _rope(config: dict) -> tuple[float, Llama3Rope | None, float]:
    """(theta, scaling, rotary fraction) from rope_parameters or from rope_theta, rope_scaling."""
    old, new = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    if clash := sorted(key for key in old.keys() & new.keys() if old[key] != new[key]):
        raise ValueError(
            f"the model's config gives rope_scaling {old} and rope_parameters {new}, which differ "
            f"in {clash}; keep one"
        )
    rope = old | new
    thetas = {float(d["rope_theta"]) for d in (config, rope) if d.get("rope_theta") is not None}
    if len(thetas) > 1:
        raise ValueError(f"the model's config gives two rope_theta, {sorted(thetas)}; keep one")
    if not thetas:
        raise ValueError("the model's config has no rope_theta; add it (10000.0 for old Llamas)")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(
            f"rope_type {kind!r} is not implemented; there are ['default', 'llama3']: use a model "
            "without it, or remove the scaling if the original context length is enough"
        )
    scaling = None
    if kind == "llama3":
        names = [field.name for field in dataclasses.fields(Llama3Rope)]
        if missing := [name for name in names if name not in rope]:
            raise ValueError(f"rope_type 'llama3' needs {missing} beside it in the model's config")
        scaling = Llama3Rope(**{name: rope[name] for name in names})
    rotary = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    return thetas.pop(), scaling, 1.0 if rotary is None else rotary


def to_hf(cfg: ModelConfig) -> dict:
    """config.json of the model, readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
    out = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "architecture"}
    if isinstance(cfg.eos_token_id, tuple):
        out["eos_token_id"] = list(cfg.eos_token_id)
    rope = {"rope_type": "default"}
    if cfg.rope_scaling is not None:
        rope = {"rope_type": "llama3", **dataclasses.asdict(cfg.rope_scaling)}
        out["rope_scaling"] = dict(rope)
    return out | {
        "architectures": [ARCHITECTURES[cfg.architecture][0]],
        "model_type": cfg.architecture,
        "rope_parameters": rope | {"rope_theta": cfg.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **({"use_sliding_window": False} if cfg.architecture == "qwen3" else {"mlp_bias": False}),
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Param:
    """One parameter: path in the params dict, Hugging Face name, and "their axes -> our axes".

    Axis names are the logical names that sharding rules speak of; axes in brackets are merged. A
    path under "layers" is stacked on a leading axis over layers, one tensor each in the file.
    """

    path: str
    hf_name: str
    pattern: str

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def groups(self) -> list[list[str]]:
        """Axis names of each dimension of the file's tensor."""
        left = self.pattern.split("->")[0].replace("(", " ( ").replace(")", " ) ").split()
        groups, inside = [], False
        for word in left:
            if word in "()":
                inside = word == "("
                groups += [[]] if inside else []
            elif inside:
                groups[-1].append(word)
            else:
                groups.append([word])
        return groups

    @property
    def layer_axes(self) -> tuple[str, ...]:
        """Our axes of one layer's array, or of the array itself where it is not stacked."""
        return tuple(self.pattern.split("->")[1].split())

    @property
    def axes(self) -> tuple[str, ...]:
        return ("layers", *self.layer_axes) if self.stacked else self.layer_axes

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        return tuple(axis_sizes(cfg)[axis] for axis in self.axes)

    def hf_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(cfg)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def hf_names(self, cfg: ModelConfig) -> list[str]:
        n_tensors = cfg.num_hidden_layers if self.stacked else 1
        return [self.hf_name.format(layer=i) for i in range(n_tensors)]

    def from_hf(self, tensor, sizes: dict[str, int]):
        """One tensor of the file (or a block of it, with the block's sizes) in our layout."""
        left = [axis for group in self.groups for axis in group]
        split = tensor.reshape([sizes[axis] for axis in left])
        return split.transpose([left.index(axis) for axis in self.layer_axes])

    def to_hf(self, array, cfg: ModelConfig):
        """One layer's array (or the array, where not stacked) in the file's layout."""
        left = [axis for group in self.groups for axis in group]
        split = array.transpose([self.layer_axes.index(axis) for axis in left])
        return split.reshape(self.hf_shape(cfg))

    def initialize(self, key, cfg: ModelConfig, shape: tuple[int, ...]):
        """Ones for norms, normal with standard deviation 0.02 for the rest; float32."""
        if self.name.endswith("norm"):
            return jnp.ones(shape, jnp.float32)
        return 0.02 * jax.random.normal(key, shape, jnp.float32)


_LAYER = "model.layers.{layer}."
_EMBED = (Param("embed", "model.embed_tokens.weight", "vocab embed -> vocab embed"),)
_LAYERS = tuple(
    Param(f"layers/{name}", f"{_LAYER}{hf_name}.weight", pattern)
    for name, hf_name, pattern in (
        ("attention_norm", "input_layernorm", "embed -> embed"),
        ("q", "self_attn.q_proj", "(heads head_dim) embed -> embed heads head_dim"),
        ("k", "self_attn.k_proj", "(kv_heads head_dim) embed -> embed kv_heads head_dim"),
        ("v", "self_attn.v_proj", "(kv_heads head_dim) embed -> embed kv_heads head_dim"),
        ("o", "self_attn.o_proj", "embed (heads head_dim) -> heads head_dim embed"),
        ("mlp_norm", "post_attention_layernorm", "embed -> embed"),
        ("gate", "mlp.gate_proj", "mlp embed -> embed mlp"),
        ("up", "mlp.up_proj", "mlp embed -> embed mlp"),
        ("down", "mlp.down_proj", "embed mlp -> mlp embed"),
    )
)
_QK_NORM = tuple(
    Param(f"layers/{name}", f"{_LAYER}self_attn.{name}.weight", "head_dim -> head_dim")
    for name in ("q_norm", "k_norm")
)
_FINAL_NORM = (Param("final_norm", "model.norm.weight", "embed -> embed"),)
_HEAD = (Param("head", "lm_head.weight", "vocab embed -> vocab embed"),)


def table(cfg: ModelConfig) -> tuple[Param, ...]:
    """The model's parameters, in the order in which they are initialised and written."""
    layers = _LAYERS + (_QK_NORM if cfg.qk_norm else ())
    return _EMBED + layers + _FINAL_NORM + (() if cfg.tie_word_embeddings else _HEAD)


def axis_sizes(cfg: ModelConfig) -> dict[str, int]:
    """Logical axis of the parameters -> its size."""
    return {
        "layers": cfg.num_hidden_layers,
        "vocab": cfg.vocab_size,
        "embed": cfg.hidden_size,
        "heads": cfg.num_attention_heads,
        "kv_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "mlp": cfg.intermediate_size,
    }


def tree(cfg: ModelConfig, leaf_of) -> Params:
    """The params dict with leaf_of(row) at each row's path."""
    out: Params = {}
    for row in table(cfg):
        *above, name = row.path.split("/")
        node = out
        for part in above:
            node = node.setdefault(part, {})
        node[name] = leaf_of(row)
    return out


def leaf(params: Params, row: Param):
    """The array of a row. ValueError where the params dict has none."""
    node = params
    for part in row.path.split("/"):
        if part not in node:
            raise ValueError(f"params have no {row.path!r}; these are another model's")
        node = node[part]
    return node


def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes of the float32 master parameters, as jax.ShapeDtypeStruct."""
    return tree(cfg, lambda row: jax.ShapeDtypeStruct(row.shape(cfg), jnp.float32))


def logical_axes(cfg: ModelConfig) -> Params:
    """A tuple of logical axis names for each parameter."""
    return tree(cfg, lambda row: row.axes)


def init(cfg: ModelConfig, key) -> Params:
    """Random float32 parameters; a row's draw depends on its place in the table and on key."""
    places = {row.path: i for i, row in enumerate(table(cfg))}

    def draw(row):
        key_of_row = jax.random.fold_in(key, places[row.path])
        return row.initialize(key_of_row, cfg, row.shape(cfg))

    return tree(cfg, draw)
