"""Divergences D_f(S || T) = E_S[f(T / S)] and the token rewards and corrections that follow.

An entry is the perspective of its f in log space, name(log_s, log_t) -> s f(t / s), elementwise,
with s = exp(log_s) and t = exp(log_t): summed over a vocabulary it is the divergence, in nats where
f has a logarithm. So f(u) is the entry at (0, log u). f is convex and f(1) = 0. Entries are
differentiable in both arguments, which must be finite, and are written so that neither value nor
derivative overflows where the true one is a float32. OPD+, arXiv 2606.01039; names after Liese and
Vajda, "On divergences and informations", IEEE Trans. Inf. Theory 52 (2006).
"""

import math

import jax
import jax.numpy as jnp

from gopd_jax.spec import resolve, table


def reverse_kl(log_s, log_t):
    """KL(S || T), f = -ln u."""
    return jnp.exp(log_s) * (log_s - log_t)


def forward_kl(log_s, log_t):
    """KL(T || S), f = u ln u."""
    return jnp.exp(log_t) * (log_t - log_s)


def jsd(log_s, log_t, *, beta=0.5):
    """beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S; 0 < beta < 1.

    beta = 1/2 is Jensen and Shannon's. Generalised by GKD, arXiv 2306.13649.
    """
    log_m = _log_mixture(log_s, log_t, beta, "jsd: beta")
    by_teacher = jnp.exp(log_t) * (log_t - log_m)
    return beta * by_teacher + (1 - beta) * jnp.exp(log_s) * (log_s - log_m)


def skew_reverse(log_s, log_t, *, alpha=0.1):
    """KL(S || (1 - alpha) T + alpha S), 0 < alpha < 1: at most -ln alpha. arXiv 2402.03898."""
    log_m = _log_mixture(log_s, log_t, 1 - alpha, "skew_reverse: 1 - alpha")
    return jnp.exp(log_s) * (log_s - log_m)


def skew_forward(log_s, log_t, *, alpha=0.1):
    """KL(T || alpha T + (1 - alpha) S), 0 < alpha < 1: at most -ln alpha. arXiv 2402.03898."""
    log_m = _log_mixture(log_s, log_t, alpha, "skew_forward: alpha")
    return jnp.exp(log_t) * (log_t - log_m)


def jeffreys(log_s, log_t):
    """KL(S || T) + KL(T || S), f = (u - 1) ln u."""
    return (jnp.exp(log_t) - jnp.exp(log_s)) * (log_t - log_s)


def pearson(log_s, log_t):
    """Pearson's chi-squared, sum (t - s)^2 / s, f = (u - 1)^2."""
    return jnp.exp(2 * log_t - log_s) - 2 * jnp.exp(log_t) + jnp.exp(log_s)


def neyman(log_s, log_t):
    """Neyman's chi-squared, sum (t - s)^2 / t, f = (u - 1)^2 / u."""
    return jnp.exp(2 * log_s - log_t) - 2 * jnp.exp(log_s) + jnp.exp(log_t)


def hellinger(log_s, log_t):
    """Squared Hellinger distance, sum (sqrt t - sqrt s)^2, f = (sqrt u - 1)^2; at most 2."""
    return (jnp.exp(log_t / 2) - jnp.exp(log_s / 2)) ** 2


def total_variation(log_s, log_t):
    """Half the sum of |t - s|, f = |u - 1| / 2, with f'(1) taken as 0; at most 1."""
    gap = jnp.exp(log_t) - jnp.exp(log_s)
    return gap * jnp.sign(gap) / 2  # abs() has derivative 1 at 0


def triangular(log_s, log_t):
    """Le Cam's triangular discrimination, sum (t - s)^2 / (t + s); at most 2."""
    # 4 t s / (t + s) by the sigmoid, whose derivative keeps its digits where tanh's is 1 - 1.
    overlap = 4 * jnp.exp(log_s) * jax.nn.sigmoid(log_t - log_s)
    return jnp.exp(log_t) + jnp.exp(log_s) - overlap


def alpha(log_s, log_t, *, alpha=0.5):
    """Cressie and Read's family, f = (u^a - a u - 1 + a) / (a (a - 1)), a = alpha, not 0 or 1.

    a -> 0 is reverse KL and a -> 1 forward KL; a = 1/2 is twice the squared Hellinger distance,
    a = 2 half of Pearson's and a = -1 half of Neyman's chi-squared.
    """
    if alpha in (0, 1):
        raise ValueError(f"alpha is {alpha}: write {('reverse_kl', 'forward_kl')[int(alpha)]!r}")
    power = jnp.exp((1 - alpha) * log_s + alpha * log_t)
    rest = alpha * jnp.exp(log_t) + (1 - alpha) * jnp.exp(log_s)
    return (power - rest) / (alpha * (alpha - 1))


def mixture(log_s, log_t, *, of=("reverse_kl", "forward_kl"), weights=(0.5, 0.5)):
    """Weighted sum of other entries, which `of` names as a config does; weights > 0."""
    if len(of) != len(weights) or not of or min(weights) <= 0:
        raise ValueError(f"mixture: of = {of} and weights = {weights}; give each a weight > 0")
    parts = [resolve(text, DIVERGENCES)(log_s, log_t) for text in of]
    return sum(weight * part for weight, part in zip(weights, parts))


DIVERGENCES = table(
    reverse_kl,
    forward_kl,
    jsd,
    skew_reverse,
    skew_forward,
    jeffreys,
    pearson,
    neyman,
    hellinger,
    total_variation,
    triangular,
    alpha,
    mixture,
)


def token_reward(divergence, log_u):
    """-f(u) at log_u = log T - log S of a sampled token, any shape: its mean is -D_f(S || T)."""
    return -divergence(jnp.zeros_like(log_u), log_u)


def correction(divergence, log_u):
    """u f'(u) - f'(1), what the gradient of E_S[f(T / S)] has beside the reward's.

    Without it, -f(u) as an advantage ascends something else for every f but reverse KL, where it is
    0. It belongs to the token itself: added after credit, never discounted. f'(1) centres it, and
    as a constant adds nothing to an expected gradient. OPD+, arXiv 2606.01039.
    """
    return _slope(divergence, log_u) - _slope(divergence, jnp.zeros_like(log_u))


def corrected(divergence, log_u):
    """A0 = -f(u) + u f'(u) - f'(1): zero at u = 1 and never decreasing in u.

    token_reward + correction, but for rounding: where f grows like u these two cancel and lose
    log10(u) digits, while A0 is also minus the derivative of s f(t / s) in log s, which does not.
    """

    def by_log_s(log_t):
        zeros = jnp.zeros_like(log_t)
        return jax.jvp(lambda x: divergence(x, log_t), (zeros,), (jnp.ones_like(log_t),))[1]

    return by_log_s(jnp.zeros_like(log_u)) - by_log_s(log_u)


def _slope(divergence, log_u):
    """u f'(u), the derivative of f in log u."""
    zeros = jnp.zeros_like(log_u)
    return jax.jvp(lambda x: divergence(zeros, x), (log_u,), (jnp.ones_like(log_u),))[1]


def _log_mixture(log_s, log_t, weight, name):
    """log(weight t + (1 - weight) s)."""
    if not 0 < weight < 1:
        raise ValueError(f"{name} is {weight:g}; it must be above 0 and below 1")
    return jnp.logaddexp(math.log(weight) + log_t, math.log1p(-weight) + log_s)
