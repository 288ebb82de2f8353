"""One training step: generate, score, weigh, update; fused into one jit, or in stages.

The stages are plain functions of a static Recipe and arrays. `fused` composes them into a single
compiled program with a donated state; `staged` compiles them apart, for when the host has to work
between them (verifier rewards). Both run the same functions and give the same numbers.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gopd_jax import batching, heads, sampler, scoring, sharding
from gopd_jax.models import lora
from gopd_jax.models.decoder import Decoder
from gopd_jax.recipe import Frozen, Recipe, following, state_shardings
from gopd_jax.types import Params, Prompts, Rollout, Scores, TrainState
from gopd_jax.update import update

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
            decoder = recipe.teachers[i]
            params = batching.resident(decoder, frozen.teachers[i], after)
            return _sample(recipe, decoder, params, rows, key, view=rows.teacher)

        (routes,) = recipe.routes
        of = _groups(recipe, routes) | {"shards": sharding.n_decode_shards(recipe.mesh)}
        rollout = batching.by_teacher(write, prompts, **of)
    else:
        whole = lora.join(params, frozen.base)
        rollout = _sample(recipe, recipe.student, whole, prompts, key, narrow=True)
    return jax.lax.stop_gradient(sharding.constrain_rows(rollout))


def score(recipe: Recipe, frozen: Frozen, rollout: Rollout) -> Scores:
    """What the objective needs of the frozen models: each row by its own teacher. No gradient.

    Log-probs of the sampled tokens; hidden states where it needs whole distributions.
    """
    objective, found = recipe.objective, {}
    whole, before = recipe.needs_vocabulary, None
    if objective.needs_teacher:
        width = max(decoder.cfg.hidden_size for decoder in recipe.teachers)
        answers = []
        for routes in recipe.routes:

            def judge(i, rows, after):
                decoder = recipe.teachers[i]
                params = batching.resident(decoder, frozen.teachers[i], after)
                if whole:
                    hidden_BCD = _judged(recipe, decoder, params, rows, "teacher", _states)
                    missing = width - decoder.cfg.hidden_size
                    return jnp.pad(hidden_BCD, ((0, 0), (0, 0), (0, missing)))
                return _judged(recipe, decoder, params, rows, "teacher", _logps)

            answer = batching.by_teacher(judge, rollout, **_groups(recipe, routes))
            hold = sharding.constrain_positions if whole else sharding.constrain_rows
            answers.append(before := hold(answer))
        if whole:
            found["teacher_hidden"] = tuple(answers)
        else:
            found["teacher_BT"] = heads.mix(recipe, [logp_BT for logp_BT, _ in answers])
            if recipe.mixture is None:
                found["teacher_entropy_BT"] = answers[0][1]
            found["teacher_BT"] = jnp.where(rollout.mask_BT, found["teacher_BT"], 0.0)
    if objective.needs_reference:
        params = batching.resident(recipe.reference, frozen.reference, before)
        read = _states if whole else _logps
        answer = _judged(recipe, recipe.reference, params, rollout, "reference", read)
        found |= {"ref_hidden": answer} if whole else {"ref_BT": answer[0]}
    return jax.lax.stop_gradient(Scores(**found))


# --- their compositions


def fused(recipe: Recipe) -> Callable:
    """jit of (state, frozen, prompts, key) -> (state, rollout, metrics); the state is donated.

    rollout is what was learnt from. Where the sampler lags, prompts and key are those of the step
    recipe.lag later: its completions are written now and wait in state.pending.
    """

    def step(state, frozen, prompts, key):
        frozen = following(frozen, state)
        rollout = generate(recipe, state.params, frozen, prompts, key)
        if recipe.lag:
            rollout, state = turn(state, rollout)
        scores = score(recipe, frozen, rollout)
        state, metrics = update(recipe, state, rollout, scores, frozen)
        return state, rollout, metrics

    return compiled(recipe, step, (state_shardings(recipe), *_rows_and_whole(recipe)), donate=(0,))


def turn(state: TrainState, newest: Rollout) -> tuple[Rollout, TrainState]:
    """(the rollout whose turn it is, the state with the newest one at the end of those waiting)."""
    first, *others = state.pending
    return first, state.replace(pending=(*others, newest))


def staged(recipe: Recipe) -> tuple[Callable, Callable, Callable]:
    """(generate, score, update) as three jits.

    generate(params, frozen, prompts, key) -> rollout; score(frozen, rollout) -> scores;
    update(state, rollout, scores, frozen) -> (state, metrics), which donates the state. frozen is
    that of `following` where a teacher follows the student.
    """
    rows, whole = _rows_and_whole(recipe)
    return (
        compiled(recipe, lambda *args: generate(recipe, *args), rows),
        compiled(recipe, lambda *args: score(recipe, *args), score_shardings(recipe.mesh)),
        compiled(
            recipe,
            lambda *args: update(recipe, *args),
            (state_shardings(recipe), whole),
            donate=(0,),
        ),
    )


def score_shardings(mesh) -> Scores:
    """Where the scores lie between two stages."""
    rows, positions = sharding.by_rows(mesh), sharding.by_positions(mesh)
    found = {field.name: rows for field in dataclasses.fields(Scores)}
    return Scores(**found | dict.fromkeys(("teacher_hidden", "ref_hidden"), positions))


def sampling(recipe: Recipe, decoder: Decoder, *, greedy: bool = False) -> Callable:
    """jit of (params, prompts, key) -> rollout for any model of the run: evaluation, preflight."""
    rows, _ = _rows_and_whole(recipe)

    def sample(params, prompts, key):
        params = batching.resident(decoder, params)
        return _sample(recipe, decoder, params, prompts, key, greedy=greedy)

    return compiled(recipe, sample, rows)


def judging(recipe: Recipe, decoder: Decoder) -> Callable:
    """jit of (params, rollout, view) -> (logp_BT, entropy_BT) for any model of the run."""
    rows, _ = _rows_and_whole(recipe)

    def judge(params, rollout, view):
        params = batching.resident(decoder, params)
        return scoring.score(decoder, params, rollout, view=view, **_head(recipe))

    return compiled(recipe, judge, rows)


def compiled(recipe: Recipe, function: Callable, out_shardings, donate=()) -> Callable:
    """jit of a function that is traced, lowered and called on the recipe's mesh."""
    jitted = jax.jit(function, out_shardings=out_shardings, donate_argnums=donate)

    def on_mesh(method):
        def call(*args):
            with sharding.use(recipe.mesh):
                return method(*args)

        return call

    call = on_mesh(jitted)
    call.trace, call.lower = on_mesh(jitted.trace), on_mesh(jitted.lower)
    return call


