"""Steps whose rows are older than the student: a sampler that lags, several updates of a batch."""

import dataclasses

import full_logits as full
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gopd_jax import checkpoint, step
from gopd_jax.recipe import abstract_state, init_state

ROWS = full.rollout()
MASK_BT = np.asarray(ROWS.mask_BT)
KEYS = [jax.random.key(i) for i in range(4)]
LAG = 2


def host(tree):
    return jax.device_get(tree)


def log_u():
    teacher_BT, student_BT = (
        full.of_tokens(x) for x in (full.own_teacher(), full.logp_of(full.STUDENT))
    )
    return np.where(MASK_BT, teacher_BT - student_BT, 0.0)


# --- a sampler that lags


@pytest.fixture(scope="module")
def lagging():
    """A setting whose sampler lags, and one step at a time of it: [(state, rollout, metrics)]."""
    one = full.setting(
        options={"importance": "token"}, lag=LAG, microbatches=1, optimizer=optax.sgd(0.3)
    )
    generate, _, _ = step.staged(one.recipe)
    state = init_state(one.recipe, one.params)
    assert state.pending is None
    first = (generate(state.params, one.frozen, full.prompts(), key) for key in KEYS[:LAG])
    state, run, seen = state.replace(pending=tuple(first)), step.fused(one.recipe), []
    keys = [*KEYS[LAG:], jax.random.key(8), jax.random.key(9)]
    for key in keys:
        state, rollout, metrics = run(state, one.frozen, full.prompts(), key)
        seen.append(host((state, rollout, full.read(metrics))))
    return one, run, keys, seen


def test_a_step_learns_from_what_the_weights_of_lag_steps_before_wrote(lagging):
    one, _, _, seen = lagging
    on_time = dataclasses.replace(one.recipe, lag=0)
    generate, score, update = step.staged(on_time)
    states = [init_state(on_time, one.params)]
    weights = [host(states[0].params)]
    for i, key in enumerate(KEYS):
        old = weights[max(0, i - LAG)]
        rollout = generate(old, one.frozen, full.prompts(), key)
        scores = score(one.frozen, rollout)
        state, metrics = update(states[-1], rollout, scores)
        states, weights = [state], [*weights, host(state.params)]
        got, got_rollout, got_metrics = seen[i]
        np.testing.assert_array_equal(got_rollout.tokens_BL, rollout.tokens_BL)
        full.same(got.params, weights[-1], 5e-6)
        assert got_metrics.pop("staleness") == min(i, LAG)
        full.same(got_metrics, full.read(metrics), 2e-5, 2e-5)
        fresh = generate(weights[i], one.frozen, full.prompts(), key)
        assert (np.asarray(fresh.tokens_BL != rollout.tokens_BL).any()) == (i > 0)
    assert got_metrics["sampler_kl"] > 1e-3  # and a sampler with the student's weights has none
    assert abs(seen[0][2]["sampler_k3"]) < 1e-9


def test_rollouts_that_wait_are_saved_and_the_run_goes_on_bit_for_bit(lagging, tmp_path):
    one, run, keys, seen = lagging
    mesh_state = jax.device_put(seen[1][0], jax.devices()[0])
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 2, mesh_state, {})
    generate, _, _ = step.staged(one.recipe)
    args = one.params, one.frozen, full.prompts(), KEYS[0]
    rows = generate.lower(*args).out_info
    state = checkpoint.restore(tmp_path, abstract_state(one.recipe, rows), {})
    assert len(state.pending) == LAG
    for key, want in zip(keys[2:], seen[2:]):
        state, rollout, _ = run(state, one.frozen, full.prompts(), key)
        full.same(host((state, rollout)), want[:2], 0)


# --- weights of rows that another policy wrote


def test_importance_and_rejection_weigh_the_tokens_that_others_wrote():
    options = {"importance": "token(cap=1.3)", "rejection": "sequence(cap=4.0)", "veto": -1.0}
    grads, metrics = full.setting(options=options).descent()
    student_BT = np.asarray(full.of_tokens(full.logp_of(full.STUDENT)))
    log_w_BT = np.where(MASK_BT, student_BT - ROWS.logp_BT, 0.0)
    row_B = log_w_BT.sum(1)
    kept_B = (np.abs(row_B) <= np.log(4.0)) & (log_w_BT >= -1.0).all(1)
    assert 0 < kept_B.sum() < full.N_ROWS
    weight_BT = np.minimum(np.exp(log_w_BT), 1.3) * kept_B[:, None]
    want, loss = full.gradient(full.sampled(jnp.array(weight_BT * log_u(), jnp.float32)))
    full.same(grads, want, 1e-5)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    rejected = MASK_BT[~kept_B].sum() / MASK_BT.sum()
    np.testing.assert_allclose(metrics["rejected"], rejected, rtol=1e-5)
    capped = (log_w_BT > np.log(1.3))[MASK_BT].mean()
    np.testing.assert_allclose(metrics["importance_capped"], capped, rtol=1e-5)


# --- several updates of one batch

UPDATES = 2


def rate(count):
    return 0.5 / (1 + count)


