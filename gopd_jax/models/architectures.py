"""The families of decoders that are implemented, and the description of one model.

What sets a family apart is a row of ARCHITECTURES; what sets a model apart is a ModelConfig.
"""

from __future__ import annotations

import dataclasses

LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What sets one family apart from Llama."""

    class_name: str  # in transformers
    qk_norm: bool = False  # RMSNorm on queries and keys, before rope
    qkv_bias: bool = False  # added to queries, keys and values
    post_norms: bool = False  # an RMSNorm also behind attention and MLP, before they are added
    norm_offset: bool = False  # norms multiply by 1 + weight
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden_size)
    activation: str = "silu"  # of the MLP's gate, by its name in transformers
    routed: bool = False  # the MLP is a choice of experts


ARCHITECTURES = {  # by model_type
    "gemma3_text": Traits(
        class_name="Gemma3ForCausalLM",
        qk_norm=True,
        post_norms=True,
        norm_offset=True,
        scaled_embedding=True,
        activation="gelu_pytorch_tanh",
    ),
    "llama": Traits(class_name="LlamaForCausalLM"),
    "mistral": Traits(class_name="MistralForCausalLM"),
    "qwen2": Traits(class_name="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Traits(class_name="Qwen3ForCausalLM", qk_norm=True),
    "qwen3_moe": Traits(class_name="Qwen3MoeForCausalLM", qk_norm=True, routed=True),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Rope:
    """Rope frequencies stretched for long contexts, as in Llama 3.1 (rope_type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LinearRope:
    """All rope frequencies divided by one factor (rope_type linear)."""

    factor: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class YarnRope:
    """Rope frequencies stretched as in YaRN, https://arxiv.org/abs/2309.00071 (rope_type yarn).

    attention_factor scales cosines and sines; None derives it from factor, and from mscale over
    mscale_all_dim where both are given.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


SCALINGS = {"linear": LinearRope, "llama3": Llama3Rope, "yarn": YarnRope}  # by rope_type


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Adapters W + (alpha / rank) A B beside the matrices whose module name `targets` finds."""

    rank: int
    alpha: float
    targets: str  # a regular expression, searched for in "model.layers.*.self_attn.q_proj.weight"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder. Names are those of Hugging Face's config.json."""

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
    rope_scaling: Llama3Rope | LinearRope | YarnRope | None = None
    rope_local_base_freq: float | None = None  # rope_theta of sliding layers; None: as the others
    query_pre_attn_scalar: float | None = None  # queries are divided by its root; None: head_dim
    sliding_window: int | None = None  # positions that a sliding layer sees, its own included
    layer_types: tuple[str, ...] | None = None  # one of LAYER_TYPES a layer; None: all full
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None  # width of one expert
    norm_topk_prob: bool = False  # the chosen experts' probabilities are made to sum to 1
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    lora: Lora | None = None  # no part of a checkpoint: adapters that are trained beside it

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
        self._check_windows()
        self._check_experts()

    def _check_windows(self):
        types = self.layer_types or ()
        if unknown := sorted(set(types) - set(LAYER_TYPES)):
            raise ValueError(f"layer_types has {unknown}; only {list(LAYER_TYPES)} are implemented")
        if types and len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(types)} layers and num_hidden_layers is "
                f"{self.num_hidden_layers}; give one for each"
            )
        if any(self.slides) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window = {self.sliding_window!r} and layer_types = {self.layer_types!r}: "
                "a window needs layers that are 'sliding_attention', and they a window"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window = {self.sliding_window}; it is 1 or more, or None")

    def _check_experts(self):
        sizes = {
            name: getattr(self, name)
            for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
        }
        if not self.traits.routed:
            if given := [name for name, size in sizes.items() if size is not None]:
                raise ValueError(f"{self.architecture} has no experts; leave {given} unset")
        elif bad := {name: size for name, size in sizes.items() if not size or size < 1}:
            raise ValueError(f"{self.architecture} needs sizes of its experts; {bad} are none")
        elif self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} is more than num_experts = "
                f"{self.num_experts}; choose at most all of them"
            )

    @property
    def traits(self) -> Traits:
        return ARCHITECTURES[self.architecture]

    @property
    def slides(self) -> tuple[bool, ...]:
        """Whether each layer sees sliding_window positions only."""
        if self.layer_types is None:
            return (False,) * self.num_hidden_layers
        return tuple(kind == "sliding_attention" for kind in self.layer_types)
