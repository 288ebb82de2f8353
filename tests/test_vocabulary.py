"""Contracts of every support, mass and loss over the vocabulary, fed by their parameters' names."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives.distributional import DISTRIBUTIONAL
from gopd_jax.objectives.divergences import DIVERGENCES
from gopd_jax.objectives.routing import ROUTING
from gopd_jax.objectives.supports import MASSES, SUPPORTS, log_mass, members, supported

N_VOCAB, N_REAL, SHAPE = 10, 8, (3, 4)
REAL_V = np.arange(N_VOCAB) < N_REAL
# Values of options that have no default; a divergence stands for every one of them.
REQUIRED = {"k": [3], "divergence": list(DIVERGENCES.values())}


def entries(table):
    """Every entry with every choice of its required options, to be run as a test each."""
    found = []
    for name, function in table.items():
        parameters = inspect.signature(function).parameters.values()
        asked = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
        assert len(asked) <= 1, f"{name} asks for {asked}: extend this to products"
        for option in asked:
            for value in REQUIRED[option]:
                chosen = functools.partial(function, **{option: value})
                label = getattr(value, "__name__", str(value))
                found.append(pytest.param(chosen, id=f"{name}-{label}"))
        if not asked:
            found.append(pytest.param(function, id=name))
    return found


LOSSES = entries({**DISTRIBUTIONAL, **ROUTING})
COMPLETE = [p.values[0] for p in entries(SUPPORTS)]
TOP = next(f for f in COMPLETE if getattr(f, "func", None) is SUPPORTS["top_k"])


def feed(function, quantities, **more):
    """Calls an entry with the quantities that its positional parameters name."""
    given = {**quantities, **more}
    parameters = inspect.signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    return function(*(given[name] for name in names))


def close(got, want, atol=2e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def log_softmax(logits_xV):
    return jax.nn.log_softmax(jnp.where(REAL_V, logits_xV, -jnp.inf))


def quantities(
    logits_xV, target_xV, ids_x, advantage_x, support=TOP, mass=MASSES["rest"], of=log_softmax
):
    """Everything that an entry may name, by name; the student's are functions of logits_xV."""
    student_xV, real_xV = of(logits_xV), jnp.broadcast_to(REAL_V, logits_xV.shape)
    logp_x, target_x = (
        jnp.take_along_axis(x, ids_x[..., None], -1)[..., 0] for x in (student_xV, target_xV)
    )
    student_xS, target_xS, valid_xS = supported(support, mass, student_xV, target_xV, real_xV)
    return {k: v for k, v in locals().items() if "_x" in k and k != "logits_xV"}


def ordinary():
    keys = jax.random.split(jax.random.key(0), 4)
    logits_xV, target_xV = (2 * jax.random.normal(key, (*SHAPE, N_VOCAB)) for key in keys[:2])
    ids_x = jax.random.randint(keys[2], SHAPE, 0, N_REAL)
    return logits_xV, log_softmax(target_xV), ids_x, jax.random.normal(keys[3], SHAPE)


def extreme(depth):
    """Pairs of states that are as sure as float32 or bfloat16 allow, of the same id or another.

    depth: nats between what is likely and what is not. Sampled ids are likely under one of the
    two, under both or under none, and advantages are their log-ratios.
    """
    shapes_sV = np.zeros((5, N_VOCAB), np.float32)
    shapes_sV[1, 1:] = -depth  # sure of 0
    shapes_sV[2, :-3] = -depth  # sure of the last real id
    shapes_sV[3] = -depth * np.arange(N_VOCAB) / N_VOCAB  # a slope
    shapes_sV[4, ::2] = -depth  # torn between every other one
    pairs = np.array([(s, t, i) for s in range(5) for t in range(5) for i in (0, 3, N_REAL - 1)])
    student_xV, target_xV = (log_softmax(jnp.array(shapes_sV)[pairs[:, i]]) for i in (0, 1))
    ids_x = jnp.array(pairs[:, 2])
    gap_xV = jnp.where(REAL_V, target_xV - student_xV, 0.0)
    return student_xV, target_xV, ids_x, jnp.take_along_axis(gap_xV, ids_x[:, None], -1)[:, 0]


def value_and_grad(loss, state, **choice):
    """loss_x and its gradient in the logits, [..., V], or in what `of` makes log-probs of."""

    def total(logits_xV):
        loss_x = feed(loss, quantities(logits_xV, *state[1:], **choice))
        return loss_x.sum(), loss_x

    (_, loss_x), grad_xV = jax.value_and_grad(total, has_aux=True)(state[0])
    return loss_x, grad_xV


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_one_float32_a_position(loss):
    loss_x, grad_xV = value_and_grad(loss, ordinary())
    assert (loss_x.shape, loss_x.dtype) == (SHAPE, jnp.float32)
    assert np.isfinite(loss_x).all()
    assert np.abs(grad_xV).max() > 1e-3
    assert not np.asarray(grad_xV)[..., N_REAL:].any()


