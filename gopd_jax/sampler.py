"""Completions sampled from a model: prefill, then a cached loop that ends when every row has."""

import jax
import jax.numpy as jnp

from gopd_jax.models import decoder as lm
from gopd_jax.types import Rollout


def generate(
    decoder,
    params,
    prompts,
    key,
    *,
    completion_length: int,
    temperature: float,
    eos_ids: tuple[int, ...],
    n_vocab: int,
    greedy: bool = False,
    top_p: float | None = None,
) -> Rollout:
    """Sample one completion for each prompt at `temperature`, from the whole vocabulary.

    prompts: types.Prompts of arrays, tokens_BP left-padded. A row ends with the first of eos_ids,
    which is part of the completion and of the mask, or at completion_length tokens (ended_B False).
    The draw at position t of row b is a function of (key, row_B[b], t) alone: batch, order and
    mesh do not change it. Ids from n_vocab on are padding of the embedding table and cannot be
    drawn. greedy takes the likeliest token and reports its log-prob at `temperature`.
    top_p, of (0, 1], draws from each position's `nucleus` instead; log-probs stay those of the
    whole distribution, so that they are the scorer's. Training leaves it None.
    """
    n_rows, n_prompt = prompts.tokens_BP.shape
    length = n_prompt + completion_length
    keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(prompts.row_B)
    stops_S = jnp.array(eos_ids, jnp.int32)

    def draw(hidden_BD, t):
        logits_BV = lm.logits(decoder, params, hidden_BD) / temperature
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < n_vocab, logits_BV, -jnp.inf)
        logp_BV = jax.nn.log_softmax(logits_BV)
        if greedy:
            token_B = jnp.argmax(logp_BV, -1)
        else:
            draw_keys_B = jax.vmap(lambda k: jax.random.fold_in(k, t))(keys_B)
            drawn_BV = logp_BV if top_p is None else nucleus(logp_BV, top_p)
            token_B = jax.vmap(jax.random.categorical)(draw_keys_B, drawn_BV)
        token_B = token_B.astype(jnp.int32)
        return token_B, pick(logp_BV, token_B)

    def write(arrays, t, token_B, logp_B, done_B):
        tokens_BC, logp_BC, mask_BC = arrays
        tokens_BC = tokens_BC.at[:, t].set(jnp.where(done_B, 0, token_B))
        logp_BC = logp_BC.at[:, t].set(jnp.where(done_B, 0.0, logp_B))
        mask_BC = mask_BC.at[:, t].set(~done_B)
        return (tokens_BC, logp_BC, mask_BC), done_B | (token_B[:, None] == stops_S).any(-1)

    def more(carry):
        t, _, done_B, _, _ = carry
        return (t < completion_length) & ~done_B.all()

    def advance(carry):
        t, token_B, done_B, arrays, cache = carry
        hidden_BD, cache = lm.decode(decoder, params, token_B, cache)
        token_B, logp_B = draw(hidden_BD, t)
        arrays, done_B = write(arrays, t, token_B, logp_B, done_B)
        return t + 1, token_B, done_B, arrays, cache

    hidden_BD, cache = lm.prefill(
        decoder, params, prompts.tokens_BP, prompts.valid_BP, length=length
    )
    shape = (n_rows, completion_length)
    arrays = (jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    token_B, logp_B = draw(hidden_BD, 0)
    arrays, done_B = write(arrays, 0, token_B, logp_B, jnp.zeros(n_rows, bool))
    _, _, ended_B, (tokens_BC, logp_BC, mask_BC), _ = jax.lax.while_loop(
        more, advance, (jnp.int32(1), token_B, done_B, arrays, cache)
    )
    return assemble(prompts, tokens_BC, mask_BC, logp_BC, ended_B)


def assemble(prompts, tokens_BC, mask_BC, logp_BC, ended_B) -> Rollout:
    """Prompts and their completions, wherever these come from, as one Rollout."""
    n_prompt = prompts.tokens_BP.shape[1]
    before = ((0, 0), (n_prompt - 1, 0))  # prediction t speaks of token t + 1
    return Rollout(
        tokens_BL=jnp.concatenate([prompts.tokens_BP, tokens_BC], 1),
        valid_BL=jnp.concatenate([prompts.valid_BP, mask_BC], 1),
        mask_BT=jnp.pad(mask_BC, before),
        logp_BT=jnp.pad(jnp.where(mask_BC, logp_BC, 0.0), before),
        ended_B=ended_B,
        group_B=prompts.group_B,
        task_B=prompts.task_B,
        n_prompt=n_prompt,
        teacher=prompts.teacher,
        reference=prompts.reference,
        lam_B=prompts.lam_B,
    )


def nucleus(logp_xV, top_p: float):
    """logp_xV of the fewest likeliest ids whose probabilities reach top_p, -inf elsewhere.

    Not normalised anew, which a draw does not need. The likeliest id always stays; of equal ones
    the lower id is the likelier. https://arxiv.org/abs/1904.09751
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is above 0 and at most 1, None truncates nothing")
    if top_p == 1:
        return logp_xV  # a sum in float32 can reach 1 before the last ids, which would then go
    order_xV = jnp.argsort(-logp_xV, axis=-1, stable=True)
    sorted_xV = jnp.exp(jnp.take_along_axis(logp_xV, order_xV, -1))
    # An id stays if those before it have not reached top_p yet: the one that crosses it is in.
    before_xV = jnp.cumsum(sorted_xV, -1) - sorted_xV
    kept_xV = (before_xV < top_p).at[..., 0].set(True)
    rank_xV = jnp.argsort(order_xV, axis=-1)
    return jnp.where(jnp.take_along_axis(kept_xV, rank_xV, -1), logp_xV, -jnp.inf)


def pick(values_xV, ids_x):
    """values_xV at ids_x along the last axis, as a masked sum.

    A gather along a vocabulary that is sharded would fetch all of it; a sum is one small reduction.
    """
    hit_xV = jax.lax.broadcasted_iota(jnp.int32, values_xV.shape, values_xV.ndim - 1)
    return jnp.where(hit_xV == ids_x[..., None], values_xV, 0.0).sum(-1)
