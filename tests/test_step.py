"""The training step against full logits, other meshes, other splits, and its own first_step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gopd_jax import step
from gopd_jax.models import decoder as lm
from gopd_jax.optimizer import make_optimizer
from gopd_jax.recipe import Frozen, init_state
from gopd_jax.types import Scores

TASK_B = np.repeat([0, 1], [6, 10])
N_ROWS, WIDTH, LENGTH = 16, 5, 6
LAM = 1.25
KEY = jax.random.key(0)


def same(got, want, atol=1e-6, rtol=1e-6):
    """Equal up to the rounding of float32: a log-prob of 6 nats has steps of 5e-7."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=rtol), got, want)


def values(metrics):
    """Metrics as they are read: means, or one mean a task."""
    return {k: np.asarray(m.total) / np.asarray(m.count) for k, m in metrics.items()}


def full_logp(recipe, decoder, params, rollout):
    """Log-probs of the tokens from all logits at once: the oracle."""
    hidden_BLD = lm.hidden(decoder, params, rollout.tokens_BL, rollout.valid_BL)
    logits_BTV = lm.logits(decoder, params, hidden_BLD)[:, :-1, : recipe.n_vocab]
    logp_BTV = jax.nn.log_softmax(logits_BTV / recipe.temperature)
    return jnp.take_along_axis(logp_BTV, rollout.tokens_BL[:, 1:, None], -1)[..., 0]


def updated(recipe, params, loss_of):
    """Params after one optimizer step along the gradient of a plain loss."""
    grads = jax.jit(jax.grad(loss_of))(params)
    updates, _ = recipe.optimizer.update(grads, recipe.optimizer.init(params), params)
    return optax.apply_updates(params, updates), optax.tree.norm(grads)


def mean_loss(recipe, rollout, advantage_of):
    """-mean of A log S over the batch's tokens, A a function of the oracle's log-probs of S."""
    mask_BT = rollout.mask_BT

    def loss(params):
        logp_BT = full_logp(recipe, recipe.student, params, rollout)
        advantage_BT = jax.lax.stop_gradient(advantage_of(logp_BT))
        return -jnp.where(mask_BT, advantage_BT * logp_BT, 0.0).sum() / mask_BT.sum()

    return loss


def own_teacher(recipe, frozen, rollout):
    """Every row under every teacher, then the row's own."""
    both = [
        full_logp(recipe, decoder, params, rollout)
        for decoder, params in zip(recipe.teachers, frozen.teachers)
    ]
    return jnp.where(TASK_B[:, None] == 0, *both)


def test_a_step_is_the_update_from_full_logits(setting, first_step):
    recipe, params, frozen, _ = setting()
    rollout, _, state, metrics = jax.device_get(first_step)
    got = values(metrics)
    teacher_BT = own_teacher(recipe, frozen, rollout)
    ref_BT = full_logp(recipe, recipe.reference, frozen.reference, rollout)

    def advantage_of(logp_BT):
        return LAM * (teacher_BT - ref_BT) - (logp_BT - ref_BT)

    loss_of = mean_loss(recipe, rollout, advantage_of)
    want, grad_norm = updated(recipe, params, loss_of)
    same(state.params, want, 2e-6)
    np.testing.assert_allclose(got["loss"], loss_of(params), rtol=1e-5)
    np.testing.assert_allclose(got["grad_norm"], grad_norm, rtol=1e-5)
    mask_BT, student_BT = rollout.mask_BT, rollout.logp_BT
    for key, gap_BT in {
        "kl_teacher": student_BT - teacher_BT,
        "kl_ref": student_BT - ref_BT,
        "advantage_mean": advantage_of(student_BT),
    }.items():
        np.testing.assert_allclose(got[key], np.asarray(gap_BT)[mask_BT].mean(), atol=1e-5)
    gap_BT = np.asarray(student_BT - teacher_BT)
    by_task = [gap_BT[rows][mask_BT[rows]].mean() for rows in (TASK_B == 0, TASK_B == 1)]
    np.testing.assert_allclose(got["kl_teacher_task"], by_task, atol=1e-5)
    assert got["tokens"] == mask_BT.sum()
    np.testing.assert_allclose(got["length"], mask_BT.sum(1).mean())
    np.testing.assert_allclose(got["truncated"], 1 - rollout.ended_B.mean(), atol=1e-7)
    assert (int(state.step), got["skipped"], got["learning_rate"]) == (1, 0, np.float32(0.01))


