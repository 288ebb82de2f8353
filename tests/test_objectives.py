"""The identities of the objective, by enumeration of every completion of a toy language."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives.advantages import gopd
from gopd_jax.objectives.losses import policy_gradient
from gopd_jax.objectives.targets import tilted
from gopd_jax.types import Scores

# A language of three tokens and at most three positions, in which everything can be listed.
V, LENGTH, EOS = 3, 3, 0
EVERY = [
    tokens
    for n in range(1, LENGTH + 1)
    for tokens in itertools.product(range(V), repeat=n)
    if EOS not in tokens[:-1] and (tokens[-1] == EOS or n == LENGTH)
]
STATES = sorted({tokens[:t] for tokens in EVERY for t in range(len(tokens))})
PADDED = [tokens + (0,) * (LENGTH - len(tokens)) for tokens in EVERY]
TOKENS_BT = jnp.array(PADDED)
MASK_BT = jnp.arange(LENGTH) < jnp.array([len(tokens) for tokens in EVERY])[:, None]
# Off the mask the index is that of some state: what is there must not matter.
STATE_BT = jnp.array(
    [[STATES.index(p[:t]) if p[:t] in STATES else 0 for t in range(LENGTH)] for p in PADDED]
)


def table_of(seed):
    """A model: logits of each token at each state."""
    return 1.5 * jax.random.normal(jax.random.key(seed), (len(STATES), V))


STUDENT, TEACHER, REF, OTHER = map(table_of, range(4))


def log_softmax(logits_SV):
    return logits_SV - jax.nn.logsumexp(logits_SV, -1, keepdims=True)


def logp_of(logits_SV):
    """logp_BT of every completion."""
    return log_softmax(logits_SV)[STATE_BT, TOKENS_BT]


def visits(logits_SV):
    """Probability of each completion and, by multiplication along it, of reaching each state."""
    logp_BT = jnp.where(MASK_BT, logp_of(logits_SV), 0.0)
    reached_S = np.zeros(len(STATES))
    for i, state in enumerate(STATES):
        logp = log_softmax(logits_SV)
        steps = [logp[STATES.index(state[:t]), state[t]] for t in range(len(state))]
        reached_S[i] = np.exp(sum(map(float, steps)))
    return jnp.exp(logp_BT.sum(1)), jnp.array(reached_S)


PROB_B, REACHED_S = visits(STUDENT)


def expected_gradient(advantage_of, **tables):
    """Sampled gradient of ascent, weighted by every completion's probability."""
    scores = Scores(**{name: logp_of(logits) for name, logits in tables.items()})

    def loss(logits_SV):
        logp_BT = jnp.where(MASK_BT, logp_of(logits_SV), 0.0)
        advantage_BT = advantage_of(
            scores.replace(student_BT=jax.lax.stop_gradient(logp_BT)), MASK_BT
        )
        return (PROB_B * policy_gradient(logp_BT, advantage_BT).sum(1)).sum()

    return -jax.jit(jax.grad(loss))(STUDENT)


def exact_gradient(target_SV):
    """-gradient of sum over states of the frozen visits times KL(S || target), by autodiff."""
    target_SV = log_softmax(target_SV)

    def divergence(logits_SV):
        logp_SV = log_softmax(logits_SV)
        kl_S = (jnp.exp(logp_SV) * (logp_SV - target_SV)).sum(-1)
        return (REACHED_S * kl_S).sum()

    return -jax.jit(jax.grad(divergence))(STUDENT)


def g_opd(lam):
    return lambda scores, mask_BT: gopd(scores, mask_BT, lam=lam)


def close(got, want, atol=1e-6):
    np.testing.assert_allclose(got, want, atol=atol)


def test_the_listing_is_complete():
    assert len(EVERY) == 1 + 2 + 4 * 3
    assert len(STATES) == 1 + 2 + 4
    close(PROB_B.sum(), 1)
    close(REACHED_S[STATES.index(())], 1)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0, 1.25, 2.0])
def test_the_expected_gradient_is_that_of_the_divergence_from_the_tilted_teacher(lam):
    ref = {} if lam == 1 else {"ref_BT": REF}
    got = expected_gradient(g_opd(lam), teacher_BT=TEACHER, **ref)
    target = lam * log_softmax(TEACHER) + (1 - lam) * log_softmax(REF)
    close(got, exact_gradient(target), 1e-5)
    assert np.abs(got).max() > 0.05
    assert np.abs(got - exact_gradient(OTHER)).max() > 0.05


