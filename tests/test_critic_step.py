"""A value head in closed form, inside the step, against full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import sharding, step
from gopd_jax.critic import Critic
from gopd_jax.models import decoder as lm
from gopd_jax.objectives import objective
from gopd_jax.recipe import init_state
from gopd_jax.update import gradient

TASK_B = np.repeat([0, 1], [6, 10])


def all_log_probs(recipe, decoder, params, rollout):
    """[B, L, V] of every state, the one behind the last token among them."""
    hidden_BLD = lm.hidden(decoder, params, rollout.tokens_BL, rollout.valid_BL)
    logits_BLV = lm.logits(decoder, params, hidden_BLD)[..., : recipe.n_vocab]
    return np.asarray(jax.nn.log_softmax(logits_BLV / recipe.temperature), np.float64)


@pytest.mark.parametrize("loss", ["policy_gradient", "ppo"])
def test_without_learning_v_is_minus_the_local_kl_in_any_objective(setting, loss):
    # Neither the advantage nor these losses ask for distributions: the closed form alone does.
    head = Critic(
        learning_rate=1e-3, width=4, closed_form=True, warmup_steps=0, value_clip=None, seed=0
    )
    goal = objective.build(credit="gae(gamma=1.0, lam=0.0)", loss=loss)
    recipe, params, frozen, prompts = setting(lam=1.0, objective=goal, critic=head)
    generate, score, update = step.staged(recipe)
    rollout = generate(params, frozen, prompts, jax.random.key(0))
    state, scores = init_state(recipe, params), score(frozen, rollout)
    with sharding.use(recipe.mesh):
        _, seen = jax.jit(lambda *args: gradient(recipe, *args))(state, rollout, scores, frozen)

    student_BLV = all_log_probs(recipe, recipe.student, params, rollout)
    teachers = [all_log_probs(recipe, *of, rollout) for of in zip(recipe.teachers, frozen.teachers)]
    teacher_BLV = np.where(TASK_B[:, None, None] == 0, *teachers)
    value_BL = -(np.exp(student_BLV) * (student_BLV - teacher_BLV)).sum(-1)
    ids_BT1 = np.asarray(rollout.tokens_BL)[:, 1:, None]
    log_u_BLV = teacher_BLV - student_BLV
    reward_BT = np.take_along_axis(log_u_BLV[:, :-1], np.maximum(ids_BT1, 0), -1)[..., 0]
    mask_BT, ended_B = np.asarray(rollout.mask_BT), np.asarray(rollout.ended_B)
    assert not ended_B.all()
    goes_on_BT = np.pad(mask_BT[:, 1:], ((0, 0), (0, 1))) | ~ended_B[:, None]
    want_BT = reward_BT + np.where(goes_on_BT, value_BL[:, 1:], 0.0) - value_BL[:, :-1]
    got_BT = np.asarray(seen["advantage_BT"])
    np.testing.assert_allclose(got_BT[mask_BT], want_BT[mask_BT], atol=2e-4)

    state, metrics = update(state, rollout, scores, frozen)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert float(metrics["skipped"].value()) == 0
