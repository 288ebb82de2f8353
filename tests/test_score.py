"""Scores of given completions against all logits at once, torch, and runs that break off."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import command, generate, microworld, rows, score
from gopd_jax.models import decoder as lm
from gopd_jax.reader import padded

PROMPT = "What is 2 + 3 * 4?"
CHAT = [{"role": "user", "content": PROMPT}]
BASE = microworld.path("base")


@pytest.fixture(scope="module")
def data():
    """Rows of ids, of many lengths: two buckets."""
    draw = np.random.default_rng(0)

    def ids(n):
        return draw.integers(0, 90, n).tolist()

    sizes = [(3, 5), (40, 9), (2, 0), (1, 1), (20, 30), (7, 7), (30, 3), (50, 12), (5, 4)]
    return [
        {"prompt_ids": ids(p), "completion_ids": ids(c), "id": f"row {i}"}
        for i, (p, c) in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def want(model, data):
    """The scores of `data`, computed once."""
    return score.score_rows(model, data, batch=4)


@functools.partial(jax.jit, static_argnums=(0, 4))
def full_logp(decoder, params, tokens_BL, valid_BL, n_vocab, temperature):
    """Log-probs of every token at every position, from all logits at once."""
    hidden_BLD = lm.hidden(decoder, params, tokens_BL, valid_BL)
    logits_BLV = lm.logits(decoder, params, hidden_BLD)[..., :n_vocab]
    return jax.nn.log_softmax(logits_BLV / temperature)


def same(got, want, atol=2e-5):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        numbers = ("logprobs", "sum")
        assert {k: a[k] for k in a if k not in numbers} == {k: b[k] for k in b if k not in numbers}
        np.testing.assert_allclose(a["logprobs"], b["logprobs"], rtol=0, atol=atol)
        assert abs(a["sum"] - b["sum"]) <= atol * max(len(b["logprobs"]), 1)


def write_rows(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_are_those_of_all_logits(model, data, temperature):
    found = score.score_rows(model, data, temperature=temperature, batch=4)
    assert [row["index"] for row in found] == list(range(len(data)))
    ids = [[*row["prompt_ids"], *row["completion_ids"]] for row in data]
    every_BLV = full_logp(
        *(model.decoder, model.params, *padded(ids, 64, 0, left=False)),
        *(model.tokenizer.vocab_size, temperature),
    )
    for row, given, logp_LV in zip(found, data, np.asarray(every_BLV)):
        assert (row["id"], row["prompt_form"]) == (given["id"], "ids")
        assert row["prompt_ids"] == given["prompt_ids"]
        assert row["token_ids"] == given["completion_ids"]
        place = len(row["prompt_ids"]) - 1 + np.arange(len(row["token_ids"]))
        want = logp_LV[place, row["token_ids"]]
        np.testing.assert_allclose(row["logprobs"], want, rtol=0, atol=2e-5)
        assert row["sum"] == pytest.approx(sum(row["logprobs"]), abs=1e-9)
        assert all(str(np.float32(x)) in (str(x), f"{x:.0e}") for x in row["logprobs"])
    assert (found[2]["token_ids"], found[2]["logprobs"], found[2]["sum"]) == ([], [], 0)
    assert np.std(found[4]["logprobs"]) > 0.3


def test_prompts_are_rendered_unless_they_are_asked_for_raw(model):
    chat = model.tokenizer
    given = [{"prompt": PROMPT}, {"messages": CHAT}, {"prompt": CHAT}]
    given = [row | {"completion": "7"} for row in given]
    found = score.score_rows(model, given)
    assert [row["prompt_form"] for row in found] == ["chat"] * 3
    assert all(row["prompt_ids"] == chat.render(CHAT) for row in found)
    assert all(row["token_ids"] == chat.encode("7") for row in found)
    same(found[1:2], [found[0] | {"index": 1}], atol=0)

    raw, turns = score.score_rows(model, given[:2], raw_prompt=True)
    assert (raw["prompt_form"], raw["prompt_ids"]) == ("raw", chat.encode(PROMPT))
    assert (turns["prompt_form"], turns["prompt_ids"]) == ("chat", chat.render(CHAT))
    assert abs(raw["sum"] - turns["sum"]) > 1e-3


def test_the_end_token_is_added_to_text_alone_and_when_asked_for(model):
    chat = model.tokenizer
    given = [{"prompt": PROMPT, "completion": "7"}, {"prompt": PROMPT, "completion_ids": [9]}]
    given.append({"prompt": PROMPT, "completion": ""})
    ids = [row["token_ids"] for row in score.score_rows(model, given, append_eos=True)]
    assert ids == [[*chat.encode("7"), chat.end_id], [9], [chat.end_id]]
    # The end that the template writes, which another may come before.
    other = next(i for i in range(9) if i != chat.end_id)
    listed = dataclasses.replace(chat, eos_ids=(other, chat.end_id)).ending_with((other,))
    own = listed.ending_with(listed.eos_ids)
    for tokenizer, end in ((listed, other), (own, chat.end_id)):
        source = command.source(given[:1])
        found, _ = rows.read(
            source, tokenizer, name="given", scored=True, append_eos=True, n_context=99
        )
        assert found[0].completion_ids == [*chat.encode("7"), end]


def test_rows_of_another_tokenizer_are_refused(model, data, tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", data))
    beside = tmp_path / "rows.jsonl.identity.json"
    ours = {"command": "generate", "tokenizer": model.tokenizer.fingerprint()}
    # That of a student with fewer ids, which are ids of ours; and a user's own file.
    fewer = {"tokenizer": model.tokenizer.fingerprint(200), "ids": "200"}
    for made in (ours, ours | fewer, {"tokenizer": "gpt2"}, []):
        beside.write_text(json.dumps(made))
        assert len(score.score_rows(model, path, batch=4)) == len(data)
    beside.write_text(json.dumps(ours)[:-1])
    with pytest.raises(ValueError, match=r"rows.jsonl.identity.json is not JSON .*, so whose ids"):
        score.score_rows(model, path)
    beside.write_text(json.dumps(ours | fewer | {"ids": "199"}))
    with pytest.raises(ValueError, match="another tokenizer"):
        score.score_rows(model, path)
    beside.write_text(json.dumps(ours | {"tokenizer": "0123456789abcdef"}))
    with pytest.raises(ValueError, match=r"another tokenizer \(0123456789abcdef in rows"):
        score.score_rows(model, path)
    with pytest.raises(ValueError, match="another tokenizer"):
        generate.generate_rows(model, path, max_tokens=2)


@pytest.mark.parametrize("options", [{"batch": 1}, {"batch": 16, "head_chunk": 5}], ids=str)
def test_batch_and_chunk_change_nothing(model, data, want, options):
    same(score.score_rows(model, data, **options), want)


def test_the_order_and_the_other_rows_change_nothing(model, data, want):
    order = np.random.default_rng(1).permutation(len(data))[:6]
    found = score.score_rows(model, [data[i] for i in order], batch=4)
    same([row | {"index": int(i)} for row, i in zip(found, order)], [want[i] for i in order])


@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (1, 4, 2, 1)], ids=str)
def test_every_mesh_gives_the_same(root, data, want, shape):
    axes = dict(zip(("data", "fsdp", "tensor", "slices"), shape))
    model = command.open_model(root / "base", **axes)
    same(score.score_rows(model, data, batch=8), want)
    with pytest.raises(ValueError, match=r"batch is 3 .* = 4 shards.*a multiple of 4"):
        score.score_rows(model, data, batch=3)
    with pytest.raises(ValueError, match=r"mesh.expert = 2, and no model has routed experts"):
        command.open_model(root / "base", expert=2)


def test_bfloat16_is_near(root, data, want):
    model = command.open_model(root / "base", dtype="bfloat16", devices=jax.devices()[:1])
    found = score.score_rows(model, data, batch=4)
    away = np.concatenate([np.subtract(a["logprobs"], b["logprobs"]) for a, b in zip(found, want)])
    assert 1e-4 < np.abs(away).mean() < 0.1


def test_wrong_settings_are_refused(root, model, data):
    for name, value in (("temperature", 0.0), ("temperature", np.inf), ("head_chunk", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            score.score_rows(model, data, **{name: value})
    for name, value in (("dtype", "float16"), ("fsdp", 3), ("tensor", 8), ("data", 0)):
        with pytest.raises(ValueError, match=name):
            command.open_model(root / "base", **{name: value})


def test_weights_that_are_not_sound_are_an_error_not_a_number(root, data):
    model = command.open_model(root / "base", devices=jax.devices()[:1])
    model.params["final_norm"] = model.params["final_norm"] * jnp.nan
    with pytest.raises(ValueError, match=r"row\[0\]: log-probs .* are not finite"):
        score.score_rows(model, data, batch=4)


@pytest.fixture
def arguments(root, data, tmp_path, monkeypatch):
    """arguments(**flags) of the command on the tiny model; main sets the cache of compilations."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
    usual = {"model": root / "base", "data": write_rows(tmp_path / "data.jsonl", data)}
    usual |= {"out": tmp_path / "out.jsonl", "batch": 8}

    def make(**changes):
        return ["score", *(f"--{k}={v}" for k, v in (usual | changes).items() if v is not None)]

    return make


