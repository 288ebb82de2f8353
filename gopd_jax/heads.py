"""The student's distributions beside its target's, a chunk of positions at a time.

What an objective needs of the vocabulary is computed here, forward and backward, without an array
[B, T, V] of any model: each chunk makes the logits of student, teachers and reference from their
hidden states, forms the target, and keeps what is one number a position.
"""

import jax
import jax.numpy as jnp

from gopd_jax import batching, scoring, sharding
from gopd_jax.models import decoder as lm
from gopd_jax.objectives.objective import fed, over_vocabulary
from gopd_jax.objectives.supports import supported
from gopd_jax.objectives.targets import mixed, tilted, tilted_distribution
from gopd_jax.sampler import pick
from gopd_jax.types import Rollout, Scores

# What the chunks give of the frozen models.
TARGET = ("target_BT", "teacher_BT", "teacher_entropy_BT", "ref_BT", "local_kl_BT")


def frozen_heads(recipe, frozen):
    """What of the frozen models makes logits, in device memory; None where none is used."""
    if not recipe.vocabulary:
        return None

    def head(decoder, params):
        return batching.resident(lm.head_params(decoder, params))

    teachers = tuple(head(d, p) for d, p in zip(recipe.teachers, frozen.teachers))
    if not recipe.objective.reference:
        return teachers, None
    return teachers, head(recipe.reference, frozen.reference)


def weights_of(recipe, n_rows: int):
    """Weights of each of a row's teachers, [B] float32, for n_rows rows sorted by task."""
    rows = shares(recipe, n_rows)
    weights = recipe.mixture.weights if recipe.mixture else ((1.0,) * len(rows),)
    return [jnp.repeat(jnp.array(w), jnp.array(rows), total_repeat_length=n_rows) for w in weights]


