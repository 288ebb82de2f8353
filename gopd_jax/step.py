"""One training step: generate, score, weigh, update; fused into one jit, or in stages.

The stages are plain functions of a static Recipe and arrays. `fused` composes them into a single
compiled program with a donated state; `staged` compiles them apart, for when the host has to work
between them (verifier rewards). Both run the same functions and give the same numbers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from gopd_jax import sampler, scoring, sharding
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import abstract_params, logical_axes
from gopd_jax.objectives.diagnostics import diagnostics
from gopd_jax.objectives.objective import Objective
from gopd_jax.types import Mean, Params, Prompts, Rollout, Scores, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything static about a step."""

    mesh: Mesh
    student: Decoder
    teachers: tuple[Decoder, ...]  # of the tasks in their order; empty where none scores
    reference: Decoder | None
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: Callable  # step -> rate, for the log
    source: str  # student, teacher or data: who writes the completions
    group_rows: tuple[int, ...]  # rows of each task; a batch is sorted by task
    completion_length: int
    temperature: float
    eos_ids: tuple[int, ...]
    n_vocab: int  # ids that can be sampled
    microbatches: int
    head_chunk: int


@struct.dataclass
class Frozen:
    """Parameters that no gradient reaches: each task's teacher, and the reference or None."""

    teachers: tuple[Params, ...]
    reference: Params | None


def make_optimizer(
    *,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    steps: int,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float,
):
    """(AdamW behind a clip of the global norm, its schedule: step -> rate).

    schedule: "constant", or "cosine" to 0 at `steps`; either after a linear warm-up from 0.
    """
    rate = {
        "constant": optax.constant_schedule(learning_rate),
        "cosine": optax.cosine_decay_schedule(learning_rate, max(steps - warmup_steps, 1)),
    }[schedule]
    if warmup_steps:
        warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
        rate = optax.join_schedules([warmup, rate], [warmup_steps])
    adamw = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw), rate


def state_shardings(recipe: Recipe) -> TrainState:
    """NamedShardings of a TrainState: moments lie as the parameters they belong to."""
    cfg, mesh = recipe.student.cfg, recipe.mesh
    of_params = sharding.shardings(mesh, logical_axes(cfg))
    whole = sharding.replicated(mesh)
    opt_state = jax.eval_shape(recipe.optimizer.init, abstract_params(cfg))
    of_opt = optax.tree_utils.tree_map_params(
        recipe.optimizer,
        lambda _, s: s,
        opt_state,
        of_params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(step=whole, params=of_params, opt_state=of_opt)


def init_state(recipe: Recipe, params: Params) -> TrainState:
    """Step 0 of these parameters, sharded as `state_shardings`. params is not donated."""

    def start(params):
        # A copy: the state is donated to the step, and the reference may be the same arrays.
        params = jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, recipe.optimizer.init(params))

    return jax.jit(start, out_shardings=state_shardings(recipe))(params)


# --- the stages


def generate(recipe: Recipe, params: Params, frozen: Frozen, prompts: Prompts, key) -> Rollout:
    """The step's completions, from whoever recipe.source names. No gradient."""
    if recipe.source == "data":
        shape = prompts.completion_BC.shape
        mask_BC = prompts.completion_mask_BC
        rollout = sampler.assemble(
            prompts,
            prompts.completion_BC,
            mask_BC,
            jnp.zeros(shape, jnp.float32),
            jnp.ones(shape[0], bool),
        )
    elif recipe.source == "teacher":
        parts = _by_task(
            recipe,
            prompts,
            lambda i, rows: _sample(recipe, recipe.teachers[i], frozen.teachers[i], rows, key),
        )
        rollout = jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)
    else:
        rollout = _sample(recipe, recipe.student, params, prompts, key)
    return jax.lax.stop_gradient(sharding.constrain_rows(rollout))


