"""G-OPD's token reward: the tilted teacher is a target, and lambda says how far."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import toy
from gopd_jax.objectives.advantages import gopd
from gopd_jax.objectives.divergences import forward_kl, reverse_kl
from gopd_jax.objectives.targets import tilted


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, atol=atol)


def test_the_token_reward_of_g_opd_is_the_papers():
    """Both of its forms, in NumPy."""
    s, t, r = (np.asarray(toy.logp_of(x)) for x in (toy.STUDENT, toy.TEACHER, toy.REF))
    mask = np.asarray(toy.MASK_BT)
    got = np.asarray(gopd(tilted(t, r, lam=1.25) - s, toy.MASK_BT))
    close(got[mask], (1.25 * (t - r) - (s - r))[mask], 2e-6)
    close(got[mask], ((t - s) + 0.25 * (t - r))[mask], 2e-6)
    assert not got[~mask].any()


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.25, 2.0])
def test_the_normaliser_of_the_tilted_teacher_changes_no_expected_gradient(lam):
    s, t, r = (toy.logp_of(x) for x in (toy.STUDENT, toy.TEACHER, toy.REF))
    unnormalised_BT = gopd(tilted(t, r, lam=lam) - s, toy.MASK_BT)
    close(toy.ascent(unnormalised_BT), toy.frozen(reverse_kl, toy.tilt(lam)))


def test_lambda_one_is_distillation_with_any_reference_and_with_none():
    s, t = toy.logp_of(toy.STUDENT), toy.logp_of(toy.TEACHER)
    want = np.where(toy.MASK_BT, t - s, 0)
    for ref in (None, toy.logp_of(toy.REF), jnp.full(toy.MASK_BT.shape, jnp.nan)):
        np.testing.assert_array_equal(gopd(tilted(t, ref, lam=1.0) - s, toy.MASK_BT), want)


def test_a_student_at_its_target_has_nothing_to_learn():
    lam = 1.25
    teacher = (toy.log_softmax(toy.STUDENT) - (1 - lam) * toy.log_softmax(toy.REF)) / lam
    log_t_BT = tilted(toy.logp_of(teacher), toy.logp_of(toy.REF), lam=lam)
    close(toy.ascent(gopd(log_t_BT - toy.logp_of(toy.STUDENT), toy.MASK_BT)), 0, 1e-6)


def test_a_clip_of_log_u_comes_before_the_divergence():
    log_u_BT, mask_BT = jnp.array([[-80.0, -1.0, 3.0, 80.0, jnp.nan]]), jnp.arange(5)[None] < 4
    got = gopd(log_u_BT, mask_BT, divergence=forward_kl, clip=2.0)
    u = np.exp([-2.0, -1.0, 2.0, 2.0])
    close(got, [[*(-u * np.log(u)), 0.0]], 1e-5)
    with pytest.raises(ValueError, match="clip of log u is 0; give nats above 0, or None"):
        gopd(log_u_BT, mask_BT, clip=0)


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match=r"lam = 1.25 needs the reference's log-probs .* None"):
        tilted(jnp.zeros((1, 1)), None, lam=1.25)
