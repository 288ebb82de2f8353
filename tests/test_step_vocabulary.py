"""Losses over the vocabulary in the step, chunk by chunk, against full logits and written out."""

import dataclasses
import functools
import math

import full_logits as full
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step_program import shapes_in, walk

from gopd_jax.recipe import init_state

MASK_BT = full.rollout().mask_BT
IDS_BT = full.rollout().tokens_BL[:, 1:]


def kl(log_p, log_q):
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def jsd(log_s, log_t, beta=0.5):
    log_m = jnp.log(beta * jnp.exp(log_t) + (1 - beta) * jnp.exp(log_s))
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def likeliest(logp, k):
    """Ids [.., k] of the largest."""
    return jnp.argsort(-jax.lax.stop_gradient(logp), axis=-1, stable=True)[..., :k]


def bucketed(ids, *logps):
    """Each distribution on the ids, and the rest of it as one more outcome."""
    for logp in logps:
        inside = jnp.take_along_axis(logp, ids, -1)
        chosen = (ids[..., None] == jnp.arange(full.V)).any(-2)
        outside = jnp.log(jnp.where(chosen, 0.0, jnp.exp(logp)).sum(-1))
        yield jnp.concatenate([inside, outside[..., None]], -1)


def entropy(logp):
    return -(jnp.exp(logp) * logp).sum(-1)


def picked(logp):
    return jnp.take_along_axis(logp, IDS_BT[..., None], -1)[..., 0]


def routed(s, t, k=8):
    """-|A| (sum rho log S - log S(y)) of negatives, rho ~ T S (T / S) over candidates."""
    advantage = jax.lax.stop_gradient(picked(t) - picked(s))
    wanted = (t > s) & (jnp.arange(full.V) != IDS_BT[..., None])
    for logp in (s, t):
        wanted &= (likeliest(logp, k)[..., None] == jnp.arange(full.V)).any(-2)
    rho = jnp.where(wanted, jnp.exp(2 * t), 0.0)
    some = wanted.any(-1)
    rho = jax.lax.stop_gradient(rho / jnp.where(some, rho.sum(-1), 1.0)[..., None])
    plain = -advantage * picked(s)
    freed = jnp.abs(advantage) * (picked(s) - (rho * s).sum(-1))
    return jnp.where((advantage < 0) & some, freed, plain)


def gated(s, t):
    g = jax.lax.stop_gradient(jax.nn.sigmoid((picked(t) - picked(s)) / 2.0))
    return g * kl(t, s) + (1 - g) * kl(s, t)


def asymmetric(s, t):
    advantage = jax.lax.stop_gradient(jnp.exp(picked(t) - picked(s)) - 1)  # forward KL, corrected
    return jnp.where(advantage > 0, -advantage * picked(s), kl(t, s))


def mode_seeking(s, t):
    forward = kl(*list(bucketed(likeliest(t, 16), t, s)))
    return kl(s, t) + jnp.where(entropy(t) > 1.5, 0.5 * forward, 0.0)


def regularised(s, t):
    ref = picked(full.logp_of(full.REFERENCE)[:, :-1])
    return kl(s, t) - 0.3 * entropy(s) + 0.2 * (picked(s) - ref) ** 2 / 2


def semi(s, t):
    advantage = jnp.exp(picked(t) - picked(s)) - 1
    return -jax.lax.stop_gradient(advantage) * picked(s)


# name: options of objective.build, the loss of each state from log-probs [.., V] of S and T_lam
CASES = {
    "reverse": ({"loss": "exact"}, kl),
    "jsd": ({"loss": "exact", "divergence": "jsd", "lam": 1.25}, jsd),
    "forward over the target's five likeliest": (
        {
            **{"loss": "exact", "divergence": "forward_kl", "lam": 1.25},
            "support": "top_k(k=5, of='teacher')",
        },
        lambda s, t: kl(*reversed(list(bucketed(likeliest(t, 5), s, t)))),
    ),
    "entropy_gated": (
        {"loss": "entropy_gated(threshold=1.5, weight=0.5)", "lam": 1.25},
        mode_seeking,
    ),
    "ratio_gated": ({"loss": "ratio_gated(temperature=2.0)", "lam": 1.25}, gated),
    "cr_opd": ({"loss": "cr_opd(teacher_k=8, student_k=8)"}, routed),
    "asymmetric": ({"loss": "asymmetric", "divergence": "forward_kl", "lam": 1.25}, asymmetric),
    "regularised": (
        {"loss": "exact", "regularizers": ("entropy(weight=0.3)", "anchor(weight=0.2)")},
        regularised,
    ),
    "sampled forward KL": ({"divergence": "forward_kl", "lam": 1.25}, semi),
}