def test_the_exact_gradient_agrees_with_finite_differences():
    """Of the divergence in float64, so that the oracle is not JAX's own derivative alone."""
    student, target = (np.asarray(x, np.float64) for x in (STUDENT, TEACHER))

    def normal(x):
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    def divergence(x):
        kl_S = (np.exp(normal(x)) * (normal(x) - normal(target))).sum(-1)
        return (np.asarray(REACHED_S, np.float64) * kl_S).sum()

    want, h = np.zeros_like(student), 1e-5
    for i in np.ndindex(*student.shape):
        step = np.zeros_like(student)
        step[i] = h
        want[i] = -(divergence(student + step) - divergence(student - step)) / (2 * h)
    close(expected_gradient(g_opd(1.0), teacher_BT=TEACHER), want, 1e-5)


def test_lambda_one_is_distillation_with_any_reference_and_with_none():
    scores = Scores(student_BT=logp_of(STUDENT), teacher_BT=logp_of(TEACHER))
    want = np.where(MASK_BT, scores.teacher_BT - scores.student_BT, 0)
    for ref in (None, logp_of(REF), jnp.full(MASK_BT.shape, jnp.nan)):
        np.testing.assert_array_equal(gopd(scores.replace(ref_BT=ref), MASK_BT, lam=1.0), want)


def test_lambda_zero_stays_at_the_reference_whatever_the_teacher():
    for teacher in (TEACHER, OTHER):
        got = expected_gradient(g_opd(0.0), teacher_BT=teacher, ref_BT=REF)
        close(got, exact_gradient(REF), 1e-5)


def test_extrapolation_is_distillation_towards_the_tilted_teacher():
    lam = 1.5
    mixed = tilted(log_softmax(TEACHER), log_softmax(REF), lam=lam)
    got = expected_gradient(g_opd(lam), teacher_BT=TEACHER, ref_BT=REF)
    close(got, expected_gradient(g_opd(1.0), teacher_BT=log_softmax(mixed)), 1e-5)


def test_a_baseline_of_the_state_adds_no_bias():
    def shifted(scores, mask_BT):
        return jnp.where(mask_BT, gopd(scores, mask_BT) + REF[STATE_BT, 0], 0.0)

    close(expected_gradient(shifted, teacher_BT=TEACHER), exact_gradient(TEACHER), 1e-5)


def test_a_student_at_its_target_has_nothing_to_learn():
    at = {"student_BT": logp_of(STUDENT), "teacher_BT": logp_of(STUDENT)}
    assert not gopd(Scores(**at), MASK_BT).any()
    # Elsewhere than at lambda = 1 the advantage of a tilted student is a constant of the state.
    lam, ref = 1.25, REF
    teacher = (log_softmax(STUDENT) - (1 - lam) * log_softmax(ref)) / lam
    close(expected_gradient(g_opd(lam), teacher_BT=teacher, ref_BT=ref), 0)


def test_the_advantage_is_the_papers():
    """Both of its forms, in NumPy."""
    s, t, r = (np.asarray(logp_of(x), np.float64) for x in (STUDENT, TEACHER, REF))
    scores = Scores(student_BT=jnp.array(s), teacher_BT=jnp.array(t), ref_BT=jnp.array(r))
    got = np.asarray(gopd(scores, MASK_BT, lam=1.25))[np.asarray(MASK_BT)]
    mask = np.asarray(MASK_BT)
    close(got, (1.25 * (t - r) - (s - r))[mask], 1e-5)
    close(got, ((t - s) + 0.25 * (t - r))[mask], 1e-5)


def test_extreme_ratios_stay_finite():
    logp_BT = jnp.array([[-1e4, -1e-6, -5e3]])
    scores = Scores(student_BT=logp_BT, teacher_BT=logp_BT[:, ::-1], ref_BT=logp_BT - 1e4)
    advantage_BT = gopd(scores, jnp.ones((1, 3), bool), lam=2.0)
    # 2 (T - R) - (S - R) with T - R = (15, 10, 5) thousand and S - R = 10 thousand
    close(advantage_BT, [[2e4, 1e4, 0.0]], 1e-2)
    assert np.isfinite(jax.grad(lambda x: policy_gradient(x, advantage_BT).sum())(logp_BT)).all()


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match=r"lam = 1.25 needs the reference's log-probs .* None"):
        tilted(jnp.zeros((1, 1)), None, lam=1.25)
