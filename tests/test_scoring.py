"""Chunked scoring against all logits at once: values, entropy, gradient, padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import sampler, scoring
from gopd_jax.models import decoder as lm

N_ROWS, WIDTH, LENGTH = 4, 5, 6
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def rollout(make_prompts, n_vocab):
    """Random completions of one to six tokens."""
    draw = np.random.default_rng(0)
    mask_BC = np.arange(LENGTH) < np.array([6, 1, 4, 3])[:, None]
    tokens_BC = draw.integers(0, n_vocab, mask_BC.shape)
    return sampler.assemble(
        make_prompts(N_ROWS, WIDTH),
        jnp.array(np.where(mask_BC, tokens_BC, 0), jnp.int32),
        jnp.array(mask_BC),
        jnp.zeros(mask_BC.shape),
        jnp.ones(N_ROWS, bool),
    )


@pytest.fixture(scope="module")
def score(make_model, n_vocab):
    """score(rollout, chunk=...) -> ((logp_BT, entropy_BT), gradient of a weighted sum of them)."""
    decoder, params = make_model(2, "llama", 1)

    @functools.partial(jax.jit, static_argnames="chunk")
    def run(rollout, weight_BT, *, chunk=2, temperature=TEMPERATURE, n_vocab=n_vocab):
        def total(params):
            found = scoring.score(
                decoder, params, rollout, temperature=temperature, n_vocab=n_vocab, chunk=chunk
            )
            # The entropy is a diagnostic: it must add nothing to the gradient.
            return (weight_BT * (found[0] + found[1])).sum(), found

        grads, found = jax.grad(total, has_aux=True)(params)
        return found, grads

    return run


@pytest.fixture(scope="module")
def oracle(make_model, n_vocab):
    """The same from the logits of all positions at once."""
    decoder, params = make_model(2, "llama", 1)

    @functools.partial(jax.jit, static_argnames="n_vocab")
    def run(rollout, weight_BT, *, temperature=TEMPERATURE, n_vocab=n_vocab):
        def total(params):
            hidden_BLD = lm.hidden(decoder, params, rollout.tokens_BL, rollout.valid_BL)
            logits_BLV = jnp.einsum("bld,vd->blv", hidden_BLD, params["head"], precision="highest")
            logp_BTV = jax.nn.log_softmax(logits_BLV[:, :-1, :n_vocab] / temperature)
            ids_BT1 = rollout.tokens_BL[:, 1:, None]
            logp_BT = jnp.take_along_axis(logp_BTV, ids_BT1, -1)[..., 0]
            entropy_BT = -(jnp.exp(logp_BTV) * logp_BTV).sum(-1)
            found = [jnp.where(rollout.mask_BT, x, 0.0) for x in (logp_BT, entropy_BT)]
            return (weight_BT * found[0]).sum(), tuple(found)

        grads, found = jax.grad(total, has_aux=True)(params)
        return found, grads

    return run


@pytest.fixture(scope="module")
def weight_BT(rollout):
    return jax.random.normal(jax.random.key(1), rollout.mask_BT.shape)


def same(got, want, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


@pytest.mark.parametrize("chunk", [2, 4, 99])
def test_any_chunk_gives_the_log_probs_of_all_logits(rollout, score, oracle, weight_BT, chunk):
    (want, want_grads), (got, grads) = (
        oracle(rollout, weight_BT),
        score(rollout, weight_BT, chunk=chunk),
    )
    same(got, want, 1e-5)
    same(grads, want_grads, 1e-5)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 0.1
    off = ~np.asarray(rollout.mask_BT)
    assert not any(np.asarray(x)[off].any() for x in got)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.0}, {"temperature": 2.5}, {"n_vocab": 68}], ids=str
)
def test_temperature_and_vocabulary_are_those_asked_for(rollout, score, oracle, weight_BT, options):
    want = oracle(rollout, weight_BT, **options)
    same(score(rollout, weight_BT, **options), want, 1e-5)
    usual = oracle(rollout, weight_BT)[0]
    assert all(np.abs(a - b).max() > 1e-2 for a, b in zip(usual, want[0]))


def test_entropy_lies_between_zero_and_that_of_the_uniform(rollout, score, weight_BT, n_vocab):
    hot = score(rollout, weight_BT, temperature=1e4)[0][1]
    cold = score(rollout, weight_BT, temperature=1e-3)[0][1]
    mask_BT = np.asarray(rollout.mask_BT)
    np.testing.assert_allclose(np.asarray(hot)[mask_BT], np.log(n_vocab), atol=1e-5)
    np.testing.assert_allclose(cold, 0, atol=1e-3)


def test_padding_and_what_it_holds_change_nothing(rollout, score, weight_BT):
    want, want_grads = score(rollout, weight_BT)
    junk = rollout.replace(tokens_BL=jnp.where(rollout.valid_BL, rollout.tokens_BL, 10**6))
    same(score(junk, weight_BT), (want, want_grads), 1e-5)

    left, right = 3, 2  # wider prompts, longer completions

    def widen(x):
        return jnp.pad(x, ((0, 0), (left, right)))

    wide = rollout.replace(
        tokens_BL=widen(rollout.tokens_BL),
        valid_BL=widen(rollout.valid_BL),
        mask_BT=widen(rollout.mask_BT),
        logp_BT=widen(rollout.logp_BT),
        n_prompt=rollout.n_prompt + left,
    )
    got, grads = score(wide, widen(weight_BT))
    same([x[:, left:-right] for x in got], list(want), 1e-5)
    assert not any(np.asarray(x)[:, :left].any() or np.asarray(x)[:, -right:].any() for x in got)
    same(grads, want_grads, 1e-5)
