"""Batches at the edge of what can be: nothing sampled, and rows of one task alone."""

import full_logits as full
import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXACT = {"loss": "exact", "divergence": "jsd", "lam": 1.25}
SAMPLED = {"divergence": "forward_kl", "lam": 1.25, "credit": "return_to_go"}
OBJECTIVES = pytest.mark.parametrize("options", [EXACT, SAMPLED], ids=["exact", "sampled"])


@OBJECTIVES
def test_a_batch_without_a_token_moves_nothing_and_is_no_error(options):
    rows = full.rollout()
    none = rows.replace(
        valid_BL=rows.valid_BL.at[:, full.WIDTH :].set(False),
        mask_BT=jnp.zeros_like(rows.mask_BT),
        logp_BT=jnp.zeros_like(rows.logp_BT),
        ended_B=jnp.ones_like(rows.ended_B),
    )
    grads, metrics = full.setting(options=options).descent(none)
    assert full.norm(grads) == 0
    assert (metrics["loss"], metrics["tokens"], metrics["length"]) == (0, 0, 0)
    assert metrics["skipped"] == 0


@OBJECTIVES
def test_rows_of_one_task_alone_are_judged_by_its_teacher(options):
    rows = full.rollout().replace(task_B=jnp.zeros(full.N_ROWS, jnp.int32))
    teachers = full.TEACHERS[:1]
    one = full.setting(
        options=options, teachers=teachers, routes=((0,),), group_rows=(full.N_ROWS,)
    )
    got, metrics = one.descent(rows)
    teacher_BLV = full.logp_of(teachers[0], rows)
    target_BTV = full.target(1.25, rows, teacher_BLV)[:, :-1]
    mask_BT = rows.mask_BT

    def exact(student_BLV):
        s_BTV, t_BTV = jnp.exp(student_BLV[:, :-1]), jnp.exp(target_BTV)
        half_BTV = jnp.log((s_BTV + t_BTV) / 2)
        terms_BTV = s_BTV * (jnp.log(s_BTV) - half_BTV) + t_BTV * (target_BTV - half_BTV)
        return full.token_mean(0.5 * terms_BTV.sum(-1), mask_BT)

    student_BT = full.of_tokens(full.logp_of(full.STUDENT, rows), rows)
    target_BT = jnp.take_along_axis(target_BTV, rows.tokens_BL[:, 1:, None], -1)[..., 0]
    log_u_BT = np.where(mask_BT, target_BT - student_BT, 0.0)
    # f(u) = u log u: the rewards -f(u) that follow, and u f' - f' (1) of the token itself.
    reward_BT = np.where(mask_BT, -np.exp(log_u_BT) * log_u_BT, 0.0)
    to_go_BT = reward_BT[:, ::-1].cumsum(1)[:, ::-1]
    own_BT = np.where(mask_BT, np.exp(log_u_BT) * (log_u_BT + 1) - 1, 0.0)
    loss_of = exact if options is EXACT else full.sampled(jnp.array(to_go_BT + own_BT), rows)
    want, loss = full.gradient(loss_of, rows)
    assert full.norm(want) > 0.05
    full.same(got, want, 1e-5 * max(1, full.norm(want)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    assert metrics["kl_teacher_task"].shape == (1,)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