def test_each_row_is_scored_by_its_own_teacher_and_by_the_reference(setting, first_step):
    recipe, _, frozen, _ = setting()
    rollout, scores, _, _ = first_step
    mask_BT = rollout.mask_BT
    same(scores.teacher_BT, jnp.where(mask_BT, own_teacher(recipe, frozen, rollout), 0), 1e-5)
    ref_BT = full_logp(recipe, recipe.reference, frozen.reference, rollout)
    same(scores.ref_BT, jnp.where(mask_BT, ref_BT, 0), 1e-5)
    swapped = own_teacher(recipe, frozen, rollout)[::-1]
    assert np.abs(np.where(mask_BT, swapped - scores.teacher_BT, 0)).max() > 1


@pytest.mark.parametrize(("microbatches", "chunk"), [(1, 3), (4, 5), (2, 99)])
def test_microbatches_and_chunks_change_nothing(setting, first_step, microbatches, chunk):
    rollout, want_scores, want_state, want_metrics = first_step
    recipe, params, frozen, _ = setting(microbatches=microbatches, head_chunk=chunk)
    _, score, update = step.staged(recipe)
    scores = score(frozen, rollout)
    same(scores, want_scores)
    state, metrics = update(init_state(recipe, params), rollout, scores)
    same(state, want_state)
    same(values(metrics), values(want_metrics))


def test_lambda_one_takes_no_reference(setting, first_step):
    recipe, params, frozen, _ = setting(lam=1.0, reference=None)
    _, score, update = step.staged(recipe)
    rollout = first_step[0]
    scores = score(frozen.replace(reference=None), rollout)
    assert scores.ref_BT is None
    same(scores.teacher_BT, first_step[1].teacher_BT)
    state, metrics = update(init_state(recipe, params), rollout, scores)
    assert "kl_ref" not in metrics
    teacher_BT = own_teacher(recipe, frozen, rollout)
    loss_of = mean_loss(recipe, rollout, lambda logp_BT: teacher_BT - logp_BT)
    same(state.params, updated(recipe, params, loss_of)[0], 2e-6)


def test_lambda_zero_descends_the_divergence_from_the_reference(setting, first_step):
    recipe, params, frozen, _ = setting(lam=0.0)
    rollout, scores, _, _ = first_step
    state, _ = step.staged(recipe)[2](init_state(recipe, params), rollout, scores)
    ref_BT = full_logp(recipe, recipe.reference, frozen.reference, rollout)
    mask_BT = rollout.mask_BT

    def k2(params):  # its gradient on the student's samples is that of KL(S || R)
        gap_BT = full_logp(recipe, recipe.student, params, rollout) - ref_BT
        return jnp.where(mask_BT, gap_BT**2 / 2, 0.0).sum() / mask_BT.sum()

    same(state.params, updated(recipe, params, k2)[0], 2e-6)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(setting, first_step):
    recipe, params, _, _ = setting()
    rollout, scores, want_state, _ = first_step
    update = step.staged(recipe)[2]
    broken = scores.replace(teacher_BT=scores.teacher_BT.at[3, WIDTH - 1].set(jnp.nan))
    start = jax.device_get(init_state(recipe, params))
    state, metrics = update(init_state(recipe, params), rollout, broken)
    assert float(metrics["skipped"].total) == 1
    assert not np.isfinite(metrics["grad_norm"].total)
    assert int(state.step) == 1
    same((state.params, state.opt_state), (start.params, start.opt_state), 0)
    # The optimizer has not moved either: the next step is what the first would have been.
    state, metrics = update(state, rollout, scores)
    assert (float(metrics["skipped"].total), int(state.step)) == (0, 2)
    same((state.params, state.opt_state), (want_state.params, want_state.opt_state), 0)


# --- other sources and rewards


def test_imitation_of_the_data_is_cross_entropy(setting, n_vocab):
    recipe, params, _, prompts = setting(
        advantage="imitation",
        source="data",
        teachers=(),
        reference=None,
    )
    draw = np.random.default_rng(3)
    mask_BC = np.arange(LENGTH) < draw.integers(1, LENGTH + 1, N_ROWS)[:, None]
    prompts = prompts.replace(
        completion_BC=jnp.array(np.where(mask_BC, draw.integers(0, n_vocab, mask_BC.shape), 0)),
        completion_mask_BC=jnp.array(mask_BC),
    )
    state, rollout, metrics = step.fused(recipe)(
        init_state(recipe, params), Frozen(teachers=(), reference=None), prompts, KEY
    )
    np.testing.assert_array_equal(rollout.tokens_BL[:, WIDTH:], prompts.completion_BC)
    np.testing.assert_array_equal(rollout.mask_BT[:, WIDTH - 1 :], mask_BC)
    assert not rollout.mask_BT[:, : WIDTH - 1].any()
    loss_of = mean_loss(recipe, rollout, jnp.ones_like)
    same(state.params, updated(recipe, params, loss_of)[0], 2e-6)
    np.testing.assert_allclose(values(metrics)["loss"], loss_of(params), rtol=1e-5)


