"""Sampling against exact probabilities, the scorer, and other batches, paddings and meshes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import drawing, processes, sampler, scoring, sharding
from gopd_jax.models import decoder as lm
from gopd_jax.models.params import logical_axes
from gopd_jax.types import Prompts, Rollout

N_ROWS, WIDTH, LENGTH = 8, 5, 6
EOS = tuple(range(10))
KEY = jax.random.key(11)
TEMPERATURE = 0.7
STATIC = ("completion_length", "temperature", "eos_ids", "n_vocab", "greedy")
generate = jax.jit(sampler.generate, static_argnums=0, static_argnames=STATIC)


@pytest.fixture
def sample(make_model, n_vocab):
    """sample(prompts, **options) -> Rollout of the tiny student."""

    def run(prompts, key=KEY, params=None, **options):
        decoder, own = make_model()
        defaults = {"completion_length": LENGTH, "temperature": TEMPERATURE}
        defaults |= {"eos_ids": EOS, "n_vocab": n_vocab}
        return generate(
            decoder, own if params is None else params, prompts, key, **(defaults | options)
        )

    return run


def full_logp(decoder, params, rollout, *, n_vocab, temperature=TEMPERATURE):
    """Log-probs of every token at every position, from all logits at once."""
    hidden_BLD = lm.hidden(decoder, params, rollout.tokens_BL, rollout.valid_BL)
    logits_BLV = lm.logits(decoder, params, hidden_BLD)[..., :n_vocab]
    return jax.nn.log_softmax(logits_BLV / temperature)[:, :-1]


def same(got, want):
    """The same rollouts; log-probs to rounding."""
    for field in ("tokens_BL", "mask_BT", "ended_B"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, atol=1e-5)


def completions(rollout):
    return Rollout(
        tokens_BL=rollout.tokens_BL[:, rollout.n_prompt :],
        valid_BL=rollout.valid_BL[:, rollout.n_prompt :],
        mask_BT=rollout.mask_BT[:, rollout.n_prompt - 1 :],
        logp_BT=rollout.logp_BT[:, rollout.n_prompt - 1 :],
        ended_B=rollout.ended_B,
        group_B=rollout.group_B,
        task_B=rollout.task_B,
        n_prompt=0,
    )


def take(tree, rows):
    return jax.tree.map(lambda x: x[rows], tree)


def test_masks_end_with_the_end_token_or_at_the_length(sample, make_prompts):
    prompts = make_prompts(N_ROWS, WIDTH)
    rollout = jax.device_get(sample(prompts))
    part = completions(rollout)
    seen = set()
    for tokens, mask, ended in zip(part.tokens_BL, part.mask_BT, part.ended_B):
        stops = np.flatnonzero(np.isin(tokens[mask], EOS))
        n_tokens = mask.sum()
        assert mask[:n_tokens].all()
        assert stops.tolist() == ([n_tokens - 1] if ended else [])
        assert ended or n_tokens == LENGTH
        assert not tokens[n_tokens:].any()
        seen.add((bool(ended), bool(n_tokens == LENGTH)))
    assert {(True, False), (False, True)} <= seen
    assert not rollout.mask_BT[:, : WIDTH - 1].any()
    assert not rollout.logp_BT[~rollout.mask_BT].any()
    assert (rollout.logp_BT[rollout.mask_BT] < 0).all()
    np.testing.assert_array_equal(rollout.tokens_BL[:, :WIDTH], prompts.tokens_BP)
    np.testing.assert_array_equal(rollout.valid_BL[:, :WIDTH], prompts.valid_BP)
    np.testing.assert_array_equal(part.valid_BL, part.mask_BT)


def test_log_probs_are_the_scorers(sample, make_prompts, make_model, n_vocab):
    decoder, params = make_model()
    rollout = sample(make_prompts(N_ROWS, WIDTH))
    logp_BT, _ = jax.jit(
        lambda p: scoring.score(
            decoder, p, rollout, temperature=TEMPERATURE, n_vocab=n_vocab, chunk=4
        )
    )(params)
    np.testing.assert_allclose(rollout.logp_BT, logp_BT, atol=1e-5)


def test_a_row_depends_on_nothing_but_itself(sample, make_prompts):
    """Not on the order of rows, on the other rows, on how many there are, or on padding."""
    prompts = make_prompts(N_ROWS, WIDTH)
    want = sample(prompts)
    order = np.random.default_rng(0).permutation(N_ROWS)
    same(sample(take(prompts, order)), take(want, order))

    first, last = slice(None, N_ROWS // 2), slice(N_ROWS // 2, None)
    changed = sample(prompts.replace(tokens_BP=prompts.tokens_BP.at[first].set(7)))
    same(take(changed, last), take(want, last))
    assert (changed.tokens_BL[first, WIDTH:] != want.tokens_BL[first, WIDTH:]).any()

    same(sample(take(prompts, slice(2, 5))), take(want, slice(2, 5)))
    same(completions(sample(make_prompts(N_ROWS, WIDTH + 4))), completions(want))


def test_another_key_or_row_number_draws_anew(sample, make_prompts):
    prompts = make_prompts(N_ROWS, WIDTH)
    want = sample(prompts)
    for changed in (
        sample(prompts, key=jax.random.key(12)),
        sample(prompts.replace(row_B=prompts.row_B + 1)),
    ):
        assert (changed.tokens_BL != want.tokens_BL).any(1).sum() >= N_ROWS - 2


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_every_mesh_draws_the_same(sample, make_prompts, make_mesh, make_model, shape):
    prompts = make_prompts(N_ROWS, WIDTH)
    mesh = make_mesh(shape)
    decoder, params = make_model()
    layout = sharding.shardings(mesh, logical_axes(decoder.cfg), sharding.DECODE)
    with sharding.use(mesh):
        got = sample(processes.to_global(mesh, prompts), params=jax.device_put(params, layout))
    same(got, sample(prompts))


def test_whole_completions_have_their_exact_probabilities(make_model):
    """Every completion of at most three of four tokens, drawn 4096 times, by chi-square."""
    decoder, params = make_model()
    n_vocab, length, eos, n_rows = 4, 3, 1, 4096
    options = {"completion_length": length, "temperature": 1.5, "eos_ids": (eos,)}
    head = jnp.array([[5, 17, 40]])

    def prompts(n):
        count = jnp.arange(n)
        return Prompts(
            tokens_BP=jnp.tile(head, (n, 1)),
            valid_BP=jnp.ones((n, 3), bool),
            task_B=0 * count,
            group_B=0 * count,
            row_B=count,
        )

    rollout = generate(decoder, params, prompts(n_rows), KEY, n_vocab=n_vocab, **options)
    drawn = [tuple(t[m]) for t, m in zip(*map(np.asarray, _completion(rollout)))]

    every = [
        tokens
        for n in range(1, length + 1)
        for tokens in itertools.product(range(n_vocab), repeat=n)
        if eos not in tokens[:-1] and (tokens[-1] == eos or n == length)
    ]
    padded = np.array([tokens + (0,) * (length - len(tokens)) for tokens in every])
    mask = np.arange(length) < np.array([len(tokens) for tokens in every])[:, None]
    listed = sampler.assemble(
        prompts(len(every)), jnp.array(padded), jnp.array(mask), jnp.zeros(mask.shape), mask[:, 0]
    )

    def expected(temperature):
        logp_BTV = full_logp(decoder, params, listed, n_vocab=n_vocab, temperature=temperature)
        logp_BT = np.take_along_axis(np.asarray(logp_BTV)[:, 2:], padded[..., None], -1)[..., 0]
        return n_rows * np.exp((logp_BT * mask).sum(1))

    counts = np.array([drawn.count(tokens) for tokens in every])
    assert counts.sum() == n_rows  # nothing else was drawn
    np.testing.assert_allclose(expected(1.5).sum(), n_rows, rtol=1e-4)
    assert len(every) == 1 + 3 + 9 * 4
    assert (expected(1.5) > 5).mean() > 0.8
    # Of at most 39 degrees of freedom: 39 +- 9, above 73 once in a thousand.
    assert chi_square(counts, expected(1.5)) < 73
    assert chi_square(counts, expected(1.4)) > 73  # as small an error of temperature is seen


def _completion(rollout):
    part = completions(rollout)
    return part.tokens_BL, part.mask_BT


@pytest.mark.parametrize("n_ids", [9001, 2 * 9001, 128 * 71])
def test_rare_ids_of_a_vocabulary_of_any_size_are_told_apart(n_ids):
    # Rarer than the step of one uniform number: by that alone some were drawn twice as often.
    p_V = jnp.full(n_ids, 1e-7).at[0].set(1 - 1e-3)
    low, n, counts = 1 - 1e-7 * (n_ids - 1), 40_000, np.zeros(n_ids)
    steps = np.random.default_rng(0).integers(int(low * 2**24) + 1, 2**24, n) / 2**24
    other = np.random.default_rng(1).random(n)
    uniform_N2 = jnp.array(np.stack([steps, other], 1), jnp.float32)
    draw = jax.jit(lambda u_B2: drawing.draw(jnp.broadcast_to(p_V, (1000, n_ids)), u_B2))
    for part in jnp.split(uniform_N2, n // 1000):
        counts += np.bincount(draw(part), minlength=n_ids)
    rare = counts[200:]  # the first blocks are partly the likely id's
    want = rare.sum() / len(rare)
    assert rare.sum() > 0.9 * n
    assert ((rare - want) ** 2 / want).mean() < 1.1


def chi_square(counts, expected):
    """Pearson's, with the bins that expect fewer than five joined into one."""
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    return ((counts - expected) ** 2 / expected).sum()