def shares(recipe, n_rows: int) -> tuple[int, ...]:
    """Rows of each task among n_rows that a strided split of the batch has left."""
    return tuple(n * n_rows // sum(recipe.group_rows) for n in recipe.group_rows)


def mix(recipe, logps):
    """Log-probs of each row's teacher from one array [B, ...] for each of its teachers."""
    if recipe.mixture is None:
        return logps[0]
    shape = (-1,) + (1,) * (logps[0].ndim - 1)
    weights = [w.reshape(shape) for w in weights_of(recipe, logps[0].shape[0])]
    return mixed(logps, weights, space=recipe.mixture.space)


def read(
    recipe, params, heads, rollout: Rollout, scores: Scores, lam, given=None, grad=False, look=None
):
    """What the student says of a rollout's tokens, beside its target: {name: [B, T]}.

    params: all of the student's. heads: `frozen_heads`. lam: a number, or [B]. The result has
    logp_BT (with its gradient), entropy_BT, eos_probability_BT; of an objective over the vocabulary
    the names of TARGET; and, where grad is True and they take the vocabulary, loss_BT and
    regularizer_BT. given: {name: [B, T]} of what a loss needs besides (advantage_x, student_x, ..).
    look: a function of the chunk's distributions whose {name: [B, c]} come back under these names.
    With a critic also hidden, [B, C + 1, D], and after_kl_B, the local KL behind the last token.
    """
    objective, after = recipe.objective, recipe.critic is not None
    hidden_BCD, ids_BC = scoring.hidden(recipe.student, params, rollout, None, after=after)
    first, width = rollout.n_prompt - 1, ids_BC.shape[1]
    end = first + width
    arrays = {"hidden": hidden_BCD, "ids": ids_BC}
    if recipe.vocabulary:
        arrays["teacher"] = tuple(x[:, :width] for x in scores.teacher_hidden)
        if objective.reference:
            arrays["ref"] = scores.ref_hidden[:, :width]

    def aligned(x_BT):
        x_BC = x_BT[:, first:end]
        return jnp.pad(x_BC, ((0, 0), (0, width - x_BC.shape[1])))

    arrays["given"] = jax.tree.map(aligned, given or {})

    def head(chunk):
        return _head(recipe, params, heads, chunk, lam, grad=grad, look=look)

    found_C = scoring.in_chunks(head, arrays, chunk=recipe.head_chunk)
    n = rollout.tokens_BL.shape[1] - rollout.n_prompt
    found = {
        f"{name}_BT": jnp.where(rollout.mask_BT, scoring.on_positions(rollout, x[:, :n]), 0.0)
        for name, x in found_C.items()
    }
    if after:
        found["hidden"] = hidden_BCD
        if "local_kl" in found_C:
            found["after_kl_B"] = found_C["local_kl"][:, n]
    return found


def _head(recipe, params, heads, chunk, lam, *, grad, look):
    """One chunk: {name: [B, c]}."""
    objective = recipe.objective
    options = {"temperature": recipe.temperature, "n_vocab": recipe.n_vocab}
    student_xV = scoring.log_probs(recipe.student, params, chunk["hidden"], **options)
    real_V = jnp.arange(student_xV.shape[-1]) < recipe.n_vocab
    real_xV = jnp.broadcast_to(real_V, student_xV.shape)
    ids_x = chunk["ids"]
    still_xV = jax.lax.stop_gradient(student_xV)
    is_end_V = jnp.isin(jnp.arange(student_xV.shape[-1]), jnp.array(recipe.eos_ids))
    found = {
        "logp": pick(student_xV, ids_x),
        "entropy": scoring.entropy(student_xV, real_V),
        "eos_probability": jnp.where(is_end_V, jnp.exp(still_xV), 0.0).sum(-1),
    }
    vocabulary = {"student_xV": student_xV, "real_xV": real_xV}
    if recipe.vocabulary:
        teacher_xV, ref_xV = _frozen(recipe, heads, chunk, options, student_xV.shape[-1])
        lam_x = lam if jnp.ndim(lam) == 0 else lam[:, None]
        lam_xV = lam if jnp.ndim(lam) == 0 else lam[:, None, None]
        target_xV = tilted_distribution(
            teacher_xV, ref_xV, real_xV, lam=lam_xV, cap=objective.ratio_cap
        )
        vocabulary |= {"target_xV": target_xV, "ref_xV": ref_xV}
        of_id = {"teacher": pick(teacher_xV, ids_x)}
        if ref_xV is not None:
            of_id["ref"] = pick(ref_xV, ids_x)
        found |= of_id
        found["teacher_entropy"] = scoring.entropy(teacher_xV, real_V)
        if objective.normalised or not objective.tilts:
            found["target"] = pick(target_xV, ids_x)
        else:
            found["target"] = tilted(
                of_id["teacher"], of_id.get("ref"), lam=lam_x, cap=objective.ratio_cap
            )
        if "local_kl_BT" in objective.needs or recipe.critic is not None:
            # The same target as the sampled token's: normalised or not, it is its expectation.
            as_sampled_xV = target_xV
            if objective.tilts and not objective.normalised:
                as_sampled_xV = jnp.where(
                    real_xV,
                    tilted(
                        jnp.where(real_xV, teacher_xV, 0.0),
                        jnp.where(real_xV, ref_xV, 0.0),
                        lam=lam_xV,
                        cap=objective.ratio_cap,
                    ),
                    -jnp.inf,
                )
            found["local_kl"] = _expected(objective, still_xV, as_sampled_xV, real_xV)
        found = {k: v if k == "logp" else jax.lax.stop_gradient(v) for k, v in found.items()}
    if look is not None:
        found |= look(ids_x=ids_x, teacher_xV=teacher_xV, **vocabulary)
    if grad:
        if any(name.endswith("_xS") for name in objective.needs):
            support, mass = objective.support, objective.mass
            of_support = supported(support, mass, student_xV, vocabulary["target_xV"], real_xV)
            vocabulary |= dict(zip(("student_xS", "target_xS", "valid_xS"), of_support))
        known = chunk["given"] | vocabulary | {"logp_x": found["logp"], "ids_x": ids_x}
        known |= {f"{k}_x": found[k] for k in ("target", "ref") if k in found}
        if over_vocabulary(objective.loss):
            found["loss"] = fed(objective.loss, known)
        if of := [r for r in objective.regularizers if over_vocabulary(r)]:
            found["regularizer"] = sum(fed(one, known) for one in of)
    return found


def _expected(objective, student_xV, target_xV, real_xV):
    """-E_S[token reward] of each state: KL(S || T) for plain distillation."""
    log_u = jnp.where(real_xV, target_xV, 0.0) - jnp.where(real_xV, student_xV, 0.0)
    reward = objective.token_reward(log_u)
    return -jnp.where(real_xV, jnp.exp(student_xV) * reward, 0.0).sum(-1)


def _frozen(recipe, heads, chunk, options, n_ids):
    """(log-probs of each row's teacher, of the reference or None) over the student's n_ids ids."""
    teachers, ref = heads

    def over(decoder, params, hidden_xD):
        hidden_xD = hidden_xD[..., : decoder.cfg.hidden_size]
        return same_width(scoring.log_probs(decoder, params, hidden_xD, **options), n_ids)

    n_rows = chunk["ids"].shape[0]
    every = []
    for routes, hidden_xD in zip(recipe.routes, chunk["teacher"]):

        def judge(i, rows, after):
            return over(recipe.teachers[i], teachers[i], rows)

        groups = {"mesh": recipe.mesh, "routes": routes, "group_rows": shares(recipe, n_rows)}
        every.append(batching.by_teacher(judge, hidden_xD, **groups))
    teacher_xV = mix(recipe, every)
    if recipe.mixture is not None and recipe.mixture.space == "log":
        real_V = jnp.arange(n_ids) < recipe.n_vocab
        teacher_xV = jax.nn.log_softmax(jnp.where(real_V, teacher_xV, -jnp.inf))
    teacher_xV = sharding.constrain_rows(teacher_xV)
    ref_xV = None if ref is None else over(recipe.reference, ref, chunk["ref"])
    return jax.lax.stop_gradient((teacher_xV, ref_xV))


def same_width(logp_xV, n_ids: int):
    """Cut or filled up with -inf to n_ids: other models pad their embeddings to other widths."""
    missing = n_ids - logp_xV.shape[-1]
    if missing <= 0:
        return logp_xV[..., :n_ids]
    widths = ((0, 0),) * (logp_xV.ndim - 1) + ((0, missing),)
    return jnp.pad(logp_xV, widths, constant_values=-jnp.inf)
