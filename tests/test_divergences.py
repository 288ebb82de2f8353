"""Every divergence against closed forms in NumPy, and its gradient against enumeration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import toy
from gopd_jax.objectives.divergences import (
    DIVERGENCES,
    alpha,
    corrected,
    correction,
    forward_kl,
    hellinger,
    jsd,
    mixture,
    neyman,
    pearson,
    reverse_kl,
    skew_forward,
    skew_reverse,
    token_reward,
)

EVERY = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
GENTLE = np.linspace(-3, 3, 61, dtype=np.float32)
WIDE = np.array([-80, -30, -8, -1, -1e-3, 0, 1e-3, 1, 8, 30, 80], np.float32)


def close(got, want, atol=1e-5, rtol=0.0):
    np.testing.assert_allclose(got, want, atol=atol, rtol=rtol)


def f_of(divergence, log_u):
    return divergence(jnp.zeros_like(log_u), log_u)


def log_probs(seed, n=7):
    return jax.nn.log_softmax(2 * jax.random.normal(jax.random.key(seed), (n,)))


# --- the functions

# name: f and the corrected advantage, both of u in float64, written from the paper's table.
M = lambda u, w: w * u + 1 - w  # noqa: E731
CLOSED = {
    "reverse_kl": (reverse_kl, lambda u: -np.log(u), np.log),
    "forward_kl": (forward_kl, lambda u: u * np.log(u), lambda u: u - 1),
    "jsd": (
        jsd,
        lambda u: (u * np.log(u) - (1 + u) * np.log((1 + u) / 2)) / 2,
        lambda u: np.log((1 + u) / 2) / 2,
    ),
    "jsd(.3)": (
        functools.partial(jsd, beta=0.3),
        lambda u: 0.3 * u * np.log(u) - M(u, 0.3) * np.log(M(u, 0.3)),
        lambda u: 0.7 * np.log(M(u, 0.3)),
    ),
    "skew_reverse": (
        skew_reverse,
        lambda u: -np.log(M(u, 0.9)),
        lambda u: np.log(M(u, 0.9)) + 0.1 / M(u, 0.9) - 0.1,
    ),
    "skew_forward": (
        skew_forward,
        lambda u: u * np.log(u / M(u, 0.1)),
        lambda u: 0.9 * (u / M(u, 0.1) - 1),
    ),
    "jeffreys": (
        DIVERGENCES["jeffreys"],
        lambda u: (u - 1) * np.log(u),
        lambda u: u - 1 + np.log(u),
    ),
    "pearson": (pearson, lambda u: (u - 1) ** 2, lambda u: u**2 - 1),
    "neyman": (neyman, lambda u: (u - 1) ** 2 / u, lambda u: 2 - 2 / u),
    "hellinger": (hellinger, lambda u: (np.sqrt(u) - 1) ** 2, lambda u: np.sqrt(u) - 1),
    "total_variation": (
        DIVERGENCES["total_variation"],
        lambda u: np.abs(u - 1) / 2,
        lambda u: np.sign(u - 1) / 2,
    ),
    "triangular": (
        DIVERGENCES["triangular"],
        lambda u: (u - 1) ** 2 / (u + 1),
        lambda u: (u - 1) / (u + 1) * ((3 * u + 1) / (u + 1)),
    ),
    "alpha": (alpha, lambda u: (u**0.5 - u / 2 - 0.5) / -0.25, lambda u: (u**0.5 - 1) / 0.5),
    "alpha(1.5)": (
        functools.partial(alpha, alpha=1.5),
        lambda u: (u**1.5 - 1.5 * u + 0.5) / 0.75,
        lambda u: (u**1.5 - 1) / 1.5,
    ),
    "mixture": (
        mixture,
        lambda u: (u - 1) * np.log(u) / 2,
        lambda u: (u - 1 + np.log(u)) / 2,
    ),
}
KNOWN = pytest.mark.parametrize(("divergence", "f", "advantage"), CLOSED.values(), ids=CLOSED)


@KNOWN
def test_values_and_corrected_advantages_are_the_closed_forms(divergence, f, advantage):
    u = np.exp(GENTLE.astype(np.float64))
    close(f_of(divergence, GENTLE), f(u), 2e-6, 2e-6)
    close(token_reward(divergence, GENTLE), -f(u), 2e-6, 2e-6)
    close(corrected(divergence, GENTLE), advantage(u), 2e-6, 2e-6)
    close(
        token_reward(divergence, GENTLE) + correction(divergence, GENTLE), advantage(u), 1e-5, 2e-6
    )


@KNOWN
def test_extreme_ratios_are_right_wherever_the_true_value_is_a_float32(divergence, f, advantage):
    u = np.exp(WIDE.astype(np.float64))
    for got, want in (
        (f_of(divergence, WIDE), f(u)),
        (corrected(divergence, WIDE), advantage(u)),
        (correction(divergence, WIDE), advantage(u) + f(u)),
    ):
        fits = np.abs(want) < 3e38
        assert fits.sum() >= WIDE.size - 2
        # 80 nats are known to 4e-6 of themselves, and their exponential to as much.
        close(np.asarray(got)[fits], want[fits], 2e-6, 2e-5)


@KNOWN
def test_extreme_log_probs_are_right_wherever_the_true_value_is_a_float32(divergence, f, advantage):
    tried = 0
    for log_s, log_t in [(-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4), (-1e4, -2e4), (-9e3, -1e4)]:
        with np.errstate(over="ignore", invalid="ignore"):
            # s f(t / s) in extended range: the sizes that underflow are those that count nothing.
            s, r = np.exp(np.longdouble(log_s)), np.longdouble(log_t) - np.longdouble(log_s)
            want = float(s * f(np.exp(r)))
        if not abs(want) < 3e38:
            continue
        tried += 1
        got, grads = jax.value_and_grad(divergence, argnums=(0, 1))(log_s, log_t)
        close(got, want, 1e-6, 1e-5)
        close(sum(grads), want, 1e-6, 1e-5)  # homogeneous of degree one: Euler's identity
    assert tried >= 3


@pytest.mark.parametrize("name", [n for n in CLOSED if "(" not in n])
def test_the_closed_forms_are_those_of_the_table(name):
    assert CLOSED[name][0] is DIVERGENCES[name]


@EVERY
def test_f_is_zero_at_one_and_convex(divergence):
    close(f_of(divergence, jnp.zeros(())), 0, 1e-6)
    u = np.linspace(0.05, 4, 80)
    values = np.asarray(f_of(divergence, jnp.log(u)), np.float64)
    second = values[2:] - 2 * values[1:-1] + values[:-2]
    # The rounding of three values of at most the largest size.
    assert second.min() > -4 * np.finfo(np.float32).eps * max(1, np.abs(values).max())
    assert values.max() > 0.01


@EVERY
def test_the_corrected_advantage_is_zero_at_one_and_grows_with_u(divergence):
    advantage = np.asarray(corrected(divergence, GENTLE), np.float64)
    slack = 4 * np.finfo(np.float32).eps * np.abs(advantage).max()
    assert np.diff(advantage).min() > -slack
    assert (advantage[GENTLE < 0] < 0).all()
    assert (advantage[GENTLE > 0] > 0).all()
    assert corrected(divergence, jnp.zeros(())) == 0
    assert correction(divergence, jnp.zeros(())) == 0
    wide = np.asarray(corrected(divergence, WIDE), np.float64)
    assert not np.isnan(wide).any()
    wide = wide[np.isfinite(wide)]
    # exp of a number near 80 is known to 1e-5 of itself.
    assert (np.diff(wide) >= -1e-5 * np.abs(wide[1:])).all()


@EVERY
def test_reward_and_correction_add_up_to_the_corrected_advantage(divergence):
    r = GENTLE
    got = token_reward(divergence, r) + correction(divergence, r)
    close(got, corrected(divergence, r), 1e-5, 1e-6)
    # The correction is the slope of f in log u, by central differences, but for one constant f'(1).
    h = 0.005
    up, down = (np.asarray(f_of(divergence, r + d), np.float64) for d in (h, -h))
    gap = (up - down) / (2 * h) - np.asarray(correction(divergence, r))
    smooth = np.abs(r) > 2 * h
    gap, size = gap[smooth], np.abs(up[smooth]).clip(1)
    close((gap - np.median(gap)) / size, 0, 3e-4)


@EVERY
def test_ids_of_hardly_any_probability_are_numbers(divergence):
    # One NaN among a vocabulary's ids is a NaN of the whole loss. Ids of probability 0 come last.
    low = np.array([-90.0, -110.0, -200.0, -1e4, -2e4], np.float32)
    log_s, log_t = (x.ravel() for x in np.meshgrid(low, low))
    value, grads = jax.vmap(jax.value_and_grad(divergence, (0, 1)))(log_s, log_t)
    for x in (value, *grads):
        assert not np.isnan(x).any()
        assert not np.asarray(x)[log_s == log_t].any()


@EVERY
def test_an_entry_is_homogeneous_in_both_distributions(divergence):
    log_s, log_t = log_probs(0), log_probs(1)
    value = divergence(log_s, log_t)
    close(value, np.exp(log_s) * f_of(divergence, log_t - log_s), 1e-6, 1e-5)
    for c in (-3.0, 2.5):
        close(divergence(log_s + c, log_t + c), np.exp(c) * value, 1e-6, 1e-5)


@EVERY
def test_the_divergence_is_positive_and_zero_with_no_gradient_at_its_target(divergence):
    log_s, log_t = log_probs(0), log_probs(1)

    def total(logits, log_t):
        return divergence(jax.nn.log_softmax(logits), log_t).sum()

    assert total(log_s, log_t) > 0.02
    value, grad = jax.value_and_grad(total)(log_s, log_s)
    close(value, 0, 1e-6)
    close(grad, 0, 1e-6)


@EVERY
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_entries_keep_shape_and_dtype(divergence, shape):
    r = jnp.full(shape, 0.5)
    for got in (f_of(divergence, r), corrected(divergence, r), correction(divergence, r)):
        assert (got.shape, got.dtype) == (shape, jnp.float32)


def test_related_divergences_agree():
    s, t = log_probs(0), log_probs(1)
    close(alpha(s, t), 2 * hellinger(s, t), 1e-6)
    close(alpha(s, t, alpha=2), pearson(s, t) / 2, 1e-5)
    close(alpha(s, t, alpha=-1), neyman(s, t) / 2, 1e-5)
    close(alpha(s, t, alpha=1e-3).sum(), reverse_kl(s, t).sum(), 0, 2e-3)
    close(alpha(s, t, alpha=1 - 1e-3).sum(), forward_kl(s, t).sum(), 0, 2e-3)
    close(jsd(s, t, beta=0.25), jsd(t, s, beta=0.75), 1e-6)
    close(skew_reverse(s, t, alpha=0.3), skew_forward(t, s, alpha=0.3), 1e-6)
    close(skew_reverse(s, t, alpha=1e-6).sum(), reverse_kl(s, t).sum(), 1e-4)
    parts = mixture(s, t, of=("jsd(beta=0.3)", "pearson"), weights=(2.0, 0.5))
    close(parts, 2 * jsd(s, t, beta=0.3) + pearson(s, t) / 2, 1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (functools.partial(jsd, beta=1.0), "jsd: beta is 1; it must be above 0 and below 1"),
        (functools.partial(skew_reverse, alpha=0.0), "skew_reverse: 1 - alpha is 1; .* below 1"),
        (functools.partial(skew_forward, alpha=-0.5), "skew_forward: alpha is -0.5; it must be"),
        (functools.partial(alpha, alpha=0), "alpha is 0: write 'reverse_kl'"),
        (functools.partial(alpha, alpha=1.0), "alpha is 1.0: write 'forward_kl'"),
        (functools.partial(mixture, weights=(1.0,)), r"of = \('reverse.*weights = \(1.0,\); give"),
        (functools.partial(mixture, weights=(1.0, 0.0)), "give each a weight > 0"),
        (functools.partial(mixture, of=("jds", "jsd")), "there is no 'jds'; there are"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make(jnp.zeros(3), jnp.zeros(3))


# --- the expected gradient, over every completion of the toy language


@EVERY
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.25])
def test_the_corrected_advantage_ascends_minus_the_divergence_from_the_tilted_teacher(
    divergence, lam
):
    target = toy.tilt(lam)
    log_u_BT, _ = toy.log_u(target)
    want = toy.frozen(divergence, target)
    close(toy.ascent(corrected(divergence, log_u_BT)), want)
    parts_BT = token_reward(divergence, log_u_BT) + correction(divergence, log_u_BT)
    close(toy.ascent(parts_BT), want)
    assert np.abs(want).max() > 0.02
    assert np.abs(want - toy.frozen(divergence, toy.OTHER)).max() > 0.02


@KNOWN
def test_the_exact_gradient_is_that_of_finite_differences(divergence, f, advantage):
    """Of the closed form in float64, so that the oracle is not JAX's own derivative alone."""
    student, target = (np.asarray(x, np.float64) for x in (toy.STUDENT, toy.TEACHER))

    def probs(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    def total(x):
        s_SV = probs(x)
        of_state_S = (s_SV * f(probs(target) / s_SV)).sum(-1)
        return (np.asarray(toy.REACHED_S, np.float64) * of_state_S).sum()

    want, h = np.zeros_like(student), 1e-5
    for i in np.ndindex(*student.shape):
        step = np.zeros_like(student)
        step[i] = h
        want[i] = -(total(student + step) - total(student - step)) / (2 * h)
    close(toy.frozen(divergence, toy.TEACHER), want, 2e-6)


@EVERY
def test_without_the_correction_only_reverse_kl_is_unbiased(divergence):
    target = toy.tilt(1.25)
    log_u_BT, _ = toy.log_u(target)
    got = toy.ascent(token_reward(divergence, log_u_BT))
    bias = np.linalg.norm(got - toy.frozen(divergence, target))
    if divergence is reverse_kl:
        assert bias < 1e-6
        assert not np.asarray(correction(divergence, log_u_BT)).any()
    else:
        assert bias > 1e-2


def test_the_toy_language_is_listed_whole():
    assert len(toy.EVERY) == 1 + 2 + 4 * 3
    assert len(toy.STATES) == 1 + 2 + 4
    close(toy.PROB_B.sum(), 1, 1e-6)
    close(toy.REACHED_S[toy.STATES.index(())], 1, 1e-6)
    through_S = (
        jnp.zeros(len(toy.STATES))
        .at[toy.STATE_BT]
        .add(jnp.where(toy.MASK_BT, toy.PROB_B[:, None], 0.0))
    )
    close(through_S, toy.REACHED_S, 1e-6)