def _rows_and_whole(recipe):
    return sharding.by_rows(recipe.mesh), sharding.replicated(recipe.mesh)


def _groups(recipe, routes) -> dict:
    return {"mesh": recipe.mesh, "routes": routes, "group_rows": recipe.group_rows}


def _head(recipe) -> dict:
    return {
        "temperature": recipe.temperature,
        "n_vocab": recipe.n_vocab,
        "chunk": recipe.head_chunk,
    }


def _sample(recipe, decoder, params, prompts, key, view=None, greedy=False, narrow=False):
    """sampler.generate from a copy of the weights in decode layout and dtype, made once.

    view: the prompts as the model reads them, where that is not as the student does; the rollout
    is that of the student's prompts all the same. narrow: in the 8 bits that the recipe allows what
    is learnt from and corrected; evaluation and whom nobody corrects keep the model's own.
    """
    seen = prompts
    if view is not None:
        seen = prompts.replace(tokens_BP=view.tokens_BP, valid_BP=view.valid_BP)
    narrow_weights = recipe.sampling_dtype if narrow else None
    with sharding.decoding():
        rollout = sampler.generate(
            decoder,
            batching.decode_copy(recipe.mesh, decoder, params, narrow_weights),
            sharding.constrain_decode_rows(recipe.mesh, seen),
            key,
            completion_length=recipe.completion_length,
            temperature=recipe.temperature,
            eos_ids=recipe.eos_ids,
            n_vocab=recipe.n_vocab,
            greedy=greedy,
            slots=recipe.slots,
            n_shards=sharding.n_decode_shards(recipe.mesh),
            buckets=recipe.sampling_buckets,
            prompt_buckets=recipe.prompt_buckets,
            cache_dtype=recipe.cache_dtype if narrow else None,
        )
    if view is None:
        return rollout
    n = rollout.n_prompt
    tokens_BC, mask_BC = rollout.tokens_BL[:, n:], rollout.mask_BT[:, n - 1 :]
    logp_BC = rollout.logp_BT[:, n - 1 :]
    return sampler.assemble(prompts, tokens_BC, mask_BC, logp_BC, rollout.ended_B)


def judging_turns(recipe: Recipe, n_rows: int) -> int:
    """Pieces in which n_rows rows are scored, no larger than the update's microbatches."""
    microbatch = sum(recipe.group_rows) // recipe.pieces
    local = n_rows // sharding.n_row_shards(recipe.mesh)
    return next(n for n in range(-(-n_rows // microbatch), local + 1) if local % n == 0)


def _judged(recipe, decoder, params, rollout, role: str, read):
    """read(...) of a frozen model, a microbatch of rows at a time as in the update.

    role: teacher or reference, whose view of the prompts it is shown.
    """
    n = judging_turns(recipe, rollout.tokens_BL.shape[0])

    def one(rows):
        def judge(rows):
            return (), read(recipe, decoder, params, rows, getattr(rows, role))

        return batching.at_width(judge, rows, rows.mask_BT, recipe.widths)[1]

    ordered, back = batching.sorted_by_length(
        recipe.mesh, rollout, rollout.mask_BT, n, recipe.widths
    )
    return back(batching.join(jax.lax.map(one, batching.split(ordered, n)), n))


def _logps(recipe, decoder, params, rows, view):
    return scoring.score(decoder, params, rows, view=view, **_head(recipe))


def _states(recipe, decoder, params, rows, view):
    return scoring.hidden(decoder, params, rows, view, after=True)[0]
