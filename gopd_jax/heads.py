"""The student's distributions beside its target's, a chunk of positions at a time.

What an objective needs of the vocabulary is computed here, forward and backward, without an array
[B, T, V] of any model: each chunk makes the logits of student, teachers and reference from their
hidden states, forms the target, and keeps what is one number a position.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gopd_jax import batching, scoring, sharding
from gopd_jax.drawing import pick
from gopd_jax.models import decoder as lm
from gopd_jax.models.ops import constrain
from gopd_jax.objectives.entries import fed, over_vocabulary
from gopd_jax.objectives.supports import supported
from gopd_jax.objectives.targets import along, mixed, tilted, tilted_distribution
from gopd_jax.types import Rollout, Scores

# What the chunks give of the frozen models.
TARGET = ("target_BT", "teacher_BT", "teacher_entropy_BT", "ref_BT", "local_kl_BT")


def frozen_heads(recipe, frozen):
    """What of the frozen models makes logits, in device memory; None where none is used."""
    if not recipe.needs_vocabulary:
        return None

    def head(decoder, params):
        return batching.resident(decoder, lm.head_params(decoder, params))

    used = zip(recipe.teachers, frozen.teachers) if recipe.objective.needs_teacher else ()
    teachers = tuple(head(decoder, params) for decoder, params in used)
    if not recipe.objective.needs_reference:
        return teachers, None
    return teachers, head(recipe.reference, frozen.reference)


def weights_of(recipe, n_rows: int):
    """Weights of each of a row's teachers, [B] float32, for n_rows rows sorted by task."""
    return [jnp.repeat(*by_task(recipe, w, n_rows)) for w in recipe.mixture.weights]


def by_task(recipe, of_task: tuple, n_rows: int):
    """(values, repeats) as NumPy arrays: one value a task and its rows among n_rows of the batch.

    A strided split of the batch leaves each task its share. ValueError where that is no whole
    number of rows, unless all tasks have one value.
    """
    if len(set(of_task)) == 1:
        return np.array(of_task[:1]), np.array([n_rows])
    total = sum(recipe.group_rows)
    if any(n * n_rows % total for n in recipe.group_rows):
        raise ValueError(
            f"tasks of {recipe.group_rows} rows cannot be split evenly into pieces of {n_rows}; "
            "take fewer updates or microbatches"
        )
    return np.array(of_task), np.array(recipe.group_rows) * n_rows // total


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
    if recipe.needs_vocabulary:
        arrays["teacher"] = tuple(x[:, :width] for x in scores.teacher_hidden or ())
        if objective.needs_reference:
            arrays["ref"] = scores.ref_hidden[:, :width]

    def aligned(x_BT):
        x_BC = x_BT[:, first:end]
        return jnp.pad(x_BC, ((0, 0), (0, width - x_BC.shape[1])))

    arrays["given"] = jax.tree.map(aligned, given or {})

    by_row = lam if jnp.ndim(lam) else None
    # A plain number stays one: as an array of the shards, 1 would ask for a reference.
    at_step = lam if by_row is None and isinstance(lam, jax.Array) else None

    def head(weights, chunk, by_row):
        params, heads, at_step = weights
        now = next(x for x in (by_row, at_step, lam) if x is not None)
        return _head(recipe, params, heads, chunk, now, grad=grad, look=look)

    # In float32, so that its gradient is summed in float32 over chunks and shards.
    own = jax.tree.map(lambda x: x.astype(jnp.float32), lm.head_params(recipe.student, params))
    found_C = scoring.in_chunks(
        head,
        (own, heads, at_step),
        arrays,
        by_row,
        chunk=recipe.head_chunk,
        apart=_alike(recipe),
    )
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


def _alike(recipe) -> bool:
    """Whether all rows have the same teachers in the same shares: none needs other shards' rows."""
    shares = recipe.routes if recipe.mixture is None else (*recipe.routes, *recipe.mixture.weights)
    return not recipe.needs_vocabulary or all(len({*of_task}) == 1 for of_task in shares)


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
    teacher_xV = mixed_xV = ref_xV = None
    if recipe.needs_vocabulary:
        teacher_xV, mixed_xV, ref_xV = _frozen(recipe, heads, chunk, options, student_xV.shape[-1])
    if ref_xV is not None:
        vocabulary["ref_xV"], found["ref"] = ref_xV, pick(ref_xV, ids_x)
    if teacher_xV is not None:
        found["teacher"] = pick(teacher_xV, ids_x)
        found["teacher_entropy"] = scoring.entropy(teacher_xV, real_V)
    # Where the teacher's own figures alone are asked for, a tilted target lacks its reference.
    if teacher_xV is not None and (ref_xV is not None or not objective.tilts):
        lam_x, lam_xV = along(lam, 1), along(lam, 2)
        target_xV = tilted_distribution(
            teacher_xV, ref_xV, real_xV, lam=lam_xV, cap=objective.ratio_cap
        )
        vocabulary["target_xV"] = target_xV
        # As where only the sampled tokens are scored, whatever asked for the vocabulary here.
        if objective.normalised:
            found["target"], mixed_xV = pick(target_xV, ids_x), teacher_xV
        else:
            found["target"] = tilted(
                pick(mixed_xV, ids_x), found.get("ref"), lam=lam_x, cap=objective.ratio_cap
            )
        if "local_kl_BT" in objective.needs or recipe.closed_form:
            found["local_kl"] = _local(objective, student_xV, mixed_xV, ref_xV, real_xV, lam_xV)
    found = {k: v if k == "logp" else jax.lax.stop_gradient(v) for k, v in found.items()}
    if look is not None:
        found |= look(ids_x=ids_x, teacher_xV=teacher_xV, **{"ref_xV": None} | vocabulary)
    if grad:
        # Before the first update of a batch the student is what it was at the start.
        known = {"student_x": jax.lax.stop_gradient(found["logp"])} | chunk["given"] | vocabulary
        known |= {"logp_x": found["logp"], "ids_x": ids_x}
        known |= {f"{k}_x": found[k] for k in ("target", "ref") if k in found}
        found |= sharding.rows_apart(functools.partial(_losses, objective), known)
    return found


