"""How roles read a problem: options, contexts, and what they refuse."""

import dataclasses
import sys
import types as python_types

import numpy as np
import pytest

from gopd_jax import data
from gopd_jax.models import chat_template
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.models.tokenizer import template_options
from gopd_jax.reader import CONTEXTS, Reader, find_context
from gopd_jax.types import Record

RECORD = Record(
    messages=({"role": "system", "content": "s"}, {"role": "user", "content": "question"}),
    task="math",
    answer="42",
    verifier="math",
    source="rows.jsonl:7",
    completion="worked",
    context="a {brace}",
)


@pytest.fixture(scope="module")
def chat():
    from gopd_jax.microworld import path

    return tokenizers.load(path("base"))


def with_template(chat, template):
    compiled = chat_template.environment().from_string(template)
    return dataclasses.replace(chat, template=template, compiled=compiled)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("solution", "question\n\nA correct solution:\nworked"),
        ("solution(text='so: {}')", "question\n\nso: worked"),
        ("answer", "question\n\nThe correct answer: 42"),
        ("context", "question\n\na {brace}"),
    ],
)
def test_a_context_follows_the_users_own_words(text, want):
    *before, last = find_context(text)(RECORD)
    assert before == [RECORD.messages[0]]
    assert last == {"role": "user", "content": want}


@pytest.mark.parametrize("name", CONTEXTS)
def test_a_context_says_what_a_record_lacks(name):
    lacking = dataclasses.replace(RECORD, completion=None, context=None, answer=None)
    with pytest.raises(ValueError, match=r"rows.jsonl:7: the row has no '\w+', which the context"):
        CONTEXTS[name](lacking)
    with pytest.raises(ValueError, match=r"has no \{\} where the \w+ goes"):
        CONTEXTS[name](RECORD, text="nothing")
    with pytest.raises(ValueError, match=r"context text 5 has no \{\}"):
        CONTEXTS[name](RECORD, text=5)
    spoken = dataclasses.replace(RECORD, messages=({"role": "assistant", "content": "x"},))
    with pytest.raises(ValueError, match="its last turn is the assistant's"):
        CONTEXTS[name](spoken)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sollution", "there is no 'sollution'; there are .*'solution'"),
        ("solution(txt=1)", r"solution has no \['txt'\]"),
        ("nowhere:f", "cannot be imported: No module named 'nowhere'"),
        ("json:nothing", "cannot be imported: module 'json' has no attribute"),
        ("json:__name__", "is a str, not a function"),
    ],
)
def test_a_context_that_does_not_exist(text, said):
    with pytest.raises(ValueError, match=said):
        find_context(text)


def test_a_users_own_context(chat, monkeypatch):
    module = python_types.ModuleType("mine")
    module.hint = lambda record: [{"role": "user", "content": f"1+1, {record.answer}"}]
    module.wrong = lambda record: "text"
    monkeypatch.setitem(sys.modules, "mine", module)
    plain = Reader(tokenizer=chat, length=64)
    mine = dataclasses.replace(plain, context=find_context("mine:hint"))
    told = dataclasses.replace(RECORD, messages=({"role": "user", "content": "1+1, 42"},))
    assert mine.ids(RECORD) == plain.ids(told) != plain.ids(RECORD)
    with pytest.raises(ValueError, match=r"rows.jsonl:7: the context returned 'text', not turns"):
        dataclasses.replace(plain, context=find_context("mine:wrong")).ids(RECORD)


def test_an_error_in_a_users_module_names_the_module_or_the_record(chat, monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("HINTS = {}['hints']\n")
    (tmp_path / "hints.py").write_text(
        "def key(record): return {}[record.answer]\n"
        "def attribute(record): return record.hint\n"
        "def own(record): raise ValueError('no hint')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="'broken:f' cannot be imported: KeyError: 'hints'; give"):
        find_context("broken:f")
    for name, said in (
        ("key", "rows.jsonl:7: the context hints:key raises KeyError: '42'"),
        ("attribute", "rows.jsonl:7: the context hints:attribute raises AttributeError: .*'hint'"),
        ("own", "rows.jsonl:7: no hint"),
    ):
        with pytest.raises(ValueError, match=said):
            Reader(tokenizer=chat, length=64, context=find_context(f"hints:{name}")).ids(RECORD)


def test_template_options_reach_the_template(chat):
    assert template_options(None) == {}
    assert template_options("a=False, b='x'") == {"a": False, "b": "x"}
    for text in ("a", "a=b", "a=1)+f(", "**{'a': 1}", "1, 2"):
        with pytest.raises(ValueError, match="are not of the form key=value"):
            template_options(text)
    switch = with_template(chat, "{{ messages[0].content }}{% if loud %}!{% endif %}")
    quiet = Reader(tokenizer=switch, length=9)
    loud = dataclasses.replace(quiet, tokenizer=switch.with_options("loud=True"))
    with pytest.raises(ValueError, match=r"uses none of \['lod'\]; its variables are .*'loud'"):
        switch.with_options("lod=True")
    assert switch.template_variables() >= {"messages", "loud"}
    assert loud.ids(RECORD) == [*quiet.ids(RECORD), *chat.encode("!")]


def test_readers_that_read_alike_are_known(chat):
    plain = Reader(tokenizer=chat, length=64)
    assert plain.reads_as(dataclasses.replace(plain, length=80))
    told = dataclasses.replace(chat, options={"loud": True})
    assert not plain.reads_as(dataclasses.replace(plain, tokenizer=told))
    assert not plain.reads_as(dataclasses.replace(plain, context=find_context("answer")))
    other = with_template(chat, chat.template + " ")
    assert not plain.reads_as(Reader(tokenizer=other, length=64))


def test_views_of_a_batch_are_what_each_reader_makes_of_its_rows(chat):
    records = {
        task: tuple(
            dataclasses.replace(RECORD, task=task, answer=f"{task[0]}{i}") for i in range(3)
        )
        for task in ("math", "code")
    }
    dataset = data.Dataset(records=records, identity="", source="here")
    own = Reader(tokenizer=chat, length=64)
    told = dataclasses.replace(own, length=80, context=find_context("answer"))
    teachers = {"math": told, "code": dataclasses.replace(own, length=80)}
    batch = data.prompts(
        dataset, own, 0, seed=0, n_prompts=4, rollouts=2, teachers=teachers, reference=told
    )
    for view, readers in (
        (batch.teacher, teachers),
        (batch.reference, dict.fromkeys(records, told)),
    ):
        assert view.tokens_BP.shape == (8, 80)
        for b, record in enumerate(batch.records):
            got = view.tokens_BP[b][view.valid_BP[b]].tolist()
            assert got == readers[record.task].ids(record)
            assert view.valid_BP[b, -1]
    np.testing.assert_array_equal(batch.teacher.tokens_BP[:4], batch.reference.tokens_BP[:4])
    assert (batch.teacher.tokens_BP[4:] != batch.reference.tokens_BP[4:]).any()
    plain = data.prompts(dataset, own, 0, seed=0, n_prompts=4, rollouts=2)
    assert plain.teacher is plain.reference is None
    np.testing.assert_array_equal(plain.tokens_BP, batch.tokens_BP)
