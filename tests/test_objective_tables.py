"""Every entry of the objectives' tables: contracts, NumPy, and how they are put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives import objective
from gopd_jax.objectives.advantages import ADVANTAGES, gopd
from gopd_jax.objectives.baselines import group_relative
from gopd_jax.objectives.diagnostics import diagnostics
from gopd_jax.objectives.losses import LOSSES
from gopd_jax.objectives.reductions import REDUCTIONS
from gopd_jax.spec import resolve
from gopd_jax.types import Rollout, Scores

RAGGED_BT = np.arange(5) < np.array([5, 0, 1, 3])[:, None]

# Contracts of every entry; one with options that have no default is listed here with them.
WITH_OPTIONS = {"sequence_sum": "sequence_sum(length=7)"}


def entries(table):
    return [pytest.param(resolve(WITH_OPTIONS.get(n, n), table), id=n) for n in table]


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def noise(seed, shape):
    return -2 * jnp.abs(jax.random.normal(jax.random.key(seed), shape))


def random_scores(shape=RAGGED_BT.shape):
    names = ("student_BT", "teacher_BT", "ref_BT")
    return Scores(
        **{name: noise(i, shape) for i, name in enumerate(names)},
        reward_B=jnp.array([1.0, -1.0, 0.5, 0.25]),
    )


def widen(x, value=0):
    """Two columns before and three after."""
    return jnp.pad(x, ((0, 0), (2, 3)), constant_values=value)


def on_rows(scores, function):
    """Scores with a function applied to their [B, T] entries."""
    return scores.replace(
        **{
            f"{name}_BT": function(getattr(scores, f"{name}_BT"))
            for name in ("student", "teacher", "ref")
        }
    )


@pytest.mark.parametrize("advantage", entries(ADVANTAGES))
def test_every_advantage_is_finite_on_the_mask_zero_off_it_and_blind_to_padding(advantage):
    mask_BT, scores = jnp.array(RAGGED_BT), random_scores()
    want_BT = advantage(scores, mask_BT)
    assert (want_BT.shape, want_BT.dtype) == (mask_BT.shape, jnp.float32)
    assert np.isfinite(want_BT).all()
    assert not np.asarray(want_BT)[~RAGGED_BT].any()
    assert np.asarray(want_BT)[RAGGED_BT].all()
    for junk in (jnp.nan, jnp.inf, -jnp.inf):
        spoilt = on_rows(scores, lambda x, j=junk: jnp.where(mask_BT, x, j))
        np.testing.assert_array_equal(advantage(spoilt, mask_BT), want_BT)
        wide = on_rows(spoilt, lambda x, j=junk: widen(x, j))
        np.testing.assert_array_equal(advantage(wide, widen(mask_BT)), widen(want_BT))
    order = np.array([2, 0, 3, 1])
    shuffled = jax.tree.map(lambda x: x[order], scores)
    np.testing.assert_array_equal(advantage(shuffled, mask_BT[order]), want_BT[order])


@pytest.mark.parametrize("loss", entries(LOSSES))
def test_every_loss_is_per_token_finite_and_pushes_along_the_advantage(loss):
    mask_BT = jnp.array(RAGGED_BT)
    logp_BT = jnp.where(mask_BT, noise(5, mask_BT.shape), 0.0)
    advantage_BT = jnp.where(mask_BT, jax.random.normal(jax.random.key(6), mask_BT.shape), 0.0)
    loss_BT = loss(logp_BT, advantage_BT)
    assert (loss_BT.shape, loss_BT.dtype) == (mask_BT.shape, jnp.float32)
    assert np.isfinite(loss_BT).all()
    assert not np.asarray(loss_BT)[~RAGGED_BT].any()
    np.testing.assert_array_equal(loss(widen(logp_BT), widen(advantage_BT)), widen(loss_BT))
    grad_BT = jax.grad(lambda x: loss(x, advantage_BT).sum())(logp_BT)
    # At the policy that sampled, descending any policy loss ascends A log S.
    close(grad_BT, -advantage_BT)


@pytest.mark.parametrize("reduction", entries(REDUCTIONS))
def test_every_reduction_is_zero_off_the_mask_and_blind_to_padding(reduction):
    mask_BT = jnp.array(RAGGED_BT)
    want_BT = reduction(mask_BT)
    assert (want_BT.shape, want_BT.dtype) == (mask_BT.shape, jnp.float32)
    assert (np.asarray(want_BT)[RAGGED_BT] > 0).all()
    assert not np.asarray(want_BT)[~RAGGED_BT].any()
    np.testing.assert_array_equal(reduction(widen(mask_BT)), widen(want_BT))
    order = np.array([2, 0, 3, 1])
    np.testing.assert_array_equal(reduction(mask_BT[order]), want_BT[order])
    nothing_BT = reduction(jnp.zeros_like(mask_BT))
    assert not np.asarray(nothing_BT).any()  # no row has a token: 0, not NaN


# --- the objective


def build(**changes):
    options = {"advantage": "gopd", "lam": 1.0, "loss": "policy_gradient"}
    return objective.build(**(options | {"reduction": "token_mean"} | changes))


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_advantage_can_be_built_and_named(advantage):
    made = build(advantage=advantage)
    assert hash(made) is not None
    assert made.formula.endswith("loss = policy_gradient, reduced by token_mean")
    if made.advantage is not ADVANTAGES[advantage]:
        assert made.advantage.func is ADVANTAGES[advantage]


@pytest.mark.parametrize(
    ("changes", "needs", "formula"),
    [
        ({}, (True, False, False), "A = log T - log S  (plain"),
        ({"lam": 1.25}, (True, True, False), "A = 1.25 (log T - log R) - (log S - log R)  (G-OPD"),
        ({"lam": 0.0}, (True, True, False), "A = 0 (log T - log R) - (log S - log R)"),
        ({"advantage": "grpo", "lam": 2.0}, (False, False, True), "A = (reward - group mean)"),
        ({"advantage": "imitation"}, (False, False, False), "A = 1  (maximum"),
    ],
)
def test_an_objective_says_what_it_needs_and_what_it_is(changes, needs, formula):
    made = build(**changes)
    assert (made.teacher, made.reference, made.reward) == needs
    assert made.formula.startswith(formula)
    assert (made.baseline is group_relative) == made.reward


def test_lambda_reaches_the_advantage():
    scores, mask_BT = random_scores(), jnp.array(RAGGED_BT)
    got_BT = build(lam=1.5).advantage(scores, mask_BT)
    np.testing.assert_array_equal(got_BT, gopd(scores, mask_BT, lam=1.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "godp"}, r"there is no 'godp'; there are \['gopd', 'grpo', 'imitation'\]"),
        ({"advantage": "grpo(lam=1)"}, r"grpo has no \['lam'\]; it has \[\]"),
        ({"loss": "ppo"}, r"there is no 'ppo'; there are \['policy_gradient'\]"),
        ({"reduction": "mean"}, r"there is no 'mean'; there are \['sequence_mean', 'seq.*token"),
        ({"reduction": "sequence_sum(len=3)"}, r"sequence_sum has no \['len'\]; .* \['length'\]"),
    ],
)
def test_what_cannot_be_built_is_told_in_the_same_words_before(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)
    texts = {"advantage": "gopd", "loss": "policy_gradient", "reduction": "token_mean"} | changes
    (found,) = objective.objective_problems(**texts)
    (key,) = changes
    assert found.startswith(f"objective.{key}: ")


def test_all_problems_are_told_at_once():
    found = objective.objective_problems("gopd(lam=2.0)", "ppo", "mean()")
    assert len(found) == 3
    assert found[-1] == "objective.advantage: gopd takes its lambda from objective.lam"
    assert objective.objective_problems("gopd", "policy_gradient", "sequence_sum(length=4)") == []


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


def test_diagnostics_are_numpys_means_over_the_mask():
    mask_BT = RAGGED_BT
    scores = random_scores()
    task_B = np.array([0, 2, 2, 0])
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
    entropy_BT, advantage_BT = noise(7, mask_BT.shape), jax.random.normal(jax.random.key(8), (4, 5))
    found = diagnostics(rollout, scores, entropy_BT, advantage_BT, n_tasks=3)
    got = {
        k: np.asarray(m.total) / np.asarray(m.count) for k, m in found.items() if "task" not in k
    }
    a = np.asarray(advantage_BT)[mask_BT]
    gap_BT = np.asarray(scores.student_BT - scores.teacher_BT)
    want = {
        "advantage_mean": a.mean(),
        "advantage_negative": (a < 0).mean(),
        "advantage_absmax": np.abs(a).max(),
        "entropy": np.asarray(entropy_BT)[mask_BT].mean(),
        "length": 9 / 4,
        "length_p95": np.quantile([5, 0, 1, 3], 0.95),
        "truncated": 0.5,
        "tokens": 9,
        "kl_teacher": gap_BT[mask_BT].mean(),
        "kl_ref": np.asarray(scores.student_BT - scores.ref_BT)[mask_BT].mean(),
    }
    assert got.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, err_msg=key)
    by_task = found["kl_teacher_task"]
    np.testing.assert_array_equal(by_task.count, [8, 0, 1])
    sums = [gap_BT[task_B == i][mask_BT[task_B == i]].sum() for i in range(3)]
    np.testing.assert_allclose(by_task.total, sums, rtol=1e-5)
    without = diagnostics(rollout, Scores(), entropy_BT, advantage_BT, n_tasks=3)
    assert not {"kl_teacher", "kl_teacher_task", "kl_ref"} & without.keys()