def _losses(objective, known: dict) -> dict:
    """{name: [B, c]} of what is differentiated and takes the vocabulary."""
    found = {}
    if any(name.endswith("_xS") for name in objective.needs):
        whole = (known[name] for name in ("student_xV", "target_xV", "real_xV"))
        of_support = supported(objective.support, objective.mass, *whole)
        known = known | dict(zip(("student_xS", "target_xS", "valid_xS"), of_support))
    if over_vocabulary(objective.loss):
        found["loss"] = fed(objective.loss, known)
    if of := [r for r in objective.regularizers if over_vocabulary(r)]:
        found["regularizer"] = sum(fed(one, known) for one in of)
    return found


def _local(objective, student_xV, teacher_xV, ref_xV, real_xV, lam):
    """-E_S[token reward] of each state, over the support: KL(S || T) for plain distillation.

    The target is the sampled token's, normalised or not, so that it is the expectation of what is
    sampled.
    """
    student_xV, teacher_xV = (jnp.where(real_xV, x, 0.0) for x in (student_xV, teacher_xV))
    target_xV = teacher_xV
    if objective.tilts:
        ref_xV = jnp.where(real_xV, ref_xV, 0.0)
        target_xV = tilted(teacher_xV, ref_xV, lam=lam, cap=objective.ratio_cap)
        if objective.normalised:
            target_xV = jax.nn.log_softmax(jnp.where(real_xV, target_xV, -jnp.inf))
    choose = functools.partial(supported, objective.support, objective.mass)
    student_xS, target_xS, valid_xS = sharding.rows_apart(choose, student_xV, target_xV, real_xV)
    log_u_xS = jnp.where(valid_xS, target_xS - student_xS, 0.0)
    reward_xS = objective.token_reward(log_u_xS)
    return -jnp.where(valid_xS, jnp.exp(student_xS) * reward_xS, 0.0).sum(-1)


def _frozen(recipe, heads, chunk, options, n_ids):
    """(log-probs of each row's teacher, the same but for a geometric mixture's normaliser, the
    reference's) over n_ids ids; None of whom there is not."""
    teachers, ref = heads

    def over(decoder, params, hidden_xD):
        # Next to other teachers' they are as wide as the widest, and of the highest precision.
        hidden_xD = hidden_xD[..., : decoder.cfg.hidden_size].astype(decoder.dtype)
        return same_width(scoring.log_probs(decoder, params, hidden_xD, **options), n_ids)

    ref_xV = None if ref is None else over(recipe.reference, ref, chunk["ref"])
    if not teachers:
        return None, None, jax.lax.stop_gradient(ref_xV)
    n_rows = chunk["ids"].shape[0]
    every = []
    for of_task, hidden_xD in zip(recipe.routes, chunk["teacher"]):
        routes, rows_of = by_task(recipe, of_task, n_rows)

        def judge(i, rows, after):
            return over(recipe.teachers[i], teachers[i], rows)

        if len({*routes}) == 1:
            every.append(judge(routes[0], hidden_xD, None))
            continue
        if recipe.buckets != 1:
            raise ValueError(
                f"buckets is {recipe.buckets}, and rows sorted by length do not stand by task, as "
                "those of several teachers over the vocabulary have to; use buckets = 1"
            )
        groups = {"mesh": recipe.mesh, "routes": routes, "group_rows": rows_of}
        found = batching.by_teacher(judge, hidden_xD, **groups)
        # Joined from groups of rows, they would stand in the groups' sharding, or with all ids on
        # each device.
        every.append(constrain(found, "batch", None, "vocab"))
    teacher_xV = mixed_xV = mix(recipe, every)
    if recipe.mixture is not None and recipe.mixture.space == "log":
        real_V = jnp.arange(n_ids) < recipe.n_vocab
        teacher_xV = jax.nn.log_softmax(jnp.where(real_V, teacher_xV, -jnp.inf))
    return jax.lax.stop_gradient((teacher_xV, mixed_xV, ref_xV))


def same_width(logp_xV, n_ids: int):
    """Cut or filled up with -inf to n_ids: other models pad their embeddings to other widths."""
    missing = n_ids - logp_xV.shape[-1]
    if missing <= 0:
        return logp_xV[..., :n_ids]
    widths = ((0, 0),) * (logp_xV.ndim - 1) + ((0, missing),)
    return jnp.pad(logp_xV, widths, constant_values=-jnp.inf)
