"""Losses that choose the tokens to which a suppressed token's probability goes.

A policy-gradient update with A < 0 takes probability from the sampled token and raises every other
logit by |A| S_v: what it frees goes where the student already leans. Routing sends it to tokens
that the target likes better and the student can reach. x is any leading shape; log-probs are nats.
"""

import jax
import jax.numpy as jnp

from gopd_jax.objectives.distributional import exact
from gopd_jax.objectives.supports import check_k, likeliest, log_mass, members
from gopd_jax.spec import table


def cr_opd(
    logp_x,
    ids_x,
    advantage_x,
    student_xV,
    target_xV,
    real_xV,
    *,
    threshold=0.0,  # a token is a negative where A < -threshold
    teacher_k=16,  # candidates are among the target's so many likeliest ids; None asks nothing
    teacher_floor=None,  # and have at least this probability under the target
    student_k=16,
    student_floor=None,
    margin=0.0,  # and log T - log S above this
    teacher_power=1.0,
    student_power=1.0,
    temperature=1.0,
    teacher_mass=0.0,  # the gate: candidates have at least this probability together
    student_mass=0.0,
    confidence=None,  # and the target's likeliest id at least this
    fallback=1.0,  # factor of plain suppression where the gate is shut; 0 abstains
    clip=None,  # largest |A| of a negative
):
    """Counterfactual routing: -|A| (sum_v rho(v) log S(v) - log S(y)) for a negative sample y.

    Its direction in the logits is |A| (rho - e_y), which sums to zero, rho as `route` gives it.
    Where the gate is shut a negative is suppressed plainly, times `fallback`; other tokens are the
    policy gradient -A log S(y). Biased by design: report its cosine with the exact gradient.
    Derived from what the survey arXiv 2606.22793 says of CR-OPD. ValueError as `route`, and for a
    negative `fallback` or a `clip` that is not positive.
    """
    if not fallback >= 0:
        raise ValueError(f"fallback = {fallback} would raise negatives; give 0 or more")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip = {clip} leaves no advantage; give one above 0, or None")
    gate_x, rho_xV = route(
        ids_x,
        advantage_x,
        student_xV,
        target_xV,
        real_xV,
        threshold=threshold,
        teacher_power=teacher_power,
        student_power=student_power,
        temperature=temperature,
        teacher_mass=teacher_mass,
        student_mass=student_mass,
        confidence=confidence,
        teacher_k=teacher_k,
        teacher_floor=teacher_floor,
        student_k=student_k,
        student_floor=student_floor,
        margin=margin,
    )
    advantage_x = jax.lax.stop_gradient(advantage_x)
    size_x = jnp.abs(advantage_x)
    if clip is not None:
        size_x = jnp.minimum(size_x, clip)
    # rho is 0 where the log-prob may be -inf, and 0 times that is not 0. The sampled token's is
    # subtracted under the sum: outside of it, what rho lacks of 1 would weigh all of log S(y).
    gap_xV = jnp.where(rho_xV > 0, student_xV, 0.0) - logp_x[..., None]
    routed_x = -size_x * jnp.where(rho_xV > 0, rho_xV * gap_xV, 0.0).sum(-1)
    negative_x = jnp.where(gate_x, routed_x, fallback * size_x * logp_x)
    return jnp.where(advantage_x < -threshold, negative_x, -advantage_x * logp_x)


def asymmetric(logp_x, advantage_x, student_xS, target_xS, valid_xS, *, divergence):
    """Policy gradient -A log S(y) where A > 0, the divergence D_f(S || T) where A <= 0.

    A sampled token that the target likes better is worth repeating; one that it likes less says
    nothing of what to do instead, which the whole distribution does. divergence: an entry of
    DIVERGENCES, its options bound. The divergence is not weighed by A.
    """
    advantage_x = jax.lax.stop_gradient(advantage_x)
    # A divergence that overflows must not reach the gradient of tokens that do not use it.
    used_xS = valid_xS & (advantage_x <= 0)[..., None]
    whole_x = exact(student_xS, target_xS, used_xS, divergence=divergence)
    return jnp.where(advantage_x > 0, -advantage_x * logp_x, whole_x)


