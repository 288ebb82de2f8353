"""Contracts of every loss and regularizer: one position each, whatever the log-probs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feeding import entries, fed

from gopd_jax.objectives.losses import LOSSES
from gopd_jax.objectives.regularizers import REGULARIZERS

N_VOCAB, N_REAL, N_SUPPORT = 7, 5, 4
DIFFERENTIABLE = ("logp_x", "student_xV", "student_xS")


def of_positions(shape, *, scale=1.0, junk=-jnp.inf):
    """Every quantity of positions; `junk` stands where the support is not valid."""

    def distribution(seed):
        logits_xV = scale * jax.random.normal(jax.random.key(seed), (*shape, N_VOCAB))
        real_xV = jnp.arange(N_VOCAB) < N_REAL
        return jax.nn.log_softmax(jnp.where(real_xV, logits_xV, -jnp.inf))

    valid_xS = jnp.broadcast_to(jnp.arange(N_SUPPORT) < 3, (*shape, N_SUPPORT))
    found = {f"{name}_xV": distribution(i) for i, name in enumerate(("student", "target", "ref"))}
    ids_x = jax.random.randint(jax.random.key(3), shape, 0, N_REAL)

    def at(name):
        return jnp.take_along_axis(found[name], ids_x[..., None], -1)[..., 0]

    return found | {
        "logp_x": at("student_xV"),
        "student_x": at("student_xV"),
        "sampler_x": at("ref_xV"),
        "target_x": at("target_xV"),
        "ref_x": at("ref_xV"),
        "ids_x": ids_x,
        "advantage_x": scale * jax.random.normal(jax.random.key(4), shape),
        "real_xV": jnp.broadcast_to(jnp.arange(N_VOCAB) < N_REAL, (*shape, N_VOCAB)),
        "student_xS": jnp.where(valid_xS, found["student_xV"][..., :N_SUPPORT], junk),
        "target_xS": jnp.where(valid_xS, found["target_xV"][..., :N_SUPPORT], junk),
        "valid_xS": valid_xS,
    }


def gradients(entry, quantities):
    """Those of the summed loss, of the quantities that gradients reach."""

    def total(of):
        return fed(entry, quantities | of).sum()

    return jax.grad(total)({name: quantities[name] for name in DIFFERENTIABLE})


OF_POSITIONS = pytest.mark.parametrize("entry", entries(LOSSES, REGULARIZERS))


@OF_POSITIONS
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 0)])
def test_losses_have_a_number_for_each_position(entry, shape):
    loss_x = fed(entry, of_positions(shape))
    assert (loss_x.shape, loss_x.dtype) == (shape, jnp.float32)
    assert np.isfinite(loss_x).all()


@OF_POSITIONS
def test_no_position_of_a_loss_knows_of_the_others(entry):
    quantities = of_positions((6,))
    loss_x, grads = fed(entry, quantities), gradients(entry, quantities)
    assert any(np.asarray(grad).any() for grad in grads.values())
    for i in range(6):
        one = {name: x[i] for name, x in quantities.items()}
        np.testing.assert_allclose(fed(entry, one), loss_x[i], 1e-6, 1e-6)
        for name, grad in gradients(entry, one).items():
            np.testing.assert_allclose(grad, grads[name][i], 1e-6, 1e-6)


@OF_POSITIONS
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 40.0, 5e3])
def test_losses_and_their_gradients_are_finite_for_extreme_log_probs(entry, scale):
    quantities = of_positions((64,), scale=scale)
    assert np.isfinite(fed(entry, quantities)).all()
    for name, grad in gradients(entry, quantities).items():
        assert np.isfinite(grad).all(), name


@OF_POSITIONS
@pytest.mark.parametrize("junk", [jnp.nan, jnp.inf, 1e30, 0.0])
def test_losses_read_only_what_is_valid_of_a_support(entry, junk):
    clean, dirty = of_positions((6,)), of_positions((6,), junk=junk)
    np.testing.assert_array_equal(fed(entry, dirty), fed(entry, clean))
    want, got = gradients(entry, clean), gradients(entry, dirty)
    for name in DIFFERENTIABLE:
        np.testing.assert_array_equal(got[name], want[name])
    invalid_xS = ~np.asarray(clean["valid_xS"])
    assert not np.asarray(got["student_xS"])[invalid_xS].any()
    assert not np.asarray(got["student_xV"])[..., N_REAL:].any()


POLICY = {
    name: loss
    for name, loss in LOSSES.items()
    if set(inspect.signature(loss).parameters)
    - {p.name for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY}
    <= {"logp_x", "student_x", "advantage_x"}
}


@pytest.mark.parametrize("entry", entries(POLICY))
def test_policy_losses_ascend_the_advantage_at_the_policy_that_sampled(entry):
    quantities = of_positions((6,))
    got = gradients(entry, quantities)["logp_x"]
    np.testing.assert_allclose(got, -quantities["advantage_x"], atol=1e-6)
