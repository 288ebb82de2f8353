"""Credit, baselines and the critic in the step, against full logits and sums written out."""

import dataclasses

import full_logits as full
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.critic import Critic, explained_variance, value
from gopd_jax.recipe import init_state

ROWS = full.rollout()
MASK_BT = np.asarray(ROWS.mask_BT)
HEAD = Critic(learning_rate=0.02, width=8, closed_form=True, warmup_steps=0, value_clip=None)
LAM = 1.25


def tokens(logp_BLV):
    return np.asarray(full.of_tokens(logp_BLV), np.float64)


def log_u(lam=LAM):
    """Of the sampled tokens, the target not normalised: G-OPD's reward."""
    teacher_BT, ref_BT = tokens(full.own_teacher()), tokens(full.logp_of(full.REFERENCE))
    student_BT = tokens(full.logp_of(full.STUDENT))
    return np.where(MASK_BT, teacher_BT + (lam - 1) * (teacher_BT - ref_BT) - student_BT, 0.0)


def local_kl(lam=LAM):
    """-E_S of that reward at every state, also behind the last token: [B, L]."""
    teacher, ref, student = (
        np.asarray(x, np.float64)
        for x in (full.own_teacher(), full.logp_of(full.REFERENCE), full.logp_of(full.STUDENT))
    )
    reward = teacher + (lam - 1) * (teacher - ref) - student
    return -(np.exp(student) * reward).sum(-1)


def discounted(reward_BT, gamma):
    out_BT, last_B = np.zeros_like(reward_BT), np.zeros(len(reward_BT))
    for t in reversed(range(reward_BT.shape[1])):
        out_BT[:, t] = last_B = reward_BT[:, t] + gamma * last_B
    return np.where(MASK_BT, out_BT, 0.0)


def advantage_estimation(reward_BT, value_BL, gamma, lam):
    """GAE a row at a time; what is behind the last token counts where the row was cut off."""
    out_BT = np.zeros_like(reward_BT)
    for b, (n, ended) in enumerate(zip(full.LENGTH_B, full.ENDED_B)):
        first, running = full.WIDTH - 1, 0.0
        for t in reversed(range(first, first + n)):
            last = t == first + n - 1
            after = 0.0 if last and ended else value_BL[b, t + 1]
            delta = reward_BT[b, t] + gamma * after - value_BL[b, t]
            running = delta + gamma * lam * (0.0 if last else running)
            out_BT[b, t] = running
    return out_BT


def others_mean(credit_BT, groups=None):
    """Of each row: mean over the tokens of the others, or over the means of its group's others."""
    out_BT = np.zeros_like(credit_BT)
    for b in range(len(credit_BT)):
        rest = [i for i in range(len(credit_BT)) if i != b and MASK_BT[i].any()]
        if groups is None:
            found = np.concatenate([credit_BT[i][MASK_BT[i]] for i in rest])
        else:
            rest = [i for i in rest if groups[i] == groups[b]]
            found = np.array([credit_BT[i][MASK_BT[i]].mean() for i in rest])
        out_BT[b] = found.mean() if len(found) else 0.0
    return np.where(MASK_BT, out_BT, 0.0)


