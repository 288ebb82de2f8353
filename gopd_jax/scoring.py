"""Log-probs of a rollout's tokens under a model, without ever holding its logits.

The language-model head runs over chunks of positions and is recomputed in the backward pass: one
row of 4096 positions of Qwen3 would otherwise need 2.3 GiB of logits, twice that with gradient.
"""

import jax
import jax.numpy as jnp

from gopd_jax.models import decoder as lm
from gopd_jax.sampler import pick


def score(decoder, params, rollout, *, temperature: float, n_vocab: int, chunk: int, view=None):
    """(logp_BT, entropy_BT) of the sampled tokens: float32 nats, 0 off the mask.

    view: the prompts as this model reads them (types.View); None: as the student does. The
    completion and the positions of the result are the rollout's in either case. Differentiable in
    params through logp_BT; entropy_BT carries no gradient. `chunk` positions have logits at one
    time; the result does not depend on it. Ids from n_vocab on have no mass.
    """
    hidden_BCD, ids_BC = _hidden(decoder, params, rollout, view)
    options = {"temperature": temperature, "n_vocab": n_vocab, "chunk": chunk}
    logp_BC, entropy_BC = head_chunks(decoder, params, hidden_BCD, ids_BC, **options)
    mask_BT = rollout.mask_BT
    logp_BT, entropy_BT = (_on_positions(rollout, x) for x in (logp_BC, entropy_BC))
    return jnp.where(mask_BT, logp_BT, 0.0), jnp.where(mask_BT, entropy_BT, 0.0)


def _hidden(decoder, params, rollout, view):
    """(hidden_BCD that predict the completion, its ids_BC), after the model's own prompt."""
    n_prompt, tokens_BL, valid_BL = rollout.n_prompt, rollout.tokens_BL, rollout.valid_BL
    ids_BC, mask_BC = tokens_BL[:, n_prompt:], valid_BL[:, n_prompt:]
    if view is not None:
        tokens_BL = jnp.concatenate([view.tokens_BP, ids_BC], 1)
        valid_BL = jnp.concatenate([view.valid_BP, mask_BC], 1)
    hidden_BLD = lm.hidden(decoder, params, tokens_BL, valid_BL)
    # Position t predicts token t + 1: from the prompt's last position to the last but one.
    first = tokens_BL.shape[1] - ids_BC.shape[1] - 1
    return hidden_BLD[:, first:-1], ids_BC


def _on_positions(rollout, values_BC):
    """Values of the completion's tokens at the rollout's positions: _BC -> _BT."""
    return jnp.pad(values_BC, ((0, 0), (rollout.n_prompt - 1, 0)))


def head_chunks(decoder, params, hidden_BCD, ids_BC, *, temperature, n_vocab, chunk):
    """(logp_BC of ids_BC, entropy_BC) from hidden states, `chunk` positions at a time."""
    n_rows, n_positions = ids_BC.shape
    chunk = min(chunk, n_positions)
    n_chunks = -(-n_positions // chunk)
    missing = n_chunks * chunk - n_positions
    hidden_BCD = jnp.pad(hidden_BCD, ((0, 0), (0, missing), (0, 0)))
    ids_BC = jnp.pad(ids_BC, ((0, 0), (0, missing)))

    def split(x):
        return x.reshape(n_rows, n_chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def head(pair):
        hidden_BcD, ids_Bc = pair
        logits_BcV = lm.logits(decoder, params, hidden_BcD) / temperature
        real = jnp.arange(logits_BcV.shape[-1]) < n_vocab
        logp_BcV = jax.nn.log_softmax(jnp.where(real, logits_BcV, -jnp.inf))
        still_BcV = jax.lax.stop_gradient(logp_BcV)
        entropy_Bc = -jnp.where(real, jnp.exp(still_BcV) * still_BcV, 0.0).sum(-1)
        return pick(logp_BcV, ids_Bc), entropy_Bc

    logp, entropy = jax.lax.map(head, (split(hidden_BCD), split(ids_BC)))

    def join(x):
        return x.swapaxes(0, 1).reshape(n_rows, n_chunks * chunk)[:, :n_positions]

    return join(logp), join(entropy)


def mass(decoder, params, rollout, ids, *, temperature: float, n_vocab: int, chunk: int, view=None):
    """Probability_BT of any of `ids` in place of each completion token, 0 off the mask.

    The arguments are those of `score`.
    """
    probability_BT = jnp.zeros(rollout.mask_BT.shape)
    hidden_BCD, _ = _hidden(decoder, params, rollout, view)
    for i in ids:
        ids_BC = jnp.full(hidden_BCD.shape[:2], i, jnp.int32)
        options = {"temperature": temperature, "n_vocab": n_vocab, "chunk": chunk}
        logp_BC, _ = head_chunks(decoder, params, hidden_BCD, ids_BC, **options)
        probability_BT += jnp.exp(_on_positions(rollout, logp_BC))
    return jnp.where(rollout.mask_BT, probability_BT, 0.0)