def parts(tree):
    """Each update's rows, every other one."""
    return [jax.tree.map(lambda x, i=i: x[i::UPDATES], tree) for i in range(UPDATES)]


def loop(params, epochs, loss_of, broken=()):
    """Every update written out: loss_of(part's index, its rows, student's log-probs)."""
    count = 0
    for _ in range(epochs):
        for i, rows in enumerate(parts(ROWS)):
            if i in broken:
                continue
            grads, _ = full.gradient(lambda s, i=i, rows=rows: loss_of(i, rows, s), rows, params)
            params = jax.tree.map(lambda p, g, c=count: p - rate(c) * g, params, grads)
            count += 1
    return params


def discounted(reward_BT):
    """Of every token the rewards from it on, halved at each step."""
    out_BT, last_B = np.zeros_like(reward_BT), 0.0
    for t in reversed(range(reward_BT.shape[1])):
        out_BT[:, t] = last_B = reward_BT[:, t] + 0.5 * last_B
    return np.where(MASK_BT, out_BT, 0.0)


@pytest.fixture(scope="module")
def ppo():
    """(setting, its stages) of two updates of a batch and two epochs."""
    one = full.setting(
        options={"credit": "discounted(gamma=0.5)", "loss": "ppo(low=0.1, high=0.1, dual=3.0)"},
        updates=UPDATES,
        epochs=2,
        optimizer=optax.sgd(rate),
        learning_rate=rate,
    )
    return one, step.staged(one.recipe)


def ppo_loss(clipped):
    old_BT = full.of_tokens(full.logp_of(full.STUDENT))
    advantage_BT = discounted(log_u())
    given = parts((jnp.array(old_BT), jnp.array(advantage_BT, jnp.float32)))

    def loss_of(i, rows, student_BLV):
        old_BT, advantage_BT = given[i]
        ratio_BT = jnp.exp(full.of_tokens(student_BLV, rows) - old_BT)
        bounded_BT = jnp.clip(ratio_BT, 0.9, 1.1)
        gain_BT = jnp.minimum(ratio_BT * advantage_BT, bounded_BT * advantage_BT)
        gain_BT = jnp.where(advantage_BT < 0, jnp.maximum(gain_BT, 3 * advantage_BT), gain_BT)
        outside_BT = rows.mask_BT & (gain_BT != ratio_BT * advantage_BT)
        clipped.append(int(np.asarray(jax.lax.stop_gradient(outside_BT)).sum()))
        # The batch's number of tokens, not the part's: each part has half of the weight.
        return -UPDATES * jnp.where(rows.mask_BT, gain_BT, 0.0).sum() / MASK_BT.sum()

    return loss_of


def test_updates_and_epochs_learn_from_advantages_fixed_at_the_start(ppo):
    one, (_, score, update) = ppo
    scores = score(one.frozen, ROWS)
    state, metrics = update(init_state(one.recipe, one.params), ROWS, scores, one.frozen)
    want = loop(one.params, 2, ppo_loss(clipped := []))
    assert clipped[0] == 0  # strictly on-policy: every ratio is 1
    assert min(clipped[1:]) > 3
    full.same(host(state.params), host(want), 1e-5)
    metrics = full.read(host(metrics))
    assert (metrics["skipped"], metrics["learning_rate"], int(state.step)) == (0, rate(0), 1)
    assert int(optax.tree.get(state.opt_state, "count")) == 4
    # What is reported is of the batch as it was sampled.
    np.testing.assert_allclose(metrics["kl_teacher"], -log_u()[MASK_BT].mean(), atol=2e-5)
    np.testing.assert_allclose(
        metrics["advantage_mean"], discounted(log_u())[MASK_BT].mean(), atol=2e-5
    )
    _, again = update(state, ROWS, scores, one.frozen)
    np.testing.assert_allclose(full.read(host(again))["learning_rate"], rate(4), rtol=1e-6)


def test_an_update_that_is_not_finite_is_skipped_alone(ppo):
    one, (_, score, update) = ppo
    scores = score(one.frozen, ROWS)
    broken = scores.replace(teacher_BT=scores.teacher_BT.at[3, full.WIDTH - 1].set(jnp.nan))
    state, metrics = update(init_state(one.recipe, one.params), ROWS, broken, one.frozen)
    want = loop(one.params, 2, ppo_loss([]), broken=(1,))
    full.same(host(state.params), host(want), 1e-5)
    assert full.read(host(metrics))["skipped"] == 2  # of four, and each of them counts


def test_an_exact_loss_looks_anew_at_every_update():
    one = full.setting(
        options={"loss": "exact", "lam": 1.25},
        updates=UPDATES,
        microbatches=1,
        optimizer=optax.sgd(rate),
    )
    state, _ = one.update()
    target_BLV = parts(full.target(1.25))

    def loss_of(i, rows, student_BLV):
        kl_BL = (jnp.exp(student_BLV) * (student_BLV - target_BLV[i])).sum(-1)
        return UPDATES * jnp.where(rows.mask_BT, kl_BL[:, :-1], 0.0).sum() / MASK_BT.sum()

    full.same(state.params, host(loop(one.params, 1, loss_of)), 1e-5)
