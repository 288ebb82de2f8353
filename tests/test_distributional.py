"""Losses over whole distributions: their gradients, their gates, and what samples say instead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import toy
from gopd_jax.objectives.distributional import entropy_gated, exact, ratio_gated
from gopd_jax.objectives.divergences import DIVERGENCES, corrected, forward_kl, reverse_kl
from gopd_jax.objectives.supports import MASSES, supported, top_k

N_VOCAB = 7
EVERY = [pytest.param(f, id=name) for name, f in DIVERGENCES.items()]


def distribution(seed, shape=(6,), scale=1.5):
    return jax.nn.log_softmax(scale * jax.random.normal(jax.random.key(seed), (*shape, N_VOCAB)))


S_XV, T_XV = distribution(0), distribution(1)
REAL_XV = jnp.ones(S_XV.shape, bool)


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def kl(p_XV, q_XV):
    """KL(P || Q) by NumPy."""
    p_XV, q_XV = (np.asarray(x, np.float64) for x in (p_XV, q_XV))
    return (np.exp(p_XV) * (p_XV - q_XV)).sum(-1)


@pytest.mark.parametrize("divergence", EVERY)
def test_the_logit_gradient_is_the_centred_corrected_advantage(divergence):
    def loss(logits_XV):
        return exact(jax.nn.log_softmax(logits_XV), T_XV, REAL_XV, divergence=divergence).sum()

    got_XV = jax.jit(jax.grad(loss))(S_XV)
    w_XV, s_XV = corrected(divergence, T_XV - S_XV), jnp.exp(S_XV)
    want_XV = -s_XV * (w_XV - (s_XV * w_XV).sum(-1, keepdims=True))
    np.testing.assert_allclose(got_XV, want_XV, rtol=2e-5, atol=2e-6)
    assert np.abs(want_XV).max() > 1e-3


@pytest.mark.parametrize("divergence", EVERY)
def test_the_gradient_is_that_of_finite_differences_in_float64(divergence):
    with jax.enable_x64(True):
        target_V = jnp.asarray(np.asarray(T_XV[0], np.float64))
        target_V = jax.nn.log_softmax(target_V)
        logits_V = jnp.asarray(np.asarray(S_XV[0], np.float64))
        real_V = jnp.ones(N_VOCAB, bool)

        def loss(logits_V):
            return exact(jax.nn.log_softmax(logits_V), target_V, real_V, divergence=divergence)

        many = jax.jit(jax.vmap(loss))
        ups, downs = (many(logits_V + h * jnp.eye(N_VOCAB)) for h in (1e-6, -1e-6))
        want_V, got_V = (ups - downs) / 2e-6, jax.jit(jax.grad(loss))(logits_V)
        np.testing.assert_allclose(got_V, want_V, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mass", ["rest", "renormalised"])
@pytest.mark.parametrize("divergence", EVERY)
def test_a_student_at_its_target_has_no_loss_and_no_gradient(divergence, mass):
    def loss(logits_XV):
        student_XV = jax.nn.log_softmax(logits_XV)
        support = functools.partial(top_k, k=3)
        parts = supported(support, MASSES[mass], student_XV, T_XV, REAL_XV)
        return exact(*parts, divergence=divergence).sum()

    value, grad_XV = jax.value_and_grad(loss)(T_XV)
    close(value, 0, 2e-6)
    close(grad_XV, 0, 2e-6)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.25])
@pytest.mark.parametrize("divergence", EVERY)
def test_samples_say_on_average_what_the_whole_distribution_says_at_once(divergence, lam):
    """Over every completion of a toy language, by the probability of each."""
    target_SV = toy.log_softmax(toy.tilt(lam))
    valid_BTV = jnp.ones((*toy.MASK_BT.shape, toy.V), bool)
    log_u_BT, _ = toy.log_u(target_SV)
    sampled_SV = toy.ascent(corrected(divergence, log_u_BT))

    def direct(logits_SV):
        student_BTV = toy.log_softmax(logits_SV)[toy.STATE_BT]
        loss_BT = exact(student_BTV, target_SV[toy.STATE_BT], valid_BTV, divergence=divergence)
        return (toy.PROB_B * jnp.where(toy.MASK_BT, loss_BT, 0.0).sum(1)).sum()

    close(sampled_SV, -jax.jit(jax.grad(direct))(toy.STUDENT), 1e-5)
    assert np.abs(sampled_SV).max() > 5e-3


# --- the entropy gate


def test_forward_kl_is_added_where_the_targets_entropy_is_above_the_threshold():
    entropy_X = -(np.exp(T_XV) * T_XV).sum(-1)
    threshold = float(np.median(entropy_X))
    got_X = entropy_gated(
        S_XV, T_XV, REAL_XV, S_XV, T_XV, REAL_XV, threshold=threshold, k=N_VOCAB, weight=0.7
    )
    above_X = entropy_X > threshold
    assert 0 < above_X.sum() < len(above_X)
    close(got_X, kl(S_XV, T_XV) + 0.7 * above_X * kl(T_XV, S_XV), 1e-5)


def test_forward_kl_of_the_gate_is_over_the_targets_likeliest_and_a_bucket():
    got_X = entropy_gated(S_XV, T_XV, REAL_XV, S_XV, T_XV, REAL_XV, threshold=0.0, k=2)
    for got, s_V, t_V in zip(got_X - kl(S_XV, T_XV), np.exp(S_XV), np.exp(T_XV)):
        top = np.argsort(-t_V)[:2]
        s, t = (np.append(p[top], 1 - p[top].sum()) for p in (s_V, t_V))
        close(got, (t * np.log(t / s)).sum(), 1e-5)


def test_no_gradient_flows_through_the_entropy_gate_and_both_parts_have_theirs():
    def loss(logits_XV, threshold):
        s_XV = jax.nn.log_softmax(logits_XV)
        return entropy_gated(
            s_XV, T_XV, REAL_XV, s_XV, T_XV, REAL_XV, threshold=threshold, k=N_VOCAB
        ).sum()

    def kl_loss(logits_XV, divergence):
        s_XV = jax.nn.log_softmax(logits_XV)
        return exact(s_XV, T_XV, REAL_XV, divergence=divergence).sum()

    reverse, forward = (jax.grad(kl_loss)(S_XV, f) for f in (reverse_kl, forward_kl))
    close(jax.grad(loss)(S_XV, 10.0), reverse)
    close(jax.grad(loss)(S_XV, -1.0), reverse + forward)


# --- the ratio gate


def ratio_loss(logits_XV, ids_X, temperature):
    s_XV = jax.nn.log_softmax(logits_XV)
    picked = [jnp.take_along_axis(x, ids_X[:, None], -1)[:, 0] for x in (s_XV, T_XV)]
    return ratio_gated(*picked, s_XV, T_XV, REAL_XV, temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_ratio_gate_mixes_the_two_kls_by_the_sampled_token(temperature):
    ids_X = jnp.arange(6) % N_VOCAB
    gap_X = np.asarray((T_XV - S_XV)[jnp.arange(6), ids_X], np.float64)
    g_X = 1 / (1 + np.exp(-gap_X / temperature))
    want_X = g_X * kl(T_XV, S_XV) + (1 - g_X) * kl(S_XV, T_XV)
    close(ratio_loss(S_XV, ids_X, temperature), want_X, 1e-5)

    def fixed(logits_XV):
        s_XV = jax.nn.log_softmax(logits_XV)
        parts = [exact(s_XV, T_XV, REAL_XV, divergence=f) for f in (forward_kl, reverse_kl)]
        return (jnp.array(g_X) * parts[0] + jnp.array(1 - g_X) * parts[1]).sum()

    got_XV = jax.grad(lambda x: ratio_loss(x, ids_X, temperature).sum())(S_XV)
    close(got_XV, jax.grad(fixed)(S_XV), 1e-5)  # no gradient in g


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_ratio_gate_without_a_positive_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match=rf"temperature = {temperature} divides .* above 0"):
        ratio_loss(S_XV, jnp.zeros(6, int), temperature)
