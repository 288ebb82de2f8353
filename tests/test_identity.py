"""What a continued run has to share with its beginning: what is noticed, and what is let pass."""

import json
import shutil
import sys

import pytest
import tiny

from gopd_jax import checkpoint, config, data, train
from gopd_jax.config import Lora
from gopd_jax.models import tokenizer as tokenizers


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("identity")
    tiny.build(root)
    (root / "my_hints.py").write_text(
        "def hint(record):\n    return [{'role': 'user', 'content': 'x'}]\n"
    )
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    rows = [row | {"context": "be quick"} for row in rows]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def identity(root, context=None):
    c = tiny.config(root)
    c.teachers["math"].context = context
    return train.prepare(c).identity


@pytest.mark.parametrize(
    ("file", "change", "noticed"),
    [
        ("train.jsonl", ("be quick", "be right"), {"data.train content"}),
        ("my_hints.py", ("'x'", "'y'"), {"reader of teacher:math"}),
        ("teacher_code/chat_template.jinja", ("{%", "!{%"), {"reader of teacher:code"}),
        (
            "base/chat_template.jinja",
            ("{%", "!{%"),
            {"reader of student", "reader of reference"},
        ),
        ("base/generation_config.json", ("89", "88"), {"ends of completions"}),
        ("teacher_code/generation_config.json", ("89", "88"), set()),
    ],
)
def test_a_file_that_changes_a_number_is_noticed(
    built, tmp_path, monkeypatch, file, change, noticed
):
    root = tmp_path / "copy"
    shutil.copytree(built, root)
    preset = root / "preset.py"
    preset.write_text(preset.read_text().replace(str(built), str(root)))
    monkeypatch.syspath_prepend(root)
    monkeypatch.delitem(sys.modules, "my_hints", raising=False)
    before = identity(root, "my_hints:hint")
    text = (root / file).read_text()
    assert change[0] in text
    (root / file).write_text(text.replace(*change, 1))
    after = identity(root, "my_hints:hint")
    assert {key for key in before | after if before.get(key) != after.get(key)} == noticed


def test_the_end_of_what_is_imitated_is_noticed_where_it_is_not_the_first(built, tmp_path):
    shutil.copytree(built / "base", tmp_path / "base")
    chat, said = tokenizers.load(built / "base"), []
    own = chat.contents.index(chat.special["eos_token"])
    texts = [json.loads(line)["completion"] for line in (built / "train.jsonl").open()]
    first = min(
        {*range(chat.vocab_size)} - {i for text in texts for i in chat.encode(text)} - {own}
    )
    listed = tmp_path / "base" / "generation_config.json"
    listed.write_text(json.dumps({"eos_token_id": [first, own]}))
    for source, advantage in (("student", "gopd"), ("data", "imitation")):
        c = tiny.config(built, sampling={"completion_length": 32})
        c.student.path = str(tmp_path / "base")
        c.objective.source, c.objective.advantage = source, advantage
        said.append(train.prepare(c).identity["ends of completions"])
        if source == "data":
            assert ends_of(c) == {own}
            c.sampling.stop = (chat.contents[first],)
            assert ends_of(c) == {first}
            c.sampling.stop = (chat.contents[first], chat.contents[own])
            assert ends_of(c) == {own}
    assert said == [json.dumps([first, own]), json.dumps([[first, own], own])]


def ends_of(c):
    """The last ids of the completions that a run of data imitates."""
    run = train.prepare(c)
    got = data.prompts(
        run.train, run.student.reader, 0, seed=0, n_prompts=4, rollouts=1, completion_length=32
    )
    n_C = got.completion_mask_BC.sum(1)
    return {int(row[n - 1]) for row, n in zip(got.completion_BC, n_C)}


def test_a_template_that_ends_turns_otherwise_than_completions_is_asked_about(built, tmp_path):
    """Base models are published so, with the template of the instruction-tuned one."""
    shutil.copytree(built / "base", tmp_path / "base")
    chat = tokenizers.load(built / "base")
    turn = chat.special["eos_token"]
    own = next(t.content for t in chat.backend.get_added_tokens_decoder().values())
    assert own != turn
    (tmp_path / "base" / "special_tokens_map.json").unlink()
    file = tmp_path / "base" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": own}))
    ends = json.dumps({"eos_token_id": chat.contents.index(own)})
    (tmp_path / "base" / "generation_config.json").write_text(ends)
    c = tiny.config(built, sampling={"completion_length": 32})
    c.student.path = str(tmp_path / "base")
    train.prepare(c)
    c.objective.source, c.objective.advantage = "data", "imitation"
    with pytest.raises(ValueError, match="ends a turn with") as error:
        train.prepare(c)
    assert f"('{turn}', '{own}')" in str(error.value)
    c.sampling.stop = (turn, own)
    assert ends_of(c) == {chat.contents.index(turn)}
    c.sampling.stop = (own,)
    assert ends_of(c) == {chat.contents.index(own)}


def test_a_row_that_names_another_lambda_is_noticed(built, tmp_path):
    rows = [json.loads(line) for line in (built / "train.jsonl").read_text().splitlines()]
    found = []
    for lam in (1.5, 2.0):
        told = [*(row | {"lam": 1.5} for row in rows[:-1]), rows[-1] | {"lam": lam}]
        (tmp_path / "lams.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
        c = tiny.config(built, objective={"lam_by_row": True})
        c.data.train = str(tmp_path / "lams.jsonl")
        found.append(train.prepare(c).identity)
    before, after = found
    assert {key for key in before if before[key] != after[key]} == {"data.train content"}


def test_what_changes_no_number_may_change(built):
    same = tiny.config(built, lora=Lora(export="adapter"))
    same.teachers["math"].fingerprint = "0123"
    other = tiny.config(built, lora=Lora())
    assert config.identity(same) == config.identity(other)
    other.lora.rank += 1
    assert config.identity(same) != config.identity(other)


def test_a_checkpoint_of_the_first_version_is_continued(tmp_path):
    old = {"seed": "0"}
    now = old | {"reader of student": "0123", "ends of completions": "[2]"}
    state = {"step": 1}
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        checkpoint.save(manager, 1, state, old)
    assert checkpoint.restore(tmp_path, None, now) is not None
    assert checkpoint.differences({"a": "5", "b": "0.50"}, {"a": "5.0", "b": "0.5"}) == []
    assert len(checkpoint.differences({"a": "5", "b": "5"}, {"a": "5.1", "b": "[5]"})) == 2
    with pytest.raises(ValueError, match="seed: 0 in the checkpoint, 1 now"):
        checkpoint.restore(tmp_path, None, now | {"seed": "1"})


def test_remat_by_name_is_the_same_run_as_before():
    """A run of the version that had True and False is continued under their names."""
    c = config.Config(workdir="w", student=config.Model())
    before = config.identity(c)
    assert "batch.remat" not in before  # as with False
    c.batch.remat = "layers"
    assert config.identity(c) == before | {"batch.remat": "true"}  # as with True
    c.batch.remat = "products"
    assert config.identity(c) == before | {"batch.remat": '"products"'}
