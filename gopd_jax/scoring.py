"""Log-probs of a rollout's tokens under a model, without ever holding its logits.

The language-model head runs over chunks of positions and is recomputed in the backward pass: one
row of 4096 positions of Qwen3 would otherwise need 2.3 GiB of logits, twice that with gradient.
"""

import jax
import jax.numpy as jnp

from gopd_jax import sharding
from gopd_jax.drawing import pick
from gopd_jax.models import decoder as lm
from gopd_jax.models.ops import constrain, shards


def score(decoder, params, rollout, *, temperature: float, n_vocab: int, chunk: int, view=None):
    """(logp_BT, entropy_BT) of the sampled tokens: float32 nats, 0 off the mask.

    view: the prompts as this model reads them (types.View); None: as the student does. The
    completion and the positions of the result are the rollout's in either case. Differentiable in
    params through logp_BT; entropy_BT carries no gradient. `chunk` positions have logits at one
    time; the result does not depend on it. Ids from n_vocab on have no mass.
    """
    hidden_BCD, ids_BC = hidden(decoder, params, rollout, view)
    options = {"temperature": temperature, "n_vocab": n_vocab, "chunk": chunk}
    logp_BC, entropy_BC = head_chunks(decoder, params, hidden_BCD, ids_BC, **options)
    mask_BT = rollout.mask_BT
    logp_BT, entropy_BT = (on_positions(rollout, x) for x in (logp_BC, entropy_BC))
    return jnp.where(mask_BT, logp_BT, 0.0), jnp.where(mask_BT, entropy_BT, 0.0)


def hidden(decoder, params, rollout, view, *, after: bool = False):
    """(hidden_BCD that predict the completion, its ids_BC), after the model's own prompt.

    after: one more state, behind the last token, with an id that means nothing. Where positions lie
    on several devices there are more of these, to `state_width`.
    """
    n_prompt, tokens_BL, valid_BL = rollout.n_prompt, rollout.tokens_BL, rollout.valid_BL
    ids_BC, mask_BC = tokens_BL[:, n_prompt:], valid_BL[:, n_prompt:]
    if view is not None:
        tokens_BL = jnp.concatenate([view.tokens_BP, ids_BC], 1)
        valid_BL = jnp.concatenate([view.valid_BP, mask_BC], 1)
    # Position t predicts token t + 1: from the prompt's last position to the last but one.
    first = tokens_BL.shape[1] - ids_BC.shape[1] - 1
    if shards("length") > 1:
        width = state_width(ids_BC.shape[1])
        missing = (0, 0), (0, first + width - tokens_BL.shape[1])
        hidden_BLD = lm.hidden(
            decoder, params, jnp.pad(tokens_BL, missing), jnp.pad(valid_BL, missing)
        )
        ids_BC = jnp.pad(ids_BC, ((0, 0), (0, width - ids_BC.shape[1])))
        return constrain(hidden_BLD[:, first:], "batch", "length", None), ids_BC
    hidden_BLD = lm.hidden(decoder, params, tokens_BL, valid_BL)
    if after:
        return hidden_BLD[:, first:], jnp.pad(ids_BC, ((0, 0), (0, 1)))
    return hidden_BLD[:, first:-1], ids_BC


def state_width(length: int) -> int:
    """States of completions of that length, with the one behind it: a multiple of the shards."""
    return length + 1 + -(length + 1) % shards("length")


def on_positions(rollout, values_BC):
    """Values of the completion's tokens at the rollout's positions: _BC -> _BT."""
    values_BC = values_BC[:, : rollout.tokens_BL.shape[1] - rollout.n_prompt]
    return jnp.pad(values_BC, ((0, 0), (rollout.n_prompt - 1, 0)))


def in_chunks(function, weights, arrays, of_rows=None, *, chunk: int, apart: bool = True):
    """function(weights, arrays, of_rows) of `chunk` positions at a time, made again in the
    backward pass.

    arrays: a tree of [B, C, ...]; function takes such a tree of fewer positions and returns one of
    [B, c]. It must treat every position by itself: the last chunk is filled up with zeros.
    of_rows: a tree of [B, ...]. weights: what it uses besides, whole at every row shard. apart:
    whether it treats every row by itself, too, and may be given those of one shard.
    """

    def one_shard(weights, arrays, of_rows):
        return _in_chunks(lambda part: function(weights, part, of_rows), arrays, chunk=chunk)

    return sharding.over_shards(one_shard, weights, arrays, of_rows, apart=apart)


def _in_chunks(function, arrays, *, chunk):
    n_rows, n_positions = jax.tree.leaves(arrays)[0].shape[:2]
    chunk = min(chunk, n_positions)
    n_chunks = -(-n_positions // chunk)
    missing = n_chunks * chunk - n_positions

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(n_rows, n_chunks, chunk, *x.shape[2:]).swapaxes(0, 1)

    def join(x):
        x = x.swapaxes(0, 1).reshape(n_rows, n_chunks * chunk, *x.shape[3:])
        return x[:, :n_positions]

    found = jax.lax.map(jax.checkpoint(function), jax.tree.map(split, arrays))
    return jax.tree.map(join, found)


def log_probs(decoder, params, hidden_xD, *, temperature: float, n_vocab: int):
    """float32 log-probs over the vocabulary, -inf from id n_vocab on: call it in chunks."""
    logits_xV = lm.logits(decoder, params, hidden_xD) / temperature
    real_V = jnp.arange(logits_xV.shape[-1]) < n_vocab
    return jax.nn.log_softmax(jnp.where(real_V, logits_xV, -jnp.inf))


def entropy(logp_xV, real_V):
    """-sum p log p, nats, without a gradient."""
    still_xV = jax.lax.stop_gradient(logp_xV)
    return -jnp.where(real_V, jnp.exp(still_xV) * still_xV, 0.0).sum(-1)


def head_chunks(decoder, params, hidden_BCD, ids_BC, *, temperature, n_vocab, chunk):
    """(logp_BC of ids_BC, entropy_BC) from hidden states, `chunk` positions at a time."""

    def head(weights, arrays, _):
        hidden_BcD, ids_Bc = arrays
        logp_BcV = log_probs(decoder, weights, hidden_BcD, temperature=temperature, n_vocab=n_vocab)
        real_V = jnp.arange(logp_BcV.shape[-1]) < n_vocab
        return pick(logp_BcV, ids_Bc), entropy(logp_BcV, real_V)

    weights = lm.head_params(decoder, params)
    return in_chunks(head, weights, (hidden_BCD, ids_BC), chunk=chunk)


def mass(decoder, params, rollout, ids, *, temperature: float, n_vocab: int, chunk: int, view=None):
    """Probability_BT of any of `ids` in place of each completion token, 0 off the mask.

    The arguments are those of `score`.
    """
    probability_BT = jnp.zeros(rollout.mask_BT.shape)
    hidden_BCD, _ = hidden(decoder, params, rollout, view)
    for i in ids:
        ids_BC = jnp.full(hidden_BCD.shape[:2], i, jnp.int32)
        options = {"temperature": temperature, "n_vocab": n_vocab, "chunk": chunk}
        logp_BC, _ = head_chunks(decoder, params, hidden_BCD, ids_BC, **options)
        probability_BT += jnp.exp(on_positions(rollout, logp_BC))
    return jnp.where(rollout.mask_BT, probability_BT, 0.0)