def score(recipe: Recipe, frozen: Frozen, rollout: Rollout) -> Scores:
    """What the objective needs of the frozen models: each row by its own teacher. No gradient."""
    teacher_BT = ref_BT = None
    if recipe.objective.teacher:
        parts = _by_task(
            recipe,
            rollout,
            lambda i, rows: _logps(recipe, recipe.teachers[i], frozen.teachers[i], rows),
        )
        teacher_BT = sharding.constrain_rows(jnp.concatenate(parts))
    if recipe.objective.reference:
        ref_BT = _logps(recipe, recipe.reference, frozen.reference, rollout)
    return jax.lax.stop_gradient(Scores(teacher_BT=teacher_BT, ref_BT=ref_BT))


def update(recipe: Recipe, state: TrainState, rollout: Rollout, scores: Scores):
    """(state after one optimizer step, metrics {key: Mean}).

    Weights and baselines are fixed on the whole batch first; the gradient is then summed over
    microbatches. The student's log-probs come from the loss's own forward pass. A gradient that is
    not finite leaves params and optimizer as they were, and counts as skipped.
    """
    objective = recipe.objective
    if objective.baseline:
        scores = scores.replace(reward_B=objective.baseline(scores.reward_B, rollout.group_B))
    weight_BT = objective.reduction(rollout.mask_BT)

    def loss_of(params, rows):
        rollout, scores, weight_BT = rows
        logp_BT, entropy_BT = scoring.score(recipe.student, params, rollout, **_head(recipe))
        student_BT = jax.lax.stop_gradient(logp_BT)
        advantage_BT = objective.advantage(scores.replace(student_BT=student_BT), rollout.mask_BT)
        advantage_BT = jax.lax.stop_gradient(advantage_BT)
        loss_BT = objective.loss(logp_BT, advantage_BT)
        return jnp.sum(weight_BT * loss_BT), (student_BT, entropy_BT, advantage_BT)

    def one(carry, rows):
        loss, grads = carry
        (more, seen), grads_more = jax.value_and_grad(loss_of, has_aux=True)(state.params, rows)
        return (loss + more, jax.tree.map(jnp.add, grads, grads_more)), seen

    zero = jnp.float32(0), jax.tree.map(jnp.zeros_like, state.params)
    pieces = _split((rollout, scores, weight_BT), recipe.microbatches)
    (loss, grads), seen = jax.lax.scan(one, zero, pieces)
    student_BT, entropy_BT, advantage_BT = _join(seen, recipe.microbatches)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state),
        (state.params, state.opt_state),
    )
    metrics = diagnostics(
        rollout,
        scores.replace(student_BT=student_BT),
        entropy_BT,
        advantage_BT,
        n_tasks=len(recipe.group_rows),
    )
    one_count = jnp.float32(1)
    metrics |= {
        "loss": Mean(loss, one_count),
        "grad_norm": Mean(grad_norm, one_count),
        "skipped": Mean(1.0 - finite.astype(jnp.float32), one_count),
        "learning_rate": Mean(jnp.float32(recipe.learning_rate(state.step)), one_count),
    }
    return TrainState(state.step + 1, params, opt_state), metrics


# --- their compositions


def fused(recipe: Recipe) -> Callable:
    """jit of (state, frozen, prompts, key) -> (state, rollout, metrics); the state is donated."""

    def step(state, frozen, prompts, key):
        rollout = generate(recipe, state.params, frozen, prompts, key)
        state, metrics = update(recipe, state, rollout, score(recipe, frozen, rollout))
        return state, rollout, metrics

    return _jit(recipe, step, (state_shardings(recipe), *_rows_and_whole(recipe)), donate=(0,))


def staged(recipe: Recipe) -> tuple[Callable, Callable, Callable]:
    """(generate, score, update) as three jits.

    generate(params, frozen, prompts, key) -> rollout; score(frozen, rollout) -> scores;
    update(state, rollout, scores) -> (state, metrics), which donates the state.
    """
    rows, whole = _rows_and_whole(recipe)
    return (
        _jit(recipe, lambda *args: generate(recipe, *args), rows),
        _jit(recipe, lambda *args: score(recipe, *args), rows),
        _jit(
            recipe,
            lambda *args: update(recipe, *args),
            (state_shardings(recipe), whole),
            donate=(0,),
        ),
    )


