"""Losses per token, to be minimised; differentiable in logp_BT."""

from gopd_jax.spec import table


def policy_gradient(logp_BT, advantage_BT):
    """-A log S, nats: its gradient is minus the score-function estimate of ascent along A."""
    return -advantage_BT * logp_BT


LOSSES = table(policy_gradient)