ROUTING = table(cr_opd, asymmetric)


def route(
    ids_x,
    advantage_x,
    student_xV,
    target_xV,
    real_xV,
    *,
    threshold=0.0,
    teacher_power=1.0,
    student_power=1.0,
    temperature=1.0,
    teacher_mass=0.0,
    student_mass=0.0,
    confidence=None,
    **choice,
):
    """(gate_x, rho_xV): which negatives are routed, and where to; options are those of `cr_opd`.

    rho ~ T^teacher_power S^student_power (T / S)^(1 / temperature) over the `candidates`, which
    take `choice`; it sums to 1 where the gate is open and is 0 elsewhere. The gate is open for a
    negative that has a candidate, whose candidates have the mass asked for under both models, and
    whose target is as confident as asked. No gradient flows through either. ValueError for a
    negative threshold (positive advantages would be routed) or a temperature that is not positive.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold = {threshold} makes negatives of A > 0; give 0 or more")
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} divides log(T / S); give one above 0")
    student_xV, target_xV = map(jax.lax.stop_gradient, (student_xV, target_xV))
    candidate_xV = candidates(ids_x, student_xV, target_xV, real_xV, **choice)
    gate_x = (advantage_x < -threshold) & candidate_xV.any(-1)
    gate_x &= jnp.exp(log_mass(target_xV, candidate_xV)) >= teacher_mass
    gate_x &= jnp.exp(log_mass(student_xV, candidate_xV)) >= student_mass
    if confidence is not None:
        gate_x &= jnp.exp(jnp.where(real_xV, target_xV, -jnp.inf).max(-1)) >= confidence
    log_s_xV, log_t_xV = (jnp.where(candidate_xV, x, 0.0) for x in (student_xV, target_xV))
    score_xV = (teacher_power + 1 / temperature) * log_t_xV
    score_xV += (student_power - 1 / temperature) * log_s_xV
    open_xV = candidate_xV & gate_x[..., None]
    log_rho_xV = score_xV - jnp.where(open_xV, log_mass(score_xV, open_xV)[..., None], 0.0)
    return gate_x, jnp.where(open_xV, jnp.exp(log_rho_xV), 0.0)


def candidates(
    ids_x,
    student_xV,
    target_xV,
    real_xV,
    *,
    teacher_k=16,
    teacher_floor=None,
    student_k=16,
    student_floor=None,
    margin=0.0,
):
    """bool_xV: ids other than the sampled one that could take its probability.

    They are supported by the target (among its teacher_k likeliest, with probability of at least
    teacher_floor), reachable by the student (likewise), and log T - log S is above margin. Each
    condition that is not None must hold. ValueError for k < 1.
    """
    student_xV, target_xV = map(jax.lax.stop_gradient, (student_xV, target_xV))
    real_xV = jnp.broadcast_to(real_xV, student_xV.shape)
    n_vocab = student_xV.shape[-1]
    sampled_xV = jnp.arange(n_vocab) == ids_x[..., None]
    # Where an id is not real the difference of two infinities would be NaN.
    log_s_xV, log_t_xV = (jnp.where(real_xV, x, 0.0) for x in (student_xV, target_xV))
    found_xV = real_xV & ~sampled_xV & (log_t_xV - log_s_xV > margin)
    for k, name, floor, logp_xV in (
        (teacher_k, "teacher_k", teacher_floor, log_t_xV),
        (student_k, "student_k", student_floor, log_s_xV),
    ):
        if k is not None:
            check_k(k, name)
            if k < n_vocab:
                found_xV &= members(*likeliest(logp_xV, real_xV, k), n_vocab)
        if floor is not None:
            found_xV &= jnp.exp(logp_xV) >= floor
    return found_xV
