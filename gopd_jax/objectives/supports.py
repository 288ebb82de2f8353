"""Over which ids a state's two distributions are compared, and what becomes of the mass outside.

student_xV, target_xV: log-probs over the vocabulary, x any leading shape; real_xV bool, the ids
that the tokenizer has (it may be [V] alone). The gradient flows through the values of the student
and never through the choice of ids.
"""

import inspect

import jax
import jax.numpy as jnp

from gopd_jax.spec import table

# The largest sum of probabilities below 1 that float32 holds is 1 - 2^-24.
_LARGEST_SUM = -(2.0**-24)


def full(student_xV, target_xV, real_xV):
    """Every real id: None, because there is nothing to choose."""
    return None


def top_k(student_xV, target_xV, real_xV, *, k, of="teacher"):
    """(ids_xS int32, valid_xS bool): the k likeliest ids of the target, the student, or both.

    of: "teacher" means the target, tilted or not; "student"; "union" (S = 2k, an id that both
    have counts once) or "intersection" (S = k, and it may be empty). Of equal ids the lower comes
    first. None, everything, where k reaches V. ValueError for k < 1 or another `of`.
    """
    check_k(k, "k")
    n_vocab = student_xV.shape[-1]
    by_name = {"teacher": (target_xV,), "student": (student_xV,)}
    by_name["union"] = by_name["intersection"] = (student_xV, target_xV)
    if of not in by_name:
        raise ValueError(f"of = {of!r} is no choice of ids; there are {sorted(by_name)}")
    if k >= n_vocab:
        return None
    chosen = [likeliest(logp_xV, real_xV, k) for logp_xV in by_name[of]]
    if len(chosen) == 1:
        return chosen[0]
    (ids_xS, valid_xS), (other_xS, other_valid_xS) = chosen
    if of == "intersection":
        in_other_xV = members(other_xS, other_valid_xS, n_vocab)
        return ids_xS, valid_xS & jnp.take_along_axis(in_other_xV, ids_xS, -1)
    listed_xV = members(ids_xS, valid_xS, n_vocab)
    new_xS = other_valid_xS & ~jnp.take_along_axis(listed_xV, other_xS, -1)
    return jnp.concatenate([ids_xS, other_xS], -1), jnp.concatenate([valid_xS, new_xS], -1)


def rest(logp_xS, valid_xS, outside_x=None):
    """The support and one bucket that holds everything else: [..., S + 1]. Nothing is lost.

    outside_x: log of the mass outside, -inf where there is no id, so that the bucket is not valid.
    It is summed over those ids, because 1 - sum has no digit left once the support holds all but
    1e-7. None, for whoever knows of the distribution only its support: then log(1 - sum), floored
    at log 2^-24 where the sum rounds to 1 or more. A support without any valid entry leaves one
    bucket of probability 1, in the student and in the target: its divergence is 0.
    """
    if outside_x is None:
        outside_x = _log_complement(jnp.minimum(log_mass(logp_xS, valid_xS), _LARGEST_SUM))
    some_x = outside_x > -jnp.inf
    bucket_x = jnp.where(some_x, outside_x, 0.0)
    return (
        jnp.concatenate([logp_xS, bucket_x[..., None]], -1),
        jnp.concatenate([valid_xS, some_x[..., None]], -1),
    )


def renormalised(logp_xS, valid_xS):
    """The distribution given that the id lies in the support; what is outside is not trained.

    A support without any valid entry stays so: its divergence is 0, and so is its gradient.
    """
    inside_x1 = log_mass(logp_xS, valid_xS)[..., None]
    return jnp.where(valid_xS, logp_xS - jnp.where(valid_xS, inside_x1, 0.0), 0.0), valid_xS


def raw(logp_xS, valid_xS):
    """The probabilities as they are, summing to less than 1.

    Biased: a sum over them may be negative and is least elsewhere than at the target. It is not
    clamped at zero, which would switch the gradient off exactly where the bias is.
    """
    return logp_xS, valid_xS


SUPPORTS = table(full, top_k)
MASSES = table(rest, renormalised, raw)


def supported(support, mass, student_xV, target_xV, real_xV):
    """(student_xS, target_xS, valid_xS): log-probs over a support, at least float32, mass handled.

    support, mass: entries of SUPPORTS and MASSES with their options bound. Entries that are not
    valid are 0, without a gradient. With the full support every mass is the identity.
    """
    real_xV = jnp.broadcast_to(real_xV, student_xV.shape)
    chosen = support(student_xV, target_xV, real_xV)
    logps = [
        jnp.where(real_xV, x.astype(jnp.promote_types(x.dtype, jnp.float32)), 0.0)
        for x in (student_xV, target_xV)
    ]
    if chosen is None:
        return *logps, real_xV
    ids_xS, valid_xS = chosen
    n_vocab = student_xV.shape[-1]

    def of_model(logp_xV):
        def outside():
            outside_xV = real_xV & ~members(ids_xS, valid_xS, n_vocab)
            return log_mass(logp_xV, outside_xV)

        inside_xS = jnp.where(valid_xS, jnp.take_along_axis(logp_xV, ids_xS, -1), 0.0)
        return handled(mass, inside_xS, valid_xS, outside)

    (student_xS, student_valid_xS), (target_xS, target_valid_xS) = map(of_model, logps)
    valid_xS = student_valid_xS & target_valid_xS
    return jnp.where(valid_xS, student_xS, 0.0), jnp.where(valid_xS, target_xS, 0.0), valid_xS


def handled(mass, logp_xS, valid_xS, outside):
    """What mass makes of a support; outside() is the log-mass off it, asked for where mass is."""
    wants = "outside_x" in inspect.signature(mass).parameters
    return mass(logp_xS, valid_xS, **({"outside_x": outside()} if wants else {}))


def likeliest(logp_xV, real_xV, k):
    """(ids_xS int32, valid_xS bool): the k likeliest real ids, of equal ones the lower first.

    Not valid are entries past the last real id. k is at most V.
    """
    # A real id of probability 0 still comes before one that does not exist.
    lowest = jnp.finfo(jnp.float32).min
    logp_xV = jax.lax.stop_gradient(logp_xV.astype(jnp.float32))
    key_xV = jnp.where(real_xV, jnp.maximum(logp_xV, lowest), -jnp.inf)
    key_xS, ids_xS = jax.lax.top_k(key_xV, k)
    return ids_xS, key_xS > -jnp.inf


def members(ids_xS, valid_xS, n_vocab):
    """bool [..., n_vocab]: the ids that are among the valid ones of ids_xS."""
    scatter = jnp.vectorize(lambda a, i, v: a.at[i].max(v), signature="(v),(s),(s)->(v)")
    return scatter(jnp.zeros(n_vocab, bool), ids_xS, valid_xS)


def log_mass(logp_xS, kept_xS):
    """Log of the probability of the ids kept, summed over the last axis; -inf where none is.

    No gradient reaches what is not kept, whatever its value.
    """
    return jax.nn.logsumexp(jnp.where(kept_xS, logp_xS, -jnp.inf), -1)


def _log_complement(logp_x):
    """log(1 - exp(logp_x)) for logp_x < 0: each half by the form that keeps its digits there."""
    half = -0.6931472
    near_x = jnp.log(-jnp.expm1(jnp.maximum(logp_x, half)))
    far_x = jnp.log1p(-jnp.exp(jnp.minimum(logp_x, half)))
    return jnp.where(logp_x > half, near_x, far_x)


def check_k(k, name):
    """ValueError unless k is an int of at least 1."""
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"{name} = {k!r} counts no ids; give an int of at least 1")
