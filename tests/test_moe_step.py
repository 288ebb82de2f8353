"""A whole step of models with routed experts: the same where experts have an axis of their own."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import sharding, step
from gopd_jax.models import moe
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.recipe import init_state

pytestmark = pytest.mark.slow


def routed(mesh, dense: Decoder, seed: int):
    """(decoder, params on the mesh) of a dense decoder's sizes, with four experts for its MLP."""
    cfg = tiny.with_experts(dense.cfg, tie_word_embeddings=False)
    params = lm_params.init(cfg, jax.random.key(seed))
    params = jax.tree.map(lambda x: 8 * x if x.std() > 0 else x, params)
    return Decoder(cfg), jax.device_put(
        params, sharding.shardings(mesh, lm_params.logical_axes(cfg))
    )


def two_steps(setting, shape, remat=None):
    """(state, rollout, metrics) on the host after two fused steps of a routed student that learns
    from a routed teacher and a dense one."""
    recipe, _, frozen, prompts = setting(shape)
    student, params = routed(recipe.mesh, recipe.student, 0)
    student = dataclasses.replace(student, remat=remat)
    teacher, teacher_params = routed(recipe.mesh, recipe.student, 1)
    teachers = teacher, recipe.teachers[1]
    recipe = dataclasses.replace(recipe, student=student, teachers=teachers)
    frozen = frozen.replace(teachers=(teacher_params, frozen.teachers[1]))
    state, run = init_state(recipe, params), step.fused(recipe)
    for i in range(2):
        state, rollout, metrics = run(state, frozen, prompts, jax.random.key(i))
    means = {name: np.asarray(m.total) / np.asarray(m.count) for name, m in metrics.items()}
    return jax.device_get((state, rollout, means))


@pytest.fixture(scope="module")
def one_device(setting):
    return two_steps(setting, (1, 1, 1))


@pytest.mark.parametrize(
    ("shape", "remat", "at_once"),
    [((1, 1, 1, 4), None, moe.AT_ONCE), ((1, 2, 2, 2), "layers", 16)],
    ids=str,
)
def test_a_mesh_with_devices_for_experts_takes_the_same_two_steps(
    setting, one_device, shape, remat, at_once, monkeypatch
):
    """Decoding with a cache, scores, gradients and moments; 6 and 10 rows of the two tasks."""
    want_state, want_rollout, want_metrics = one_device
    monkeypatch.setattr(moe, "AT_ONCE", at_once)  # tokens of a microbatch: 11 of 8 rows
    state, rollout, metrics = two_steps(setting, shape, remat)
    np.testing.assert_array_equal(rollout.tokens_BL, want_rollout.tokens_BL)
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=2e-5),
        (state, rollout.logp_BT, metrics),
        (want_state, want_rollout.logp_BT, want_metrics),
    )
    moved = jax.tree.map(lambda x: np.abs(x).max(), want_state.opt_state[1][0].mu["layers"])
    assert all(moved[name] > 1e-4 for name in ("router", "expert_gate", "expert_down"))
