"""Types that travel: exact means, and what is a leaf and what is static."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gopd_jax.types import Mean, Prompts, Record, Rollout, Scores


def test_a_mean_counts_what_the_mask_selects_and_nothing_else():
    values_BT = jnp.array([[1.0, 2.0, jnp.nan], [4.0, jnp.inf, jnp.nan]])
    mask_BT = jnp.array([[True, True, False], [True, False, False]])
    mean = Mean.of(values_BT, mask_BT)
    assert (float(mean.total), float(mean.count)) == (7.0, 3.0)
    assert mean.total.dtype == mean.count.dtype == jnp.float32
    assert math.isclose(mean.value(), 7 / 3, rel_tol=1e-6)


def test_a_mean_without_a_mask_is_over_everything():
    mean = Mean.of(jnp.array([[True, False], [True, True]]))
    assert mean.value() == 0.75
    assert float(Mean.of(3).count) == 1


def test_an_empty_mean_is_not_a_number():
    assert math.isnan(Mean.of(jnp.ones(3), jnp.zeros(3, bool)).value())


def test_means_of_pieces_add_up_to_the_mean_of_the_whole():
    draw = np.random.default_rng(0)
    values_BT, mask_BT = draw.normal(size=(12, 5)), draw.random((12, 5)) < 0.4
    pieces = [
        Mean.of(values_BT[rows], jnp.array(mask_BT[rows])) for rows in (slice(0, 2), slice(2, 12))
    ]
    whole = jax.tree.map(lambda *parts: sum(parts), *pieces)
    np.testing.assert_allclose(whole.value(), values_BT[mask_BT].mean(), rtol=1e-5)


def test_a_rollout_is_a_tree_of_arrays_by_rows_with_a_static_prompt_width():
    rows = {f"{n}_B": jnp.arange(4) for n in ("ended", "group", "task")}
    grid = {n: jnp.zeros((4, 3)) for n in ("valid_BL", "mask_BT", "logp_BT")}
    rollout = Rollout(tokens_BL=jnp.zeros((4, 3)), n_prompt=2, **grid, **rows)
    assert len(jax.tree.leaves(rollout)) == 7
    half = jax.tree.map(lambda x: x[2:], rollout)
    assert (half.n_prompt, half.task_B.tolist()) == (2, [2, 3])
    widths = []
    jax.jit(lambda r: widths.append(r.n_prompt) or r.task_B)(rollout)
    assert widths == [2]


def test_what_an_objective_has_no_use_for_is_no_leaf():
    assert jax.tree.leaves(Scores()) == []
    scores = Scores(reward_B=jnp.ones(2))
    doubled = jax.tree.map(lambda x: 2 * x, scores)
    assert (doubled.teacher_BT, doubled.reward_B.tolist()) == (None, [2.0, 2.0])


def test_records_stay_with_their_prompts_and_are_no_leaves():
    record = Record(
        messages=({"role": "user", "content": "1+1"},),
        task="math",
        answer="2",
        verifier="math",
        source="a.jsonl:1",
    )
    arrays = {n: np.zeros((1, 2)) for n in ("tokens_BP", "valid_BP", "task_B", "group_B", "row_B")}
    prompts = Prompts(**arrays, records=(record,))
    assert len(jax.tree.leaves(prompts)) == 5
    assert jax.tree.map(jnp.asarray, prompts).records == (record,)
    assert prompts.replace(completion_BC=1, completion_mask_BC=1).completion_BC == 1
