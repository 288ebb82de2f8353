"""What the two distributions look like at the states visited: diagnostics over the vocabulary.

Pure functions over student_xV, target_xV, teacher_xV, ref_xV, log-probs in nats, and real_xV bool;
x is any leading shape, each position by itself. They need whole distributions, so they are for some
rows every now and then; `diagnostics` has what every step reports.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from gopd_jax.objectives.routing import candidates, route
from gopd_jax.objectives.supports import likeliest, log_mass, members

_CHOICE = ("teacher_k", "teacher_floor", "student_k", "student_floor", "margin")
# Options of cr_opd that say what a routed token weighs, not where the routing goes.
_WEIGHING = ("fallback", "clip")


def inspect(
    student_xV,
    target_xV,
    real_xV,
    ids_x,
    advantage_x,
    teacher_xV=None,
    ref_xV=None,
    *,
    k=16,
    routing: Mapping | None = None,
):
    """{name: value_x} of everything here, for the states and the sampled ids_x at positions x.

    kl_target, kl_teacher, kl_ref: KL(S || .); the same with _forward: KL(. || S); entropy,
    entropy_target, entropy_teacher, all in nats. overlap, overlap_mass, tail_mass over the k
    likeliest. actionability; negative and routable, 0 or 1: the routable share of negatives is the
    sum of the second over that of the first. routing: options of `cr_opd`; None are its own.
    What is asked of a model that is None is left out.
    """
    routing = {name: v for name, v in (routing or {}).items() if name not in _WEIGHING}
    choice = {name: v for name, v in routing.items() if name in _CHOICE}
    real_xV = jnp.broadcast_to(real_xV, student_xV.shape)
    overlap_x, overlap_mass_x = overlap(student_xV, target_xV, real_xV, k=k)
    found = {
        "entropy": entropy(student_xV, real_xV),
        "overlap": overlap_x,
        "overlap_mass": overlap_mass_x,
        "tail_mass": tail_mass(student_xV, target_xV, real_xV, k=k),
        "actionability": actionability(ids_x, student_xV, target_xV, real_xV, **choice),
        "negative": (advantage_x < -routing.get("threshold", 0.0)).astype(jnp.float32),
        "routable": routable(ids_x, advantage_x, student_xV, target_xV, real_xV, **routing),
    }
    for name, other_xV in (("target", target_xV), ("teacher", teacher_xV), ("ref", ref_xV)):
        if other_xV is not None:
            found[f"kl_{name}"] = kl(student_xV, other_xV, real_xV)
            found[f"kl_{name}_forward"] = kl(other_xV, student_xV, real_xV)
            if name != "ref":
                found[f"entropy_{name}"] = entropy(other_xV, real_xV)
    return found


def kl(logp_xV, logq_xV, real_xV):
    """KL(P || Q), exact, nats."""
    logp_xV, logq_xV = (jnp.where(real_xV, x, 0.0) for x in (logp_xV, logq_xV))
    return jnp.where(real_xV, jnp.exp(logp_xV) * (logp_xV - logq_xV), 0.0).sum(-1)


def entropy(logp_xV, real_xV):
    """-sum p log p, nats."""
    logp_xV = jnp.where(real_xV, logp_xV, 0.0)
    return -jnp.where(real_xV, jnp.exp(logp_xV) * logp_xV, 0.0).sum(-1)


def overlap(student_xV, target_xV, real_xV, *, k):
    """(|top-k S and top-k T| / k, the probability of those shared ids under S).

    Where fewer than k ids are real, all of them are the top k, and k is their number.
    """
    shared_xV, n_x = _top(student_xV, real_xV, k)
    shared_xV &= _top(target_xV, real_xV, k)[0]
    return shared_xV.sum(-1) / n_x, jnp.exp(log_mass(student_xV, shared_xV))


def tail_mass(student_xV, target_xV, real_xV, *, k):
    """The student's probability outside the target's k likeliest ids.

    Summed over those ids: 1 minus the sum over the others would be rounding where it is small.
    """
    return jnp.exp(log_mass(student_xV, real_xV & ~_top(target_xV, real_xV, k)[0]))


def actionability(ids_x, student_xV, target_xV, real_xV, **choice):
    """sum_C (T - S)+ / TV(S, T): the share of the mass to be moved that `candidates` would take.

    C as for the sampled ids_x, `choice` its options. 0 where the models agree. Survey, arXiv
    2606.22793.
    """
    wanted_xV = jnp.where(real_xV, jnp.exp(target_xV) - jnp.exp(student_xV), 0.0)
    wanted_xV = jnp.maximum(wanted_xV, 0.0)
    candidate_xV = candidates(ids_x, student_xV, target_xV, real_xV, **choice)
    # T - S sums to zero, so the sum of its positive part is the total variation.
    variation_x = wanted_xV.sum(-1)
    part_x = jnp.where(candidate_xV, wanted_xV, 0.0).sum(-1)
    return jnp.where(variation_x > 0, part_x / jnp.where(variation_x > 0, variation_x, 1.0), 0.0)


def routable(ids_x, advantage_x, student_xV, target_xV, real_xV, **routing):
    """1 where the sampled token is a negative that `route` would send somewhere, 0 elsewhere."""
    return route(ids_x, advantage_x, student_xV, target_xV, real_xV, **routing)[0].astype(
        jnp.float32
    )


def cosine(tree_a, tree_b):
    """Cosine of two gradients of the same structure; NaN where one of them is zero everywhere."""
    a, b = (jax.tree.map(lambda x: x.astype(jnp.float32), tree) for tree in (tree_a, tree_b))
    # Squares of gradients of 1e-20, or 1e20, are not float32 numbers.
    a, b = map(_scaled, (a, b))
    return _dot(a, b) / jnp.sqrt(_dot(a, a) * _dot(b, b))


def repetition(ids_BT, mask_BT, *, n=4):
    """share_B: of a row's n-grams, those that occurred earlier in the row; 0 where it has none.

    An n-gram is n neighbouring tokens that are all on the mask. Sorting, O(n T log T) and exact.
    ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n = {n}: an n-gram has at least one token")
    n_windows = ids_BT.shape[1] - n + 1
    if n_windows < 1:
        return jnp.zeros(ids_BT.shape[0], jnp.float32)
    ids_BT = jnp.where(mask_BT, ids_BT, 0)

    def windows(values_BT):
        return [values_BT[:, i : i + n_windows] for i in range(n)]

    whole_BW = jnp.stack(windows(mask_BT)).all(0)
    keys = [(~whole_BW).astype(jnp.int32), *windows(ids_BT)]
    # Windows that are no n-grams go last; equal ones become neighbours, all but the first repeat.
    sorted_keys = jax.lax.sort(keys, dimension=1, num_keys=len(keys))
    same_BW = jnp.stack([key[:, 1:] == key[:, :-1] for key in sorted_keys]).all(0)
    repeated_B = (same_BW & (sorted_keys[0][:, 1:] == 0)).sum(1)
    return repeated_B / jnp.maximum(whole_BW.sum(1), 1).astype(jnp.float32)


