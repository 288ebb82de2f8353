"""Supports and what becomes of the mass outside, against NumPy in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives.distributional import exact
from gopd_jax.objectives.divergences import forward_kl, pearson, reverse_kl
from gopd_jax.objectives.supports import (
    MASSES,
    SUPPORTS,
    full,
    log_mass,
    members,
    rest,
    supported,
    top_k,
)
from gopd_jax.spec import resolve

N_VOCAB, N_REAL = 11, 9
REAL_V = np.arange(N_VOCAB) < N_REAL


def distribution(seed, shape=(5,), scale=2.0):
    """Log-probs whose last two ids do not exist."""
    logits = scale * jax.random.normal(jax.random.key(seed), (*shape, N_VOCAB))
    return jax.nn.log_softmax(jnp.where(REAL_V, logits, -jnp.inf))


S_XV, T_XV = distribution(0), distribution(1)


def of_top_k(k, of="teacher"):
    return functools.partial(top_k, k=k, of=of)


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def listed(ids_xS, valid_xS):
    """The valid ids of each position, in their order."""
    return [
        np.asarray(ids)[np.asarray(valid)].tolist()
        for ids, valid in zip(np.asarray(ids_xS), np.asarray(valid_xS))
    ]


def numpys_top(logp_xV, k):
    """Ids in order of probability, equal ones by id, real ones alone."""
    return [np.argsort(-row[:N_REAL], kind="stable")[:k].tolist() for row in np.asarray(logp_xV)]


@pytest.mark.parametrize("k", [1, 3, 8])
def test_top_k_is_numpys(k):
    top_s, top_t = numpys_top(S_XV, k), numpys_top(T_XV, k)
    both = [(s, t) for s, t in zip(top_s, top_t)]
    want = {
        "student": top_s,
        "teacher": top_t,
        "union": [s + [i for i in t if i not in s] for s, t in both],
        "intersection": [[i for i in s if i in t] for s, t in both],
    }
    for of, lists in want.items():
        assert listed(*top_k(S_XV, T_XV, REAL_V, k=k, of=of)) == lists, of


def test_of_equal_ids_the_lower_comes_first():
    logp_V = jax.nn.log_softmax(jnp.where(REAL_V, jnp.zeros(N_VOCAB).at[4].set(1.0), -jnp.inf))
    ids_S, valid_S = top_k(logp_V, logp_V, REAL_V, k=3)
    assert ids_S.tolist() == [4, 0, 1]
    assert valid_S.all()


def test_ids_that_do_not_exist_are_never_valid():
    for of in ("teacher", "student", "union", "intersection"):
        found = listed(*top_k(S_XV, T_XV, REAL_V, k=10, of=of))
        assert all(sorted(ids) == list(range(N_REAL)) for ids in found), of


def test_only_valid_entries_are_members():
    ids_xS = jnp.array([[3, 0, 5], [3, 3, 1], [2, 2, 2]])
    valid_xS = jnp.array([[True, False, True], [False, True, False], [False] * 3])
    got_xV = members(ids_xS, valid_xS, 6)
    assert [np.flatnonzero(x).tolist() for x in got_xV] == [[3, 5], [3], []]


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.value_and_grad, has_aux=True)
def three_losses(logits_xV, support, mass):
    student_xV = jax.nn.log_softmax(jnp.where(REAL_V, logits_xV, -jnp.inf))
    parts = supported(support, MASSES[mass], student_xV, T_XV, REAL_V)
    each = [exact(*parts, divergence=f).sum() for f in (reverse_kl, forward_kl, pearson)]
    return sum(each), (jnp.stack(each), parts[2])


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("of", ["teacher", "student", "union", "intersection"])
@pytest.mark.parametrize("k", [N_REAL, N_VOCAB, 400])
def test_top_k_of_everything_is_the_full_support(k, of, mass):
    logits_xV = jnp.where(REAL_V, S_XV, 0.0)
    (_, (got, _)), got_grad = three_losses(logits_xV, of_top_k(k, of), mass)
    (_, (want, valid_xS)), want_grad = three_losses(logits_xV, full, mass)
    np.testing.assert_array_equal(valid_xS, np.broadcast_to(REAL_V, S_XV.shape))
    if k >= N_VOCAB:
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(got_grad, want_grad)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(got_grad, want_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of", ["teacher", "student", "union", "intersection"])
@pytest.mark.parametrize("k", [2, 4])
def test_masses_are_numpys(k, of):
    ids = listed(*top_k(S_XV, T_XV, REAL_V, k=k, of=of))
    for mass, function in MASSES.items():
        got = jax.jit(supported, static_argnums=(0, 1))(
            of_top_k(k, of), function, S_XV, T_XV, REAL_V
        )
        for i, chosen in enumerate(ids):
            valid_S = np.asarray(got[2][i])
            for logp_xS, logp_xV in zip(got, (S_XV, T_XV)):
                p_V = np.exp(np.asarray(logp_xV[i], np.float64))
                p_S, outside = p_V[chosen], p_V.sum() - p_V[chosen].sum()
                want = {"raw": p_S, "rest": [*p_S, outside], "renormalised": p_S / p_S.sum()}
                close(np.exp(np.asarray(logp_xS[i]))[valid_S], want[mass])


def test_an_empty_intersection_has_no_loss_and_no_gradient():
    student_V = jnp.array([5.0, 0, 0, 0, 0, 0])
    target_V = jax.nn.log_softmax(student_V[::-1])
    real_V = jnp.ones(6, bool)
    for name, function in MASSES.items():

        def loss(logits_V, mass=function):
            parts = supported(
                of_top_k(1, "intersection"), mass, jax.nn.log_softmax(logits_V), target_V, real_V
            )
            return exact(*parts, divergence=reverse_kl), parts

        (value, parts), grad_V = jax.jit(jax.value_and_grad(loss, has_aux=True))(student_V)
        close(value, 0)
        close(grad_V, 0)
        assert parts[2].tolist() == ([False, True] if name == "rest" else [False])


def test_the_mass_of_nothing_is_zero_and_has_no_gradient():
    kept_XS = jnp.array([[True, False], [False, False]])
    grad_XS = jax.grad(lambda x: jnp.exp(log_mass(x, kept_XS)).sum())(jnp.zeros((2, 2)))
    assert grad_XS.tolist() == [[1, 0], [0, 0]]
    assert log_mass(jnp.full((2, 2), jnp.nan), kept_XS)[1] == -np.inf


def test_renormalised_mass_is_a_distribution_whose_gradient_is_its_own():
    def loss(logits_xV, whole):
        student_xV = jax.nn.log_softmax(jnp.where(REAL_V, logits_xV, -jnp.inf))
        parts = supported(of_top_k(3), MASSES["renormalised"], student_xV, T_XV, REAL_V)
        if whole:
            return exact(*parts, divergence=forward_kl).sum()
        # The same by a softmax over those three logits alone.
        ids_xS, _ = top_k(student_xV, T_XV, REAL_V, k=3)
        own_xS, target_xS = (
            jax.nn.log_softmax(jnp.take_along_axis(x, ids_xS, -1)) for x in (logits_xV, T_XV)
        )
        return exact(own_xS, target_xS, jnp.ones_like(ids_xS, bool), divergence=forward_kl).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    grads = [gradient(jnp.where(REAL_V, S_XV, 0.0), whole) for whole in (True, False)]
    close(*grads)


@pytest.mark.parametrize("of", ["student", "teacher"])
def test_the_rest_bucket_keeps_its_value_and_gradient_where_the_sum_rounds_to_one(of):
    """Student sure of an id that the target hardly takes: log(1 - sum) would have no digit left."""
    logits_V = np.array([30.0, 0, 1, 2, -1, 0.5])
    target_V = jax.nn.log_softmax(jnp.array([0.0, 3, 2, 1, 0, 1]))
    real_V = jnp.ones(6, bool)

    def loss(logits_V):
        student_V = jax.nn.log_softmax(logits_V)
        return exact(
            *supported(of_top_k(1, of), rest, student_V, target_V, real_V), divergence=forward_kl
        )

    chosen = 0 if of == "student" else 1

    def numpys(logits_V):
        s_V = np.exp(logits_V - logits_V.max())
        s_V, t_V = s_V / s_V.sum(), np.exp(np.asarray(target_V, np.float64))
        split = [(p[chosen], np.delete(p, chosen).sum()) for p in (s_V, t_V)]
        return sum(t * np.log(t / s) for s, t in zip(*split))

    value, grad_V = jax.value_and_grad(loss)(jnp.array(logits_V, jnp.float32))
    np.testing.assert_allclose(value, numpys(logits_V), rtol=1e-5)
    steps = 1e-5 * np.eye(6)
    want_V = [(numpys(logits_V + h) - numpys(logits_V - h)) / 2e-5 for h in steps]
    assert np.abs(want_V).max() > 0.1
    close(grad_V, want_V, 1e-5)


@pytest.mark.parametrize("excess", [0.0, 1e-7, 1e-6, 1e-3])
def test_the_rest_of_a_known_support_is_a_number_where_the_sum_is_one_or_more(excess):
    logp_S = jnp.log(jnp.array([0.75, 0.25])) + excess
    valid_S = jnp.ones(2, bool)
    value, grad_S = jax.value_and_grad(lambda x: rest(x, valid_S)[0][-1])(logp_S)
    assert np.isfinite(grad_S).all()
    close(value, -24 * np.log(2), 1e-3)


def test_the_rest_of_a_known_support_is_what_is_missing():
    for inside in (0.0, 1e-6, 0.3, 0.999):
        logp_S = jnp.log(jnp.array([inside / 3, 2 * inside / 3, 0.5]))
        logp_S3, valid_S3 = rest(logp_S, jnp.array([True, True, False]))
        assert valid_S3.tolist() == [True, True, False, True]
        np.testing.assert_allclose(logp_S3[-1], np.log1p(-np.float64(inside)), rtol=1e-4)


def test_raw_mass_is_biased_where_the_others_are_not():
    """Raw reverse KL is least where the student has put T / e of the target's T on the support.

    sum s log(s / t) over s = c t is c log c times T, least at c = 1 / e: below zero, and unclamped.
    """
    target_V = jax.nn.log_softmax(jnp.array([2.0, 1.0, 0.0, 0.0]))
    real_V = jnp.ones(4, bool)
    inside = np.exp(np.asarray(target_V, np.float64))[:2].sum()
    least = inside / np.e
    inward_V = jnp.log(jnp.array([least / inside] * 2 + [(1 - least) / (1 - inside)] * 2))

    def loss(logits_V, mass):
        student_V = jax.nn.log_softmax(logits_V)
        parts = supported(of_top_k(2), MASSES[mass], student_V, target_V, real_V)
        return exact(*parts, divergence=reverse_kl)

    measured = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    for mass in MASSES:
        value, grad_V = measured(target_V, mass)
        if mass == "raw":
            assert np.abs(grad_V).max() > 0.1  # it leaves the target
            value, grad_V = measured(target_V + inward_V, mass)
            close(value, -least)
        else:
            close(value, 0)
        close(grad_V, 0)


def test_no_gradient_flows_through_the_choice_of_ids_or_into_what_is_outside_of_raw():
    def values(student_xV):
        return supported(of_top_k(2, "student"), MASSES["raw"], student_xV, T_XV, REAL_V)[0].sum()

    top_xV = members(*top_k(S_XV, T_XV, REAL_V, k=2, of="student"), N_VOCAB)
    np.testing.assert_array_equal(jax.grad(values)(S_XV), top_xV.astype(jnp.float32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_k(k=0)", r"k = 0 counts no ids; give an int of at least 1"),
        ("top_k(k=2.5)", r"k = 2.5 counts no ids"),
        ("top_k(k=3, of='target')", r"of = 'target' is no choice .* \['intersection', 'student',"),
    ],
)
def test_a_support_that_cannot_be_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        resolve(text, SUPPORTS)(S_XV, T_XV, REAL_V)
