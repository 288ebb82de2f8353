"""Baselines over other rows against NumPy, a row at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives.baselines import BASELINES

MASK_BT = np.arange(6) < np.array([6, 0, 1, 4, 3, 2, 5])[:, None]
GROUP_B = np.array([0, 0, 3, 3, 3, 0, 6], np.int32)  # the second row is empty, the last alone
CREDIT_BT = np.random.default_rng(0).normal(1.0, 2.0, MASK_BT.shape).astype(np.float32)


def wanted(name, b, t):
    """The baseline of row b's token t, from the lists of the others' credits."""
    others = [i for i in range(len(MASK_BT)) if i != b and MASK_BT[i].any()]
    if name == "batch_mean":
        found = [CREDIT_BT[i][MASK_BT[i]] for i in others]
    elif name == "position_mean":
        found = [CREDIT_BT[i, t : t + 1] for i in others if MASK_BT[i, t]]
    else:
        found = [[CREDIT_BT[i][MASK_BT[i]].mean()] for i in others if GROUP_B[i] == GROUP_B[b]]
    return np.concatenate(found).mean() if found else 0.0


def baseline(name, mask_BT=MASK_BT):
    of_group = (jnp.array(GROUP_B),) if name == "leave_one_out" else ()
    return BASELINES[name](jnp.array(CREDIT_BT), jnp.array(mask_BT), *of_group)


@pytest.mark.parametrize("name", ["batch_mean", "position_mean", "leave_one_out"])
def test_baselines_of_other_rows_are_numpys(name):
    want_BT = np.zeros(MASK_BT.shape)
    for b, t in np.argwhere(MASK_BT):
        want_BT[b, t] = wanted(name, b, t)
    np.testing.assert_allclose(baseline(name), want_BT, atol=2e-6)


@pytest.mark.parametrize("name", ["batch_mean", "position_mean", "leave_one_out"])
def test_a_row_with_nobody_to_compare_with_has_baseline_zero(name):
    alone_BT = MASK_BT & (np.arange(len(MASK_BT)) == 3)[:, None]
    assert not np.asarray(baseline(name, alone_BT)).any()
