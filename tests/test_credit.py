"""Temporal credit, by enumeration against gradients in which prefixes are differentiated too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import toy
from benchmarks.toy import MASK_BT, STATE_BT
from gopd_jax.objectives.baselines import BASELINES
from gopd_jax.objectives.credit import discounted, gae, immediate, k_step, return_to_go
from gopd_jax.objectives.divergences import (
    DIVERGENCES,
    correction,
    forward_kl,
    reverse_kl,
    token_reward,
)

TARGET = toy.tilt(1.25)
LOG_U_BT, LOG_U_SV = toy.log_u(TARGET)
REWARD_BT = token_reward(reverse_kl, LOG_U_BT)
EXACT = toy.whole(reverse_kl, TARGET)
ZERO_BT, ZERO_B = jnp.zeros(MASK_BT.shape), jnp.zeros(len(MASK_BT))
EVERY = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def bias(credit_BT, exact=EXACT):
    return float(jnp.linalg.norm(toy.ascent(credit_BT) - exact))


def critic(reward_SV, gamma=1.0):
    return toy.value(reward_SV, gamma)[STATE_BT]


# --- section by section of the table of biases


def test_the_chain_rule_makes_the_sequence_divergence_a_sum_over_tokens_for_reverse_kl_alone():
    close(EXACT, toy.visited(reverse_kl, TARGET))
    gap = toy.whole(forward_kl, TARGET) - toy.visited(forward_kl, TARGET)
    assert np.linalg.norm(gap) > 1e-2


def test_immediate_credit_has_the_gradient_with_visits_frozen():
    got = toy.ascent(immediate(REWARD_BT, MASK_BT))
    close(got, toy.frozen(reverse_kl, TARGET))
    assert np.linalg.norm(got - EXACT) > 0.05


def test_return_to_go_has_no_bias():
    close(toy.ascent(return_to_go(REWARD_BT, MASK_BT)), EXACT)


def test_the_bias_of_discounting_falls_to_zero_as_gamma_grows_to_one():
    found = [
        bias(discounted(REWARD_BT, MASK_BT, gamma=g)) for g in (0.0, 0.3, 0.6, 0.9, 0.99, 0.999)
    ]
    assert (np.diff(found) < 0).all()
    assert found[-1] < 1e-3
    close(found[0], bias(immediate(REWARD_BT, MASK_BT)))


def test_the_bias_of_k_steps_falls_to_zero_as_k_grows_to_the_length():
    found = [bias(k_step(REWARD_BT, MASK_BT, k=k)) for k in (1, 2, 3)]
    assert found[0] > found[1] > 1e-3
    assert found[2] < 1e-6
    close(found[0], bias(immediate(REWARD_BT, MASK_BT)))
    discounts = [bias(k_step(REWARD_BT, MASK_BT, k=3, gamma=g)) for g in (0.5, 0.9, 1.0)]
    assert discounts[0] > discounts[1] > discounts[2]


@pytest.mark.parametrize("credit", [immediate, return_to_go, "discounted"])
def test_a_baseline_of_the_state_changes_no_expected_gradient(credit):
    credit = functools.partial(discounted, gamma=0.7) if credit == "discounted" else credit
    credit_BT = credit(REWARD_BT, MASK_BT)
    any_of_state_BT = toy.OTHER[STATE_BT, 0]
    kl_S = -(jnp.exp(toy.log_softmax(toy.STUDENT)) * LOG_U_SV).sum(-1)
    want = toy.ascent(credit_BT)
    for baseline_BT in (
        any_of_state_BT,
        BASELINES["value"](any_of_state_BT, MASK_BT),
        BASELINES["local_kl"](kl_S[STATE_BT], MASK_BT),
    ):
        close(toy.ascent(credit_BT - baseline_BT), want)
    by_token_BT = LOG_U_BT
    assert np.linalg.norm(toy.ascent(credit_BT - by_token_BT) - want) > 0.05


def test_the_local_kl_is_the_mean_of_immediate_credit_at_each_state():
    kl_S = -(jnp.exp(toy.log_softmax(toy.STUDENT)) * LOG_U_SV).sum(-1)
    left_BT = immediate(REWARD_BT, MASK_BT) - BASELINES["local_kl"](kl_S[STATE_BT], MASK_BT)
    weight_BT = jnp.where(MASK_BT, toy.PROB_B[:, None], 0.0)
    mean_S = jnp.zeros(len(toy.STATES)).at[STATE_BT].add(weight_BT * left_BT)
    close(mean_S, 0)


@pytest.mark.parametrize("name", ["batch_mean", "position_mean", "leave_one_out"])
def test_means_over_other_rows_change_no_expected_gradient(name):
    """By enumeration of every batch of two rows."""
    n = len(toy.EVERY)
    pairs_N2 = jnp.stack(jnp.meshgrid(jnp.arange(n), jnp.arange(n), indexing="ij"), -1)
    pairs_N2 = pairs_N2.reshape(-1, 2)
    credit_BT = return_to_go(REWARD_BT, MASK_BT) + 3.0
    more = (jnp.zeros(2, jnp.int32),) if name == "leave_one_out" else ()

    def one(pair_2):
        return BASELINES[name](credit_BT[pair_2], MASK_BT[pair_2], *more)

    baseline_N2T = jax.jit(jax.vmap(one))(pairs_N2)
    both_N = toy.PROB_B[pairs_N2].prod(1)
    mean_BT = ZERO_BT.at[pairs_N2[:, 0]].add(both_N[:, None] * baseline_N2T[:, 0])
    # mean_BT holds each completion's probability already.
    close(toy.ascent(mean_BT, prob_B=jnp.ones(n)), 0, 2e-6)
    assert np.abs(baseline_N2T).max() > 1


# --- generalised advantage estimation


def test_gae_without_a_critic_is_credit_without_one():
    args = (REWARD_BT, ZERO_BT, ZERO_B, toy.ENDED_B, MASK_BT)
    close(gae(*args, gamma=1.0, lam=1.0), return_to_go(REWARD_BT, MASK_BT))
    close(gae(*args, gamma=0.0, lam=0.9), immediate(REWARD_BT, MASK_BT), 0)
    close(gae(*args, gamma=0.9, lam=0.5), discounted(REWARD_BT, MASK_BT, gamma=0.45))


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_gae_with_the_exact_value_has_no_bias_whatever_lambda(lam):
    value_BT = critic(LOG_U_SV)
    close(toy.ascent(gae(REWARD_BT, value_BT, ZERO_B, toy.ENDED_B, MASK_BT, lam=lam)), EXACT)


def test_the_bias_of_gae_with_a_wrong_value_falls_to_zero_as_lambda_grows_to_one():
    wrong_BT = critic(LOG_U_SV) + toy.OTHER[STATE_BT, 1]
    # V is asked for only where rows end at the limit of three tokens: there is nothing after it.
    found = [
        bias(gae(REWARD_BT, wrong_BT, ZERO_B, toy.ENDED_B, MASK_BT, lam=lam))
        for lam in (0.0, 0.5, 0.9, 1.0)
    ]
    assert (np.diff(found) < 0).all()
    assert found[0] > 0.02
    assert found[-1] < 1e-6


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_a_truncated_row_goes_on_with_the_value_where_it_was_cut(lam, gamma):
    """Completions of three tokens, cut at two: with the exact value nothing is missing."""
    value_BT = critic(LOG_U_SV, gamma)
    cut_BT = MASK_BT & (jnp.arange(toy.LENGTH) < 2)
    ended_B = MASK_BT.sum(1) <= 2
    bootstrap_B = jnp.where(ended_B, jnp.nan, value_BT[:, 2])
    got_BT = gae(REWARD_BT, value_BT, bootstrap_B, ended_B, cut_BT, gamma=gamma, lam=lam)
    whole_BT = gae(REWARD_BT, value_BT, ZERO_B, toy.ENDED_B, MASK_BT, gamma=gamma, lam=lam)
    early_S = np.array([len(state) < 2 for state in toy.STATES])
    want = np.where(early_S[:, None], toy.ascent(whole_BT), 0)
    close(toy.ascent(got_BT), want)
    assert not np.asarray(got_BT)[~np.asarray(cut_BT)].any()
    dropped_BT = gae(REWARD_BT, value_BT, ZERO_B, ended_B, cut_BT, gamma=gamma, lam=lam)
    assert np.linalg.norm(toy.ascent(dropped_BT) - want) > 0.02


# --- the correction of section 2


@EVERY
def test_return_to_go_plus_the_tokens_own_correction_is_the_exact_gradient(divergence):
    """Of E[sum_t f(u_t)], over whole completions, for every f."""
    want = toy.visited(divergence, TARGET)
    correction_BT = correction(divergence, LOG_U_BT)
    reward_BT = token_reward(divergence, LOG_U_BT)
    close(toy.ascent(return_to_go(reward_BT, MASK_BT) + correction_BT), want)
    assert np.linalg.norm(want - toy.frozen(divergence, TARGET)) > 1e-2
    if divergence is not reverse_kl:
        inside_BT = return_to_go(reward_BT + correction_BT, MASK_BT)
        without_BT = return_to_go(reward_BT, MASK_BT)
        for wrong_BT in (inside_BT, without_BT):
            assert np.linalg.norm(toy.ascent(wrong_BT) - want) > 5e-3


@EVERY
def test_discounting_leaves_the_correction_whole(divergence):
    """gamma = 0 with the correction added after is the corrected immediate advantage."""
    reward_BT, own_BT = token_reward(divergence, LOG_U_BT), correction(divergence, LOG_U_BT)
    got = toy.ascent(discounted(reward_BT, MASK_BT, gamma=0.0) + own_BT)
    close(got, toy.frozen(divergence, TARGET))


# --- NumPy

RAGGED_BT = np.arange(9) < np.array([9, 0, 1, 5])[:, None]


def random_rewards():
    return np.random.default_rng(0).normal(size=RAGGED_BT.shape)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 2, 3, 6, 7, 9, 40])
def test_sums_are_numpys(gamma, k):
    reward_BT = random_rewards()
    want_BT = np.zeros_like(reward_BT)
    for b, t in np.argwhere(RAGGED_BT):
        row = reward_BT[b, t : RAGGED_BT[b].sum()][:k]
        want_BT[b, t] = (gamma ** np.arange(len(row)) * row).sum()
    args = (jnp.float32(reward_BT), jnp.array(RAGGED_BT))
    close(k_step(*args, k=k, gamma=gamma), want_BT, 1e-5)
    if k >= 9:
        close(discounted(*args, gamma=gamma), want_BT, 1e-5)


def test_gae_is_the_recursion_of_the_paper():
    draw = np.random.default_rng(1)
    reward_BT, value_BT = draw.normal(size=(2, *RAGGED_BT.shape))
    bootstrap_B, ended_B = draw.normal(size=4), np.array([False, True, True, False])
    gamma, lam = 0.9, 0.7
    want_BT = np.zeros_like(reward_BT)
    for b in range(4):
        after, advantage = (0.0 if ended_B[b] else bootstrap_B[b]), 0.0
        for t in reversed(range(RAGGED_BT[b].sum())):
            delta = reward_BT[b, t] + gamma * after - value_BT[b, t]
            advantage = delta + gamma * lam * advantage
            want_BT[b, t], after = advantage, value_BT[b, t]
    inputs = (reward_BT, value_BT, bootstrap_B, ended_B, RAGGED_BT)
    close(gae(*map(jnp.array, inputs), gamma=gamma, lam=lam), want_BT, 1e-5)


def test_long_rows_lose_no_digits():
    reward_BT = np.random.default_rng(2).normal(-0.3, 1, (2, 4096)).astype(np.float32)
    mask_BT = jnp.ones(reward_BT.shape, bool)
    want_BT = np.cumsum(reward_BT[:, ::-1].astype(np.float64), 1)[:, ::-1]
    for credit in (return_to_go, functools.partial(k_step, k=4096)):
        got_BT = jax.jit(credit)(reward_BT, mask_BT)
        np.testing.assert_allclose(got_BT, want_BT, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: discounted(ZERO_BT, MASK_BT, gamma=1.1), "gamma is 1.1; it must be from 0 to 1"),
        (lambda: k_step(ZERO_BT, MASK_BT, k=0), "k is 0; give a whole number of steps"),
        (lambda: k_step(ZERO_BT, MASK_BT, k=1.5), "k is 1.5; give a whole number"),
        (
            lambda: gae(ZERO_BT, ZERO_BT, ZERO_B, toy.ENDED_B, MASK_BT, lam=-0.1),
            "lam is -0.1; it must be from 0 to 1",
        ),
    ],
)
def test_options_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
