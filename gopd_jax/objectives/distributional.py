"""Losses that compare whole distributions at the states the student visited: nats, minimised.

They are differentiated through the student's log-probs, over the support that `supports` chose:
student_xS, target_xS, valid_xS. Each returns loss_x. Their expected gradient over the student's
own samples is that of the sampled, corrected advantage, without its variance.
"""

import jax
import jax.numpy as jnp

from gopd_jax.objectives.divergences import forward_kl, reverse_kl
from gopd_jax.objectives.supports import check_k, rest, supported, top_k
from gopd_jax.spec import table


def exact(student_xS, target_xS, valid_xS, *, divergence):
    """D_f(S || T) = sum over the support of s f(t / s).

    divergence: an entry of DIVERGENCES, its options bound. Its gradient in the logits is
    -S(v) (w(u_v) - E_S w) with w the corrected advantage of f, u = T / S.
    """
    # 0 - 0 where nothing counts: neither a value nor a gradient of what lies there.
    log_s_xS, log_t_xS = (jnp.where(valid_xS, x, 0.0) for x in (student_xS, target_xS))
    return jnp.where(valid_xS, divergence(log_s_xS, log_t_xS), 0.0).sum(-1)


def entropy_gated(
    student_xS,
    target_xS,
    valid_xS,
    student_xV,
    target_xV,
    real_xV,
    *,
    threshold=0.8,
    k=16,
    weight=1.0,
):
    """KL(S || T), and weight * KL(T || S) besides where the target's entropy is above threshold.

    Reverse KL keeps to one mode; where the target itself has many (threshold in nats, strictly
    above) the forward one, over its k likeliest ids and a bucket for the others, spreads the
    student over them. Entropy-aware on-policy distillation, arXiv 2603.07079.
    """
    check_k(k, "k")
    target_V = jnp.where(real_xV, target_xV, 0.0)
    entropy_x = -jnp.where(real_xV, jnp.exp(target_V) * target_V, 0.0).sum(-1)
    uncertain_x = jax.lax.stop_gradient(entropy_x) > threshold

    def likeliest_of_target(student_xV, target_xV, real_xV):
        return top_k(student_xV, target_xV, real_xV, k=k, of="teacher")

    on_target = supported(likeliest_of_target, rest, student_xV, target_xV, real_xV)
    covering_x = exact(*on_target, divergence=forward_kl)
    seeking_x = exact(student_xS, target_xS, valid_xS, divergence=reverse_kl)
    return seeking_x + jnp.where(uncertain_x, weight * covering_x, 0.0)


def ratio_gated(logp_x, target_x, student_xS, target_xS, valid_xS, *, temperature=1.0):
    """g KL(T || S) + (1 - g) KL(S || T), g = sigmoid(log(T / S) / temperature), no gradient in g.

    T / S is that of the sampled token: where the target likes it more than the student does,
    the student is spread over the target; where it likes it less, it is drawn to a mode.
    ValueError for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} divides a log-ratio; give one above 0")
    g_x = jax.nn.sigmoid(jax.lax.stop_gradient(target_x - logp_x) / temperature)
    forward_x = exact(student_xS, target_xS, valid_xS, divergence=forward_kl)
    reverse_x = exact(student_xS, target_xS, valid_xS, divergence=reverse_kl)
    return g_x * forward_x + (1.0 - g_x) * reverse_x


DISTRIBUTIONAL = table(exact, entropy_gated, ratio_gated)