@pytest.mark.parametrize("depth", [80.0, 104.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_right_for_extreme_states_wherever_float32_can_be(loss, depth):
    """float64 says what it is; where that is beyond float32 there is nothing to ask for.

    At 104 nats probabilities have left float32 and bfloat16, at 80 they are near the end of both.
    """
    state = extreme(depth)
    # In the log-probs, because a softmax's derivative has rounding of its own.
    measured = functools.partial(value_and_grad, loss, of=lambda logp_xV: logp_xV)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in state]
        wide[2] = jnp.asarray(np.asarray(state[2]))
        want_x, want_xV = map(np.asarray, measured(wide, support=SUPPORTS["full"]))
    assert want_x.dtype == np.float64
    assert not np.isnan(want_x).any()
    held_x = np.abs(want_x) < 1e37
    assert held_x.mean() > 0.4
    assert held_x.all() or depth > 80
    for support in COMPLETE:
        for mass in MASSES.values():
            both = measured(state, support=support, mass=mass)
            assert all(np.isfinite(np.asarray(x)[held_x]).all() for x in both)
    loss_x, grad_xV = measured(state, support=SUPPORTS["full"])
    np.testing.assert_allclose(loss_x[held_x], want_x[held_x], rtol=2e-5, atol=1e-5)
    size_x1 = np.maximum(np.abs(want_xV[held_x]).max(-1, keepdims=True), 1.0)
    close(grad_xV[held_x] / size_x1, want_xV[held_x] / size_x1, 2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_local_to_its_position_and_blind_to_how_positions_are_chunked(loss):
    state = ordinary()
    want_x, want_xV = value_and_grad(loss, state)
    turned = [x[::-1, ::-1] for x in state]
    got_x, got_xV = value_and_grad(loss, turned)
    close(got_x[::-1, ::-1], want_x)
    close(got_xV[::-1, ::-1], want_xV)
    for part in (np.s_[:, :1], np.s_[2, 3]):
        got_x, got_xV = value_and_grad(loss, [x[part] for x in state])
        close(got_x, want_x[part])
        close(got_xV, want_xV[part])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
def test_no_loss_sees_what_is_not_valid(loss, junk):
    """Not in its value and not in its gradient, wherever the support's values are the input."""
    names = inspect.signature(loss).parameters
    if "valid_xS" not in names:
        assert {"student_xV", "real_xV"} <= names.keys()  # which hold -inf in every test here
        return
    given = quantities(*ordinary())
    valid_xS = given["valid_xS"].at[0, 0].set(False).at[1, :, 1].set(False)

    def total(student_xS, target_xS):
        more = {"student_xS": student_xS, "target_xS": target_xS, "valid_xS": valid_xS}
        loss_x = feed(loss, given, **more)
        return loss_x.sum(), loss_x

    def of(fill):
        parts = [jnp.where(valid_xS, given[name], fill) for name in ("student_xS", "target_xS")]
        (_, loss_x), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*parts)
        return loss_x, *grads

    for got, want in zip(of(junk), of(0.0)):
        np.testing.assert_array_equal(got, want)
        assert np.isfinite(want).all()


# --- supports and masses


def every_support():
    """Entries with each value that their `of` may have."""
    for support in COMPLETE:
        if "of" in inspect.signature(support).parameters:
            for of in ("teacher", "student", "union", "intersection"):
                yield functools.partial(support, of=of)
        else:
            yield support


@pytest.mark.parametrize("make", [ordinary, lambda: extreme(80.0), lambda: extreme(1e4)])
@pytest.mark.parametrize("support", list(every_support()))
def test_every_support_lists_real_ids_once_and_position_by_position(support, make):
    given = quantities(*make())
    found = feed(support, given)
    if found is None:
        return
    ids_xS, valid_xS = found
    assert (ids_xS.dtype, valid_xS.dtype) == (jnp.int32, jnp.bool_)
    assert ids_xS.shape == valid_xS.shape == (*given["student_xV"].shape[:-1], ids_xS.shape[-1])
    assert np.asarray((ids_xS >= 0) & (ids_xS < N_VOCAB)).all()
    assert not np.asarray(valid_xS & (ids_xS >= N_REAL)).any()
    member_xV = members(ids_xS, valid_xS, N_VOCAB)
    np.testing.assert_array_equal(member_xV.sum(-1), valid_xS.sum(-1))  # none of them twice
    turned = feed(support, {name: x[::-1] for name, x in given.items()})
    for got, want in zip(turned, found):
        np.testing.assert_array_equal(got[::-1], want)


@pytest.mark.parametrize("support", list(every_support()))
@pytest.mark.parametrize("mass", entries(MASSES))
def test_every_mass_is_finite_with_its_gradient_and_no_more_than_one(mass, support):
    for state in (ordinary(), extreme(80.0), extreme(1e4)):
        given = quantities(*state)

        def total(student_xV, given=given):
            rest = given["target_xV"], given["real_xV"]
            parts = supported(support, mass, student_xV, *rest)
            return parts[0].sum(), parts

        grad_xV, parts = jax.grad(total, has_aux=True)(given["student_xV"])
        student_xS, target_xS, valid_xS = parts
        assert student_xS.dtype == target_xS.dtype == jnp.float32
        assert all(np.isfinite(x).all() for x in (grad_xV, student_xS, target_xS))
        assert not np.asarray(grad_xV)[..., N_REAL:].any()
        for logp_xS in (student_xS, target_xS):
            assert (np.exp(log_mass(logp_xS, valid_xS)) < 1 + 1e-5).all()


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mass", entries(MASSES))
def test_no_mass_sees_what_is_not_valid(mass, junk):
    given = quantities(*ordinary(), mass=MASSES["raw"])
    valid_xS = given["valid_xS"].at[0, 0].set(False).at[1, :, 1].set(False)

    def of(fill, outside_x):
        def total(logp_xS):
            more = {"logp_xS": logp_xS, "valid_xS": valid_xS, "outside_x": outside_x}
            logp_xS, kept_xS = feed(mass, more)
            return jnp.where(kept_xS, logp_xS, 0.0).sum(), jnp.where(kept_xS, logp_xS, 0.0)

        return jax.grad(total, has_aux=True)(jnp.where(valid_xS, given["student_xS"], fill))

    for outside_x in (None, jnp.full(SHAPE, -0.7)):
        for got, want in zip(of(junk, outside_x), of(0.0, outside_x)):
            np.testing.assert_array_equal(got, want)
            assert np.isfinite(want).all()
