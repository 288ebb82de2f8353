"""One table of a model's parameters; its configuration is in architectures and hf_config.

A row of the table says where a parameter lives in the params dict, what Hugging Face calls it, and
how the two layouts relate. Shapes, logical axes (hence sharding), initialisation, import and export
are all read off that row.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import jax
import jax.numpy as jnp

from gopd_jax.models.architectures import (
    ARCHITECTURES,
    LinearRope,
    Llama3Rope,
    Lora,
    ModelConfig,
    YarnRope,
)
from gopd_jax.models.hf_config import from_hf, to_hf
from gopd_jax.types import Params

__all__ = [
    "ARCHITECTURES",
    "LinearRope",
    "Llama3Rope",
    "Lora",
    "ModelConfig",
    "Param",
    "YarnRope",
    "abstract_params",
    "adapted",
    "axis_sizes",
    "from_hf",
    "init",
    "leaf",
    "logical_axes",
    "table",
    "to_hf",
    "tree",
]


@dataclasses.dataclass(frozen=True, slots=True)
class Param:
    """One parameter: path in the params dict, Hugging Face name, and "their axes -> our axes".

    Axis names are the logical names that sharding rules speak of; axes in brackets are merged. A
    path under "layers" is stacked on a leading axis over layers, one tensor each in the file, and
    on one over experts behind it where the name counts them.
    """

    path: str
    hf_name: str
    pattern: str

    @property
    def stacked(self) -> bool:
        return self.path.startswith("layers/")

    @property
    def stack(self) -> tuple[str, ...]:
        """Leading axes over which the file has one tensor each."""
        return ("layers", "experts")[: self.stacked + ("{expert}" in self.hf_name)]

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
    def tensor_axes(self) -> tuple[str, ...]:
        """Our axes of what one tensor of the file holds."""
        return tuple(self.pattern.split("->")[1].split())

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.stack, *self.tensor_axes)

    def shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        return tuple(axis_sizes(cfg)[axis] for axis in self.axes)

    def hf_shape(self, cfg: ModelConfig) -> tuple[int, ...]:
        sizes = axis_sizes(cfg)
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.groups)

    def hf_names(self, cfg: ModelConfig) -> list[str]:
        """Of the file's tensors, in the order of the stacked axes."""
        counts = [range(axis_sizes(cfg)[axis]) for axis in self.stack]
        words = [axis.removesuffix("s") for axis in self.stack]
        return [self.hf_name.format(**dict(zip(words, i))) for i in itertools.product(*counts)]

    def from_hf(self, tensor, sizes: dict[str, int]):
        """One tensor of the file (or a block of it, with the block's sizes) in our layout."""
        left = [axis for group in self.groups for axis in group]
        split = tensor.reshape([sizes[axis] for axis in left])
        return split.transpose([left.index(axis) for axis in self.tensor_axes])

    def to_hf(self, array, cfg: ModelConfig):
        """What one tensor of the file holds, from our layout to the file's."""
        left = [axis for group in self.groups for axis in group]
        split = array.transpose([self.tensor_axes.index(axis) for axis in left])
        return split.reshape(self.hf_shape(cfg))

    def initialize(self, key, cfg: ModelConfig, shape: tuple[int, ...]):
        """Norms that multiply by 1, no bias, normal with deviation 0.02 for the rest; float32."""
        if self.name.endswith("bias") or (self.name.endswith("norm") and cfg.traits.norm_offset):
            return jnp.zeros(shape, jnp.float32)
        if self.name.endswith("norm"):
            return jnp.ones(shape, jnp.float32)
        return 0.02 * jax.random.normal(key, shape, jnp.float32)


def _layer(*rows: tuple[str, str, str]) -> tuple[Param, ...]:
    return tuple(
        Param(f"layers/{name}", f"model.layers.{{layer}}.{hf_name}", pattern)
        for name, hf_name, pattern in rows
    )


