"""The figures of the probe against NumPy in float64, from all logits of every model at once."""

import functools

import full_logits as full
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import diagnose, sharding, step
from gopd_jax.recipe import init_state
from gopd_jax.types import Rollout

LAM, CAP, TOP_K = 1.25, 3.0, 5
OPTIONS = {"lam": LAM, "ratio_cap": CAP}
LOOP_ROW = 0  # writes one token all the time
REWARD_B = np.array([1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0])


def rows_of(order=None) -> Rollout:
    """Some of the sixteen rows, one of which repeats itself."""
    made = full.rollout()
    at_C = np.arange(made.tokens_BL.shape[1]) >= full.WIDTH
    loops_BL = (np.arange(full.N_ROWS) == LOOP_ROW)[:, None] & at_C
    made = made.replace(tokens_BL=jnp.where(loops_BL, 7, made.tokens_BL))
    order = np.arange(full.N_ROWS) if order is None else np.array(order)
    return jax.tree.map(lambda x: x[order], made)


def probing(setting, options, n_rows=full.N_ROWS, rollouts=2, top_k=TOP_K):
    return diagnose.probing(
        setting.recipe, n_rows=n_rows, rollouts=rollouts, top_k=top_k, options=options
    )


def looked(options, rows=None, *, reward_B=None, shape=(1, 1, 1), at_step=0, n_rows=16, **changes):
    """{name: figure as it is read} of the probe at a step on some rows."""
    setting = full.setting(shape, options=options, **changes)
    state = init_state(setting.recipe, setting.params).replace(step=jnp.int32(at_step))
    rows = setting.laid(rows_of() if rows is None else rows)
    reward_B = None if reward_B is None else setting.laid(jnp.array(reward_B, jnp.float32))
    look = probing(setting, options, n_rows).look
    found = jax.device_get(look(state, setting.frozen, rows, reward_B))
    assert all(name.startswith("probe/") for name in found)
    return {name.removeprefix("probe/"): x for name, x in full.read(found).items()}


# --- the oracle: float64, one state after another