@functools.cache
def wanted(name):
    """(gradient, loss) of a case from all logits at once."""
    options, loss = CASES[name]
    target_BTV = full.target(options.get("lam", 1.0))[:, :-1]
    return full.gradient(lambda s: full.token_mean(loss(s[:, :-1], target_BTV), MASK_BT))


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_descent_from_full_logits(name):
    grads, metrics = full.setting(options=CASES[name][0]).descent()
    want, loss = wanted(name)
    assert full.norm(want) > 0.05
    full.same(grads, want, 1e-5 * max(1, full.norm(want)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert metrics["skipped"] == 0


# --- what must not matter

# A loss of each kind at once: on a support, over the vocabulary, of the sampled token; gated rows.
EVERYTHING = {
    **{"loss": "asymmetric", "divergence": "jsd", "lam": 1.25, "support": "top_k(k=5, of='union')"},
    **{"regularizers": ("entropy(weight=0.3)", "anchor(weight=0.2)"), "gates": ("trust",)},
}


@pytest.fixture(scope="module")
def plain():
    """(gradient, metrics) in two microbatches and chunks of two positions, on one device."""
    return full.setting(options=EVERYTHING).descent()


def agree(got, want):
    full.same(got[0], want[0])
    full.same(got[1], want[1], 2e-5, 2e-5)


@pytest.mark.parametrize(("microbatches", "chunk"), [(1, 4)])
def test_microbatches_and_chunks_change_nothing(plain, microbatches, chunk):
    changed = full.setting(options=EVERYTHING, microbatches=microbatches, head_chunk=chunk)
    agree(changed.descent(), plain)


@pytest.mark.parametrize(
    "shape", [(1, 2, 4), pytest.param((2, 2, 2), marks=pytest.mark.slow)], ids=str
)
def test_every_mesh_gives_the_same_step(plain, shape):
    # Groups of 3 and of 5 rows in a microbatch, on 2 and on 4 row shards.
    agree(full.setting(shape, options=EVERYTHING).descent(), plain)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("routes", [(0, 0), (0, 1)], ids=["one teacher", "a teacher each"])
def test_plain_distillation_asks_for_no_reference_on_any_mesh(shape, routes):
    options = {"loss": "exact", "divergence": "jsd", "lam": 1.0}
    few = {"teachers": full.TEACHERS[: 1 + max(routes)], "routes": (routes,)}
    want = full.setting(options=options, **few).descent()
    agree(full.setting(shape, options=options, **few).descent(), want)


def test_layers_that_are_recomputed_change_nothing(plain):
    student = dataclasses.replace(full.model(*full.STUDENT)[0], remat="layers")
    agree(full.setting(options=EVERYTHING, student=student).descent(), plain)


def test_neither_the_order_of_rows_nor_the_width_of_prompts_matters(plain):
    draw = np.random.default_rng(8)
    order = (*draw.permutation(6), *(6 + draw.permutation(10)))
    other = full.rollout(width=7, order=order)
    assert other.tokens_BL.shape[1] == full.rollout().tokens_BL.shape[1] + 3
    agree(full.setting(options=EVERYTHING).descent(other), plain)


def test_one_teacher_of_all_tasks_is_split_into_pieces_that_tasks_do_not_divide_into():
    options = {"loss": "exact"}
    one = {"teachers": full.TEACHERS[:1], "routes": ((0, 0),)}
    want = full.setting(options=options, **one).descent()
    agree(full.setting(options=options, **one, microbatches=4).descent(), want)
    two = full.setting(options=options, microbatches=4)
    with pytest.raises(ValueError, match="take fewer updates or microbatches"):
        two.descent()


# --- memory


def largest_over_a_vocabulary(head_chunk, compiled=False):
    """{rows of an embedding: positions with logits over it at once}, of any of the models."""
    one = full.setting(options=EVERYTHING, microbatches=1, head_chunk=head_chunk)
    args = (init_state(one.recipe, one.params), one.rollout, None, one.frozen)
    if compiled:
        shapes = shapes_in(one.compiled.lower(*args).compile().as_text())
    else:
        equations = walk(one.compiled.trace(*args).jaxpr)
        shapes = {v.aval.shape for eqn in equations for v in eqn.outvars}
    found = {}
    for which in (full.STUDENT, full.REFERENCE, full.TEACHERS[1]):
        n_ids = which[3]
        sizes = [math.prod(s) // n_ids for s in shapes if s and s[-1] == n_ids]
        found[n_ids] = max(sizes)
    return found


def test_no_array_holds_the_logits_of_more_positions_than_a_chunk():
    # Chunks of the sixteen rows; the llama teacher has the ten of its task.
    assert largest_over_a_vocabulary(2) == {68: 32, 64: 32, 72: 20}
    assert max(largest_over_a_vocabulary(2, compiled=True).values()) == 32
    assert largest_over_a_vocabulary(6) == {68: 96, 64: 96, 72: 60}


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 2)], ids=str)
def test_no_device_holds_the_logits_of_another_ones_ids(shape):
    one = full.setting(shape, options={"loss": "exact", "lam": 1.25})
    args = (init_state(one.recipe, one.params), one.rollout, None, one.frozen)
    shapes = shapes_in(one.compiled.lower(*args).compile().as_text())
    widths = {full.model(*which)[0].cfg.vocab_size for which in (full.STUDENT, *full.TEACHERS)}
    assert {n // 2 for n in widths} <= {s[-1] for s in shapes if len(s) == 3}
    assert not [s for s in shapes if len(s) == 3 and s[-1] in widths]