_EMBED = (Param("embed", "model.embed_tokens.weight", "vocab embed -> vocab embed"),)
_ATTENTION = _layer(
    ("attention_norm", "input_layernorm.weight", "embed -> embed"),
    ("q", "self_attn.q_proj.weight", "(heads head_dim) embed -> embed heads head_dim"),
    ("k", "self_attn.k_proj.weight", "(kv_heads head_dim) embed -> embed kv_heads head_dim"),
    ("v", "self_attn.v_proj.weight", "(kv_heads head_dim) embed -> embed kv_heads head_dim"),
    ("o", "self_attn.o_proj.weight", "embed (heads head_dim) -> heads head_dim embed"),
)
_QKV_BIAS = _layer(
    ("q_bias", "self_attn.q_proj.bias", "(heads head_dim) -> heads head_dim"),
    ("k_bias", "self_attn.k_proj.bias", "(kv_heads head_dim) -> kv_heads head_dim"),
    ("v_bias", "self_attn.v_proj.bias", "(kv_heads head_dim) -> kv_heads head_dim"),
)
_MLP_NORM = _layer(("mlp_norm", "post_attention_layernorm.weight", "embed -> embed"))
_SANDWICH = _layer(
    ("attention_post_norm", "post_attention_layernorm.weight", "embed -> embed"),
    ("mlp_norm", "pre_feedforward_layernorm.weight", "embed -> embed"),
    ("mlp_post_norm", "post_feedforward_layernorm.weight", "embed -> embed"),
)
_MLP = _layer(
    ("gate", "mlp.gate_proj.weight", "mlp embed -> embed mlp"),
    ("up", "mlp.up_proj.weight", "mlp embed -> embed mlp"),
    ("down", "mlp.down_proj.weight", "embed mlp -> mlp embed"),
)
_ROUTED = _layer(
    ("router", "mlp.gate.weight", "routes embed -> embed routes"),
    ("expert_gate", "mlp.experts.{expert}.gate_proj.weight", "expert embed -> embed expert"),
    ("expert_up", "mlp.experts.{expert}.up_proj.weight", "expert embed -> embed expert"),
    ("expert_down", "mlp.experts.{expert}.down_proj.weight", "embed expert -> expert embed"),
)
_QK_NORM = _layer(
    ("q_norm", "self_attn.q_norm.weight", "head_dim -> head_dim"),
    ("k_norm", "self_attn.k_norm.weight", "head_dim -> head_dim"),
)
_FINAL_NORM = (Param("final_norm", "model.norm.weight", "embed -> embed"),)
_HEAD = (Param("head", "lm_head.weight", "vocab embed -> vocab embed"),)


def table(cfg: ModelConfig) -> tuple[Param, ...]:
    """The model's parameters, in the order in which they are initialised and written."""
    traits = cfg.traits
    layers = _ATTENTION + (_SANDWICH if traits.post_norms else _MLP_NORM)
    layers += _ROUTED if traits.routed else _MLP
    layers += _QK_NORM if traits.qk_norm else ()
    layers += _QKV_BIAS if traits.qkv_bias else ()
    rows = _EMBED + layers + _FINAL_NORM + (() if cfg.tie_word_embeddings else _HEAD)
    return rows if cfg.lora is None else rows + _adapters(adapted(rows, cfg.lora))


def adapted(rows: tuple[Param, ...], lora: Lora) -> tuple[Param, ...]:
    """Rows whose module name lora.targets finds.

    ValueError where it finds none, or one that no adapter is implemented for.
    """
    matrices = [row for row in rows if row.stacked and len(row.groups) == 2]
    names = {row: row.hf_name.format(layer="*", expert="*") for row in matrices}
    found = [row for row in matrices if re.search(lora.targets, names[row])]
    if not found:
        raise ValueError(f"lora.targets = {lora.targets!r} finds none of {list(names.values())}")
    if routed := [names[row] for row in found if "experts" in row.stack or row.name == "router"]:
        raise ValueError(
            f"lora.targets = {lora.targets!r} finds {routed}, and adapters of routed experts are "
            r"not implemented; choose others: 'self_attn\.', say"
        )
    return tuple(found)


def _adapters(rows: tuple[Param, ...]) -> tuple[Param, ...]:
    """A and B of each row, under the names and in the layout of PEFT's files."""
    found = []
    for row in rows:
        outer, inner = (" ".join(group) for group in row.groups)
        module = f"base_model.model.{row.hf_name.removesuffix('.weight')}"
        found += [
            Param(
                f"{row.path}_lora_a", f"{module}.lora_A.weight", f"rank ({inner}) -> {inner} rank"
            ),
            Param(
                f"{row.path}_lora_b", f"{module}.lora_B.weight", f"({outer}) rank -> rank {outer}"
            ),
        ]
    return tuple(found)


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
        # The router is whole on every device, so that each can choose for its own tokens.
        "routes": cfg.num_experts,
        "experts": cfg.num_experts,
        "expert": cfg.moe_intermediate_size,
        "rank": cfg.lora.rank if cfg.lora else None,
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
