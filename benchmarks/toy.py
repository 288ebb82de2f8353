"""A language so small that every completion of it can be listed, and gradients are sums.

Three tokens, at most three positions. A model is a table of logits_SV, here S the states (what may
have been written so far). What sampling estimates is then a sum over all completions by their
probability, to be held against autodiff of the divergence itself. Gradients are of the student's
logits and point uphill, so that a loss or a divergence falls along them.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

V, LENGTH, EOS = 3, 3, 0
EVERY = [
    tokens
    for n in range(1, LENGTH + 1)
    for tokens in itertools.product(range(V), repeat=n)
    if EOS not in tokens[:-1] and (tokens[-1] == EOS or n == LENGTH)
]
STATES = sorted({tokens[:t] for tokens in EVERY for t in range(len(tokens))})
_PADDED = [tokens + (0,) * (LENGTH - len(tokens)) for tokens in EVERY]
TOKENS_BT = jnp.array(_PADDED)
MASK_BT = jnp.arange(LENGTH) < jnp.array([len(tokens) for tokens in EVERY])[:, None]
ENDED_B = jnp.array([tokens[-1] == EOS for tokens in EVERY])
# Off the mask the index is that of some state: what is there must not matter.
STATE_BT = jnp.array(
    [[STATES.index(p[:t]) if p[:t] in STATES else 0 for t in range(LENGTH)] for p in _PADDED]
)


def table_of(seed, scale=0.7):
    """A model: logits of each token at each state."""
    return scale * jax.random.normal(jax.random.key(seed), (len(STATES), V))


STUDENT, TEACHER, REF, OTHER = map(table_of, range(4))


def log_softmax(logits_SV):
    return logits_SV - jax.nn.logsumexp(logits_SV, -1, keepdims=True)


def logp_of(logits_SV):
    """logp_BT of every completion; what is off the mask is some number."""
    return log_softmax(logits_SV)[STATE_BT, TOKENS_BT]


def tilt(lam):
    """Logits of the tilted teacher T^lam R^(1 - lam)."""
    return lam * log_softmax(TEACHER) + (1 - lam) * log_softmax(REF)


def log_u(target_SV, logits_SV=STUDENT):
    """log T - log S of every completion's tokens, and of every token at every state."""
    gap_SV = log_softmax(target_SV) - log_softmax(logits_SV)
    return gap_SV[STATE_BT, TOKENS_BT], gap_SV


def visits(logits_SV):
    """prob_B of every completion and reached_S of every state; differentiable."""
    logp_SV = log_softmax(logits_SV)
    reached_S = jnp.stack(
        [
            jnp.exp(sum(logp_SV[STATES.index(state[:t]), state[t]] for t in range(len(state))))
            for state in STATES
        ]
    )
    return jnp.exp(jnp.where(MASK_BT, logp_of(logits_SV), 0.0).sum(1)), reached_S


PROB_B, REACHED_S = visits(STUDENT)


def expected(loss_of, prob_B=PROB_B):
    """Minus the gradient of the expected sum of loss_of(logp_BT), [B, T], over a completion.

    Completions are drawn with prob_B, through which no gradient flows: this is what an update on
    samples does on average.
    """

    def loss(logits_SV):
        loss_BT = loss_of(logp_of(logits_SV))
        return (prob_B * jnp.where(MASK_BT, loss_BT, 0.0).sum(1)).sum()

    return -jax.jit(jax.grad(loss))(STUDENT)


# One program for every advantage, and one a divergence for every target: compiling is what costs.
@jax.jit
def ascent(advantage_BT, prob_B=PROB_B):
    """The expected score-function gradient, sum over completions of p A grad log S."""
    return expected(lambda logp_BT: -advantage_BT * logp_BT, prob_B)


@functools.partial(jax.jit, static_argnums=0)
def frozen(divergence, target_SV, reached_S=REACHED_S):
    """Minus the gradient of sum_s reached(s) D(S || T)(s), the visits held fixed."""
    return _falling(
        lambda logits_SV: (reached_S * _at_states(divergence, logits_SV, target_SV)).sum()
    )


@functools.partial(jax.jit, static_argnums=0)
def visited(divergence, target_SV):
    """Minus the gradient of the same sum, the visits differentiated: E[sum_t f(u_t)] exactly."""
    return _falling(
        lambda logits_SV: (
            visits(logits_SV)[1] * _at_states(divergence, logits_SV, target_SV)
        ).sum()
    )


@functools.partial(jax.jit, static_argnums=0)
def whole(divergence, target_SV):
    """Minus the gradient of the divergence between the distributions of whole completions."""
    log_t_B = jnp.where(MASK_BT, logp_of(target_SV), 0.0).sum(1)

    def between(logits_SV):
        return divergence(jnp.where(MASK_BT, logp_of(logits_SV), 0.0).sum(1), log_t_B).sum()

    return _falling(between)


def value(reward_SV, gamma=1.0):
    """V_S, the expected discounted sum of reward_SV[state, token] from each state on."""
    prob_SV = np.asarray(jnp.exp(log_softmax(STUDENT)), np.float64)
    found = {}
    for i in sorted(range(len(STATES)), key=lambda i: -len(STATES[i])):
        after = [found.get((*STATES[i], v), 0.0) for v in range(V)]
        found[STATES[i]] = (prob_SV[i] * (np.asarray(reward_SV)[i] + gamma * np.array(after))).sum()
    return jnp.array([found[state] for state in STATES], jnp.float32)


def _at_states(divergence, logits_SV, target_SV):
    return divergence(log_softmax(logits_SV), log_softmax(target_SV)).sum(-1)


def _falling(function):
    return -jax.jit(jax.grad(function))(STUDENT)
