"""Completions against the scorer, torch's greedy ones, other batches and meshes; the nucleus."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import command, drawing, generate, microworld, sampler, score

BASE = microworld.path("base")
PROMPTS = [
    "What is 2 + 3 * 4?",
    "Add 7 and 8.",
    "A bus has 11 people; 6 groups of 9 get on, then 18 get off. How many?",
]
LENGTH = 6
OPTIONS = {"max_tokens": LENGTH, "seed": 3, "n": 3, "batch": 4}


@pytest.fixture(scope="module")
def data():
    """Rows of each form, in two buckets of width."""
    rows = [{"prompt": text, "id": i} for i, text in enumerate(PROMPTS)]
    return [*rows, {"messages": [{"role": "user", "content": "hi"}]}, {"prompt_ids": [5, 6, 7]}]


@pytest.fixture(scope="module")
def want(model, data):
    return generate.generate_rows(model, data, **OPTIONS)


def same(got, want, atol=2e-5):
    """The same rows; log-probs to rounding."""
    assert len(got) == len(want)
    for a, b in zip(got, want):
        numbers = ("logprobs", "sum")
        assert {k: a[k] for k in a if k not in numbers} == {k: b[k] for k in b if k not in numbers}
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], rtol=0, atol=atol)


def test_rows_are_those_of_the_data_and_end_as_they_say(model, data, want):
    chat = model.tokenizer
    assert [(row["index"], row["sample"]) for row in want] == [
        (i, j) for i in range(len(data)) for j in range(3)
    ]
    assert [row["id"] for row in want[::3]] == [0, 1, 2, None, None]
    assert [row["prompt_form"] for row in want[::3]] == ["chat"] * 4 + ["ids"]
    assert want[0]["prompt_ids"] == chat.render([{"role": "user", "content": PROMPTS[0]}])
    assert {len(row["prompt_ids"]) > 32 for row in want} == {True, False}
    for row in want:
        ids = row["token_ids"]
        ends = [i for i, token in enumerate(ids) if token in chat.eos_ids]
        assert ends == ([len(ids) - 1] if row["finish_reason"] == "stop" else [])
        assert row["finish_reason"] == "stop" or len(ids) == LENGTH
        assert len(ids) == len(row["logprobs"])
        assert row["text"] == chat.decode(ids)
        assert row["sum"] == pytest.approx(sum(row["logprobs"]), abs=1e-9)
    assert {row["finish_reason"] for row in want} == {"stop", "length"}
    assert len({tuple(row["token_ids"]) for row in want}) > 12  # samples differ


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"top_p": 0.6}, {"temperature": 0.0, "n": 1}],
    ids=str,
)
def test_log_probs_are_what_score_says_of_the_rows(model, data, options):
    made = generate.generate_rows(model, data[:2], **(OPTIONS | options))
    scored = score.score_rows(model, made, temperature=options.get("temperature") or 1.0, batch=4)
    for a, b in zip(made, scored, strict=True):
        assert b["token_ids"] == a["token_ids"]
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch", [1, 16])
def test_batches_change_nothing(model, data, want, batch):
    same(generate.generate_rows(model, data, **(OPTIONS | {"batch": batch})), want)


def test_the_other_rows_change_nothing_and_the_seed_everything(model, data, want):
    changed = [{"prompt": "Another one, and longer than it was."}, *data[1:]]
    found = generate.generate_rows(model, changed, **OPTIONS)
    same(found[3:], want[3:])
    other = generate.generate_rows(model, data, **(OPTIONS | {"seed": 4}))
    assert sum(a["token_ids"] != b["token_ids"] for a, b in zip(other, want)) > 12


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_every_mesh_draws_the_same(root, data, want, shape):
    model = command.open_model(root / "base", **dict(zip(("data", "fsdp", "tensor"), shape)))
    same(generate.generate_rows(model, data, **(OPTIONS | {"batch": 8})), want)


def test_a_run_that_breaks_off_ends_in_the_same_file(model, data, want, tmp_path):
    given, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in data))
    options = OPTIONS | {"temperature": 1.0, "top_p": 1.0, "raw_prompt": False}
    assert generate.write(model, str(given), str(out), **options) == 15
    whole = out.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == want
    lines = whole.splitlines(keepends=True)
    for n_kept in (1, 5, 14):  # within the samples of a prompt
        out.write_bytes(b"".join(lines[:n_kept]) + lines[n_kept][:30])
        generate.write(model, str(given), str(out), **options)
        assert out.read_bytes() == whole
    for name, value in (("seed", 4), ("n", 2), ("top_p", 0.5), ("max_tokens", 7)):
        with pytest.raises(ValueError, match=rf"- {name}: .* there, {value} now"):
            generate.write(model, str(given), str(out), **(options | {name: value}))
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; give 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0; it is above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"n": 0}, "n is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"temperature": 0.0}, "3 equal completions; give n = 1"),
        ({"max_tokens": 2046}, r"row\[4\]: a prompt of 3 and max_tokens = 2046 are 2049 tokens"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused(root, data, options, match):
    model = command.open_model(root / "base", devices=jax.devices()[:1])
    with pytest.raises(ValueError, match=match):
        generate.generate_rows(model, data, **(OPTIONS | options))
    assert "params" not in vars(model)  # the weights are not read


def test_the_command_writes_what_the_function_gives(
    root, data, want, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    given, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    given.write_text("".join(json.dumps(row) + "\n" for row in data))
    words = {"model": root / "base", "data": given, "out": out, **OPTIONS, "batch": 8}
    generate.main(["generate", *(f"--{k}={v}" for k, v in words.items())])
    assert capsys.readouterr().out == f"15 rows: {out}\n"
    same([json.loads(line) for line in out.read_text().splitlines()], want)


# --- the nucleus


def by_hand(p_V, top_p):
    """The ids kept, one after another."""
    kept, total = [], 0.0
    for i in sorted(range(len(p_V)), key=lambda i: (-p_V[i], i)):
        kept.append(i)
        total += p_V[i]
        if total >= top_p:
            break
    return set(kept)


@pytest.mark.parametrize("top_p", [1e-6, 0.25, 0.6, 0.7, 0.95])
def test_the_nucleus_is_the_fewest_likeliest_ids(top_p):
    draw = np.random.default_rng(0)
    logits_BV = draw.normal(0, 2, (64, 11)).astype(np.float32)
    logits_BV[0] = 0.0  # ties
    logits_BV[1] = np.log([0.5, 0.25, 0.125, 0.0625, *[0.0625 / 7] * 7])  # exact sums
    logits_BV[2, 4:] = -np.inf
    logp_BV = jax.nn.log_softmax(logits_BV)
    got_BV = np.asarray(drawing.nucleus(logp_BV, top_p))
    for got_V, logp_V in zip(got_BV, np.asarray(logp_BV)):
        kept = np.isfinite(got_V)
        assert set(np.flatnonzero(kept)) == by_hand(np.exp(logp_V.astype(np.float64)), top_p)
        np.testing.assert_array_equal(got_V[kept], logp_V[kept])
    # Of a half, a quarter and an eighth it takes those that reach it, not one more.
    assert np.isfinite(got_BV[1]).sum() == {1e-6: 1, 0.25: 1, 0.6: 2, 0.7: 2, 0.95: 6}[top_p]


def test_the_whole_vocabulary_is_a_nucleus_of_1():
    logp_V = jax.nn.log_softmax(jnp.linspace(0.0, -30.0, 1000))
    np.testing.assert_array_equal(drawing.nucleus(logp_V, 1.0), logp_V)
    for top_p in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match=f"top_p is {top_p}"):
            drawing.nucleus(logp_V, top_p)


def draws(make_model, make_prompts, n_vocab, n_rows=2048, **options):
    """(ids drawn first for one prompt, their log-probs, the program)."""
    decoder, params = make_model()
    one = jax.tree.map(lambda x: x[np.full(n_rows, 3)], make_prompts(8, 5))
    one = one.replace(row_B=jnp.arange(n_rows))

    @jax.jit
    def run(params):
        return sampler.generate(
            decoder,
            params,
            one,
            jax.random.key(11),
            completion_length=1,
            temperature=1.5,
            eos_ids=(0,),
            n_vocab=n_vocab,
            **options,
        )

    rollout = run(params)
    text = str(run.trace(params).jaxpr)
    return np.asarray(rollout.tokens_BL[:, -1]), np.asarray(rollout.logp_BT[:, -1]), text


def test_draws_are_the_nucleus_in_its_proportions(make_model, make_prompts, n_vocab):
    all_B, all_logp_B, program = draws(make_model, make_prompts, n_vocab)
    assert "sort[" not in program  # training's draw has no such thing in it
    p_V = np.zeros(n_vocab)
    p_V[all_B] = np.exp(all_logp_B.astype(np.float64))
    assert p_V.sum() > 0.98  # what was never drawn is too rare for the nucleus
    ids_B, logp_B, program = draws(make_model, make_prompts, n_vocab, top_p=0.7)
    assert "sort[" in program
    kept = sorted(by_hand(p_V, 0.7))
    assert sorted(set(ids_B.tolist())) == kept
    assert 3 <= len(kept) < n_vocab / 2
    expected = len(ids_B) * p_V[kept] / p_V[kept].sum()
    counts = np.bincount(ids_B, minlength=n_vocab)[kept]
    # Chi-square of fewer than 30 degrees of freedom: above 60 once in a thousand.
    assert ((counts - expected) ** 2 / expected).sum() < 60
    # Log-probs are those of the whole distribution.
    np.testing.assert_allclose(np.exp(logp_B), p_V[ids_B], rtol=1e-5)


# --- torch


@pytest.mark.torch
@pytest.mark.parametrize("name", ["tiny", "base"])
def test_greedy_completions_are_those_of_transformers(root, name):
    import torch
    from transformers import AutoModelForCausalLM

    path = str(root / "base") if name == "tiny" else BASE
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    model = command.open_model(path, devices=jax.devices()[:1])
    texts = [*PROMPTS, *(f"What is {a} + {b}?" for a, b in itertools.product((3, 14, 25), (7, 38)))]
    data = [{"prompt": text} for text in texts] + [{"prompt_ids": [5, 6, 7]}]
    made = generate.generate_rows(model, data, temperature=0.0, max_tokens=40, batch=4)
    for row in made:
        ids = torch.tensor([row["prompt_ids"]])
        want = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=list(model.tokenizer.eos_ids),
            pad_token_id=0,
        )
        assert row["token_ids"] == want[0, ids.shape[1] :].tolist()
    assert len({len(row["token_ids"]) for row in made}) > 2
    if name == "base":
        assert {row["finish_reason"] for row in made[:-1]} == {"stop"}