def test_the_command_says_where_its_rows_are(arguments, want, tmp_path, capsys):
    score.main(arguments(**{"mesh.tensor": 2}))
    assert capsys.readouterr().out == f"9 rows: {tmp_path / 'out.jsonl'}\n"
    same([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()], want)
    score.main(["score", "--help"])
    said = capsys.readouterr().out
    assert said.startswith(score.__doc__)
    assert "chat template" in said
    assert "--append_eos=False" in said


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"data": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"model": "nowhere"}, "nowhere is not a directory"),
        ({"out": None}, r"['--out'] have to be given"),
        ({"temprature": 1}, "Did you mean: temperature"),
        ({"temperature": "warm"}, "--temperature=warm"),
        ({"temperature": 0}, "temperature is 0.0"),
        ({"mesh.fsdp": 3}, "does not divide the 8 devices"),
        ({"mesh.slices": 3}, "mesh.slices = 3 does not divide mesh.data = 8"),
        ({"mesh.slices": 0}, "{'mesh.slices': 0}: an axis has at least one device"),
    ],
    ids=str,
)
def test_wrong_input_ends_with_status_2_and_no_traceback(arguments, capsys, changes, match):
    with pytest.raises(SystemExit) as end:
        score.main(arguments(**changes))
    assert end.value.code == 2
    said = capsys.readouterr()
    assert match in said.err
    assert "Traceback" not in said.err
    assert not said.out


@pytest.mark.torch
@pytest.mark.parametrize("name", ["tiny", "base"])
def test_log_probs_are_those_of_transformers(root, data, name):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = str(root / "base") if name == "tiny" else BASE
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    chat = AutoTokenizer.from_pretrained(path)
    model = command.open_model(path, devices=jax.devices()[:1])
    given = [{"prompt": PROMPT, "completion": "3*4=12\n2+12=14\n\\boxed{14}"}, *data]
    found = score.score_rows(model, given, append_eos=True, batch=4)
    prompt = chat.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert found[0]["prompt_ids"] == list(prompt)
    answer = chat(given[0]["completion"], add_special_tokens=False)["input_ids"]
    assert found[0]["token_ids"] == [*answer, model.tokenizer.eos_ids[0]]
    for row in found:
        ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
        with torch.no_grad():
            logp_LV = theirs(ids).logits[0].log_softmax(-1)
        first = len(row["prompt_ids"])
        want = logp_LV[first - 1 : -1].gather(1, ids[0, first:, None])[:, 0]
        np.testing.assert_allclose(row["logprobs"], want, rtol=0, atol=1e-4)
