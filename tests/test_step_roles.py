"""What roles may have of their own in a step: prompts, tasks, memory, the student's average."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from test_step import KEY, N_ROWS, TASK_B, WIDTH, full_logp, same, values

from gopd_jax import sharding, step
from gopd_jax.models import decoder as lm
from gopd_jax.recipe import following, init_state
from gopd_jax.types import View


def views(n_rows, seed):
    """The rows' prompts as somebody else reads them: other ids, wider, of several lengths."""
    rng = np.random.default_rng(seed)
    first_B1 = rng.integers(0, 5, (n_rows, 1))
    return View(
        tokens_BP=jnp.asarray(rng.integers(0, 61, (n_rows, 9)), jnp.int32),
        valid_BP=jnp.asarray(np.arange(9) >= first_B1),
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_alone(decoder, params, row_1L):
    hidden_1LD = lm.hidden(decoder, params, row_1L, jnp.ones(row_1L.shape, bool))
    return lm.logits(decoder, params, hidden_1LD)


def test_a_role_judges_the_students_completion_after_its_own_prompt(setting, first_step):
    recipe, _, frozen, _ = setting()
    rollout = first_step[0].replace(teacher=views(N_ROWS, 1), reference=views(N_ROWS, 2))
    _, score, _ = step.staged(recipe)
    got, host = jax.device_get((score(frozen, rollout), rollout))
    for role, got_BT in (("teacher", got.teacher_BT), ("reference", got.ref_BT)):
        for b in range(N_ROWS):  # each row alone, without any padding: the oracle
            view, mask_C = getattr(host, role), host.mask_BT[b, WIDTH - 1 :]
            prompt = view.tokens_BP[b][view.valid_BP[b]]
            ids = host.tokens_BL[b, WIDTH:][mask_C]
            decoder, params = recipe.reference, frozen.reference
            if role == "teacher":
                decoder, params = recipe.teachers[TASK_B[b]], frozen.teachers[TASK_B[b]]
            row = np.concatenate([prompt, ids])[None]
            logits = logits_alone(decoder, params, row)[0, :, : recipe.n_vocab]
            logp = scipy.special.log_softmax(np.asarray(logits) / recipe.temperature, -1)
            logp = logp[len(prompt) - 1 : -1]
            want = np.take_along_axis(logp, ids[:, None], 1)[:, 0]
            same(got_BT[b, WIDTH - 1 :][mask_C], want, 1e-5)
    plain = score(frozen, first_step[0])
    assert np.abs(got.teacher_BT - plain.teacher_BT).max() > 0.1
    assert not np.asarray(jnp.where(rollout.mask_BT, 0, got.teacher_BT)).any()


def test_a_view_that_is_the_students_own_prompt_changes_nothing(setting, first_step):
    recipe, _, frozen, prompts = setting()
    own = View(tokens_BP=prompts.tokens_BP, valid_BP=prompts.valid_BP)
    _, score, _ = step.staged(recipe)
    same(score(frozen, first_step[0].replace(teacher=own, reference=own)), first_step[1])


def test_a_teacher_writes_after_its_own_prompt_for_the_students(setting):
    recipe, params, frozen, prompts = setting(source="teacher", advantage="imitation")
    told = views(N_ROWS, 3)
    generate, _, _ = step.staged(recipe)
    got = generate(params, frozen, prompts.replace(teacher=told), KEY)
    theirs = generate(
        params, frozen, prompts.replace(tokens_BP=told.tokens_BP, valid_BP=told.valid_BP), KEY
    )
    plain = generate(params, frozen, prompts, KEY)
    np.testing.assert_array_equal(got.tokens_BL[:, WIDTH:], theirs.tokens_BL[:, 9:])
    np.testing.assert_array_equal(got.tokens_BL[:, :WIDTH], plain.tokens_BL[:, :WIDTH])
    np.testing.assert_array_equal(got.valid_BL[:, :WIDTH], prompts.valid_BP)
    np.testing.assert_array_equal(got.mask_BT[:, WIDTH - 1 :], theirs.mask_BT[:, 8:])
    assert (got.tokens_BL[:, WIDTH:] != plain.tokens_BL[:, WIDTH:]).any()


@pytest.mark.parametrize("routes", [(0, 0), (1, 0)])
def test_tasks_are_routed_to_teachers(setting, first_step, routes):
    recipe, _, frozen, _ = setting()
    rollout, mask_BT = first_step[0], first_step[0].mask_BT
    teachers = max(routes) + 1
    routed = dataclasses.replace(recipe, teachers=recipe.teachers[:teachers], routes=(routes,))
    _, score, _ = step.staged(routed)
    got = score(frozen.replace(teachers=frozen.teachers[:teachers]), rollout)
    both = [
        full_logp(recipe, decoder, params, rollout)
        for decoder, params in zip(recipe.teachers, frozen.teachers)
    ]
    want_BT = jnp.where(TASK_B[:, None] == 0, both[routes[0]], both[routes[1]])
    same(got.teacher_BT, jnp.where(mask_BT, want_BT, 0), 1e-5)


@pytest.mark.parametrize(
    "shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 2)], ids=str
)
def test_models_in_host_memory_give_the_same_numbers(setting, first_step, shape):
    recipe, params, frozen, prompts = setting(shape)
    away = jax.tree.map(lambda x: jax.device_put(x, sharding.on_host(x.sharding)), frozen)
    assert {x.sharding.memory_kind for x in jax.tree.leaves(away)} == {"pinned_host"}
    generate, score, update = step.staged(recipe)
    rollout = generate(params, away, prompts, KEY)
    same(score(away, rollout), score(frozen, rollout), 0, 0)
    state, _, metrics = step.fused(recipe)(init_state(recipe, params), away, prompts, KEY)
    same(jax.device_get(state.params), jax.device_get(first_step[2].params), 2e-5)
    same(values(metrics), values(first_step[3]), 2e-5, 1e-4)


def test_a_teacher_that_follows_is_the_moving_average_of_the_student(setting):
    recipe, params, frozen, prompts = setting(ema_decay=0.75)
    recipe = dataclasses.replace(recipe, teachers=(recipe.student, recipe.teachers[1]))
    frozen = frozen.replace(teachers=(None, frozen.teachers[1]))
    state = init_state(recipe, params)
    assert following(frozen, state).teachers[0] is state.ema
    generate, score, update = step.staged(recipe)
    ema = jax.device_get(params)
    for i in range(3):
        now = following(frozen, state)
        rollout = generate(state.params, now, prompts, jax.random.key(i))
        scores = score(now, rollout)
        if i:
            first_task = full_logp(recipe, recipe.student, ema, rollout)[:6]
            mask_BT = rollout.mask_BT[:6]
            same(scores.teacher_BT[:6], jnp.where(mask_BT, first_task, 0), 1e-5)
        state, _ = update(state, rollout, scores)
        ema = jax.tree.map(lambda m, p: 0.75 * m + 0.25 * p, ema, jax.device_get(state.params))
        same(jax.device_get(state.ema), ema, 1e-6)
    fused, again = step.fused(recipe), init_state(recipe, params)
    for i in range(3):
        again, _, _ = fused(again, frozen, prompts, jax.random.key(i))
    same(jax.device_get(again), jax.device_get(state), 2e-5)
