"""Vocabulary diagnostics against NumPy in float64."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives.inspection import (
    actionability,
    auroc,
    cosine,
    inspect,
    overlap,
    repetition,
    tail_mass,
)
from gopd_jax.objectives.routing import candidates, route

N_VOCAB, N_REAL = 13, 10
REAL_V = np.arange(N_VOCAB) < N_REAL
SHAPE = (3, 4)


def distribution(seed):
    logits = 2.0 * jax.random.normal(jax.random.key(seed), (*SHAPE, N_VOCAB))
    return jax.nn.log_softmax(jnp.where(REAL_V, logits, -jnp.inf))


S_XV, T_XV, TEACHER_XV, REF_XV = map(distribution, range(4))
IDS_X = jax.random.randint(jax.random.key(5), SHAPE, 0, N_REAL)
ADVANTAGE_X = jnp.take_along_axis(T_XV - S_XV, IDS_X[..., None], -1)[..., 0]


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def probabilities(*logp_XV):
    """Over the ids that exist, float64."""
    return [np.exp(np.asarray(x, np.float64))[..., :N_REAL] for x in logp_XV]


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def everything(**changes):
    options = {"teacher_xV": TEACHER_XV, "ref_xV": REF_XV, "k": 4} | changes
    static = {name: options.pop(name) for name in ("k", "routing") if name in options}
    of = jax.jit(functools.partial(inspect, **static))
    return of(S_XV, T_XV, REAL_V, IDS_X, ADVANTAGE_X, **options)


def test_divergences_and_entropies_are_numpys():
    s, *others = probabilities(S_XV, T_XV, TEACHER_XV, REF_XV)
    found = everything()
    for name, p in zip(("target", "teacher", "ref"), others):
        close(found[f"kl_{name}"], kl(s, p), 1e-5)
        close(found[f"kl_{name}_forward"], kl(p, s), 1e-5)
    for name, p in zip(("entropy", "entropy_target", "entropy_teacher"), (s, *others)):
        close(found[name], -(p * np.log(p)).sum(-1), 1e-5)


@pytest.mark.parametrize("k", [1, 4, N_REAL, N_VOCAB, 100])
def test_overlap_and_tail_are_numpys(k):
    s, t = probabilities(S_XV, T_XV)
    shared, tail = (jax.jit(functools.partial(f, k=k)) for f in (overlap, tail_mass))
    got = *shared(S_XV, T_XV, REAL_V), tail(S_XV, T_XV, REAL_V)
    for at in np.ndindex(*SHAPE):
        top_s, top_t = (set(np.argsort(-p[at])[:k].tolist()) for p in (s, t))
        both = sorted(top_s & top_t)
        tail = s[at].sum() - s[at][sorted(top_t)].sum()
        close([x[at] for x in got], [len(both) / min(k, N_REAL), s[at][both].sum(), tail])


def test_the_tail_keeps_its_digits_where_it_is_small():
    student_V = jax.nn.log_softmax(jnp.array([30.0, 0, 1]))
    target_V = jax.nn.log_softmax(jnp.array([2.0, 1, 0]))
    got = tail_mass(student_V, target_V, jnp.ones(3, bool), k=2)
    np.testing.assert_allclose(got, np.exp(1.0 - 30), rtol=1e-5)


@pytest.mark.parametrize("choice", [{}, {"teacher_k": 3, "student_k": 5}, {"margin": 0.5}])
def test_actionability_is_the_candidates_share_of_the_total_variation(choice):
    s, t = probabilities(S_XV, T_XV)
    candidate_XV = np.asarray(candidates(IDS_X, S_XV, T_XV, REAL_V, **choice))[..., :N_REAL]
    want_X = (candidate_XV * np.maximum(t - s, 0)).sum(-1) / (np.abs(t - s).sum(-1) / 2)
    got_X = actionability(IDS_X, S_XV, T_XV, REAL_V, **choice)
    close(got_X, want_X)
    assert 0 < got_X.mean() < 1
    close(everything(routing=choice)["actionability"], want_X)


def test_models_that_agree_leave_nothing_to_act_on():
    assert not np.asarray(actionability(IDS_X, S_XV, S_XV, REAL_V)).any()


def test_the_routable_share_is_that_of_the_negatives_which_the_route_takes():
    options = {"threshold": 0.2, "teacher_mass": 0.6, "teacher_k": 2, "fallback": 0.5, "clip": 2.0}
    found = everything(routing=options)
    weightless = {n: v for n, v in options.items() if n not in ("fallback", "clip")}
    gate_X, _ = route(IDS_X, ADVANTAGE_X, S_XV, T_XV, REAL_V, **weightless)
    close(found["routable"], gate_X)
    close(found["negative"], np.asarray(ADVANTAGE_X) < -0.2)
    assert 0 < found["routable"].sum() < found["negative"].sum() < gate_X.size


def test_what_is_asked_of_a_model_that_is_not_there_is_left_out():
    full, bare = everything(), everything(teacher_xV=None, ref_xV=None)
    gone = {"kl_teacher", "kl_teacher_forward", "entropy_teacher", "kl_ref", "kl_ref_forward"}
    assert full.keys() - bare.keys() == gone
    assert all(x.shape == SHAPE and x.dtype == jnp.float32 for x in full.values())


def test_every_diagnostic_is_finite_for_extreme_distributions_and_position_local():
    sharp_XV = jnp.where(REAL_V, jnp.clip(1e4 * S_XV, -1e4, 0), -jnp.inf)
    # Sure of another id: the last real one comes first.
    other_V = np.r_[N_REAL - 1, : N_REAL - 1, N_REAL:N_VOCAB]
    flipped_XV = sharp_XV[..., other_V]
    found = inspect(sharp_XV, flipped_XV, REAL_V, IDS_X, ADVANTAGE_X, S_XV, flipped_XV)
    assert all(np.isfinite(x).all() for x in found.values())
    turned = [x[::-1, ::-1] for x in (S_XV, T_XV)]
    got = inspect(*turned, REAL_V, IDS_X[::-1, ::-1], ADVANTAGE_X[::-1, ::-1])
    want = inspect(S_XV, T_XV, REAL_V, IDS_X, ADVANTAGE_X)
    for name in want:
        np.testing.assert_array_equal(got[name][::-1, ::-1], want[name], err_msg=name)


# --- gradients


def test_cosine_is_numpys_over_all_leaves():
    keys = jax.random.split(jax.random.key(0), 4)
    a = {"w": jax.random.normal(keys[0], (3, 4)), "b": jax.random.normal(keys[1], (2,))}
    b = {"w": jax.random.normal(keys[2], (3, 4)), "b": jax.random.normal(keys[3], (2,))}
    x, y = (np.concatenate([np.ravel(g["w"]), g["b"]]).astype(np.float64) for g in (a, b))
    want = x @ y / np.sqrt((x @ x) * (y @ y))
    compiled = jax.jit(cosine)
    close(compiled(a, b), want)
    for scale in (1e-25, -1e25):  # whose squares float32 does not hold
        close(compiled(a, jax.tree.map(lambda g: g * scale, b)), np.sign(scale) * want)  # noqa: B023
    assert np.isnan(compiled(a, jax.tree.map(jnp.zeros_like, b)))


# --- repetition


def counted(ids_BT, mask_BT, n):
    """By a set of what occurred before."""
    shares = []
    for ids, mask in zip(ids_BT, mask_BT):
        spans = [range(i, i + n) for i in range(len(ids) - n + 1)]
        grams = [tuple(int(ids[j]) for j in span) for span in spans if mask[list(span)].all()]
        shares.append(sum(c - 1 for c in collections.Counter(grams).values()) / max(len(grams), 1))
    return np.array(shares)


@pytest.mark.parametrize("n", [1, 2, 4, 9])
def test_repetition_is_the_share_of_ngrams_seen_before(n):
    draw = np.random.default_rng(0)
    ids_BT = draw.integers(0, 3, (6, 40))
    ids_BT[0] = 7
    start_B, length_B = np.array([0, 3, 0, 5, 0, 2]), np.array([40, 30, 0, 3, 11, 38])
    at_T = np.arange(40)
    mask_BT = (at_T >= start_B[:, None]) & (at_T < (start_B + length_B)[:, None])
    mask_BT[5, 20] = False  # no n-gram reaches over it
    want_B = counted(ids_BT, mask_BT, n)
    assert want_B[0] == (40 - n) / (41 - n)
    got_B = jax.jit(repetition, static_argnames="n")(ids_BT, mask_BT, n=n)
    close(got_B, want_B)
    other_BT = np.where(mask_BT, ids_BT, draw.integers(0, 9, (6, 40)))
    close(jax.jit(repetition, static_argnames="n")(other_BT, mask_BT, n=n), want_B)


def test_rows_shorter_than_an_ngram_repeat_nothing():
    assert repetition(jnp.ones((2, 3), int), jnp.ones((2, 3), bool), n=4).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"n = 0: an n-gram has at least one token"):
        repetition(jnp.ones((2, 3), int), jnp.ones((2, 3), bool), n=0)


# --- AUROC


@pytest.mark.parametrize("scores", ["distinct", "ties", "infinite"])
def test_auroc_counts_the_pairs_in_order_and_half_of_the_ties(scores):
    draw = np.random.default_rng(1)
    for n in (2, 5, 50):
        label_B = draw.permutation(np.arange(n) % 3 == 0)
        score_B = draw.normal(size=n) + label_B
        if scores != "distinct":
            score_B = score_B.round()
        if scores == "infinite":
            score_B[draw.random(n) < 0.3] = np.inf
            score_B[draw.random(n) < 0.3] = -np.inf
        score_B = score_B.astype(np.float32)
        t, f = score_B[label_B][:, None], score_B[~label_B][None]
        got = jax.jit(auroc)(jnp.array(score_B), jnp.array(label_B))
        close(got, ((t > f) + 0.5 * (t == f)).mean())


@pytest.mark.parametrize("label", [True, False])
def test_auroc_of_one_class_is_no_number(label):
    assert np.isnan(auroc(jnp.arange(4.0), jnp.full(4, label)))