def test_each_teacher_writes_for_its_own_rows(setting):
    recipe, params, frozen, prompts = setting(
        advantage="imitation", source="teacher", reference=None
    )
    generate, score, _ = step.staged(recipe)
    rollout = generate(params, frozen.replace(reference=None), prompts, KEY)
    written = [
        step.sampling(recipe, decoder)(teacher, prompts, KEY)
        for decoder, teacher in zip(recipe.teachers, frozen.teachers)
    ]
    # Both draw with the same numbers, which may give them a short row in common.
    assert (written[0].tokens_BL != written[1].tokens_BL).any(1).sum() >= N_ROWS - 2
    tokens_BL = np.where(TASK_B[:, None] == 0, *(w.tokens_BL for w in written))
    np.testing.assert_array_equal(rollout.tokens_BL, tokens_BL)
    want_BT = np.where(TASK_B[:, None] == 0, *(w.logp_BT for w in written))
    same(rollout.logp_BT, want_BT, 1e-5)
    assert score(frozen, rollout) == Scores()  # imitation asks nobody


def test_rewards_enter_between_the_stages(setting, first_step):
    recipe, params, frozen, _ = setting(advantage="grpo", teachers=(), reference=None)
    _, score, update = step.staged(recipe)
    rollout = first_step[0]
    reward_B = np.random.default_rng(4).integers(0, 2, N_ROWS).astype(np.float32)
    scores = score(Frozen(teachers=(), reference=None), rollout)
    assert scores == Scores()
    state, metrics = update(
        init_state(recipe, params), rollout, scores.replace(reward_B=jnp.array(reward_B))
    )
    pairs = reward_B.reshape(-1, 2)  # two rollouts of each prompt
    compared = (pairs - pairs.mean(1, keepdims=True)) / (pairs.std(1, keepdims=True) + 1e-4)
    assert len(np.unique(compared.round(3))) == 3
    loss_of = mean_loss(recipe, rollout, lambda _: compared.reshape(-1, 1))
    same(state.params, updated(recipe, params, loss_of)[0], 2e-6)
    assert "kl_teacher" not in metrics


# --- the optimizer


def test_the_schedule_warms_up_and_then_holds_or_falls():
    options = {"learning_rate": 0.4, "steps": 10, "b1": 0.9, "b2": 0.999}
    options |= {"weight_decay": 0.0, "clip_norm": 1.0}
    _, held = make_optimizer(schedule="constant", warmup_steps=4, **options)
    np.testing.assert_allclose([held(i) for i in (0, 1, 4, 9)], [0, 0.1, 0.4, 0.4], rtol=1e-6)
    _, falling = make_optimizer(schedule="cosine", warmup_steps=0, **options)
    want = 0.2 * (1 + np.cos(np.pi * np.array([0, 3, 10]) / 10))
    np.testing.assert_allclose([falling(i) for i in (0, 3, 10)], want, atol=1e-7)
    _, both = make_optimizer(schedule="cosine", warmup_steps=4, **options)
    np.testing.assert_allclose([both(i) for i in (2, 4, 7, 10)], [0.2, 0.4, 0.2, 0], atol=1e-7)


def test_the_optimizer_is_adamw_behind_a_clip_of_the_global_norm():
    optimizer, _ = make_optimizer(
        learning_rate=0.1,
        schedule="constant",
        warmup_steps=0,
        steps=3,
        b1=0.8,
        b2=0.9,
        weight_decay=0.02,
        clip_norm=1.0,
    )
    w, m, v = np.array([1.0, -2.0, 0.5]), 0.0, 0.0
    params = {"w": jnp.array(w)}
    opt_state = optimizer.init(params)
    for i, g in enumerate(np.array([[3.0, 4.0, 0.0], [0.1, -0.2, 0.3]]), start=1):
        updates, opt_state = optimizer.update({"w": jnp.array(g)}, opt_state, params)
        params = optax.apply_updates(params, updates)
        g = g / max(1.0, np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        w = w - 0.1 * (m / (1 - 0.8**i) / (np.sqrt(v / (1 - 0.9**i)) + 1e-8) + 0.02 * w)
        np.testing.assert_allclose(params["w"], w, rtol=1e-5)
