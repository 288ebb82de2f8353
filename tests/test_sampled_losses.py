"""Losses on sampled tokens, importance weights and gates: enumeration, NumPy, cases by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import toy
from benchmarks.toy import MASK_BT
from gopd_jax.objectives.advantages import gopd
from gopd_jax.objectives.credit import immediate, return_to_go
from gopd_jax.objectives.divergences import corrected, forward_kl, reverse_kl
from gopd_jax.objectives.gates import GATES
from gopd_jax.objectives.importance import (
    IMPORTANCE,
    REJECTIONS,
    statistics,
    veto,
)
from gopd_jax.objectives.losses import k1, k2, k3, policy_gradient, ppo
from gopd_jax.objectives.regularizers import anchor, entropy

INF = float("inf")
TARGET_BT = toy.logp_of(toy.TEACHER)
STUDENT_BT = toy.logp_of(toy.STUDENT)


def close(got, want, atol=1e-6, rtol=0.0):
    np.testing.assert_allclose(got, want, atol=atol, rtol=rtol)


# --- k-estimators as losses


def test_k1_has_no_expected_gradient():
    close(toy.expected(lambda logp_BT: k1(logp_BT, TARGET_BT)), 0)
    assert np.abs(jax.grad(lambda x: k1(x, TARGET_BT).sum())(STUDENT_BT)).max() == 1


def test_k2_has_the_gradient_of_reverse_kl():
    got = toy.expected(lambda logp_BT: k2(logp_BT, TARGET_BT))
    close(got, toy.frozen(reverse_kl, toy.TEACHER))


def test_k3_has_the_gradient_of_forward_kl():
    got = toy.expected(lambda logp_BT: k3(logp_BT, TARGET_BT))
    close(got, toy.frozen(forward_kl, toy.TEACHER))
    assert np.abs(got - toy.frozen(reverse_kl, toy.TEACHER)).max() > 0.05


@pytest.mark.parametrize(("loss", "divergence"), [(k2, reverse_kl), (k3, forward_kl)])
def test_k2_and_k3_are_policy_gradients_token_by_token_with_log_u_clipped(loss, divergence):
    logp_x = jnp.array([-1e4, -45.0, -3.0, -1.0, -1e-3, -2.0])
    target_x = jnp.array([-1.0, -3.0, -1.0, -1.0, -30.0, -1e4])
    advantage_x = corrected(divergence, jnp.clip(target_x - logp_x, -20, 20))
    want_x = jax.grad(lambda x: policy_gradient(x, advantage_x).sum())(logp_x)
    got_x = jax.grad(lambda x: loss(x, target_x).sum())(logp_x)
    close(got_x, want_x, 1e-5, 1e-5)
    if loss is k2:
        close(got_x, -gopd(target_x - logp_x, jnp.ones(6, bool), clip=20), 1e-5)


def test_k_estimators_are_numpys():
    s, t = (np.asarray(x, np.float64)[np.asarray(MASK_BT)] for x in (STUDENT_BT, TARGET_BT))
    for loss, want in (
        (k1, s - t),
        (k2, (s - t) ** 2 / 2),
        (k3, np.exp(t - s) - 1 - (t - s)),
    ):
        close(loss(jnp.float32(s), jnp.float32(t)), want, 1e-6)
    extreme = [loss(jnp.array([-1e4, 0.0]), jnp.array([0.0, -1e4])) for loss in (k1, k2, k3)]
    close(extreme, [[-20, 20], [200, 200], [np.exp(20) - 21, 19]], 1e-3, 1e-6)


def test_no_gradient_reaches_the_target_of_a_k_estimator():
    for loss in (k1, k2, k3):
        assert not np.asarray(jax.grad(lambda t, of=loss: of(STUDENT_BT, t).sum())(TARGET_BT)).any()


# --- ppo


def test_ppo_at_the_policy_that_sampled_is_the_policy_gradient():
    advantage_BT = toy.log_u(toy.TEACHER)[0]
    got = toy.expected(lambda logp_BT: ppo(logp_BT, STUDENT_BT, advantage_BT))
    close(got, toy.ascent(advantage_BT))
    close(ppo(STUDENT_BT, STUDENT_BT, advantage_BT), -advantage_BT)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # low = .2, high = .3, dual = 3; slope of the loss in log S
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.6, 0.0),  # up far enough
        (0.5, 2.0, -1.0, -1.0),  # has gone down, is to come back
        (0.9, -2.0, 1.8, 1.8),
        (0.5, -2.0, 1.6, 0.0),  # down far enough
        (1.5, -2.0, 3.0, 3.0),  # has gone up, is to come back
        (4.0, -2.0, 6.0, 0.0),  # dual clip
        (4.0, 2.0, -2.6, 0.0),
        (2.0, 0.0, 0.0, 0.0),
        (1e30, 1.0, -1.3, 0.0),
        (1e30, -1.0, 3.0, 0.0),
        (1e-30, 1.0, -np.exp(-20), 0.0),
    ],
)
def test_ppo_stops_where_the_ratio_has_moved_far_enough(ratio, advantage, loss, slope):
    old = -1.5
    new = jnp.float32(old + np.log(ratio))

    def of(x):
        return ppo(x, jnp.float32(old), jnp.float32(advantage), low=0.2, high=0.3, dual=3.0)

    got, grad = jax.value_and_grad(of)(new)
    close(got, loss, 1e-5)
    close(grad, slope, 1e-5)


def test_without_the_dual_clip_a_negative_advantage_follows_the_ratio():
    args = jnp.log(4.0), jnp.float32(0), jnp.float32(-2)
    close(ppo(*args, dual=None), 8, 1e-5)
    close(ppo(*args), 6, 1e-5)


@pytest.mark.parametrize("options", [{"low": 1.5}, {"high": -0.1}, {"dual": 1.0}])
def test_bounds_of_ppo_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"ppo: low = .*give 0 <= low <= 1, high >= 0 and dual ab"):
        ppo(STUDENT_BT, STUDENT_BT, STUDENT_BT, **options)


# --- regularizers


def test_the_entropy_bonus_is_weight_times_the_entropy_of_the_real_ids():
    logp_SV = toy.log_softmax(toy.STUDENT)
    p = np.exp(np.asarray(logp_SV, np.float64))
    want_S = 0.3 * (p * np.log(p)).sum(-1)
    real_SV = jnp.ones(logp_SV.shape, bool)
    close(entropy(logp_SV, real_SV, weight=0.3), want_S)
    for beyond in (-jnp.inf, jnp.nan, 0.0):
        wide_SV = jnp.pad(logp_SV, ((0, 0), (0, 2)), constant_values=beyond)
        real_SV = jnp.arange(5) < jnp.full((len(p), 1), 3)
        got_S, grad_SV = jax.value_and_grad(
            lambda x, r=real_SV: entropy(x, r, weight=0.3).sum(),
        )(wide_SV)
        close(got_S, want_S.sum(), 1e-5)
        close(grad_SV[:, :3], 0.3 * p * (1 + np.log(p)))
        assert not np.asarray(grad_SV)[:, 3:].any()


def test_the_anchor_has_the_gradient_of_the_kl_to_the_reference():
    got = toy.expected(lambda x: anchor(x, toy.logp_of(toy.REF), weight=0.2))
    close(got, 0.2 * toy.frozen(reverse_kl, toy.REF))


# --- off-policy

SAMPLER = toy.OTHER
SAMPLER_BT = toy.logp_of(SAMPLER)
SAMPLED_B, VISITED_S = toy.visits(SAMPLER)
LOG_U_BT, _ = toy.log_u(toy.TEACHER)


@pytest.mark.parametrize("cap", [INF, 1e6])
def test_weights_of_sequences_undo_the_sampler(cap):
    weight_BT = IMPORTANCE["sequence"](STUDENT_BT, SAMPLER_BT, MASK_BT, cap=cap)
    for credit in (immediate, return_to_go):
        credit_BT = credit(LOG_U_BT, MASK_BT)
        got = toy.ascent(weight_BT * credit_BT, prob_B=SAMPLED_B)
        close(got, toy.ascent(credit_BT))
        assert np.abs(toy.ascent(credit_BT, prob_B=SAMPLED_B) - got).max() > 0.02


def test_weights_of_tokens_undo_the_sampler_but_for_the_states_that_it_visits():
    weight_BT = IMPORTANCE["token"](STUDENT_BT, SAMPLER_BT, MASK_BT, cap=INF)
    got = toy.ascent(weight_BT * LOG_U_BT, prob_B=SAMPLED_B)
    close(got, toy.frozen(reverse_kl, toy.TEACHER, VISITED_S))
    assert np.abs(got - toy.frozen(reverse_kl, toy.TEACHER)).max() > 0.01


LOG_W_BT = np.log([[0.1, 1.0, 4.0], [2.0, 3.0, 50.0], [1.1, 0.9, 7.0]])
PART_BT = np.array([[1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
PAIR = jnp.float32(LOG_W_BT - 2), jnp.full((3, 3), -2.0), jnp.array(PART_BT)


@pytest.mark.parametrize(
    ("name", "options", "want_BT"),
    [
        ("none", {}, [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
        ("token", {"cap": 2.5}, [[0.1, 1, 2.5], [2, 2.5, 0], [0, 0, 0]]),
        ("token", {}, [[0.1, 1, 4], [2, 3, 0], [0, 0, 0]]),
        ("sequence", {}, [[0.4] * 3, [5, 5, 0], [0, 0, 0]]),
        ("sequence", {"cap": INF}, [[0.4] * 3, [6, 6, 0], [0, 0, 0]]),
        ("sequence", {"geometric": True}, [[0.4 ** (1 / 3)] * 3, [6**0.5, 6**0.5, 0], [0, 0, 0]]),
    ],
)
def test_importance_weights_by_hand(name, options, want_BT):
    args = PAIR[2:] if name == "none" else PAIR
    close(IMPORTANCE[name](*args, **options), want_BT, 1e-5)


@pytest.mark.parametrize("name", ["token", "sequence"])
def test_no_gradient_flows_through_importance(name):
    grads = jax.grad(lambda s, q: IMPORTANCE[name](s, q, PAIR[2], cap=INF).sum(), (0, 1))(*PAIR[:2])
    assert not np.asarray(grads).any()


@pytest.mark.parametrize(
    ("name", "options", "want_BT"),
    [
        ("none", {}, [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
        ("token", {"cap": 3.5}, [[0, 1, 0], [1, 1, 0], [0, 0, 0]]),
        ("token", {"cap": 11}, [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
        ("sequence", {"cap": 3.5}, [[1, 1, 1], [0, 0, 0], [0, 0, 0]]),
        ("sequence", {"cap": 2.0}, [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
        ("sequence", {"cap": 2.48, "geometric": True}, [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
        ("veto", {"floor": -2.0}, [[0, 0, 0], [1, 1, 0], [0, 0, 0]]),
        ("veto", {"floor": -2.5}, [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
    ],
)
def test_rejections_by_hand(name, options, want_BT):
    args = PAIR[2:] if name == "none" else PAIR
    got_BT = REJECTIONS[name](*args, **options)
    assert got_BT.dtype == bool
    np.testing.assert_array_equal(got_BT, np.array(want_BT, bool))


def test_an_unlimited_log_ratio_reaches_neither_weight_nor_statistics():
    far = jnp.array([[0.0, -1e4]]), jnp.array([[-1e4, 0.0]]), jnp.ones((1, 2), bool)
    close(IMPORTANCE["token"](*far, cap=INF), [[np.exp(20), np.exp(-20)]], 1e-8, 1e-6)
    assert all(np.isfinite(mean.value()) for mean in statistics(*far).values())
    assert not veto(*far, floor=-9.2).any()


def test_statistics_are_numpys():
    student, sampler = (np.asarray(x, np.float64) for x in (STUDENT_BT, SAMPLER_BT))
    got = {k: m.value() for k, m in statistics(STUDENT_BT, SAMPLER_BT, MASK_BT).items()}
    w = np.exp(student - sampler)[np.asarray(MASK_BT)]
    want = {
        "log_ess": np.log(w.sum() ** 2 / (w.size * (w**2).sum())),
        "sampler_kl": -np.log(w).mean(),
        "sampler_k3": (w - 1 - np.log(w)).mean(),
        "sampler_chi2": ((w - 1) ** 2).mean(),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        close(got[name], value, 1e-5, 1e-5)
    nobody = statistics(STUDENT_BT, SAMPLER_BT, jnp.zeros_like(MASK_BT))
    assert all(np.isnan(mean.value()) for mean in nobody.values())
    same = statistics(STUDENT_BT, STUDENT_BT, MASK_BT)
    close([mean.value() for mean in same.values()], 0)


def test_statistics_of_a_token_estimate_the_divergences_that_they_name():
    """Expected over the sampler's tokens in the first state, by enumeration."""
    s, q = (np.asarray(toy.log_softmax(x), np.float64)[0] for x in (toy.STUDENT, SAMPLER))
    found = [
        statistics(*(jnp.full((1, 1), x[v]) for x in (s, q)), jnp.ones((1, 1), bool))
        for v in range(toy.V)
    ]
    mean = {k: sum(np.exp(q[v]) * found[v][k].value() for v in range(toy.V)) for k in found[0]}
    kl = (np.exp(q) * (q - s)).sum()
    close([mean["sampler_kl"], mean["sampler_k3"]], [kl, kl], 1e-6)
    close(mean["sampler_chi2"], (np.exp(2 * s - q)).sum() - 1, 1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (functools.partial(IMPORTANCE["token"], cap=0.5), "cap is 0.5; give a ratio of at least 1"),
        (functools.partial(IMPORTANCE["sequence"], cap=0), "cap is 0; give a ratio"),
        (functools.partial(REJECTIONS["token"], cap=0.5), "cap is 0.5; give a ratio"),
        (functools.partial(REJECTIONS["sequence"], cap=-1), "cap is -1; give a ratio"),
        (functools.partial(veto, floor=0.1), "veto: floor is 0.1; give a log-ratio below 0"),
    ],
)
def test_caps_out_of_range_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        function(*PAIR)


