"""Contracts of every entry of the objectives' tables, which is fed by its parameters' names."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from feeding import entries, fed

from gopd_jax.objectives.advantages import ADVANTAGES
from gopd_jax.objectives.baselines import BASELINES, group_relative
from gopd_jax.objectives.credit import CREDITS
from gopd_jax.objectives.diagnostics import diagnostics
from gopd_jax.objectives.gates import GATES
from gopd_jax.objectives.importance import IMPORTANCE, REJECTIONS
from gopd_jax.objectives.objective import build
from gopd_jax.objectives.reductions import REDUCTIONS
from gopd_jax.spec import resolve
from gopd_jax.types import Rollout

RAGGED_BT = np.arange(5) < np.array([5, 0, 1, 3])[:, None]
N_ROWS, N_POSITIONS = RAGGED_BT.shape


def close(got, want, atol=1e-6, rtol=0.0):
    np.testing.assert_allclose(got, want, atol=atol, rtol=rtol)


def noise(seed, shape):
    return -2 * jnp.abs(jax.random.normal(jax.random.key(seed), shape))


# --- quantities of whole rows


def of_rows(mask_BT, *, scale=1.0):
    """Every quantity over whole rows; log-probs and their like up to several times `scale`."""
    n_rows, shape = mask_BT.shape[0], mask_BT.shape
    logs = ("student_BT", "sampler_BT", "target_BT", "teacher_BT", "ref_BT")
    signed = ("log_u_BT", "value_BT", "advantage_BT", "credit_BT", "token_reward_BT")
    sizes = ("entropy_BT", "teacher_entropy_BT", "local_kl_BT")
    found = {name: scale * noise(i, shape) for i, name in enumerate(logs)}
    for i, name in enumerate(signed):
        found[name] = scale * jax.random.normal(jax.random.key(10 + i), shape)
    for i, name in enumerate(sizes):
        found[name] = scale * -noise(20 + i, shape)
    return found | {
        "mask_BT": jnp.array(mask_BT),
        "position_BT": jnp.broadcast_to(jnp.arange(shape[1]), shape),
        "ids_BT": jax.random.randint(jax.random.key(30), shape, 0, 5),
        "end_BT": jnp.array(mask_BT) & ~jnp.pad(jnp.array(mask_BT)[:, 1:], ((0, 0), (0, 1))),
        "group_B": jnp.arange(n_rows) // 2 * 2 % n_rows,
        "ended_B": jnp.arange(n_rows) % 2 == 0,
        "reward_B": jnp.cos(jnp.arange(n_rows) * 2.0),
        "relative_reward_B": jnp.sin(jnp.arange(n_rows) * 3.0),
        "bootstrap_B": scale * jnp.sin(jnp.arange(n_rows) + 1.0),
        "step": jnp.int32(3),
    }


def spoilt(quantities, junk):
    """Junk wherever the contract says that values are arbitrary."""
    mask_BT = quantities["mask_BT"]
    there_B = mask_BT.any(1)
    used_B = {
        "bootstrap_B": there_B & ~quantities["ended_B"],
        "reward_B": there_B,
        "relative_reward_B": there_B,
    }
    found = dict(quantities)
    for name, x in quantities.items():
        if name == "mask_BT" or name in ("group_B", "ended_B", "step"):
            continue
        used = used_B[name] if name.endswith("_B") else mask_BT
        if x.dtype == bool:
            found[name] = jnp.where(used, x, True)
        elif x.dtype == jnp.int32:
            found[name] = jnp.where(used, x, -7)
        else:
            found[name] = jnp.where(used, x, junk)
    return found


def widen(x, value=0):
    """Two columns before and three after."""
    return jnp.pad(x, ((0, 0), (2, 3)), constant_values=value)


OF_ROWS = pytest.mark.parametrize(
    "entry", entries(ADVANTAGES, CREDITS, BASELINES, GATES, IMPORTANCE, REJECTIONS)
)


@OF_ROWS
def test_entries_over_rows_are_zero_off_the_mask_and_read_nothing_there(entry):
    quantities = of_rows(RAGGED_BT)
    want_BT = fed(entry, quantities)
    dtype = bool if want_BT.dtype == bool else jnp.float32
    assert (want_BT.shape, want_BT.dtype) == (RAGGED_BT.shape, dtype)
    assert np.isfinite(want_BT).all()
    assert not np.asarray(want_BT)[~RAGGED_BT].any()
    for junk in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
        np.testing.assert_array_equal(fed(entry, spoilt(quantities, junk)), want_BT)


@OF_ROWS
def test_entries_over_rows_do_not_see_padding_or_the_order_of_rows(entry):
    quantities = of_rows(RAGGED_BT)
    want_BT = fed(entry, quantities)
    for junk in (jnp.nan, 1e30):
        wide = {
            name: widen(x, junk if x.dtype == jnp.float32 else 0) if x.ndim == 2 else x
            for name, x in quantities.items()
        }
        close(fed(entry, wide), widen(want_BT), 2e-6)
    order = np.array([2, 0, 3, 1])
    shuffled = {name: x[order] if x.ndim else x for name, x in quantities.items()}
    close(fed(entry, shuffled), want_BT[order], 2e-6)


@OF_ROWS
@pytest.mark.parametrize(
    "lengths", [[0, 0, 0, 0], [1, 1, 1, 1], [5, 5, 5, 5], [0, 0, 5, 0], [1], [0], [5]]
)
def test_entries_over_rows_are_finite_for_rows_of_any_length_and_extreme_values(entry, lengths):
    mask_BT = np.arange(N_POSITIONS) < np.array(lengths)[:, None]
    for scale in (1.0, 1e-6, 40.0, 1e4):
        quantities = of_rows(mask_BT, scale=scale)
        for junk in (jnp.nan, 0.0):
            got_BT = np.asarray(fed(entry, spoilt(quantities, junk)))
            assert got_BT.shape == mask_BT.shape
            assert np.isfinite(got_BT).all()
            assert not got_BT[~mask_BT].any()


@pytest.mark.parametrize("entry", entries(GATES, IMPORTANCE))
def test_weights_are_never_negative(entry):
    for scale in (1.0, 1e4):
        assert (np.asarray(fed(entry, of_rows(RAGGED_BT, scale=scale))) >= 0).all()


@pytest.mark.parametrize("entry", entries(IMPORTANCE, REJECTIONS))
def test_rows_of_the_students_own_are_neither_weighed_nor_rejected(entry):
    quantities = of_rows(RAGGED_BT)
    got_BT = fed(entry, quantities | {"sampler_BT": quantities["student_BT"]})
    np.testing.assert_array_equal(got_BT, RAGGED_BT)


@pytest.mark.parametrize(
    "entry", entries({n: BASELINES[n] for n in ("batch_mean", "position_mean", "leave_one_out")})
)
def test_means_are_blind_to_the_row_itself(entry):
    quantities = of_rows(np.ones((4, 5), bool))
    want_BT = fed(entry, quantities)
    other = quantities | {"credit_BT": quantities["credit_BT"].at[1].add(3.0)}
    got_BT = fed(entry, other)
    close(got_BT[1], want_BT[1], 2e-6)
    assert np.abs(got_BT[0] - want_BT[0]).min() > 0.5


def moved(quantities, b, t, names=None):
    """The quantities with other numbers at [b, t]: in `names`, or in everything real."""
    return {
        name: x.at[b, t].add(0.7)
        if x.ndim == 2 and x.dtype == jnp.float32 and (names is None or name in names)
        else x
        for name, x in quantities.items()
    }


@pytest.mark.parametrize("entry", entries(BASELINES))
def test_no_baseline_depends_on_what_the_token_itself_earns(entry):
    quantities = of_rows(np.ones((4, 5), bool))
    want_BT = fed(entry, quantities)
    got_BT = fed(entry, moved(quantities, 1, 2, {"credit_BT", "token_reward_BT"}))
    close(got_BT[1, 2], want_BT[1, 2], 2e-6)


@pytest.mark.parametrize("entry", entries(CREDITS))
def test_credit_is_of_the_tokens_own_reward_and_of_later_ones(entry):
    quantities = of_rows(np.ones((4, 5), bool))
    want_BT = fed(entry, quantities)
    change_BT = fed(entry, moved(quantities, 1, 2, {"token_reward_BT"})) - want_BT
    close(change_BT[1, 3:], 0, 2e-6)
    close(change_BT[1, 2], 0.7, 2e-6)
    assert (np.asarray(change_BT[1, :2]) >= -2e-6).all()


@pytest.mark.parametrize("entry", entries(ADVANTAGES, GATES))
def test_a_tokens_reward_and_gate_do_not_read_what_comes_later(entry):
    quantities = of_rows(np.ones((4, 5), bool))
    want_BT = fed(entry, quantities)
    for t in range(1, 5):
        np.testing.assert_array_equal(fed(entry, moved(quantities, 1, t))[:, :t], want_BT[:, :t])


@OF_ROWS
def test_an_entry_that_compares_rows_asks_for_the_whole_batch(entry):
    if {"group_B", "credit_BT"} & {*inspect.signature(entry).parameters}:
        return  # `Objective.prescored`
    quantities, rows = of_rows(RAGGED_BT), slice(1, 3)
    some = {name: x[rows] if x.ndim else x for name, x in quantities.items()}
    close(fed(entry, some), fed(entry, quantities)[rows], 2e-6)


@pytest.mark.parametrize("entry", entries(REDUCTIONS))
def test_every_reduction_is_zero_off_the_mask_and_blind_to_padding(entry):
    mask_BT = jnp.array(RAGGED_BT)
    want_BT = entry(mask_BT)
    assert (want_BT.shape, want_BT.dtype) == (mask_BT.shape, jnp.float32)
    assert (np.asarray(want_BT)[RAGGED_BT] > 0).all()
    assert not np.asarray(want_BT)[~RAGGED_BT].any()
    np.testing.assert_array_equal(entry(widen(mask_BT)), widen(want_BT))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(entry(mask_BT[order]), want_BT[order])
    nothing_BT = entry(jnp.zeros_like(mask_BT))
    assert not np.asarray(nothing_BT).any()  # no row has a token: 0, not NaN


# --- baselines


def test_group_relative_is_numpys():
    draw = np.random.default_rng(0)
    group_B = draw.permutation([0] * 4 + [3] * 3 + [2] * 2 + [11] + [5] * 2).astype(np.int32)
    reward_B = draw.normal(size=12).astype(np.float32)
    reward_B[group_B == 5] = 0.25
    want_B = np.zeros(12)
    for group in np.unique(group_B):
        rows = group_B == group
        r = reward_B[rows].astype(np.float64)
        want_B[rows] = (r - r.mean()) / (r.std() + 1e-4)
    got_B = group_relative(jnp.array(reward_B), jnp.array(group_B))
    close(got_B, want_B, 1e-5)
    assert not np.asarray(got_B)[(group_B == 11) | (group_B == 5)].any()
    order = draw.permutation(12)
    close(group_relative(reward_B[order], group_B[order]), want_B[order], 1e-5)


# --- reductions


@pytest.mark.parametrize(
    ("text", "weight_B"),
    [
        ("token_mean", [1 / 9, 0, 1 / 9, 1 / 9]),
        ("sequence_mean", [1 / 15, 0, 1 / 3, 1 / 9]),
        ("sequence_sum(length=5)", [1 / 20, 0, 1 / 20, 1 / 20]),
    ],
)
def test_reductions_weigh_tokens_as_they_say(text, weight_B):
    got_BT = resolve(text, REDUCTIONS)(jnp.array(RAGGED_BT))
    close(got_BT, RAGGED_BT * np.array(weight_B)[:, None])


def test_means_weigh_one_in_all():
    for name in ("token_mean", "sequence_mean"):
        close(REDUCTIONS[name](jnp.array(RAGGED_BT)).sum(), 1)


# --- diagnostics


def seen_of_a_step(**settings):
    """(diagnostics of a batch of noise, that batch as NumPy's, the mask, task_B)."""
    mask_BT, task_B = RAGGED_BT, np.array([0, 2, 2, 0])
    quantities = of_rows(mask_BT) | {"eos_probability_BT": jnp.exp(noise(9, mask_BT.shape))}
    rollout = Rollout(
        tokens_BL=None,
        valid_BL=None,
        mask_BT=jnp.array(mask_BT),
        logp_BT=None,
        ended_B=jnp.array([True, True, False, False]),
        group_B=None,
        task_B=jnp.array(task_B),
        n_prompt=1,
    )
    found = diagnostics(
        rollout, quantities, objective=build(**settings), n_tasks=3, lam=settings.get("lam", 1.0)
    )
    return found, {k: np.asarray(x) for k, x in quantities.items()}, mask_BT, task_B


def means(found):
    return {k: np.asarray(m.total) / np.asarray(m.count) for k, m in found.items()}


def test_diagnostics_are_numpys_means_over_the_mask():
    found, q, mask_BT, task_B = seen_of_a_step(
        lam=1.25, ratio_cap=1.0, log_u_clip=0.8, advantage_clip=1.5
    )
    by_task = found.pop("kl_teacher_task")
    got, on = means(found), {k: x[mask_BT] for k, x in q.items() if k.endswith("_BT")}
    a, gap = on["advantage_BT"], on["student_BT"] - on["teacher_BT"]
    ratio = np.abs(on["teacher_BT"] - on["ref_BT"])
    w = np.exp(on["student_BT"] - on["sampler_BT"])
    touched = (np.abs(on["log_u_BT"]) > 0.8) | (ratio > 1.0) | (np.abs(a) >= 1.5)
    want = {
        "advantage_mean": a.mean(),
        "advantage_negative": (a < 0).mean(),
        "advantage_absmax": np.abs(a).max(),
        "advantage_snr": np.abs(a.mean()) / a.std(),
        "advantage_clipped": touched.mean(),
        "entropy": on["entropy_BT"].mean(),
        "eos_probability": on["eos_probability_BT"].mean(),
        "length": 9 / 4,
        "length_p95": np.quantile([5, 0, 1, 3], 0.95),
        "truncated": 0.5,
        "tokens": 9,
        "kl_teacher": gap.mean(),
        "kl_ref": (on["student_BT"] - on["ref_BT"]).mean(),
        "extrapolation_p99": np.quantile(ratio, 0.99),
        "lam": 1.25,
        "log_ess": np.log(w.sum() ** 2 / (len(w) * (w**2).sum())),
        "sampler_kl": -np.log(w).mean(),
        "sampler_k3": (w - 1 - np.log(w)).mean(),
        "sampler_chi2": ((w - 1) ** 2).mean(),
    }
    for name in ("p01", "p10", "p50", "p90", "p99"):
        share = int(name[1:]) / 100
        want[f"token_reward_{name}"] = np.quantile(on["token_reward_BT"], share)
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=key)
    np.testing.assert_array_equal(by_task.count, [8, 0, 1])
    gap_BT = np.where(mask_BT, q["student_BT"] - q["teacher_BT"], 0.0)
    sums = [gap_BT[task_B == i].sum() for i in range(3)]
    np.testing.assert_allclose(by_task.total, sums, rtol=1e-5)


def test_what_a_cap_reaches_and_what_is_rejected_are_shares_of_tokens():
    # A gate's zeros are no rejections, and a row's weight is capped as one.
    found, q, mask_BT, _ = seen_of_a_step(
        importance="sequence(cap=1.5)", rejection="token(cap=2.0)", veto=-3.0, gates=("first(n=1)",)
    )
    log_w_BT = np.where(mask_BT, q["student_BT"] - q["sampler_BT"], 0.0)
    keep_BT = (np.abs(log_w_BT) <= np.log(2.0)) & (log_w_BT >= -3.0).all(1, keepdims=True)
    capped_B1 = log_w_BT.sum(1, keepdims=True) >= np.log(1.5)
    got, shape = means(found), mask_BT.shape
    assert 0 < got["rejected"] < 1
    assert 0 < got["importance_capped"] < 1
    np.testing.assert_allclose(got["rejected"], (~keep_BT)[mask_BT].mean(), rtol=1e-6)
    capped = np.broadcast_to(capped_B1, shape)[mask_BT].mean()
    np.testing.assert_allclose(got["importance_capped"], capped, rtol=1e-6)
