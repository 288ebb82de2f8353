"""Exact figures of a few rows of a batch, for whoever wants to know why a run goes as it goes.

They need whole distributions of student, teacher and reference, which most objectives do without:
so they are a program of their own, run at config.diagnostics.every, and change nothing.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gopd_jax import heads, scoring, sharding, step
from gopd_jax.models import lora
from gopd_jax.objectives import inspection, objective
from gopd_jax.objectives.routing import ROUTING
from gopd_jax.recipe import Frozen, Recipe, following
from gopd_jax.spec import plain
from gopd_jax.types import Mean, Prompts, Rollout, TrainState
from gopd_jax.update import gradient

MEANS = (
    *("kl_target", "kl_teacher", "kl_ref", "entropy_teacher"),
    *("overlap", "overlap_mass", "tail_mass", "actionability"),
)
PARTS = 4  # of the completion limit, for what drifts with the position


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """Two compiled functions; see `probing`."""

    rows: np.ndarray  # index of the probe's rows in the batch
    sample: Callable  # (state, frozen, prompts, key) -> rollout of these rows
    look: Callable  # (state, frozen, rollout, reward_B or None) -> {"probe/..": Mean}


def probing(recipe: Recipe, *, n_rows: int, rollouts: int, top_k: int, options: dict) -> Probe:
    """The figures of n_rows rows, at the state before the update and of the batch's own tokens.

    n_rows: of the batch, equally of each task, whole groups of `rollouts` rows, and as many as
    the row shards ask for. A row's tokens are a function of its key and its index, so that sampling
    it anew gives those of the batch. options: of objective.build, of this run. ValueError where the
    objective has no teacher: there is no target to compare with.
    """
    if not recipe.objective.needs_teacher:
        raise ValueError("there is no target to compare with: the objective has no teacher")
    index_b, group_rows = _some(recipe, n_rows, rollouts)
    few = dataclasses.replace(
        recipe, group_rows=group_rows, microbatches=1, buckets=1, updates=1, epochs=1, lag=0
    )
    exact = dataclasses.replace(few, objective=_exact(recipe.objective, options), critic=None)

    def take(tree):
        few = jax.tree.map(lambda x: x[index_b], tree)
        # Groups are numbered within the rows at hand: by the first row of each.
        first_b = jnp.argmax(few.group_B[:, None] == few.group_B, axis=1).astype(jnp.int32)
        return sharding.constrain_rows(few.replace(group_B=first_b))

    def sample(state: TrainState, frozen: Frozen, prompts: Prompts, key):
        if recipe.lag:
            return take(state.pending[0])
        return step.generate(few, state.params, following(frozen, state), take(prompts), key)

    def look(state: TrainState, frozen: Frozen, rollout: Rollout, reward_B=None):
        frozen = following(frozen, state)
        scores = step.score(few, frozen, rollout).replace(reward_B=reward_B)
        wholes = step.score(exact, frozen, rollout)
        want, _ = gradient(exact, state.replace(critic=None), rollout, wholes, frozen)
        found = {}
        if not recipe.objective.needs_reward or reward_B is not None:
            got, _ = gradient(few, state, rollout, scores, frozen)
            found["cosine"] = Mean.one(inspection.cosine(got, want))
        seen = _look(exact, state, rollout, wholes, frozen, top_k, _routing(recipe.objective))
        mask_BT = rollout.mask_BT
        found |= _means(seen, rollout, recipe.completion_length)
        found["repetition"] = Mean.of(inspection.repetition(rollout.tokens_BL[:, 1:], mask_BT))
        if reward_B is not None:
            said_B = jnp.where(mask_BT, seen["teacher_BT"], 0.0).sum(1)
            per_token_B = said_B / jnp.maximum(mask_BT.sum(1), 1)
            found["auroc"] = Mean.one(inspection.auroc(per_token_B, reward_B > 0.5))
        return {f"probe/{name}": mean for name, mean in found.items()}

    return Probe(
        rows=index_b,
        sample=step.compiled(recipe, sample, sharding.by_rows(recipe.mesh)),
        look=step.compiled(recipe, look, sharding.replicated(recipe.mesh)),
    )


def _some(recipe: Recipe, n_rows: int, rollouts: int):
    """(index of the probe's rows, how many of each task): of each its first."""
    part = math.lcm(sharding.n_decode_shards(recipe.mesh), rollouts)
    wanted = -(-max(n_rows // len(recipe.group_rows), 1) // part) * part
    if wanted > min(recipe.group_rows):  # tasks of fewer rows than that: all of the batch
        wanted = max(recipe.group_rows)
    first = np.cumsum((0, *recipe.group_rows[:-1]))
    index = [np.arange(i, i + min(wanted, n)) for i, n in zip(first, recipe.group_rows)]
    return np.concatenate(index), tuple(map(len, index))


def _exact(goal: objective.Objective, options: dict) -> objective.Objective:
    """The direct loss towards the same target, over the whole vocabulary, reduced alike."""
    of_target = ("mixture", "divergence")
    if goal.drawn:  # else the teacher's own figures alone are asked for: no reference tilts it
        of_target += ("lam", "lam_schedule", "lam_by_row", "ratio_cap")
    # Tokens that weigh otherwise would turn the gradient, whatever the estimator.
    kept = {name: options[name] for name in (*of_target, "reduction") if name in options}
    return objective.build(**kept, loss="exact")


def _routing(goal: objective.Objective) -> dict:
    """The options of the run's own `cr_opd`; of another loss none, and its defaults count."""
    return getattr(goal.loss, "keywords", {}) if plain(goal.loss) is ROUTING["cr_opd"] else {}


def _look(recipe: Recipe, state, rollout, scores, frozen, top_k: int, routing: dict) -> dict:
    """{name: [B, T]} of `inspection.inspect`, its negatives those of log T - log S."""
    goal = recipe.objective
    lam = goal.lam_at(state.step, rollout.lam_B if goal.lam_by_row else None)

    def look(*, ids_x, student_xV, target_xV, teacher_xV, ref_xV, real_xV):
        sampled_x = scoring.pick(target_xV, ids_x) - scoring.pick(student_xV, ids_x)
        return inspection.inspect(
            student_xV,
            target_xV,
            real_xV,
            ids_x,
            sampled_x,
            teacher_xV,
            ref_xV,
            k=top_k,
            routing=routing,
        )

    params = lora.join(state.params, frozen.base)
    of_heads = heads.frozen_heads(recipe, frozen)
    return heads.read(recipe, params, of_heads, rollout, scores, lam, look=look)


def _means(seen: dict, rollout: Rollout, length: int) -> dict[str, Mean]:
    mask_BT = rollout.mask_BT
    found = {name: Mean.of(seen[f"{name}_BT"], mask_BT) for name in MEANS if f"{name}_BT" in seen}
    negative_BT = jnp.where(mask_BT, seen["negative_BT"], 0.0)
    found["routable"] = Mean(jnp.where(mask_BT, seen["routable_BT"], 0.0).sum(), negative_BT.sum())
    position_BT = jnp.arange(mask_BT.shape[1]) - (rollout.n_prompt - 1)
    part_BT = jnp.broadcast_to(position_BT * PARTS // length, mask_BT.shape)
    for i in range(PARTS):
        for name in ("overlap", "kl_target"):
            found[f"{name}_{i + 1}"] = Mean.of(seen[f"{name}_BT"], mask_BT & (part_BT == i))
    return found