def auroc(score_B, label_B):
    """Probability that a row with label True scores above one with False, ties counting half.

    NaN unless both labels occur. Sorting, O(B log B); scores may be infinite but not NaN.
    """
    label_B = jnp.asarray(label_B, bool)
    n_false = (~label_B).sum()
    # Rows with label True stand behind those with False, where a search may be cut off.
    false_B = jnp.sort(jnp.where(label_B, jnp.inf, score_B))
    below_B, up_to_B = (
        jnp.minimum(jnp.searchsorted(false_B, score_B, side=side), n_false)
        for side in ("left", "right")
    )
    won_B = (below_B + up_to_B).astype(jnp.float32) / (2.0 * n_false)
    return jnp.where(label_B, won_B, 0.0).sum() / label_B.sum()


def _top(logp_xV, real_xV, k):
    """(bool_xV, how many): the k likeliest real ids."""
    n_vocab = logp_xV.shape[-1]
    ids_xS, valid_xS = likeliest(logp_xV, real_xV, min(k, n_vocab))
    return members(ids_xS, valid_xS, n_vocab), valid_xS.sum(-1)


def _scaled(tree):
    largest = jnp.max(jnp.stack([jnp.abs(x).max() for x in jax.tree.leaves(tree)]))
    return jax.tree.map(lambda x: x / jnp.where(largest > 0, largest, 1.0), tree)


def _dot(tree_a, tree_b):
    products = jax.tree.map(lambda a, b: (a * b).sum(), tree_a, tree_b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))