def test_first_tokens_follow_the_softmax_of_the_forward_pass(
    sample, make_prompts, n_vocab, make_model
):
    decoder, params = make_model()
    n_rows = 4096
    one = take(make_prompts(N_ROWS, WIDTH), np.full(n_rows, 3))
    rollout = sample(one.replace(row_B=jnp.arange(n_rows)), completion_length=1)
    alone = take(rollout, slice(0, 1))
    logp_V = full_logp(decoder, params, alone, n_vocab=n_vocab)[0, WIDTH - 1]
    counts = np.bincount(rollout.tokens_BL[:, WIDTH], minlength=n_vocab)
    expected = n_rows * np.exp(np.asarray(logp_V, np.float64))
    # Chi-square of 60 degrees of freedom: 60 +- 11, above 100 once in a thousand.
    assert chi_square(counts, expected) < 100
    np.testing.assert_allclose(
        rollout.logp_BT[:, -1], logp_V[rollout.tokens_BL[:, WIDTH]], atol=1e-5
    )


def test_greedy_takes_the_argmax_of_the_forward_pass(sample, make_prompts, make_model, n_vocab):
    decoder, params = make_model()
    rollout = sample(make_prompts(N_ROWS, WIDTH), greedy=True, eos_ids=(0,))
    logp_BTV = full_logp(decoder, params, rollout, n_vocab=n_vocab)
    mask_BT = np.asarray(rollout.mask_BT)
    np.testing.assert_array_equal(
        np.argmax(logp_BTV, -1)[mask_BT], rollout.tokens_BL[:, 1:][mask_BT]
    )
    np.testing.assert_allclose(np.max(logp_BTV, -1)[mask_BT], rollout.logp_BT[mask_BT], atol=1e-5)


