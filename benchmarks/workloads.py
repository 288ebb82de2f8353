"""Steps of named sizes with random weights: what the speed benchmarks time, here and elsewhere.

`small` and `tiny` are those of the peers' benchmarks: Qwen3 with tied embeddings, float32, a
temperature of 1, AdamW behind a clip at 1. The end token lies one past the vocabulary, so every row
runs to its full length and nobody saves work by ending early.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from gopd_jax import sharding
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import ModelConfig
from gopd_jax.objectives import objective
from gopd_jax.optimizer import make_optimizer
from gopd_jax.recipe import Frozen, Recipe, init_state
from gopd_jax.types import Prompts, TrainState


@dataclasses.dataclass(frozen=True)
class Size:
    """A model: widths and counts."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """Rows of prompt + new tokens; n_teachers have equal shares of the rows."""

    student: Size
    teacher: Size
    vocab: int
    rows: int
    prompt: int
    new: int
    n_teachers: int = 1
    microbatches: int = 1
    head_chunk: int = 64


SIZES = {
    "small": Workload(
        student=Size(256, 768, 4, 4, 2, 64),
        teacher=Size(512, 1536, 8, 8, 4, 64),
        vocab=4096,
        rows=32,
        prompt=64,
        new=128,
    ),
    "tiny": Workload(
        student=Size(128, 384, 2, 4, 2, 32),
        teacher=Size(256, 768, 4, 8, 4, 32),
        vocab=512,
        rows=64,
        prompt=16,
        new=48,
    ),
}


@dataclasses.dataclass(frozen=True)
class Made:
    """A workload on a mesh, ready to be stepped."""

    recipe: Recipe
    params: Any
    frozen: Frozen
    prompts: Prompts
    key: jax.Array

    def state(self) -> TrainState:
        return init_state(self.recipe, self.params)


def make(
    of: Workload,
    *,
    loss="policy_gradient",
    lam=1.0,
    mesh=None,
    dtype="float32",
    remat=None,
    **changes,
) -> Made:
    """The workload with random weights and prompts; remat: the student's, changes: the Recipe's."""
    mesh = mesh or sharding.make_mesh(None, 1, 1, devices=jax.devices()[:1])
    goal = objective.build(loss=loss, lam=lam)
    optimizer, rate = make_optimizer(
        learning_rate=1e-5,
        schedule="constant",
        warmup_steps=0,
        steps=1000,
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    shares = np.full(of.n_teachers, of.rows // of.n_teachers)
    recipe = Recipe(
        mesh=mesh,
        student=dataclasses.replace(_decoder(of, of.student, dtype), remat=remat),
        teachers=(_decoder(of, of.teacher, dtype),) * of.n_teachers,
        routes=(tuple(range(of.n_teachers)),),
        reference=_decoder(of, of.student, dtype) if goal.needs_reference else None,
        objective=goal,
        optimizer=optimizer,
        learning_rate=rate,
        source="student",
        group_rows=tuple(shares.tolist()),
        completion_length=of.new,
        temperature=1.0,
        eos_ids=(of.vocab,),
        n_vocab=of.vocab,
        microbatches=of.microbatches,
        head_chunk=of.head_chunk,
    )
    recipe = dataclasses.replace(recipe, **changes)
    params = _weights(mesh, recipe.student, 0)
    draw = np.random.default_rng(0)
    prompts = Prompts(
        tokens_BP=draw.integers(8, of.vocab, (of.rows, of.prompt)).astype(np.int32),
        valid_BP=np.ones((of.rows, of.prompt), bool),
        task_B=np.repeat(np.arange(of.n_teachers), shares).astype(np.int32),
        group_B=np.arange(of.rows, dtype=np.int32),
        row_B=np.arange(of.rows, dtype=np.int32),
    )
    return Made(
        recipe=recipe,
        params=params,
        frozen=Frozen(
            teachers=tuple(_weights(mesh, t, 1 + i) for i, t in enumerate(recipe.teachers)),
            reference=params if goal.needs_reference else None,
        ),
        prompts=jax.device_put(prompts, sharding.by_rows(mesh)),
        key=jax.random.key(1),
    )


def _decoder(of: Workload, size: Size, dtype: str) -> Decoder:
    return Decoder(
        ModelConfig(
            architecture="qwen3",
            vocab_size=of.vocab,
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            head_dim=size.head_dim,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            tie_word_embeddings=True,
        ),
        dtype,
    )


def _weights(mesh, decoder: Decoder, seed: int):
    where = sharding.shardings(mesh, lm_params.logical_axes(decoder.cfg))
    made = jax.jit(lambda key: lm_params.init(decoder.cfg, key), out_shardings=where)
    return made(jax.random.key(seed))