def is_ascent_along(advantage_BT, got, atol=1e-5):
    grads, metrics = got
    want, loss = full.gradient(full.sampled(jnp.array(advantage_BT, jnp.float32)))
    assert full.norm(want) > 0.05
    full.same(grads, want, atol * max(1, full.norm(want)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(metrics["advantage_mean"], advantage_BT[MASK_BT].mean(), atol=2e-5)
    assert metrics["skipped"] == 0


CASES = {
    "return_to_go less the batch's mean": (
        {"credit": "return_to_go", "baseline": "batch_mean"},
        lambda r: (lambda c: c - others_mean(c))(discounted(r, 1.0)),
    ),
    "discounted less the group's others, clipped": (
        {"credit": "discounted(gamma=0.5)", "baseline": "leave_one_out", "advantage_clip": 2.0},
        lambda r: (lambda c: np.clip(c - others_mean(c, full.GROUP_B), -2, 2))(discounted(r, 0.5)),
    ),
    "immediate less the state's own mean": (
        {"baseline": "local_kl"},
        lambda r: np.where(MASK_BT, r + local_kl()[:, :-1], 0.0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_credit_and_baselines_are_those_of_the_sums_written_out(name):
    options, advantage_of = CASES[name]
    got = full.setting(options={"lam": LAM, **options}).descent()
    is_ascent_along(advantage_of(log_u()), got)


def test_the_correction_of_a_divergence_stays_with_its_own_token():
    got = full.setting(
        options={"divergence": "forward_kl", "credit": "return_to_go", "log_u_clip": 2.0}
    ).descent()
    log_u_BT = np.clip(log_u(1.0), -2, 2)
    reward_BT = np.where(MASK_BT, -np.exp(log_u_BT) * log_u_BT, 0.0)
    own_BT = np.where(MASK_BT, np.exp(log_u_BT) * (log_u_BT + 1) - 1, 0.0)
    is_ascent_along(discounted(reward_BT, 1.0) + own_BT, got)


def test_gates_multiply_the_loss_and_leave_the_number_of_tokens():
    gates = ("trust", "first(n=4)", "skip_end", "drift(half_life=3.0)")
    got = full.setting(options={"gates": gates}).descent()
    log_u_BT = log_u(1.0)
    position_BT = np.arange(MASK_BT.shape[1]) - (full.WIDTH - 1)
    end_BT = np.isin(ROWS.tokens_BL[:, 1:], full.EOS)
    weight_BT = np.minimum(np.exp(log_u_BT), 1) * (position_BT < 4) * ~end_BT
    weight_BT = weight_BT * 2.0 ** (-position_BT / 3.0)
    want, loss = full.gradient(full.sampled(jnp.array(weight_BT * log_u_BT, jnp.float32)))
    full.same(got[0], want, 1e-5)
    np.testing.assert_allclose(got[1]["loss"], loss, rtol=2e-5)
    np.testing.assert_allclose(got[1]["advantage_mean"], log_u_BT[MASK_BT].mean(), rtol=1e-4)
    np.testing.assert_allclose(got[1]["weight"], weight_BT[MASK_BT].mean(), rtol=1e-5)


REWARD_B = np.random.default_rng(4).integers(0, 2, full.N_ROWS).astype(np.float32)


def test_the_verifiers_reward_and_the_distillation_are_added():
    got = full.setting(
        options={"lam": LAM, "task": "grpo", "distil_weight": 0.3, "gates": ("agree",)}
    ).descent(reward_B=REWARD_B)
    pairs = REWARD_B.reshape(-1, 2)
    relative_B = (pairs - pairs.mean(1, keepdims=True)) / (pairs.std(1, keepdims=True) + 1e-4)
    assert len(np.unique(relative_B.round(3))) == 3
    advantage_BT = np.where(MASK_BT, relative_B.reshape(-1, 1) + 0.3 * log_u(), 0.0)
    agrees_BT = np.where(REWARD_B[:, None] > 0.5, advantage_BT >= 0, advantage_BT <= 0)
    want, _ = full.gradient(full.sampled(jnp.array(agrees_BT * advantage_BT, jnp.float32)))
    full.same(got[0], want, 1e-5)
    assert 0.2 < got[1]["weight"] < 0.8


# --- the critic


def of_gae(gamma=0.9, lam=0.8, **changes):
    """Settings of a step with a value head."""
    head = changes.pop("critic", HEAD)
    return full.setting(
        options={"lam": LAM, "credit": f"gae(gamma={gamma}, lam={lam})"}, critic=head, **changes
    )


@pytest.fixture(scope="module")
def two_steps():
    """(the setting, state and metrics of each of two steps on the same rows)."""
    one = of_gae(critic=HEAD)
    state, first = one.update()
    after, second = one.update(jax.tree.map(jnp.array, state))
    return one, (state, first), (after, second)


def head_value(critic_params, params):
    """V_phi [B, L] of the student's hidden states."""
    from gopd_jax.models import decoder as lm

    hidden_BLD = lm.hidden(full.model(*full.STUDENT)[0], params, ROWS.tokens_BL, ROWS.valid_BL)
    return value(critic_params, hidden_BLD)


def test_before_it_learns_the_value_is_the_exact_expected_reward_of_the_state(two_steps):
    one, (state, metrics), _ = two_steps
    value_BL = -local_kl()
    advantage_BT = advantage_estimation(log_u(), value_BL, 0.9, 0.8)
    grads = jax.tree.map(lambda a, b: np.asarray(a) - b, one.params, state.params)
    is_ascent_along(advantage_BT, (grads, metrics))
    # Rows that were cut off are worth what comes after, others nothing.
    value_BL[full.ENDED_B & (full.LENGTH_B == full.LENGTH), -1] = np.nan
    assert (~full.ENDED_B).sum() >= 3
    np.testing.assert_array_equal(
        advantage_estimation(log_u(), value_BL, 0.9, 0.8)[MASK_BT], advantage_BT[MASK_BT]
    )
    # It regresses on the lambda-return.
    return_BT = advantage_BT + value_BL[:, :-1]
    square_BT = 0.5 * (value_BL[:, :-1] - return_BT) ** 2
    np.testing.assert_allclose(metrics["value_loss"], square_BT[MASK_BT].mean(), rtol=1e-5)
    left, whole = (return_BT - value_BL[:, :-1])[MASK_BT].var(), return_BT[MASK_BT].var()
    np.testing.assert_allclose(metrics["explained_variance"], 1 - left / whole, atol=1e-5)


def test_the_head_steps_down_its_own_loss_at_its_own_rate(two_steps):
    one, (state, metrics), (after, second) = two_steps
    start = jax.device_get(init_state(one.recipe, one.params)).critic.params
    np.testing.assert_array_equal(start["last"], 0)
    value_BL = -local_kl()
    advantage_BT = advantage_estimation(log_u(), value_BL, 0.9, 0.8)
    return_BT = jnp.array(advantage_BT + value_BL[:, :-1], jnp.float32)

    def loss(params):
        predicted_BT = head_value(params, one.params)[:, :-1] - local_kl()[:, :-1]
        return full.token_mean(0.5 * (predicted_BT - return_BT) ** 2, MASK_BT)

    grads = jax.grad(loss)(start)
    np.testing.assert_allclose(metrics["critic_grad_norm"], full.norm(grads), rtol=1e-4)
    # Adam's first step is the rate times the sign.
    large = np.abs(grads["last"]) > 1e-4
    assert large.sum() > 4
    np.testing.assert_allclose(
        (state.critic.params["last"] - start["last"])[large],
        -HEAD.learning_rate * np.sign(grads["last"])[large],
        rtol=1e-3,
    )
    np.testing.assert_array_equal(state.critic.params["first"], start["first"])  # behind a zero
    assert np.abs(after.critic.params["first"] - start["first"]).max() > 1e-4


def test_rows_in_four_pieces_and_wider_prompts_change_nothing(two_steps):
    _, (state, metrics), _ = two_steps
    one = of_gae(microbatches=1, head_chunk=5)
    got, seen = one.update(rollout=full.rollout(width=7))
    full.same(got.params, state.params)
    full.same(got.critic.params, state.critic.params, 1e-4)
    full.same(seen, metrics, 2e-5, 2e-5)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
def test_the_critic_starts_from_any_seed_that_a_run_may_have(seed):
    one = of_gae(critic=dataclasses.replace(HEAD, seed=seed))
    first = init_state(one.recipe, one.params).critic.params["first"]
    drawn = jax.random.normal(jax.random.key(np.uint32(seed)), first.shape)
    np.testing.assert_allclose(first * first.shape[0] ** 0.5, drawn, rtol=1e-6)
    if seed < 2**31:  # as they always were
        np.testing.assert_array_equal(drawn, jax.random.normal(jax.random.key(seed), first.shape))


def test_while_the_critic_warms_up_the_student_stays_as_it_was():
    one = of_gae(critic=Critic(**{**vars(HEAD), "warmup_steps": 1}))
    state, metrics = one.update()
    full.same(state.params, jax.device_get(one.params), 0)
    assert np.abs(state.critic.params["last"]).max() > 0
    assert (metrics["skipped"], metrics["learning_rate"], int(state.step)) == (0, 0, 1)
    state, metrics = one.update(jax.tree.map(jnp.array, state))
    assert metrics["learning_rate"] == one.recipe.learning_rate(0) > 0
    moved = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), one.params, state.params)
    assert min(jax.tree.leaves(moved)) > 0


def test_an_untrained_value_without_the_closed_form_is_the_return_to_go():
    got = of_gae(
        gamma=1.0,
        lam=1.0,
        critic=Critic(**{**vars(HEAD), "closed_form": False, "value_clip": 0.1}),
    ).descent()
    is_ascent_along(discounted(log_u(), 1.0), got)


def test_no_gradient_of_the_value_reaches_the_hidden_state():
    hidden_xD = jax.random.normal(jax.random.key(0), (3, 5))
    head = {"first": jnp.ones((5, 2)), "bias": jnp.zeros(2), "last": jnp.ones(2)}
    of_head, of_hidden = jax.grad(lambda *args: value(*args).sum(), (0, 1))(head, hidden_xD)
    assert not np.asarray(of_hidden).any()
    assert all(np.asarray(grad).any() for grad in of_head.values())


def test_a_clipped_value_is_charged_for_having_moved():
    from gopd_jax.critic import loss

    clipped = Critic(**{**vars(HEAD), "value_clip": 0.5})
    got = loss(clipped, jnp.array([1.0, 2.0, 0.2, -3.0]), jnp.zeros(4), jnp.full(4, 2.0))
    np.testing.assert_allclose(got, [0.5 * 1.5**2, 0.5 * 1.5**2, 0.5 * 1.8**2, 0.5 * 5.0**2])


def test_explained_variance_is_one_less_what_is_left():
    draw = np.random.default_rng(0)
    value_BT, return_BT = draw.normal(size=(2, 3, 4))
    mask_BT = draw.random((3, 4)) < 0.6
    left = (return_BT - value_BT)[mask_BT].var()
    got = explained_variance(jnp.array(value_BT), jnp.array(return_BT), jnp.array(mask_BT))
    np.testing.assert_allclose(got, 1 - left / return_BT[mask_BT].var(), rtol=1e-5)
    assert float(explained_variance(jnp.ones((3, 4)), jnp.ones((3, 4)), jnp.array(mask_BT))) == 0
