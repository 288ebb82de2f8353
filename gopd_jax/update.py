"""The update: advantages on the whole batch or in its pieces, the gradient, the optimizer.

There are two ways to an advantage. By default it comes of the loss's own forward pass, a microbatch
at a time: a step that is strictly on-policy needs no other. Where it depends on other rows or on a
critic, or has to outlive the first of several updates, the student scores the batch beforehand.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from gopd_jax import batching, critic, heads, optimizer
from gopd_jax.models import lora
from gopd_jax.objectives.baselines import group_relative
from gopd_jax.objectives.diagnostics import diagnostics
from gopd_jax.objectives.entries import fed, names, over_vocabulary
from gopd_jax.objectives.targets import along, tilted
from gopd_jax.recipe import Frozen, Recipe
from gopd_jax.types import Mean, Rollout, Scores, TrainState

NOTHING = Frozen(teachers=(), reference=None)
# Of the quantities, those that diagnostics report.
SEEN = ("student_BT", "entropy_BT", "eos_probability_BT", "advantage_BT", "token_reward_BT")


@struct.dataclass
class Rows:
    """Rows of a batch as the update splits them, and what was computed of them before it."""

    rollout: Rollout
    scores: Scores
    reduction_BT: jax.Array  # each token's weight in the loss of the whole batch
    known: dict[str, jax.Array]  # [B, T] or [B], by the names that entries ask for


def update(
    recipe: Recipe, state: TrainState, rollout: Rollout, scores: Scores, frozen: Frozen = NOTHING
):
    """(state after the batch's optimizer updates, metrics {key: Mean}). frozen is needed
    for an objective over the vocabulary, and for its base where adapters are trained.

    Weights and baselines are fixed on the whole batch first; the gradient is then summed over
    microbatches. A gradient that is not finite leaves params and optimizer as they were, and counts
    as skipped: one of the batch's updates.
    """
    one, rows, metrics, lam = _prepared(recipe, state, rollout, scores, frozen)
    rate = recipe.learning_rate(optimizer.n_updates(state.opt_state))
    metrics["learning_rate"] = Mean.one(jnp.where(_student_learns(recipe, state), rate, 0.0))
    state, seen, found = _descend(recipe, one, state, rows)
    seen |= {name: x for name, x in rows.known.items() if name in (*SEEN, *heads.TARGET)}
    metrics |= found | diagnostics(
        rollout,
        one.quantities(rows, seen),
        objective=recipe.objective,
        n_tasks=len(recipe.group_rows),
        lam=lam,
        sampled=recipe.source == "student",
    )
    if recipe.lag:
        metrics["staleness"] = Mean.one(jnp.minimum(state.step, recipe.lag))
    return state.replace(step=state.step + 1), metrics


def gradient(recipe: Recipe, state: TrainState, rollout, scores: Scores, frozen: Frozen = NOTHING):
    """(gradient of the loss in state.params, {name: [B, T]} that it saw), all rows at once."""
    one, rows, _, _ = _prepared(recipe, state, rollout, scores, frozen)
    trained = state.params, None if state.critic is None else state.critic.params
    (grads, _), (_, _, seen) = jax.grad(one.loss, has_aux=True)(trained, rows)
    return grads, seen


def _prepared(recipe, state, rollout, scores, frozen):
    """(_Piece, rows to be split, metrics so far, lambda of this step)."""
    objective = recipe.objective
    lam = objective.lam_at(state.step, rollout.lam_B if objective.lam_by_row else None)
    by_row = objective.lam_by_row
    known = {}
    if objective.needs_reward:
        known["relative_reward_B"] = group_relative(scores.reward_B, rollout.group_B)
    rows = Rows(
        rollout=rollout.replace(teacher=None, reference=None, lam_B=lam if by_row else None),
        scores=scores,
        reduction_BT=objective.reduction(rollout.mask_BT),
        known=known,
    )
    of_heads = heads.frozen_heads(recipe, frozen)
    one = _Piece(recipe, of_heads, frozen.base, None if by_row else lam, state.step)
    metrics = {}
    if recipe.prescored:
        found, metrics = _prescore(recipe, one, state, rows)
        rows = rows.replace(known=rows.known | found)
    return one, rows, metrics, lam


class _Piece:
    """What some rows of the batch are to the objective; closes over what is not split by rows."""

    def __init__(self, recipe, of_heads, base, lam, at_step):
        self.recipe, self.of_heads, self.base = recipe, of_heads, base
        self.lam, self.step = lam, at_step

    def lam_of(self, rows: Rows):
        return rows.rollout.lam_B if self.lam is None else self.lam

    def read(self, params, rows: Rows, given=None, grad=False):
        whole = lora.join(params, self.base)
        rollout, scores, lam = rows.rollout, rows.scores, self.lam_of(rows)
        return heads.read(self.recipe, whole, self.of_heads, rollout, scores, lam, given, grad)

    def quantities(self, rows: Rows, seen: dict) -> dict:
        """Every quantity that entries may name, from what the models said."""
        rollout, scores, objective = rows.rollout, rows.scores, self.recipe.objective
        n_prompt, width = rollout.n_prompt, rollout.mask_BT.shape[1]
        ids_BT = rollout.tokens_BL[:, 1:]
        q = {
            "mask_BT": rollout.mask_BT,
            "position_BT": jnp.broadcast_to(jnp.arange(width) - (n_prompt - 1), ids_BT.shape),
            "ids_BT": ids_BT,
            "end_BT": jnp.isin(ids_BT, jnp.array(self.recipe.eos_ids)) & rollout.mask_BT,
            "group_B": rollout.group_B,
            "ended_B": rollout.ended_B,
            "reward_B": scores.reward_B,
            "step": self.step,
            "sampler_BT": rollout.logp_BT,
            "teacher_BT": scores.teacher_BT,
            "teacher_entropy_BT": scores.teacher_entropy_BT,
            "ref_BT": scores.ref_BT,
            **rows.known,
            **seen,
        }
        if "target_BT" not in q and q["teacher_BT"] is not None:
            lam = along(self.lam_of(rows), 1)
            if q["ref_BT"] is not None or not objective.tilts:
                q["target_BT"] = tilted(
                    q["teacher_BT"], q["ref_BT"], lam=lam, cap=objective.ratio_cap
                )
        if "target_BT" in q:
            q["log_u_BT"] = q["target_BT"] - q["student_BT"]
        return q

    def weighed(self, rows: Rows, seen: dict) -> dict:
        """{advantage_BT, weight_BT and what diagnostics want} of rows that the student has read."""
        objective, q = self.recipe.objective, self.quantities(rows, seen)
        found = {}
        if objective.weighs:
            found = objective.advantages(q)
        weight_BT = objective.weights(q | found)
        if weight_BT is not None:
            found["weight_BT"] = weight_BT
        return jax.lax.stop_gradient(found)

    def loss(self, trained, rows: Rows):
        """(loss of these rows, (the student's part, the critic's, what diagnostics want)).

        trained: (params, the critic's or None).
        """
        params, value_params = trained
        found = self.read(params, rows, self.given(rows), grad=True)
        seen = self.seen(rows, found)
        loss_BT = jnp.where(rows.rollout.mask_BT, self.loss_of_tokens(rows, found, seen), 0.0)
        total, value_loss = jnp.sum(rows.reduction_BT * loss_BT), jnp.float32(0)
        if value_params is not None:
            value_loss = self.value_loss(value_params, rows, found)
        kept = {name: seen[name] for name in (*SEEN, *heads.TARGET, "weight_BT") if name in seen}
        return total + value_loss, (total, value_loss, kept)

    def given(self, rows: Rows) -> dict:
        """{name: [B, T]} of what losses over the vocabulary take besides the distributions."""
        if not any(map(over_vocabulary, self.recipe.objective.losses)):
            return {}
        names = ("advantage", "student", "target", "ref")
        found = {f"{name}_x": rows.known.get(f"{name}_BT") for name in names}
        found["sampler_x"] = rows.rollout.logp_BT
        return {name: x for name, x in found.items() if x is not None}

    def seen(self, rows: Rows, found: dict) -> dict:
        """What of the forward pass, and of what was known before, the loss takes as constant."""
        still = jax.lax.stop_gradient(found)
        seen = {name: still[name] for name in (*SEEN, *heads.TARGET) if name in still}
        seen |= {"student_BT": still["logp_BT"]} | rows.known
        if "advantage_BT" not in rows.known and "weight_BT" not in rows.known:
            seen |= self.weighed(rows, seen)
        return seen

    def loss_of_tokens(self, rows: Rows, found: dict, seen: dict):
        """[B, T]: the weighted loss and the regularizers; anything where nothing was sampled."""
        objective, quantities = self.recipe.objective, self.quantities(rows, seen)
        at = {f"{name[:-3]}_x": x for name, x in quantities.items() if name.endswith("_BT")}
        at |= {"logp_x": found["logp_BT"]}
        loss_BT = found["loss_BT"] if "loss_BT" in found else fed(objective.loss, at)
        if "weight_BT" in seen:
            loss_BT = loss_BT * seen["weight_BT"]
        extra = [found["regularizer_BT"]] if "regularizer_BT" in found else []
        extra += [fed(r, at) for r in objective.regularizers if not over_vocabulary(r)]
        return loss_BT + sum(extra, jnp.zeros(()))

    def value_loss(self, value_params, rows: Rows, found: dict):
        value_BT, _ = values(self.recipe, value_params, found, rows)
        known, mask_BT = rows.known, rows.rollout.mask_BT
        loss_BT = critic.loss(self.recipe.critic, value_BT, known["value_BT"], known["return_BT"])
        return jnp.sum(rows.reduction_BT * jnp.where(mask_BT, loss_BT, 0.0))


def values(recipe, value_params, found: dict, rows: Rows):
    """(V(s_t) [B, T], V behind the last token [B]) from what `heads.read` found."""
    rollout = rows.rollout
    learnt_BS = critic.value(value_params, found["hidden"])
    n = rollout.tokens_BL.shape[1] - rollout.n_prompt
    value_BT = jnp.pad(learnt_BS[:, :n], ((0, 0), (rollout.n_prompt - 1, 0)))
    after_B = learnt_BS[:, n]
    if recipe.critic.closed_form:
        value_BT, after_B = value_BT - found["local_kl_BT"], after_B - found["after_kl_B"]
    return jnp.where(rollout.mask_BT, value_BT, 0.0), after_B


def _prescore(recipe, one: _Piece, state, rows: Rows):
    """({name: [B, T]} that is fixed before the first update, metrics of the critic)."""

    def judge(rows):
        found = one.read(state.params, rows)
        kept = ("entropy_BT", "eos_probability_BT", *heads.TARGET)
        seen = {name: found[name] for name in kept if name in found}
        seen["student_BT"] = found["logp_BT"]
        if recipe.critic is not None:
            value_BT, after_B = values(recipe, state.critic.params, found, rows)
            seen |= {"value_BT": value_BT, "bootstrap_B": after_B}
        return seen

    def piece(rows):
        mask_BT = rows.rollout.mask_BT
        return batching.at_width(lambda rows: ((), judge(rows)), rows, mask_BT, recipe.widths)[1]

    ordered, back = _by_length(recipe, rows, recipe.pieces)
    pieces = jax.lax.map(piece, batching.split(ordered, recipe.pieces))
    known = jax.lax.stop_gradient(back(batching.join(pieces, recipe.pieces)))
    known |= one.weighed(rows, known)
    if recipe.critic is None:
        return known, {}
    # What V is to predict: the credit itself, or its lambda-return where the credit is beyond V.
    beyond = "value_BT" in names(recipe.objective.credit)
    known["return_BT"] = known["credit_BT"] + (known["value_BT"] if beyond else 0.0)
    explained = critic.explained_variance(
        known["value_BT"], known["return_BT"], rows.rollout.mask_BT
    )
    return known, {"explained_variance": Mean.one(explained)}


def _descend(recipe, one: _Piece, state: TrainState, rows: Rows):
    """(state, what the losses saw {name: [B, T]}, metrics): every update of the batch."""

    def gradient(state, rows):
        trained = state.params, None if state.critic is None else state.critic.params

        def of_piece(rows):
            (_, (loss, value_loss, seen)), grads = jax.value_and_grad(one.loss, has_aux=True)(
                trained, rows
            )
            return ((loss, value_loss), grads), seen

        def add(carry, rows):
            mask_BT = rows.rollout.mask_BT
            found, seen = batching.at_width(of_piece, rows, mask_BT, recipe.widths)
            return jax.tree.map(jnp.add, carry, found), seen

        n = recipe.microbatches
        # float32 sums, whatever is summed.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), trained)
        zero = (jnp.float32(0), jnp.float32(0)), zeros
        ordered, back = _by_length(recipe, rows, n)
        (losses, grads), seen = jax.lax.scan(add, zero, batching.split(ordered, n))
        return losses, grads, back(batching.join(seen, n))

    def part(state, rows):
        losses, grads, seen = gradient(state, rows)
        state, found = _apply(recipe, state, losses, grads)
        return state, (seen, found)

    n = recipe.updates
    if n * recipe.epochs == 1:
        state, (seen, found) = part(state, rows)
        return state, seen, found
    # The reduction's weights are of the whole batch; each update has one n-th of it.
    rows = rows.replace(reduction_BT=rows.reduction_BT * n)
    parts = batching.split(rows, n)

    def epoch(state, _):
        return jax.lax.scan(part, state, parts)

    state, (seen, found) = jax.lax.scan(epoch, state, None, length=recipe.epochs)
    seen = batching.join(jax.tree.map(lambda x: x[0], seen), n)
    found = jax.tree.map(lambda x: x.sum((0, 1)), found)
    # Of the batch's updates the means, but how many were skipped: they are counted.
    return state, seen, found | {"skipped": Mean.one(found["skipped"].total)}


def _by_length(recipe, rows: Rows, n: int):
    """`batching.sorted_by_length` of the rows that an update splits."""
    mask_BT = rows.rollout.mask_BT
    return batching.sorted_by_length(recipe.mesh, rows, mask_BT, n, recipe.widths)


def _student_learns(recipe, state: TrainState):
    """Not while its critic alone does. The schedule of its learning rate begins after that."""
    return recipe.critic is None or state.step >= recipe.critic.warmup_steps


def _apply(recipe, state: TrainState, losses, grads):
    """(state after one optimizer update, its metrics); nothing changes where it is not finite."""
    (loss, value_loss), (grads, value_grads) = losses, grads
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
    if recipe.critic is not None:
        finite &= jnp.isfinite(optax.tree.norm(value_grads)) & jnp.isfinite(value_loss)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None
    if (decay := recipe.ema_decay) is not None:
        wide = jax.tree.map(lambda m, p: p.astype(m.dtype), state.ema, params)
        ema = jax.tree.map(lambda m, p: decay * m + (1 - decay) * p, state.ema, wide)
    new = params, opt_state, ema
    old = state.params, state.opt_state, state.ema
    learns = finite & _student_learns(recipe, state)
    params, opt_state, ema = optimizer.where(learns, new, old)
    found = {
        "loss": Mean.one(loss),
        "grad_norm": Mean.one(grad_norm),
        "skipped": Mean.one(1.0 - finite.astype(jnp.float32)),
    }
    value_head = state.critic
    if recipe.critic is not None:
        moves, of_value = critic.optimizer(recipe.critic).update(
            value_grads, value_head.opt_state, value_head.params
        )
        moved = critic.State(
            params=optax.apply_updates(value_head.params, moves), opt_state=of_value
        )
        value_head = optimizer.where(finite, moved, value_head)
        found |= {
            "value_loss": Mean.one(value_loss),
            "critic_grad_norm": Mean.one(optax.tree.norm(value_grads)),
        }
    state = state.replace(params=params, opt_state=opt_state, ema=ema, critic=value_head)
    return state, found