def test_padding_ids_of_the_embedding_are_never_drawn(make_model, make_prompts, n_vocab):
    """Even where their logits are the highest by far."""
    decoder, params = make_model(2, "llama", 1)
    params = params | {"head": params["head"].at[n_vocab:].set(0)}
    loud = params | {"head": params["head"].at[n_vocab:].mul(0).at[n_vocab:].add(9.0)}
    options = {"completion_length": LENGTH, "temperature": 1.0, "eos_ids": (0,), "n_vocab": n_vocab}
    prompts = make_prompts(N_ROWS, WIDTH)
    got = generate(decoder, loud, prompts, KEY, **options)
    assert (got.tokens_BL < n_vocab).all()
    same(got, generate(decoder, params, prompts, KEY, **options))


def test_a_pad_id_that_is_the_end_token_does_no_harm(sample, make_prompts):
    prompts = make_prompts(N_ROWS, WIDTH)
    padded = prompts.replace(tokens_BP=jnp.where(prompts.valid_BP, prompts.tokens_BP, 0))
    want = sample(prompts, eos_ids=(0,))
    got = sample(padded, eos_ids=(0,))
    same(completions(got), completions(want))
    # Nor do end tokens inside a prompt, as chat templates have them.
    inside = sample(padded.replace(tokens_BP=padded.tokens_BP.at[:, -2].set(0)), eos_ids=(0,))
    assert inside.mask_BT[:, WIDTH - 1].all()
    assert inside.mask_BT.sum() > 3 * N_ROWS


