"""Completions sampled from a model: prefill, then a cached loop that ends when every row has.

Where there are fewer slots than prompts, a slot whose completion has ended takes the next prompt,
so that one long completion does not keep the others' places idle.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from gopd_jax import drawing
from gopd_jax.models import decoder as lm
from gopd_jax.models.cache import Cache
from gopd_jax.models.ops import constrain
from gopd_jax.types import Array, Rollout

# An eighth of the slots take new prompts together: a prefill of a few rows costs nearly as much as
# one of more, and slots that wait for others to end are idle meanwhile.
SHARE = 8


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
    slots: int | None = None,
    n_shards: int = 1,
    buckets: int = 1,
    prompt_buckets: int = 1,
    cache_dtype: str | None = None,
) -> Rollout:
    """Sample one completion for each prompt at `temperature`, from the whole vocabulary.

    prompts: types.Prompts of arrays, tokens_BP left-padded. A row ends with the first of eos_ids,
    which is part of the completion and of the mask, or at completion_length tokens (ended_B False).
    The draw at position t of row b is a function of (key, row_B[b], t) alone: batch, order, slots
    and mesh do not change it. Ids from n_vocab on are padding of the embedding table and cannot be
    drawn. greedy takes the likeliest token and reports its log-prob at `temperature`.
    top_p, of (0, 1], draws from each position's `drawing.nucleus` instead; log-probs stay those of
    the whole distribution, so that they are the scorer's. Training leaves it None.

    slots: rows that are decoded at one time; None: all. n_shards: runs of rows that lie on devices
    of their own, each with its share of the slots. ValueError where it does not divide both.
    The rest is decoder.prefill's; an 8-bit cache, as 8-bit params, is another policy.
    """
    n_rows = prompts.tokens_BP.shape[0]
    slots = n_rows if slots is None else min(slots, n_rows)
    if n_rows % n_shards or slots % n_shards:
        raise ValueError(
            f"{n_rows} rows and {slots} slots do not divide over the mesh's {n_shards} row shards; "
            "choose multiples of it"
        )
    loop = _Loop(
        decoder=decoder,
        params=params,
        prompts=prompts,
        keys_R=jax.vmap(lambda row: jax.random.fold_in(key, row))(prompts.row_B),
        length=completion_length,
        eos_ids=eos_ids,
        choose=drawing.chooser(
            temperature=temperature, n_vocab=n_vocab, greedy=greedy, top_p=top_p
        ),
        shape=(n_shards, n_rows // n_shards, slots // n_shards),
        cached={
            "buckets": buckets,
            "prompt_buckets": prompt_buckets,
            "cache_dtype": cache_dtype,
        },
    )

    def turn(state):
        state = loop.advance(state)
        return state if slots == n_rows else loop.refill(state)

    state = jax.lax.while_loop(loop.unfinished, turn, loop.begin())
    return assemble(prompts, **loop.written(state, state.done_B))


@struct.dataclass
class _State:
    """The loop's state: S slots, and what is written of all rows.

    step: turns so far. A row's token t stands in column (began_B + t) % C of the slots' buffers, so
    that a turn writes one column for all. row_B: each slot's row within its shard. next_G: each
    shard's first row that has no slot yet. out: what rows that gave up their slots had.
    """

    cache: Cache
    step: Array
    row_B: Array
    began_B: Array
    keys_B: Array
    token_B: Array
    done_B: Array
    ended_B: Array
    tokens_BC: Array
    logp_BC: Array
    mask_BC: Array
    next_G: Array
    out: dict[str, Array]


class _Loop:
    """What the turns of one rollout share. shape: (shards, rows of a shard, slots of a shard)."""

    def __init__(self, *, decoder, params, prompts, keys_R, length, eos_ids, choose, shape, cached):
        self.decoder, self.params, self.prompts = decoder, params, prompts
        self.keys_R, self.length, self.choose, self.shape = keys_R, length, choose, shape
        self.cached = cached
        self.stops_S = jnp.array(eos_ids, jnp.int32)

    def of_rows(self, x_R, index_Gi):
        """x_R [rows, ...] at i of each shard's own rows, [G * i, ...]: nothing leaves its shard."""
        x_GR = x_R.reshape(self.shape[0], -1, *x_R.shape[1:])
        found = jax.vmap(lambda x, i: x[i])(x_GR, index_Gi)
        return by_rows(found.reshape(-1, *x_R.shape[1:]))

    def begin(self) -> _State:
        """After the prefill of as many prompts as there are slots, and their first tokens."""
        n_shards, n_rows, n_slots = self.shape
        first_Gs = jnp.broadcast_to(jnp.arange(n_slots, dtype=jnp.int32), (n_shards, n_slots))
        rows = self.prompts.tokens_BP, self.prompts.valid_BP, self.keys_R
        if n_slots < n_rows:
            rows = (self.of_rows(x, first_Gs) for x in rows)
        tokens_BP, valid_BP, keys_B = rows
        total, width = n_shards * n_slots, tokens_BP.shape[1] + self.length
        model = self.decoder, self.params
        cached = self.cached | {"length": width, "all_RP": self.prompts.valid_BP}
        hidden_BD, cache = lm.prefill(*model, tokens_BP, valid_BP, **cached)
        zero_B, none_B = jnp.zeros(total, jnp.int32), jnp.zeros(total, bool)

        def empty(n):
            shape = n, self.length
            dtypes = {"tokens_BC": jnp.int32, "logp_BC": jnp.float32, "mask_BC": bool}
            return {name: jnp.zeros(shape, dtype) for name, dtype in dtypes.items()}

        out = empty(n_shards * n_rows) | {"ended_B": jnp.zeros(n_shards * n_rows, bool)}
        state = _State(
            cache=cache,
            step=jnp.int32(0),
            row_B=first_Gs.reshape(-1),
            began_B=zero_B,
            keys_B=keys_B,
            token_B=zero_B,
            done_B=none_B,
            ended_B=none_B,
            **empty(total),
            next_G=jnp.full(n_shards, n_slots, jnp.int32),
            out=out if n_slots < n_rows else {},
        )
        return self.write(state, *self.drawn(hidden_BD, keys_B, zero_B), ~none_B)

    def unfinished(self, state: _State):
        """Whether a turn is left to make. The bound never binds: whoever counts reads it."""
        _, n_rows, n_slots = self.shape
        waves = -(-n_rows // n_slots)
        turns = self.length - 1 if waves == 1 else waves * (self.length + 2 * SHARE)
        more = ~state.done_B.all() | (state.next_G < n_rows).any()
        return (state.step < turns) & more

    def drawn(self, hidden_BD, keys_B, t_B):
        return self.choose(lm.logits(self.decoder, self.params, hidden_BD), keys_B, t_B)

    def advance(self, state: _State) -> _State:
        """One token more in every slot that has not ended."""
        hidden_BD, cache = lm.decode(self.decoder, self.params, state.token_B, state.cache)
        state = state.replace(cache=cache, step=state.step + 1)
        drawn = self.drawn(hidden_BD, state.keys_B, state.step - state.began_B)
        return self.write(state, *drawn, ~state.done_B)

    def write(self, state: _State, token_B, logp_B, active_B) -> _State:
        """This turn's column of the buffers, where active; other slots stay as they are."""
        start = 0, state.step % self.length

        def put(buffer_BC, x_B):
            old_B1 = jax.lax.dynamic_slice(buffer_BC, start, (len(x_B), 1))
            new_B1 = jnp.where(active_B[:, None], x_B[:, None], old_B1)
            return jax.lax.dynamic_update_slice(buffer_BC, new_B1, start)

        stops_B = (token_B[:, None] == self.stops_S).any(-1)
        over_B = state.step - state.began_B == self.length - 1
        return state.replace(
            token_B=jnp.where(active_B, token_B, state.token_B),
            tokens_BC=put(state.tokens_BC, token_B),
            logp_BC=put(state.logp_BC, logp_B),
            mask_BC=put(state.mask_BC, active_B),
            ended_B=jnp.where(active_B, stops_B, state.ended_B),
            done_B=jnp.where(active_B, stops_B | over_B, state.done_B),
        )

    def refill(self, state: _State) -> _State:
        """Slots that have ended take the next prompts, once enough of a shard's have."""
        n_shards, n_rows, n_slots = self.shape
        lanes = max(n_slots // SHARE, 1)
        free_G = state.done_B.reshape(n_shards, n_slots).sum(1)
        wanted_G = jnp.minimum(lanes, n_rows - state.next_G)
        enough = ((wanted_G > 0) & (free_G >= wanted_G)).any()
        return jax.lax.cond(enough, lambda s: self.admit(s, lanes), lambda s: s, state)

    def admit(self, state: _State, lanes: int) -> _State:
        """Up to `lanes` of each shard's next prompts in slots that have ended."""
        n_shards, n_rows, n_slots = self.shape
        free_Gs = state.done_B.reshape(n_shards, n_slots)
        rank_Gs = jnp.cumsum(free_Gs, 1, dtype=jnp.int32) - 1
        row_Gs = state.next_G[:, None] + rank_Gs
        taken_Gs = free_Gs & (rank_Gs < lanes) & (row_Gs < n_rows)
        taken_B, lane_Gs = taken_Gs.reshape(-1), jnp.clip(rank_Gs, 0, lanes - 1)
        row_Gf = jnp.minimum(state.next_G[:, None] + jnp.arange(lanes), n_rows - 1)
        prompts = self.prompts.tokens_BP, self.prompts.valid_BP, self.keys_R
        tokens_FP, valid_FP, keys_F = (self.of_rows(x, row_Gf) for x in prompts)

        def from_lanes(x_F):
            return self.of_rows(x_F, lane_Gs)

        def fresh(new_B, old):
            return jnp.where(taken_B.reshape(-1, *(1,) * (old.ndim - 1)), new_B, old)

        hidden_FD, cache = lm.admit(
            self.decoder, self.params, tokens_FP, valid_FP, state.cache, taken_B, from_lanes
        )
        drawn = self.drawn(hidden_FD, keys_F, jnp.zeros(keys_F.shape, jnp.int32))
        state = state.replace(
            cache=cache,
            out=self.written(state, taken_B),
            row_B=fresh(row_Gs.reshape(-1), state.row_B),
            began_B=fresh(state.step, state.began_B),
            keys_B=fresh(from_lanes(keys_F), state.keys_B),
            tokens_BC=fresh(0, state.tokens_BC),
            logp_BC=fresh(0.0, state.logp_BC),
            mask_BC=fresh(False, state.mask_BC),
            next_G=state.next_G + taken_Gs.sum(1, dtype=jnp.int32),
        )
        return self.write(state, *map(from_lanes, drawn), taken_B)

    def written(self, state: _State, which_B) -> dict:
        """{name: of all rows}, with what the slots of which_B hold in their rows' places."""
        n_shards, n_rows, n_slots = self.shape
        found = {name: getattr(state, name) for name in ("tokens_BC", "logp_BC", "mask_BC")}
        if n_slots == n_rows:
            return found | {"ended_B": state.ended_B}  # all began in column 0
        column_BC = (state.began_B[:, None] + jnp.arange(self.length)) % self.length
        found = {k: jnp.take_along_axis(x, column_BC, 1) for k, x in found.items()}
        found["ended_B"] = state.ended_B
        # A row beyond the shard's is nobody's, and dropped.
        row_Gs = jnp.where(which_B, state.row_B, n_rows).reshape(n_shards, n_slots)

        def place(out, x):
            parts = (a.reshape(n_shards, -1, *a.shape[1:]) for a in (out, x))
            put = jax.vmap(lambda o, part, row: o.at[row].set(part, mode="drop"))
            return by_rows(put(*parts, row_Gs).reshape(out.shape))

        return {name: place(state.out[name], x) for name, x in found.items()}


def by_rows(x):
    """Held to the layout of a batch, where there is a mesh."""
    return constrain(x, "batch", *(None,) * (x.ndim - 1))


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
