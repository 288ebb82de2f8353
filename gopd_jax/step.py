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

from gopd_jax import batching, sampler, scoring, sharding
from gopd_jax.models import lora
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
    teachers: tuple[Decoder, ...]  # each once; empty where none scores
    routes: tuple[int, ...]  # index in teachers of each task's own
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
    ema_decay: float | None = None  # of the student's moving average, where a teacher follows it


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
    """NamedShardings of a TrainState: moments lie as the parameters they belong to."""
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
    of_ema = None if recipe.ema_decay is None else of_params
    return TrainState(step=whole, params=of_params, opt_state=of_opt, ema=of_ema)


def init_state(recipe: Recipe, params: Params) -> TrainState:
    """Step 0 of the student's parameters, sharded as `state_shardings`. params is not donated.

    Where the student has adapters, the state holds these alone.
    """
    params, _ = lora.split(params)

    def start(params):
        # A copy: the state is donated to the step, and the reference may be the same arrays.
        params = jax.tree.map(jnp.copy, params)
        ema = None if recipe.ema_decay is None else jax.tree.map(jnp.copy, params)
        return TrainState(jnp.int32(0), params, recipe.optimizer.init(params), ema)

    return jax.jit(start, out_shardings=state_shardings(recipe))(params)


def following(frozen: Frozen, state: TrainState) -> Frozen:
    """The frozen models, with the student's moving average for each teacher that follows it."""
    if None not in frozen.teachers:
        return frozen
    average = lora.join(state.ema, frozen.base)
    teachers = (average if params is None else params for params in frozen.teachers)
    return frozen.replace(teachers=tuple(teachers))


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

        def write(i, rows, after):
            params = batching.resident(frozen.teachers[i], after)
            return _sample(recipe, recipe.teachers[i], params, rows, key, view=rows.teacher)

        rollout = batching.by_teacher(write, prompts, **_groups(recipe))
    else:
        whole = lora.join(params, frozen.base)
        rollout = _sample(recipe, recipe.student, whole, prompts, key)
    return jax.lax.stop_gradient(sharding.constrain_rows(rollout))


def score(recipe: Recipe, frozen: Frozen, rollout: Rollout) -> Scores:
    """What the objective needs of the frozen models: each row by its own teacher. No gradient."""
    teacher_BT = ref_BT = None
    if recipe.objective.teacher:

        def judge(i, rows, after):
            params = batching.resident(frozen.teachers[i], after)
            return _logps(recipe, recipe.teachers[i], params, rows, "teacher")

        teacher_BT = sharding.constrain_rows(batching.by_teacher(judge, rollout, **_groups(recipe)))
    if recipe.objective.reference:
        params = batching.resident(frozen.reference, teacher_BT)
        ref_BT = _logps(recipe, recipe.reference, params, rollout, "reference")
    return jax.lax.stop_gradient(Scores(teacher_BT=teacher_BT, ref_BT=ref_BT))


def update(recipe: Recipe, state: TrainState, rollout: Rollout, scores: Scores, base=None):
    """(state after one optimizer step, metrics {key: Mean}); base: Frozen's.

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
        whole = lora.join(params, base)
        logp_BT, entropy_BT = scoring.score(recipe.student, whole, rollout, **_head(recipe))
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
    rows = rollout.replace(teacher=None, reference=None), scores, weight_BT
    pieces = batching.split(rows, recipe.microbatches)
    (loss, grads), seen = jax.lax.scan(one, zero, pieces)
    student_BT, entropy_BT, advantage_BT = batching.join(seen, recipe.microbatches)

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None
    if (decay := recipe.ema_decay) is not None:
        ema = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, state.ema, params)
    params, opt_state, ema = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, opt_state, ema),
        (state.params, state.opt_state, state.ema),
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
    return TrainState(state.step + 1, params, opt_state, ema), metrics


# --- their compositions


def fused(recipe: Recipe) -> Callable:
    """jit of (state, frozen, prompts, key) -> (state, rollout, metrics); the state is donated."""

    def step(state, frozen, prompts, key):
        frozen = following(frozen, state)
        rollout = generate(recipe, state.params, frozen, prompts, key)
        scores = score(recipe, frozen, rollout)
        state, metrics = update(recipe, state, rollout, scores, frozen.base)
        return state, rollout, metrics

    return _jit(recipe, step, (state_shardings(recipe), *_rows_and_whole(recipe)), donate=(0,))


def staged(recipe: Recipe) -> tuple[Callable, Callable, Callable]:
    """(generate, score, update) as three jits.

    generate(params, frozen, prompts, key) -> rollout; score(frozen, rollout) -> scores;
    update(state, rollout, scores, frozen.base) -> (state, metrics), which donates the state. frozen
    is that of `following` where a teacher follows the student.
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


