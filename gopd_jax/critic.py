"""The value head of GAE-OPD: what a state is worth under the token rewards still to come.

V(s) = E_S[r(s)] + V_phi(s). The first part is the closed form of the state's own expected reward,
-KL(S || T) for plain distillation, and needs no learning; V_phi, a small network on the student's
hidden state, starts at 0 and learns the rest of the Bellman equation
V(s) = E_S[r(s)] + gamma E V(s'). The student's parameters take no part in its gradient.
Generalised advantage estimation is arXiv 1506.02438's; with distillation's reward, a hypothesis of
the survey arXiv 2606.22793. Values, returns and rewards are in nats, [B, T] float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import struct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic:
    """Static options of a value head."""

    learning_rate: float
    width: int
    closed_form: bool
    warmup_steps: int
    value_clip: float | None
    seed: int = 0


@struct.dataclass
class State:
    """A value head and its optimizer."""

    params: dict
    opt_state: optax.OptState


def optimizer(critic: Critic) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(critic.learning_rate))


def init(critic: Critic, n_hidden: int, seed) -> State:
    """A head whose value is 0 at every state, for hidden states of n_hidden features."""
    draw = jax.random.normal(jax.random.key(seed), (n_hidden, critic.width))
    params = {
        "first": draw * n_hidden**-0.5,
        "bias": jnp.zeros(critic.width),
        "last": jnp.zeros(critic.width),
    }
    return State(params=params, opt_state=optimizer(critic).init(params))


def value(params: dict, hidden_xD):
    """V_phi of any leading shape, nats; hidden_xD from the final norm, its gradient stopped."""
    hidden_xD = jax.lax.stop_gradient(hidden_xD).astype(jnp.float32)
    return jax.nn.silu(hidden_xD @ params["first"] + params["bias"]) @ params["last"]


def loss(critic: Critic, value_BT, old_BT, return_BT):
    """1/2 (V - G)^2 a token; G = sg(A + V) is the lambda-return.

    With value_clip, V moves at most so far from its value before the batch, and the larger of the
    two losses counts, so that a clipped V is not rewarded for having moved. old_BT, return_BT carry
    no gradient.
    """
    plain_BT = 0.5 * (value_BT - return_BT) ** 2
    if critic.value_clip is None:
        return plain_BT
    near_BT = old_BT + jnp.clip(value_BT - old_BT, -critic.value_clip, critic.value_clip)
    return jnp.maximum(plain_BT, 0.5 * (near_BT - return_BT) ** 2)


def explained_variance(value_BT, return_BT, mask_BT):
    """1 - Var(G - V) / Var(G) over the tokens: 1 is perfect, 0 as good as a constant.

    0 where the returns do not vary.
    """
    n = jnp.maximum(mask_BT.sum(), 1)

    def variance(x_BT):
        mean = jnp.where(mask_BT, x_BT, 0.0).sum() / n
        return jnp.where(mask_BT, (x_BT - mean) ** 2, 0.0).sum() / n

    total = variance(return_BT)
    return jnp.where(total > 0, 1 - variance(return_BT - value_BT) / jnp.maximum(total, 1e-30), 0.0)