# --- gates

FOUR = {
    "mask_BT": jnp.array([[True, True, True, False]]),
    "log_u_BT": jnp.log(jnp.array([[0.25, 1.0, 4.0, 1.0]])),
    "position_BT": jnp.array([[0, 1, 2, 3]]),
    "end_BT": jnp.array([[False, False, True, True]]),
    "ids_BT": jnp.array([[7, 5, 9, 7]]),
    "teacher_entropy_BT": jnp.array([[0.0, 0.5, 2.0, 0.5]]),
    "advantage_BT": jnp.array([[1.0, -1.0, 0.0, 1.0]]),
}


@pytest.mark.parametrize(
    ("name", "quantities", "options", "want_T"),
    [
        ("trust", ["log_u_BT"], {}, [0.25, 1, 1, 0]),
        ("first", ["position_BT"], {"n": 2}, [1, 1, 0, 0]),
        ("first", ["position_BT"], {"n": 9}, [1, 1, 1, 0]),
        ("skip_end", ["end_BT"], {}, [1, 1, 0, 0]),
        ("skip_ids", ["ids_BT"], {"ids": (7, 9)}, [0, 1, 0, 0]),
        ("teacher_entropy", ["teacher_entropy_BT"], {"at_most": 0.5}, [1, 1, 0, 0]),
        ("teacher_entropy", ["teacher_entropy_BT"], {"at_least": 0.5}, [0, 1, 1, 0]),
        (
            "teacher_entropy",
            ["teacher_entropy_BT"],
            {"at_least": 0.1, "at_most": 1.0},
            [0, 1, 0, 0],
        ),
        ("drift", ["position_BT"], {"half_life": 2.0}, [1, 0.5**0.5, 0.5, 0]),
    ],
)
def test_gates_by_hand(name, quantities, options, want_T):
    got_BT = GATES[name](*(FOUR[q] for q in quantities), FOUR["mask_BT"], **options)
    close(got_BT, [want_T])