def sampling(recipe: Recipe, decoder: Decoder) -> Callable:
    """jit of (params, prompts, key) -> rollout for any model of the run: evaluation."""
    rows, _ = _rows_and_whole(recipe)
    return _jit(recipe, lambda params, *args: _sample(recipe, decoder, params, *args), rows)


def _jit(recipe, function, out_shardings, donate=()):
    compiled = jax.jit(function, out_shardings=out_shardings, donate_argnums=donate)

    def call(*args):
        with sharding.use(recipe.mesh):
            return compiled(*args)

    def trace(*args):
        with sharding.use(recipe.mesh):
            return compiled.trace(*args)

    def lower(*args):
        with sharding.use(recipe.mesh):
            return compiled.lower(*args)

    call.trace, call.lower = trace, lower
    return call


def _rows_and_whole(recipe):
    return sharding.by_rows(recipe.mesh), sharding.replicated(recipe.mesh)


def _head(recipe) -> dict:
    return {
        "temperature": recipe.temperature,
        "n_vocab": recipe.n_vocab,
        "chunk": recipe.head_chunk,
    }


def _sample(recipe, decoder, params, prompts, key):
    """sampler.generate from a copy of the weights in decode layout and dtype, made once."""
    return sampler.generate(
        decoder,
        decode_copy(recipe.mesh, decoder, params),
        prompts,
        key,
        completion_length=recipe.completion_length,
        temperature=recipe.temperature,
        eos_ids=recipe.eos_ids,
        n_vocab=recipe.n_vocab,
    )


def decode_copy(mesh: Mesh, decoder: Decoder, params: Params) -> Params:
    """Inside a jit: the weights in decode layout and dtype, gathered once for a whole rollout."""
    axes = sharding.shardings(mesh, logical_axes(decoder.cfg), sharding.DECODE)

    def gather(path, x, layout):
        # Norm weights act in float32; rounding them would part the sampler from the scorer.
        is_norm = "norm" in jax.tree_util.keystr(path)
        x = x if is_norm else x.astype(decoder.dtype)
        return jax.lax.with_sharding_constraint(x, layout)

    return jax.tree_util.tree_map_with_path(gather, params, axes)


def _logps(recipe, decoder, params, rollout):
    """logp_BT of a frozen model, a microbatch of rows at a time as in the update."""
    n_rows = rollout.tokens_BL.shape[0]
    microbatch = sum(recipe.group_rows) // recipe.microbatches
    local = n_rows // sharding.n_row_shards(recipe.mesh)
    n = next(n for n in range(-(-n_rows // microbatch), local + 1) if local % n == 0)

    def logps(rows):
        return scoring.score(decoder, params, rows, **_head(recipe))[0]

    return _join(jax.lax.map(logps, _split(rollout, n)), n)


def _by_task(recipe, rows, function) -> list:
    """function(i, the rows of task i) for each task, each result cut to the task's own rows.

    A group that the row shards do not divide is filled up with its last row, so that shapes stay
    static and even; what comes of those rows is dropped.
    """
    shards, start, results = sharding.n_row_shards(recipe.mesh), 0, []
    for i, n_rows in enumerate(recipe.group_rows):
        padded = -(-n_rows // shards) * shards
        index = start + jnp.minimum(jnp.arange(padded), n_rows - 1)
        group = sharding.constrain_rows(jax.tree.map(lambda x, j=index: x[j], rows))
        results.append(jax.tree.map(lambda x, n=n_rows: x[:n], function(i, group)))
        start += n_rows
    return results


def _split(rows, n: int):
    """Rows -> [n, rows / n]: strided, so that each device keeps the rows that it holds."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1), rows)


def _join(rows, n: int):
    """What `_split` took apart."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1] * n, *x.shape[2:]), rows)
