"""What the student is drawn to: the tilt and its cap, mixtures, lambda's schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives.targets import SCHEDULES, mixed, tilted, tilted_distribution

REAL_V = np.arange(8) < 6


def log_probs(seed):
    """[5, 8], -inf at the two ids that do not exist."""
    logits_xV = 2 * jax.random.normal(jax.random.key(seed), (5, 8))
    return jax.nn.log_softmax(jnp.where(REAL_V, logits_xV, -jnp.inf))


TEACHER_XV, REF_XV, OTHER_XV = map(log_probs, range(3))


def probabilities(logp_xV):
    return np.exp(np.asarray(logp_xV, np.float64))


def test_the_cap_bounds_the_log_ratio_on_both_sides():
    teacher_x, ref_x = jnp.array([-1.0, -9.0, -2.0, -2.0]), jnp.array([-9.0, -1.0, -2.5, -1.5])
    got_x = tilted(teacher_x, ref_x, lam=1.5, cap=2.0)
    np.testing.assert_allclose(got_x, [-1 + 0.5 * 2, -9 - 0.5 * 2, -2 + 0.25, -2 - 0.25], rtol=1e-6)
    free_x = tilted(teacher_x, ref_x, lam=1.5)
    np.testing.assert_allclose(free_x, [-1 + 0.5 * 8, -9 - 0.5 * 8, -1.75, -2.25], rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.75])
def test_the_tilted_teacher_is_a_distribution_over_the_real_ids(lam):
    got_xV = tilted_distribution(TEACHER_XV, REF_XV, REAL_V, lam=lam)
    want_xV = np.zeros(TEACHER_XV.shape)
    t_xV, r_xV = (probabilities(x)[:, REAL_V] for x in (TEACHER_XV, REF_XV))
    want_xV[:, REAL_V] = t_xV**lam * r_xV ** (1 - lam)
    want_xV /= want_xV.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(got_xV), want_xV, atol=1e-6)


@pytest.mark.parametrize("space", ["probability", "log"])
def test_teachers_are_mixed_in_the_space_that_is_named(space):
    weights = 0.3, 0.7, 0.0
    # One of weight 0 is out, whatever it says.
    teachers = TEACHER_XV[:, :6], OTHER_XV[:, :6], jnp.full((5, 6), -jnp.inf)
    got_xV = mixed(teachers, tuple(map(jnp.float32, weights)), space=space)
    t_xV, o_xV = (probabilities(x) for x in teachers[:2])
    want_xV = 0.3 * t_xV + 0.7 * o_xV if space == "probability" else t_xV**0.3 * o_xV**0.7
    np.testing.assert_allclose(got_xV, np.log(want_xV), rtol=1e-5, atol=1e-6)


def test_schedules_go_from_their_start_to_lambda_and_stay():
    steps = np.array([0, 1, 2, 3, 4, 5, 400])
    share = np.minimum(steps / 4, 1)
    linear = [SCHEDULES["linear"](jnp.int32(s), 2.0, steps=4, start=0.5) for s in steps]
    np.testing.assert_allclose(linear, 0.5 + 1.5 * share, rtol=1e-6)
    cosine = [SCHEDULES["cosine"](jnp.int32(s), 2.0, steps=4, start=0.5) for s in steps]
    np.testing.assert_allclose(cosine, 0.5 + 1.5 * np.sin(np.pi / 2 * share) ** 2, rtol=1e-6)
    assert SCHEDULES["constant"](jnp.int32(3), 1.25) == 1.25