@pytest.mark.parametrize("eos_ids", [tuple(range(61)), EOS, ()], ids=["at once", "some", "never"])
def test_decoding_stops_with_the_longest_completion(
    make_model, make_prompts, monkeypatch, n_vocab, eos_ids
):
    decoder, params = make_model()
    calls = []

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return decode(*args)

    decode = lm.decode
    monkeypatch.setattr(lm, "decode", counted)
    rollout = jax.jit(
        lambda p: sampler.generate(
            decoder,
            p,
            take(make_prompts(N_ROWS, WIDTH), slice(0, 2)),
            KEY,
            completion_length=LENGTH,
            temperature=TEMPERATURE,
            eos_ids=eos_ids,
            n_vocab=n_vocab,
        )
    )(params)
    jax.effects_barrier()
    longest = int(rollout.mask_BT.sum(1).max())
    assert len(calls) == longest - 1
    assert longest == {61: 1, 0: LENGTH}.get(len(eos_ids), longest)
    assert rollout.ended_B.tolist() == ([False] * 2 if not eos_ids else rollout.ended_B.tolist())
    assert not rollout.tokens_BL[:, WIDTH + longest :].any()


def test_assembling_places_completions_after_their_prompts(make_prompts):
    prompts = make_prompts(2, WIDTH)
    mask_BC = jnp.array([[True, True, False], [True, False, False]])
    rollout = sampler.assemble(
        prompts, jnp.array([[7, 8, 9], [6, 5, 4]]), mask_BC, jnp.full((2, 3), -1.5), mask_BC[:, 1]
    )
    assert rollout.n_prompt == WIDTH
    assert rollout.tokens_BL[:, WIDTH:].tolist() == [[7, 8, 9], [6, 5, 4]]
    # The prompt's last position predicts the first token of the completion.
    want_BT = [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0]]
    np.testing.assert_array_equal(rollout.mask_BT, np.array(want_BT, bool))
    np.testing.assert_array_equal(rollout.logp_BT, -1.5 * np.array(want_BT))
    assert rollout.ended_B.tolist() == [True, False]


def test_picking_is_indexing():
    values_BV = jax.random.normal(KEY, (3, 2, 7)).at[0, 0, 3].set(-jnp.inf)
    ids_B = jnp.array([[0, 6], [3, 2], [5, 5]])
    want_B = np.take_along_axis(np.asarray(values_BV), np.asarray(ids_B)[..., None], -1)[..., 0]
    np.testing.assert_array_equal(drawing.pick(values_BV, ids_B), want_B)
