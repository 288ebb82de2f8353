"""Fewer slots than prompts: the same completions, whoever waited for whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import drawing, processes, sampler, sharding
from gopd_jax.models import decoder as lm
from gopd_jax.models.params import logical_axes
from tests.families import MODELS, random_params
from tests.test_sampler import EOS, KEY, STATIC, TEMPERATURE, same

N_ROWS, WIDTH, LENGTH = 24, 5, 12
generate = jax.jit(
    sampler.generate, static_argnums=0, static_argnames=(*STATIC, "slots", "n_shards")
)


@functools.cache
def model(name):
    """A model of tests.families whose completions end at many lengths."""
    params = random_params(MODELS[name])
    return lm.Decoder(MODELS[name]), params | {"embed": 0.3 * params["embed"]}


@pytest.fixture
def sample(make_model, make_prompts, n_vocab):
    def run(name=None, params=None, prompts=None, length=LENGTH, **options):
        decoder, own = make_model() if name is None else model(name)
        defaults = {"eos_ids": EOS, "n_vocab": n_vocab, "temperature": TEMPERATURE}
        return generate(
            decoder,
            own if params is None else params,
            make_prompts(N_ROWS, WIDTH) if prompts is None else prompts,
            KEY,
            completion_length=length,
            **(defaults | options),
        )

    return run


@pytest.mark.parametrize("slots", [1, 3, 10, 23])
@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])  # the latter's windows count positions
def test_slots_change_no_completion(sample, name, slots):
    want = sample(name)
    lengths_B = want.mask_BT.sum(1)
    assert lengths_B.min() <= 2
    assert lengths_B.max() == LENGTH
    same(sample(name, slots=slots), want)


@pytest.mark.parametrize("eos_ids", [tuple(range(61)), ()], ids=["at once", "never"])
def test_rows_that_end_at_once_or_never_pass_through_the_slots(sample, eos_ids):
    same(sample(slots=4, eos_ids=eos_ids), sample(eos_ids=eos_ids))


def test_completions_of_one_token_pass_through_the_slots(sample):
    same(sample(slots=4, length=1), sample(length=1))


def test_greedy_rows_pass_through_the_slots(sample):
    same(sample(slots=4, greedy=True), sample(greedy=True))


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 1, 2)], ids=str)
def test_every_shard_serves_its_own_rows_and_draws_the_same(
    sample, make_prompts, make_mesh, make_model, shape
):
    mesh, prompts = make_mesh(shape), make_prompts(N_ROWS, WIDTH)
    decoder, params = make_model()
    layout = sharding.shardings(mesh, logical_axes(decoder.cfg), sharding.DECODE)
    with sharding.use(mesh):
        got = sample(
            prompts=processes.to_global(mesh, prompts),
            params=jax.device_put(params, layout),
            slots=8,
            n_shards=4,
        )
    same(got, sample())


def test_a_slot_that_ended_takes_the_next_prompt(make_model, make_prompts, monkeypatch, n_vocab):
    """Turns of the loop: those of a queue served by hand, with as many slots."""
    decoder, params = make_model()
    calls, decode = [], lm.decode

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1))
        return decode(*args)

    monkeypatch.setattr(lm, "decode", counted)
    slots = 4
    rollout = jax.jit(
        lambda p: sampler.generate(
            decoder,
            p,
            make_prompts(N_ROWS, WIDTH),
            KEY,
            completion_length=LENGTH,
            temperature=TEMPERATURE,
            eos_ids=EOS,
            n_vocab=n_vocab,
            slots=slots,
        )
    )(params)
    jax.effects_barrier()
    left, turns = np.asarray(rollout.mask_BT.sum(1)).tolist(), 0
    busy, left = left[:slots], left[slots:]
    busy = [n - 1 for n in busy]  # the prefill gave the first token
    while any(busy) or left:
        turns += 1
        busy = [max(n - 1, 0) for n in busy]
        if left and 0 in busy:  # one prompt a turn: an eighth of 4 slots, and at least one
            busy[busy.index(0)] = left.pop(0) - 1
    assert not left
    assert len(calls) == turns < rollout.mask_BT.sum() / slots + LENGTH


def test_slots_that_do_not_divide_over_the_shards_are_refused(sample):
    with pytest.raises(ValueError, match=r"24 rows and 6 slots do not divide over .* 4 row shards"):
        sample(slots=6, n_shards=4)


# --- the draw


def test_a_draw_inverts_the_cumulative_distribution():
    """Uniform numbers on a grid fall on each id as often as its probability says."""
    p_V = np.random.default_rng(0).dirichlet(np.full(12, 0.5))
    p_V[[0, 5, 11]] = 0
    grid = (np.arange(200) + 0.5) / 200
    uniform_B2 = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    p_BV = jnp.broadcast_to(jnp.array(3 * p_V), (len(uniform_B2), 12))  # any total
    ids_B = np.asarray(drawing.draw(p_BV, jnp.array(uniform_B2)))
    counts_V = np.bincount(ids_B, minlength=12) / len(ids_B)
    np.testing.assert_allclose(counts_V, p_V / p_V.sum(), atol=0.012)
    assert not counts_V[[0, 5, 11]].any()


@pytest.mark.parametrize("n_ids", [1, 61, 68, 512, 151_936])
def test_no_draw_takes_an_id_without_mass(n_ids):
    edge = np.float32(1 - 2**-24)
    uniform_B2 = jnp.array([[0, 0], [edge, edge], [0, edge], [edge, 0]], jnp.float32)
    draw = np.random.default_rng(1)
    p_BV = np.where(draw.random((4, n_ids)) < 0.02, draw.random((4, n_ids)), 0).astype(np.float32)
    p_BV[:, draw.integers(n_ids)] = 1e-30  # one at least, however rare
    ids_B = np.asarray(drawing.draw(jnp.array(p_BV), uniform_B2))
    assert (p_BV[np.arange(4), ids_B] > 0).all()


def test_ids_rarer_than_a_float_s_bits_are_drawn_as_often_as_they_should_be():
    """4096 ids of 2^-30 beside a frequent one: one number of 24 bits would miss most of them."""
    p_V = np.full(4096, 2.0**-30, np.float32)
    p_V[77] = 1
    n = 4096
    # Uniform numbers that fall into block 64's share of the cumulative sum, by its mass of 2^-25.
    first = np.full(n, np.float32(1 - 2**-24))
    second = ((np.arange(n) + 0.5) / n).astype(np.float32)
    uniform_B2 = jnp.array(np.stack([first, second], 1))
    ids_B = np.asarray(drawing.draw(jnp.broadcast_to(p_V, (n, 4096)), uniform_B2))
    assert len(set(ids_B.tolist())) == 4096 // 128  # every id of the block
