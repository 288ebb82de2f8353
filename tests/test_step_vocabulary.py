"""Losses over the vocabulary in the step, chunk by chunk, against full logits and written out."""

import dataclasses
import functools

import full_logits as full
import jax
import jax.numpy as jnp
import numpy as np
import pytest

MASK_BT = full.rollout().mask_BT
IDS_BT = full.rollout().tokens_BL[:, 1:]


def kl(log_p, log_q):
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def jsd(log_s, log_t, beta=0.5):
    log_m = jnp.log(beta * jnp.exp(log_t) + (1 - beta) * jnp.exp(log_s))
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def likeliest(logp, k):
    """Ids [.., k] of the largest."""
    return jnp.argsort(-jax.lax.stop_gradient(logp), axis=-1, stable=True)[..., :k]


def bucketed(ids, *logps):
    """Each distribution on the ids, and the rest of it as one more outcome."""
    for logp in logps:
        inside = jnp.take_along_axis(logp, ids, -1)
        chosen = (ids[..., None] == jnp.arange(full.V)).any(-2)
        outside = jnp.log(jnp.where(chosen, 0.0, jnp.exp(logp)).sum(-1))
        yield jnp.concatenate([inside, outside[..., None]], -1)


def entropy(logp):
    return -(jnp.exp(logp) * logp).sum(-1)


def picked(logp):
    return jnp.take_along_axis(logp, IDS_BT[..., None], -1)[..., 0]


def routed(s, t, k=8):
    """-|A| (sum rho log S - log S(y)) of negatives, rho ~ T S (T / S) over candidates."""
    advantage = jax.lax.stop_gradient(picked(t) - picked(s))
    wanted = (t > s) & (jnp.arange(full.V) != IDS_BT[..., None])
    for logp in (s, t):
        wanted &= (likeliest(logp, k)[..., None] == jnp.arange(full.V)).any(-2)
    rho = jnp.where(wanted, jnp.exp(2 * t), 0.0)
    some = wanted.any(-1)
    rho = jax.lax.stop_gradient(rho / jnp.where(some, rho.sum(-1), 1.0)[..., None])
    plain = -advantage * picked(s)
    freed = jnp.abs(advantage) * (picked(s) - (rho * s).sum(-1))
    return jnp.where((advantage < 0) & some, freed, plain)


def gated(s, t):
    g = jax.lax.stop_gradient(jax.nn.sigmoid((picked(t) - picked(s)) / 2.0))
    return g * kl(t, s) + (1 - g) * kl(s, t)


def asymmetric(s, t):
    advantage = jax.lax.stop_gradient(jnp.exp(picked(t) - picked(s)) - 1)  # forward KL, corrected
    return jnp.where(advantage > 0, -advantage * picked(s), kl(t, s))


def mode_seeking(s, t):
    forward = kl(*list(bucketed(likeliest(t, 16), t, s)))
    return kl(s, t) + jnp.where(entropy(t) > 1.5, 0.5 * forward, 0.0)


def regularised(s, t):
    ref = picked(full.logp_of(full.REFERENCE)[:, :-1])
    return kl(s, t) - 0.3 * entropy(s) + 0.2 * (picked(s) - ref) ** 2 / 2


def semi(s, t):
    advantage = jnp.exp(picked(t) - picked(s)) - 1
    return -jax.lax.stop_gradient(advantage) * picked(s)


# name: options of objective.build, the loss of each state from log-probs [.., V] of S and T_lam
CASES = {
    "reverse": ({"loss": "exact"}, kl),
    "jsd": ({"loss": "exact", "divergence": "jsd", "lam": 1.25}, jsd),
    "forward over the target's five likeliest": (
        {
            **{"loss": "exact", "divergence": "forward_kl", "lam": 1.25},
            "support": "top_k(k=5, of='teacher')",
        },
        lambda s, t: kl(*reversed(list(bucketed(likeliest(t, 5), s, t)))),
    ),
    "entropy_gated": (
        {"loss": "entropy_gated(threshold=1.5, weight=0.5)", "lam": 1.25},
        mode_seeking,
    ),
    "ratio_gated": ({"loss": "ratio_gated(temperature=2.0)", "lam": 1.25}, gated),
    "cr_opd": ({"loss": "cr_opd(teacher_k=8, student_k=8)"}, routed),
    "asymmetric": ({"loss": "asymmetric", "divergence": "forward_kl", "lam": 1.25}, asymmetric),
    "regularised": (
        {"loss": "exact", "regularizers": ("entropy(weight=0.3)", "anchor(weight=0.2)")},
        regularised,
    ),
    "sampled forward KL": ({"divergence": "forward_kl", "lam": 1.25}, semi),
}


@functools.cache
def wanted(name):
    """(gradient, loss) of a case from all logits at once."""
    options, loss = CASES[name]
    target_BTV = full.target(options.get("lam", 1.0))[:, :-1]
    return full.gradient(lambda s: full.token_mean(loss(s[:, :-1], target_BTV), MASK_BT))


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_descent_from_full_logits(name):
    grads, metrics = full.setting(options=CASES[name][0]).descent()
    want, loss = wanted(name)
    assert full.norm(want) > 0.05
    full.same(grads, want, 1e-5 * max(1, full.norm(want)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["skipped"] == 0