def normalised(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.cache
def models():
    """log-probs [B, T, V] of student, own teacher and reference at the states of the rows."""
    rows = rows_of()
    return tuple(
        normalised(x)[:, :-1]
        for x in (
            full.logp_of(full.STUDENT, rows),
            full.own_teacher(rows),
            full.logp_of(full.REFERENCE, rows),
        )
    )


def tilted(lam, cap):
    """log T_lam [B, T, V]; lam: a number or one a row."""
    _, teacher, ref = models()
    gap = np.clip(teacher - ref, -cap, cap) if cap else teacher - ref
    return normalised(teacher + (np.reshape(lam, (-1, 1, 1)) - 1) * gap)


def kl(log_p, log_q):
    return (np.exp(log_p) * (log_p - log_q)).sum()


def top(logp, k):
    return set(np.argsort(-logp, kind="stable")[:k].tolist())


def candidates(y, s, t, of_teacher=16, margin=0.0):
    """Among the target's likeliest and the student's 16; likelier under T by the margin."""
    return [v for v in top(t, of_teacher) & top(s, 16) if v != y and t[v] > s[v] + margin]


def ngrams_seen_before(ids, n=4):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return sum(gram in grams[:i] for i, gram in enumerate(grams)) / max(len(grams), 1)


def wanted(target_BTV, order=None, k=TOP_K, threshold=0.0, **choice) -> dict[str, float]:
    """Every figure of some rows, but for gradients and verdicts."""
    rows, (student_BTV, teacher_BTV, ref_BTV) = rows_of(), models()
    states, repetition = [], []
    for b in range(full.N_ROWS) if order is None else order:
        length = int(full.LENGTH_B[b])
        ids = np.asarray(rows.tokens_BL)[b, full.WIDTH : full.WIDTH + length].tolist()
        repetition.append(ngrams_seen_before(ids))
        for i, y in enumerate(ids):
            s, t, teacher, ref = (
                x[b, full.WIDTH - 1 + i] for x in (student_BTV, target_BTV, teacher_BTV, ref_BTV)
            )
            shared = top(s, k) & top(t, k)
            gain = np.maximum(np.exp(t) - np.exp(s), 0)
            chosen = candidates(y, s, t, **choice)
            states.append(
                {
                    "kl_target": kl(s, t),
                    "kl_teacher": kl(s, teacher),
                    "kl_ref": kl(s, ref),
                    "entropy_teacher": -(np.exp(teacher) * teacher).sum(),
                    "overlap": len(shared) / k,
                    "overlap_mass": sum(np.exp(s[v]) for v in shared),
                    "tail_mass": sum(np.exp(s[v]) for v in range(full.V) if v not in top(t, k)),
                    "actionability": sum(gain[v] for v in chosen)
                    / (np.abs(np.exp(t) - np.exp(s)).sum() / 2),
                    "negative": t[y] < s[y] - threshold,
                    "routable": t[y] < s[y] - threshold and len(chosen) > 0,
                    "part": int(i / full.LENGTH * 4) + 1,
                }
            )
    columns = {name: np.array([state[name] for state in states]) for name in states[0]}
    part = columns.pop("part")
    found = {name: x.mean() for name, x in columns.items()}
    found["routable"] /= found.pop("negative")
    for i in (1, 2, 3, 4):
        for name in ("overlap", "kl_target"):
            found[f"{name}_{i}"] = columns[name][part == i].mean()
    return found | {"repetition": np.mean(repetition)}


@functools.cache
def cosine():
    """Of the policy gradient and of KL(S || T_lam) over every id, both token means."""
    rows = rows_of()
    teacher_BLV, ref_BLV = full.own_teacher(rows), full.logp_of(full.REFERENCE, rows)
    gap_BLV = (LAM - 1) * jnp.clip(teacher_BLV - ref_BLV, -CAP, CAP)
    student_BLV, target_BLV = full.logp_of(full.STUDENT, rows), teacher_BLV + gap_BLV
    # The sampled tokens' target without its normaliser, as G-OPD has it.
    advantage_BT = full.of_tokens(target_BLV - student_BLV, rows)
    target_BLV = jax.nn.log_softmax(target_BLV)

    def exact(student_BLV):
        kl_BL = (jnp.exp(student_BLV) * (student_BLV - target_BLV)).sum(-1)
        return full.token_mean(kl_BL[:, :-1], rows.mask_BT)

    both = full.gradient(full.sampled(advantage_BT, rows), rows), full.gradient(exact, rows)
    a, b = (np.concatenate([x.ravel() for x in jax.tree.leaves(g)]) for g, _ in both)
    a, b = a.astype(np.float64), b.astype(np.float64)
    return a @ b / np.sqrt(a @ a * (b @ b))


def auroc(reward_B):
    """Share of (right, wrong) pairs in which the teacher gives the right row more a token."""
    rows = rows_of()
    mask_BT, ids_BT = np.asarray(rows.mask_BT), np.asarray(rows.tokens_BL)[:, 1:]
    said_BT = np.take_along_axis(models()[1], ids_BT[..., None], -1)[..., 0]
    score_B = [row[mask].mean() if mask.any() else 0.0 for row, mask in zip(said_BT, mask_BT)]
    pairs = [
        (score_B[i] > score_B[j]) + (score_B[i] == score_B[j]) / 2
        for i in np.flatnonzero(reward_B == 1)
        for j in np.flatnonzero(reward_B == 0)
    ]
    return np.mean(pairs)


def close(got, want, rtol=2e-5):
    assert got.keys() == want.keys()
    off = {n: (got[n], x) for n, x in want.items() if not np.isclose(got[n], x, rtol, 2e-6)}
    assert not off, off


# --- its figures


@pytest.fixture(scope="module")
def plain():
    return looked(OPTIONS, reward_B=REWARD_B)


def test_every_figure_of_the_probe_is_that_of_full_logits(plain):
    want = wanted(tilted(LAM, CAP))
    want |= {"cosine": cosine(), "auroc": auroc(REWARD_B)}
    close(plain, want)
    # Of settings in which no figure is trivial.
    assert 0.1 < want["cosine"] < 0.9
    assert all(0.02 < want[n] < 0.98 for n in ("overlap", "overlap_mass", "tail_mass", "routable"))
    assert all(0.02 < want[n] < 0.98 for n in ("actionability", "auroc", "repetition"))
    assert len({round(x, 5) for x in want.values()}) == len(want)


def test_the_target_is_that_of_the_rows_own_lambda_at_the_step_and_the_divergence_the_runs():
    options = {"loss": "exact", "divergence": "jsd", "lam_by_row": True}
    options |= {"lam_schedule": "linear(steps=4)", "reduction": "sequence_mean"}
    lam_B = np.linspace(0.4, 1.9, full.N_ROWS)
    rows = rows_of().replace(lam_B=jnp.array(lam_B, jnp.float32))
    got = looked(options, rows, at_step=2)
    # Half of the way from 1; the loss is the exact one, so its gradient is the exact gradient.
    close(got, wanted(tilted(1 + (lam_B - 1) / 2, None)) | {"cosine": 1.0})


def test_what_a_run_would_route_is_told_by_the_options_of_its_own_routing():
    loss = "cr_opd(threshold=0.3, teacher_k=4, margin=0.2, clip=2.0)"
    got, target = looked(OPTIONS | {"loss": loss}), tilted(LAM, CAP)
    want = wanted(target, threshold=0.3, of_teacher=4, margin=0.2)
    close(got, want | {"cosine": got["cosine"]})


@pytest.mark.slow
@pytest.mark.parametrize(  # data, fsdp, tensor, expert, sequence
    "shape", [(2, 1, 2), (2, 1, 2, 1, 2)], ids=str
)
def test_neither_mesh_nor_chunks_change_a_figure(plain, shape):
    close(looked(OPTIONS, reward_B=REWARD_B, shape=shape, head_chunk=4), plain)


@pytest.fixture(scope="module")
def of_one_row_a_task():
    """figures(one row of each task, their lengths): of verdicts right and wrong."""

    def figures(order, length_B):
        rows = rows_of(order)
        kept_BT = np.arange(rows.mask_BT.shape[1]) < full.WIDTH - 1 + np.array(length_B)[:, None]
        kept_BL = np.pad(kept_BT, ((0, 0), (1, 0)), constant_values=True)
        rows = rows.replace(mask_BT=rows.mask_BT & kept_BT, valid_BL=rows.valid_BL & kept_BL)
        setting = full.setting(options=OPTIONS)
        state = init_state(setting.recipe, setting.params)
        return jax.device_get(look(state, setting.frozen, rows, jnp.array([1.0, 0.0])))

    look = probing(full.setting(options=OPTIONS), OPTIONS, n_rows=1, rollouts=1).look
    return figures


def test_completions_of_one_token_or_none_leave_finite_figures(of_one_row_a_task):
    found = of_one_row_a_task([3, 9], [1, 0])
    for name, x in found.items():
        assert np.isfinite(x.total), name
    # The only state is the first: what speaks of later ones has nothing to count.
    empty = {name for name, x in found.items() if x.count == 0}
    later = {f"probe/{name}_{i}" for i in (2, 3, 4) for name in ("overlap", "kl_target")}
    assert empty - {"probe/routable"} == later
    states = {"probe/kl_target", "probe/kl_teacher", "probe/overlap", "probe/overlap_1"}
    assert all(found[name].count == 1 for name in states)
    assert found["probe/repetition"].count == 2


def test_a_probe_without_any_token_counts_nothing_and_has_no_gradient_to_compare(of_one_row_a_task):
    found = of_one_row_a_task([0, 6], [0, 0])
    assert np.isnan(found.pop("probe/cosine").total)
    assert all(np.isfinite(x.total) for x in found.values())
    of_rows = {"probe/repetition", "probe/auroc"}
    assert {name for name, x in found.items() if x.count > 0} == of_rows


# --- which of them there are

ALWAYS = {
    *("kl_teacher", "kl_target", "entropy_teacher", "overlap", "overlap_mass", "tail_mass"),
    *("actionability", "routable", "repetition"),
    *(f"{name}_{i}" for i in (1, 2, 3, 4) for name in ("overlap", "kl_target")),
}


@pytest.mark.parametrize(
    ("options", "verified", "more"),
    [
        ({}, True, {"cosine", "auroc"}),
        ({"lam": 1.25}, False, {"cosine", "kl_ref"}),
        ({"task": "grpo"}, False, set()),  # its gradient needs the verdicts
        ({"task": "grpo"}, True, {"cosine", "auroc"}),
    ],
)
def test_a_figure_is_absent_where_it_makes_no_sense(options, verified, more):
    setting = full.setting(options=options)
    state = init_state(setting.recipe, setting.params)
    reward_B = jnp.array(REWARD_B, jnp.float32) if verified else None
    look = probing(setting, options).look
    found = look.trace(state, setting.frozen, rows_of(), reward_B).out_info
    assert {name.removeprefix("probe/") for name in found} == ALWAYS | more


def test_the_target_is_the_teacher_where_its_own_entropy_alone_is_asked_for():
    """Whatever lambda is: nothing is tilted by it, and the reference is not loaded."""
    gated = {"advantage": "grpo", "gates": ("teacher_entropy(at_most=3.65)",)}
    tilted = {"lam": 1.25, "lam_by_row": True, "lam_schedule": "linear(steps=4)", "ratio_cap": 1.0}
    want = looked(gated, reward_B=REWARD_B)
    assert want["kl_target"] == want["kl_teacher"]
    close(looked(gated | tilted, reward_B=REWARD_B), want)


def test_an_objective_without_a_teacher_has_nothing_to_be_held_against():
    options = {"advantage": "grpo"}
    with pytest.raises(ValueError, match="no target to compare with: the objective has no teacher"):
        probing(full.setting(options=options), options)


# --- its rows


@pytest.mark.parametrize("rollouts", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1)])
def test_rows_are_the_first_of_each_task_equally_many_in_whole_groups_and_shards(rollouts, shape):
    setting, unit = full.setting(shape, options=OPTIONS), max(rollouts, shape[0])
    n_before = 0
    for n_rows in range(1, 20):
        rows = probing(setting, OPTIONS, n_rows, rollouts).rows
        first, second = rows[rows < 6], rows[rows >= 6]
        np.testing.assert_array_equal(first, np.arange(len(first)))
        np.testing.assert_array_equal(second, 6 + np.arange(len(second)))
        if len(rows) < full.N_ROWS:
            assert len(first) == len(second) >= n_rows // 2
            assert len(first) < max(n_rows // 2, 1) + unit  # no more than it takes
        assert len(first) % unit == len(second) % unit == 0
        assert len(rows) >= n_before
        n_before = len(rows)
    assert n_before == full.N_ROWS


def test_the_probes_rows_are_those_that_the_step_samples():
    setting = full.setting(options=OPTIONS)
    recipe, key = setting.recipe, jax.random.key(3)
    state, probe = init_state(recipe, setting.params), probing(setting, OPTIONS, n_rows=8)
    assert probe.rows.tolist() == [0, 1, 2, 3, 6, 7, 8, 9]
    got = probe.sample(state, setting.frozen, full.prompts(), key)
    generate, _, _ = step.staged(recipe)
    whole = generate(state.params, setting.frozen, full.prompts(), key)
    for name in ("tokens_BL", "valid_BL", "mask_BT", "ended_B", "task_B"):
        np.testing.assert_array_equal(getattr(got, name), getattr(whole, name)[probe.rows], name)
    np.testing.assert_allclose(got.logp_BT, whole.logp_BT[probe.rows], atol=1e-5)
    # Rows of one prompt share a number below the number of rows.
    assert got.group_B.tolist() == [0, 0, 2, 2, 4, 4, 6, 6]


def test_where_the_sampler_lags_the_probe_looks_at_the_rows_of_the_step_and_not_at_the_newest():
    setting = full.setting(options=OPTIONS, lag=2)
    waiting = tuple(setting.laid(full.rollout(order=order)) for order in (None, range(15, -1, -1)))
    state = init_state(full.setting(options=OPTIONS).recipe, setting.params)
    state, probe = state.replace(pending=waiting), probing(setting, OPTIONS, n_rows=8)
    got = probe.sample(state, setting.frozen, full.prompts(), jax.random.key(3))
    for name in ("tokens_BL", "mask_BT", "logp_BT", "task_B"):
        np.testing.assert_array_equal(
            getattr(got, name), getattr(waiting[0], name)[probe.rows], name
        )
    assert sharding.by_rows(setting.recipe.mesh).is_equivalent_to(got.tokens_BL.sharding, 2)


def test_the_probe_of_a_step_that_sorts_its_rows_asks_each_rows_own_teacher():
    """Its exact figures are over the vocabulary of both tasks' teachers: sorted, they would mix."""
    want, got = looked(OPTIONS), looked(OPTIONS, buckets=3)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=2e-5, err_msg=name)