@pytest.mark.parametrize(
    ("reward", "options", "want_T"),
    [
        (1.0, {}, [1, 0, 1, 0]),
        (0.0, {}, [0, 1, 1, 0]),
        (-0.2, {"threshold": -1.0}, [1, 0, 1, 0]),
        (0.2, {"threshold": 0.0}, [1, 0, 1, 0]),
    ],
)
def test_tokens_stay_where_the_verifier_agrees_with_their_advantage(reward, options, want_T):
    got_BT = GATES["agree"](FOUR["advantage_BT"], jnp.array([reward]), FOUR["mask_BT"], **options)
    close(got_BT, [want_T])


@pytest.mark.parametrize(
    ("name", "quantity", "options", "message"),
    [
        ("first", "position_BT", {"n": 0}, "first: n is 0; give at least 1 token"),
        ("skip_ids", "ids_BT", {"ids": ()}, r"skip_ids: ids is \(\); name tokens, or leave"),
        ("teacher_entropy", "teacher_entropy_BT", {}, "gates nothing; give at_most, at_least"),
        ("drift", "position_BT", {"half_life": 0}, "half_life is 0; give tokens above 0"),
    ],
)
def test_gates_that_gate_nothing_or_all_are_refused(name, quantity, options, message):
    with pytest.raises(ValueError, match=message):
        GATES[name](FOUR[quantity], FOUR["mask_BT"], **options)
