"""What the student is drawn to in a step: mixed teachers, lambda by row and by step, its cap."""

import full_logits as full
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.recipe import Mixture, init_state

ROWS = full.rollout()
MASK_BT = np.asarray(ROWS.mask_BT)
FIRST = full.TASK_B == 0
# The first task has two teachers, the second another one alone; it repeats that at weight 0.
ROUTES, WEIGHTS = ((0, 1), (2, 1)), ((0.3, 1.0), (0.7, 0.0))


def mixture(space, normalised=True):
    first, second, third = (np.asarray(full.logp_of(t), np.float64) for t in full.TEACHERS)
    if space == "probability":
        mixed = np.log(0.3 * np.exp(first) + 0.7 * np.exp(third))
    else:
        mixed = 0.3 * first + 0.7 * third
        mixed -= np.log(np.exp(mixed).sum(-1, keepdims=True)) if normalised else 0
    return jnp.array(np.where(FIRST[:, None, None], mixed, second), jnp.float32)


def mixed_setting(space, **options):
    return full.setting(
        options={**options, "mixture": space},
        teachers=full.TEACHERS,
        routes=ROUTES,
        mixture=Mixture(weights=WEIGHTS, space=space),
    )


def exact(target_BLV):
    """KL(S || T), as a loss of the student's log-probs."""

    def loss_of(student_BLV):
        kl_BL = (jnp.exp(student_BLV) * (student_BLV - target_BLV)).sum(-1)
        return full.token_mean(kl_BL[:, :-1], ROWS.mask_BT)

    return loss_of


def holds(got, loss_of):
    want, loss = full.gradient(loss_of)
    assert full.norm(want) > 0.05
    full.same(got[0], want, 1e-5 * max(1, full.norm(want)))
    np.testing.assert_allclose(got[1]["loss"], loss, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("space", ["probability", "log"])
def test_whole_distributions_of_several_teachers_are_mixed(space):
    got = mixed_setting(space, loss="exact", lam=1.25).descent()
    holds(got, exact(full.target(1.25, teacher_BLV=mixture(space))))


def test_a_mixture_of_sampled_tokens_is_that_of_their_probabilities():
    got = mixed_setting("probability").descent()
    log_u_BT = full.of_tokens(mixture("probability")) - full.of_tokens(full.logp_of(full.STUDENT))
    holds(got, full.sampled(log_u_BT))
    kl = -np.asarray(log_u_BT)[MASK_BT].mean()
    np.testing.assert_allclose(got[1]["kl_teacher"], kl, atol=2e-5)


def test_a_geometric_mixture_is_normalised_where_a_ratio_is_asked_for():
    got = mixed_setting("log", divergence="pearson", log_u_clip=3.0).descent()
    log_u_BT = full.of_tokens(mixture("log")) - full.of_tokens(full.logp_of(full.STUDENT))
    holds(got, full.sampled(jnp.expm1(2 * jnp.clip(log_u_BT, -3, 3))))


@pytest.mark.parametrize("gates", [(), ("teacher_entropy(at_most=99.0)",)])
def test_what_asks_for_the_vocabulary_does_not_change_what_a_geometric_mixture_is_summed_to(gates):
    options = {"lam": 1.25, "credit": "return_to_go", "gates": gates}
    one = mixed_setting("log", **options)
    assert one.recipe.needs_vocabulary == bool(gates)  # a gate that lets every token through
    teacher_BT, ref_BT, student_BT = (
        full.of_tokens(x)
        for x in (mixture("log", False), full.logp_of(full.REFERENCE), full.logp_of(full.STUDENT))
    )
    reward_BT = teacher_BT + 0.25 * (teacher_BT - ref_BT) - student_BT
    reward_BT = jnp.where(MASK_BT, reward_BT, 0.0)
    holds(one.descent(), full.sampled(jnp.cumsum(reward_BT[:, ::-1], 1)[:, ::-1]))


@pytest.mark.parametrize("space", ["probability", "log"])
def test_a_mixtures_own_entropy_needs_no_reference_whatever_lambda_is(space):
    """Beside rewards alone lambda has no target to tilt, and the reference is not loaded."""
    at_most = 3.75
    gates = (f"teacher_entropy(at_most={at_most})",)
    one = mixed_setting(space, advantage="grpo", lam=1.25, gates=gates)
    assert one.recipe.reference is None
    reward_B = np.arange(full.N_ROWS) % 3 > 0
    got = one.descent(reward_B=reward_B)
    teacher_BTV = np.asarray(mixture(space), np.float64)[:, :-1]
    sure_BT = -(np.exp(teacher_BTV) * teacher_BTV).sum(-1) <= at_most
    assert 0.2 < sure_BT[MASK_BT].mean() < 0.8
    pairs = reward_B.reshape(-1, 2)
    compared = (pairs - pairs.mean(1, keepdims=True)) / (pairs.std(1, keepdims=True) + 1e-4)
    holds(got, full.sampled(jnp.array(compared.reshape(-1, 1) * sure_BT, jnp.float32)))


LAM_B = np.array([0.0, 1.0, 1.25, 2.0] * 4, np.float32)


@pytest.mark.parametrize("loss", ["exact", "policy_gradient"])
def test_rows_have_a_lambda_of_their_own(loss):
    one = full.setting(options={"loss": loss, "lam_by_row": True})
    got = one.descent(ROWS.replace(lam_B=jnp.array(LAM_B)))
    if loss == "exact":
        return holds(got, exact(full.target(LAM_B)))
    teacher_BT, ref_BT, student_BT = (
        full.of_tokens(x)
        for x in (full.own_teacher(), full.logp_of(full.REFERENCE), full.logp_of(full.STUDENT))
    )
    advantage_BT = teacher_BT + (LAM_B[:, None] - 1) * (teacher_BT - ref_BT) - student_BT
    np.testing.assert_allclose(got[1]["lam"], LAM_B.mean(), rtol=1e-6)
    return holds(got, full.sampled(advantage_BT))


def test_lambda_follows_its_schedule_and_the_tilt_its_cap():
    one = full.setting(
        options={
            **{"loss": "exact", "lam": 2.0, "ratio_cap": 1.5},
            "lam_schedule": "linear(steps=4, start=0.5)",
        },
    )
    state = init_state(one.recipe, one.params)
    for at, lam in ((0, 0.5), (1, 0.875), (9, 2.0)):
        after, metrics = one.update(state.replace(step=jnp.int32(at)))
        np.testing.assert_allclose(metrics["lam"], lam, rtol=1e-6)
        grads = {k: np.asarray(one.params[k]) - after.params[k] for k in ("embed", "final_norm")}
        want, loss = full.gradient(exact(full.target(lam, cap=1.5)))
        full.same(grads, {k: want[k] for k in grads}, 1e-5 * max(1, full.norm(want)))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    gap_BT = full.of_tokens(full.own_teacher()) - full.of_tokens(full.logp_of(full.REFERENCE))
    share = (np.abs(gap_BT)[MASK_BT] > 1.5).mean()
    assert 0.05 < share < 0.95
    np.testing.assert_allclose(metrics["advantage_clipped"], share, rtol=1e-5)
