"""What is static about a step, what is frozen in it, and the state that it advances."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh

from gopd_jax import critic as critics
from gopd_jax import sharding
from gopd_jax.models import lora
from gopd_jax.models.cache import widths
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import abstract_params, logical_axes
from gopd_jax.objectives.objective import Objective
from gopd_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several teachers of one task: weights as Recipe.routes, and where they are averaged."""

    weights: tuple[tuple[float, ...], ...]
    space: str  # probability or log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything static about a step."""

    mesh: Mesh
    student: Decoder
    teachers: tuple[Decoder, ...]  # each once; empty where none scores
    # Index in teachers of each task's own. Where a task has several there are as many such tuples;
    # a task with fewer repeats one at weight 0.
    routes: tuple[tuple[int, ...], ...]
    reference: Decoder | None
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable  # updates made -> rate, for the log
    source: str  # student, teacher or data: who writes the completions
    group_rows: tuple[int, ...]  # rows of each task; a batch is sorted by task
    completion_length: int
    temperature: float
    eos_ids: tuple[int, ...]
    n_vocab: int  # ids that can be sampled
    microbatches: int
    head_chunk: int
    buckets: int = 1  # widths at which pieces of the batch are scored and learnt from
    ema_decay: float | None = None  # of the student's moving average, where a teacher follows it
    mixture: Mixture | None = None
    updates: int = 1  # optimizer updates of a pass over the batch, each of as many of its rows
    epochs: int = 1  # passes
    slots: int | None = None  # rows that are sampled at one time; None: all
    sampling_buckets: int = 1  # widths of the cache as a token reads it
    prompt_buckets: int = 1  # widths that prompts are cut to as they are sampled from
    cache_dtype: str | None = None  # 8 bits for the keys and values that sampling reads
    sampling_dtype: str | None = None  # 8 bits for the weights that sampling reads
    lag: int = 0  # steps by which the sampler's weights are older than the student's
    critic: critics.Critic | None = None
    weights_dtype: str = "float32"  # of what is trained, between the steps

    @property
    def pieces(self) -> int:
        """Parts of the batch that exist one at a time."""
        return self.updates * self.microbatches

    @property
    def widths(self) -> tuple[int, ...]:
        """Completion tokens that pieces of the batch are cut to, the least that holds them."""
        return widths(self.completion_length, self.buckets)

    @property
    def closed_form(self) -> bool:
        """Whether the critic's value holds the state's own expected reward, -KL."""
        return self.critic is not None and self.critic.closed_form

    @property
    def needs_vocabulary(self) -> bool:
        """Whether the frozen models' distributions are needed, not their sampled tokens' alone."""
        return self.objective.needs_vocabulary or self.closed_form

    @property
    def prescored(self) -> bool:
        """Whether the student scores the batch before the first update of it."""
        return self.objective.prescored or self.updates * self.epochs > 1


@struct.dataclass
class Frozen:
    """Parameters that no gradient reaches: each teacher's, and the reference's or None.

    They may lie in host memory (memory kind pinned_host): the step brings them in one model after
    another, and keeps none. A teacher that is None follows the student: see `following`. base is
    what of the student is frozen, where adapters alone are trained.
    """

    teachers: tuple[Params | None, ...]
    reference: Params | None
    base: Params | None = None


def state_shardings(recipe: Recipe) -> TrainState:
    """NamedShardings of a TrainState: moments lie as the parameters they belong to.

    pending is one for all of the rollouts that wait: they lie by rows.
    """
    cfg, mesh = recipe.student.cfg, recipe.mesh
    of_params = sharding.shardings(mesh, lora.split(logical_axes(cfg))[0])
    whole = sharding.replicated(mesh)
    opt_state = jax.eval_shape(recipe.optimizer.init, lora.split(abstract_params(cfg))[0])
    of_opt = optax.tree_utils.tree_map_params(
        recipe.optimizer,
        lambda _, s: s,
        opt_state,
        of_params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(
        step=whole,
        params=of_params,
        opt_state=of_opt,
        ema=None if recipe.ema_decay is None else of_params,
        critic=None if recipe.critic is None else whole,
        pending=sharding.by_rows(mesh) if recipe.lag else None,
    )


def init_state(recipe: Recipe, params: Params, *, seed: int | None = None) -> TrainState:
    """Step 0 of the student's parameters, sharded as `state_shardings`. params is not donated.

    Where the student has adapters, the state holds these alone. seed: of the critic's first
    weights, where it is not recipe.critic's; one compiled program serves all seeds.
    """
    if recipe.critic is not None and seed is None:
        seed = recipe.critic.seed
    start = jax.jit(_start, static_argnums=0, out_shardings=state_shardings(recipe))
    # A Python int would be an int32, and seeds go up to 2^32.
    return start(recipe, params, None if seed is None else np.uint32(seed))


def _start(recipe: Recipe, params: Params, seed) -> TrainState:
    params, _ = lora.split(params)
    # A copy: the state is donated to the step, and the reference may be the same arrays.
    params = jax.tree.map(lambda x: jnp.copy(x).astype(recipe.weights_dtype), params)
    # An average moves by too little for bfloat16.
    average = recipe.ema_decay is not None
    ema = jax.tree.map(lambda x: jnp.copy(x).astype(jnp.float32), params) if average else None
    values = None
    if recipe.critic is not None:
        values = critics.init(recipe.critic, recipe.student.cfg.hidden_size, seed)
    return TrainState(jnp.int32(0), params, recipe.optimizer.init(params), ema, values)


def abstract_state(recipe: Recipe, rollout=None) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; rollout: shapes of one, if the sampler lags."""
    cfg = recipe.student.cfg
    shapes = jax.eval_shape(lambda params: _start(recipe, params, 0), abstract_params(cfg))
    shapes = shapes.replace(pending=(rollout,) * recipe.lag if recipe.lag else None)

    def laid(where, tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    return jax.tree.map(laid, state_shardings(recipe), shapes)


def following(frozen: Frozen, state: TrainState) -> Frozen:
    """The frozen models, with the student's moving average for each teacher that follows it."""
    if None not in frozen.teachers:
        return frozen
    average = lora.join(state.ema, frozen.base)
    teachers = (average if params is None else params for params in frozen.teachers)
    return frozen.replace(teachers=tuple(teachers))