def sampling(recipe: Recipe, decoder: Decoder, *, greedy: bool = False) -> Callable:
    """jit of (params, prompts, key) -> rollout for any model of the run: evaluation, preflight."""
    rows, _ = _rows_and_whole(recipe)

    def sample(params, prompts, key):
        params = batching.resident(params)
        return _sample(recipe, decoder, params, prompts, key, greedy=greedy)

    return _jit(recipe, sample, rows)


def judging(recipe: Recipe, decoder: Decoder) -> Callable:
    """jit of (params, rollout, view) -> (logp_BT, entropy_BT) for any model of the run."""
    rows, _ = _rows_and_whole(recipe)

    def judge(params, rollout, view):
        params = batching.resident(params)
        return scoring.score(decoder, params, rollout, view=view, **_head(recipe))

    return _jit(recipe, judge, rows)


def _jit(recipe, function, out_shardings, donate=()):
    compiled = jax.jit(function, out_shardings=out_shardings, donate_argnums=donate)

    def on_mesh(method):
        def call(*args):
            with sharding.use(recipe.mesh):
                return method(*args)

        return call

    call = on_mesh(compiled)
    call.trace, call.lower = on_mesh(compiled.trace), on_mesh(compiled.lower)
    return call


def _rows_and_whole(recipe):
    return sharding.by_rows(recipe.mesh), sharding.replicated(recipe.mesh)


def _groups(recipe) -> dict:
    return {"mesh": recipe.mesh, "routes": recipe.routes, "group_rows": recipe.group_rows}


def _head(recipe) -> dict:
    return {
        "temperature": recipe.temperature,
        "n_vocab": recipe.n_vocab,
        "chunk": recipe.head_chunk,
    }


def _sample(recipe, decoder, params, prompts, key, view=None, greedy=False):
    """sampler.generate from a copy of the weights in decode layout and dtype, made once.

    view: the prompts as the model reads them, where that is not as the student does; the rollout
    is that of the student's prompts all the same.
    """
    seen = prompts
    if view is not None:
        seen = prompts.replace(tokens_BP=view.tokens_BP, valid_BP=view.valid_BP)
    rollout = sampler.generate(
        decoder,
        batching.decode_copy(recipe.mesh, decoder, params),
        seen,
        key,
        completion_length=recipe.completion_length,
        temperature=recipe.temperature,
        eos_ids=recipe.eos_ids,
        n_vocab=recipe.n_vocab,
        greedy=greedy,
    )
    if view is None:
        return rollout
    n = rollout.n_prompt
    tokens_BC, mask_BC = rollout.tokens_BL[:, n:], rollout.mask_BT[:, n - 1 :]
    logp_BC = rollout.logp_BT[:, n - 1 :]
    return sampler.assemble(prompts, tokens_BC, mask_BC, logp_BC, rollout.ended_B)


def _logps(recipe, decoder, params, rollout, role: str):
    """logp_BT of a frozen model, a microbatch of rows at a time as in the update.

    role: teacher or reference, whose view of the prompts it is shown.
    """
    n_rows = rollout.tokens_BL.shape[0]
    microbatch = sum(recipe.group_rows) // recipe.microbatches
    local = n_rows // sharding.n_row_shards(recipe.mesh)
    n = next(n for n in range(-(-n_rows // microbatch), local + 1) if local % n == 0)

    def logps(rows):
        view = getattr(rows, role)
        return scoring.score(decoder, params, rows, view=view, **_head(recipe))[0]

    return batching.join(jax.lax.map(logps, batching.split(rollout, n)), n)
