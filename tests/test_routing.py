"""Routing of what a suppressed token frees, part by part, and what it buys in a toy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives.distributional import exact
from gopd_jax.objectives.divergences import jsd, reverse_kl
from gopd_jax.objectives.routing import asymmetric, candidates, cr_opd, route

N_VOCAB = 8
# One state by hand: ids 0 .. 5 are real, 0 is sampled. T > S at 1, 3 and 4; T < S at 0, 2 and 5.
S_V = np.log(np.array([0.40, 0.20, 0.30, 0.06, 0.01, 0.03, 1, 1]))
T_V = np.log(np.array([0.10, 0.50, 0.20, 0.15, 0.04, 0.01, 1, 1]))
REAL_V = np.arange(N_VOCAB) < 6
S_V, T_V = (jnp.array(np.where(REAL_V, x, -np.inf), jnp.float32) for x in (S_V, T_V))
SAMPLED, AGAINST = jnp.int32(0), jnp.float32(-2.0)


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def chosen(ids=SAMPLED, **choice):
    found_V = jax.jit(functools.partial(candidates, **choice))(ids, S_V, T_V, REAL_V)
    return np.flatnonzero(found_V).tolist()


def routed(advantage=AGAINST, **options):
    return jax.jit(functools.partial(route, **options))(SAMPLED, advantage, S_V, T_V, REAL_V)


def direction(advantage=AGAINST, ids=SAMPLED, **options):
    """Minus the gradient of the loss in the real logits: the way in which descent moves them."""

    def loss(logits_V):
        logp_V = jax.nn.log_softmax(jnp.where(REAL_V, logits_V, -jnp.inf))
        return cr_opd(logp_V[ids], ids, advantage, logp_V, T_V, REAL_V, **options)

    return -jax.jit(jax.grad(loss))(jnp.where(REAL_V, S_V, 0.0))


def one_hot(ids):
    return np.eye(N_VOCAB)[int(ids)]


def plain(size=2.0):
    """Direction of plain suppression by |A| = size: every other logit rises by |A| S_v."""
    return size * (np.exp(S_V) - one_hot(SAMPLED))


# --- candidates


@pytest.mark.parametrize(
    ("choice", "want"),
    [
        ({}, [1, 3, 4]),  # never what the student likes better, the sampled one or an unreal one
        ({"teacher_k": 2}, [1]),  # of 1 and 2
        ({"teacher_k": 4}, [1, 3]),
        ({"teacher_floor": 0.1}, [1, 3]),
        ({"teacher_k": None, "teacher_floor": 0.3}, [1]),
        ({"student_k": 4}, [1, 3]),
        ({"student_k": 3}, [1]),
        ({"student_floor": 0.05}, [1, 3]),
        ({"student_k": None, "student_floor": 0.005}, [1, 3, 4]),
        ({"teacher_k": None, "student_k": None}, [1, 3, 4]),
        ({"margin": 0.92}, [4]),  # the gaps are log 2.5 = 0.916, 0.916 and log 4
        ({"margin": -0.5}, [1, 2, 3, 4]),
        ({"margin": -2.0, "teacher_floor": 0.05, "student_k": 2}, [2]),
        ({"margin": 2.0}, []),
    ],
)
def test_candidates_are_supported_reachable_and_better_by_the_margin(choice, want):
    assert chosen(**choice) == want


def test_the_sampled_token_is_no_candidate():
    assert chosen(jnp.int32(1)) == [3, 4]


# --- the route


@pytest.mark.parametrize("powers", [(1.0, 1.0, 1.0), (2.0, 0.5, 0.7), (0.0, 0.0, 3.0), (1, 0, 1e9)])
def test_the_route_is_numpys(powers):
    a, b, tau = powers
    gate, rho_V = routed(teacher_power=a, student_power=b, temperature=tau)
    s, t = (np.exp(np.asarray(x, np.float64)) for x in (S_V, T_V))
    want_V = np.zeros(N_VOCAB)
    for v in (1, 3, 4):
        want_V[v] = t[v] ** a * s[v] ** b * (t[v] / s[v]) ** (1 / tau)
    assert bool(gate)
    close(rho_V, want_V / want_V.sum())
    assert not np.asarray(rho_V)[[0, 2, 5, 6, 7]].any()


@pytest.mark.parametrize(
    ("options", "opens"),
    [
        ({}, True),
        ({"margin": 2.0}, False),  # no candidate
        ({"teacher_mass": 0.68}, True),  # .5 + .15 + .04
        ({"teacher_mass": 0.70}, False),
        ({"student_mass": 0.26}, True),  # .2 + .06 + .01
        ({"student_mass": 0.28}, False),
        ({"confidence": 0.49}, True),  # the target's likeliest id has .5
        ({"confidence": 0.51}, False),
        ({"threshold": 1.9}, True),  # A = -2
        ({"threshold": 2.0}, False),
    ],
)
def test_the_gate_opens_as_asked_and_shut_it_routes_nothing(options, opens):
    gate, rho_V = routed(**options)
    assert bool(gate) == opens
    close(rho_V.sum(), float(opens))


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_what_is_no_negative_is_never_routed(advantage):
    assert not routed(jnp.float32(advantage))[0]


# --- the loss


def test_the_logit_direction_moves_the_samples_probability_to_the_route():
    close(direction().sum(), 0)
    # At powers and temperature 1 S cancels out of the route: no gradient could flow through it.
    for powers in ({}, {"student_power": 2.0, "temperature": 3.0}):
        _, rho_V = routed(**powers)
        close(direction(**powers), 2 * (rho_V - one_hot(SAMPLED)))


def test_the_loss_is_the_difference_of_two_log_probs():
    _, rho_V = routed()
    want = -2 * (sum(rho_V[v] * S_V[v] for v in (1, 3, 4)) - S_V[0])
    close(cr_opd(S_V[0], SAMPLED, AGAINST, S_V, T_V, REAL_V), want)


def test_plain_suppression_raises_the_others_by_what_the_student_gives_them():
    close(direction(margin=9.0), plain())
    close(plain()[[1, 2, 3, 4, 5]], 2 * np.exp(S_V)[1:6])
    close(plain().sum(), 0)


@pytest.mark.parametrize("fallback", [1.0, 0.3, 0.0])
def test_a_shut_gate_falls_back_on_a_share_of_plain_suppression(fallback):
    close(direction(margin=9.0, fallback=fallback), fallback * plain())
    close(direction(fallback=fallback), direction())  # and only a shut one


@pytest.mark.parametrize("advantage", [3.0, 0.0, -0.5, -0.7])
def test_above_the_threshold_the_loss_is_the_policy_gradient(advantage):
    options = {"threshold": 0.7, "clip": 0.1, "fallback": 0.0}  # which it does not know
    got = direction(jnp.float32(advantage), **options)
    close(got, -advantage * (np.exp(S_V) - one_hot(SAMPLED)))


def test_the_clip_bounds_negatives_routed_or_not():
    _, rho_V = routed()
    close(direction(clip=0.5), 0.5 * (rho_V - one_hot(SAMPLED)))
    close(direction(clip=0.5, margin=9.0), plain(0.5))
    close(direction(clip=5.0), direction())


def test_no_gradient_flows_through_the_advantage_or_the_target():
    def loss(advantage, target_V):
        return cr_opd(S_V[0], SAMPLED, advantage, S_V, target_V, REAL_V)

    assert not any(np.asarray(g).any() for g in jax.grad(loss, argnums=(0, 1))(AGAINST, T_V))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"threshold = -0.1 makes negatives of A > 0; give 0 or more"),
        ({"temperature": 0.0}, r"temperature = 0.0 divides log\(T / S\); give one above 0"),
        ({"fallback": -1.0}, r"fallback = -1.0 would raise negatives; give 0 or more"),
        ({"clip": 0.0}, r"clip = 0.0 leaves no advantage; give one above 0, or None"),
        ({"teacher_k": 0}, r"teacher_k = 0 counts no ids"),
        ({"student_k": 1.5}, r"student_k = 1.5 counts no ids"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        direction(**options)


# --- the asymmetric switch


@pytest.mark.parametrize("divergence", [reverse_kl, jsd])
def test_the_switch_is_the_policy_gradient_above_zero_and_the_divergence_elsewhere(divergence):
    advantage_X = jnp.array([1.5, 0.0, -1.5])

    def losses(logits_V):
        logp_V = jax.nn.log_softmax(jnp.where(REAL_V, logits_V, -jnp.inf))
        parts = [jnp.broadcast_to(x, (3, N_VOCAB)) for x in (logp_V, T_V, REAL_V)]
        got_X = asymmetric(logp_V[:1].repeat(3), advantage_X, *parts, divergence=divergence)
        whole = exact(logp_V, T_V, REAL_V, divergence=divergence)
        return got_X, jnp.stack([-1.5 * logp_V[0], whole, whole])

    logits_V = jnp.where(REAL_V, S_V, 0.0)
    close(*jax.jit(losses)(logits_V))
    close(*jax.jit(jax.jacrev(losses))(logits_V))


# --- what it buys


def toy_figures(akin, n=256, n_vocab=32):
    """{name: (share of the freed mass that goes to T > S, drop of KL(S || T) per unit of step)}.

    Over all negatives of random states by their probability under the student, to first order of
    the step. akin: how much of the target's logits are the student's.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    s_logits, other = (2.0 * jax.random.normal(key, (n, n_vocab)) for key in keys)
    t_logits = akin * s_logits + np.sqrt(1 - akin**2) * other
    student_XV, target_XV = map(jax.nn.log_softmax, (s_logits, t_logits))
    real_XV = jnp.ones(student_XV.shape, bool)

    def of_sample(ids, student_XV, target_XV, margin):
        s_XV, gap_XV = jnp.exp(student_XV), target_XV - student_XV
        ids_X, advantage_X = jnp.full(n, ids), gap_XV[:, ids]

        def loss(logits_XV):
            logp_XV = jax.nn.log_softmax(logits_XV)
            at_X = logp_XV[:, ids], ids_X, advantage_X
            return cr_opd(*at_X, logp_XV, target_XV, real_XV, margin=margin).sum()

        def whole(logits_XV):
            logp_XV = jax.nn.log_softmax(logits_XV)
            return exact(logp_XV, target_XV, real_XV, divergence=reverse_kl).sum()

        way_XV = -jax.grad(loss)(student_XV)
        moved_XV = s_XV * (way_XV - (s_XV * way_XV).sum(-1, keepdims=True))
        gained_XV = jnp.maximum(moved_XV.at[:, ids].set(0.0), 0.0)
        weight_X = jnp.where(advantage_X < 0, s_XV[:, ids], 0.0)
        useful_X = jnp.where(gap_XV > 0, gained_XV, 0.0).sum(-1)
        drop_X = -(jax.grad(whole)(student_XV) * way_XV).sum(-1)
        return jnp.stack([(weight_X * x).sum() for x in (gained_XV.sum(-1), useful_X, drop_X)])

    found = {}
    of_sample = jax.jit(of_sample)
    for name, margin in {"plain": 1e9, "routed": 0.0}.items():
        sums = sum(
            np.asarray(of_sample(i, student_XV, target_XV, margin), np.float64)
            for i in range(n_vocab)
        )
        found[name] = sums[1] / sums[0], sums[2] / n
    return found


def test_routing_sends_the_freed_mass_to_what_the_target_likes_better():
    """Measured: 21 % of it against 54 %, and 3.0 times the drop of the KL per unit of step."""
    found = toy_figures(0.5)
    (plain_share, plain_drop), (routed_share, routed_drop) = found["plain"], found["routed"]
    np.testing.assert_allclose([plain_share, routed_share], [0.215, 0.537], atol=0.01)
    np.testing.assert_allclose(routed_drop / plain_drop, 2.96, atol=0.05)
