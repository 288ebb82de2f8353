import dataclasses
import json
import threading
import time

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from gopd_jax import data
from gopd_jax.models import tokenizer as tokenizer_lib
from gopd_jax.reader import Reader

TASKS = ("math", "code")
ORDER_0 = [0, 6, 2, 3, 5, 4, 1, 7]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Words as tokens; a chat is <user>, the words, <assistant>."""
    path = tmp_path_factory.mktemp("tokenizer")
    words = ["<end>", "<user>", "<assistant>", "?", *(f"w{i}" for i in range(40))]
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:3])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer_lib.load(path)


def row(i=0, task="math", **changes):
    changes = {"verifier": "text", "answer": str(i)} | changes
    return {"prompt": f"w{i}" + " w1" * (i % 3), "task": task, **changes}


def jsonl(path, rows, name="rows.jsonl"):
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / name)


def dataset_of(path, n_math=6, n_code=4, **changes):
    rows = [row(i, **changes) for i in range(n_math)]
    rows += [row(20 + i, "code", **changes) for i in range(n_code)]
    return data.load(jsonl(path, rows), TASKS)


def batch(dataset, tokenizer, step, **changes):
    sizes = {"seed": 3, "n_prompts": 4, "rollouts": 3} | changes
    return data.prompts(dataset, read(tokenizer, sizes.pop("prompt_length", 6)), step, **sizes)


def read(tokenizer, length):
    return Reader(tokenizer=tokenizer, length=length)


def same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x == y if field.name == "records" else np.array_equal(x, y), field.name


def test_a_batch_has_equal_shares_sorted_by_task_and_adjacent_rollouts(tmp_path, tokenizer):
    got = batch(dataset_of(tmp_path), tokenizer, 0)
    assert (
        got.tokens_BP.dtype == got.task_B.dtype == got.group_B.dtype == got.row_B.dtype == np.int32
    )
    np.testing.assert_array_equal(got.row_B, np.arange(12))
    np.testing.assert_array_equal(got.group_B, np.repeat(np.arange(4), 3))
    np.testing.assert_array_equal(got.task_B, np.repeat([0, 1], 6))
    assert [r.task for r in got.records] == ["math"] * 6 + ["code"] * 6
    assert len({got.records[b].source for b in range(0, 12, 3)}) == 4
    assert all(got.records[b] is got.records[b - b % 3] for b in range(12))
    assert data.group_sizes(4, 3, TASKS) == (6, 6) == tuple(np.bincount(got.task_B))
    assert got.completion_BC is None
    assert got.completion_mask_BC is None


def test_prompts_are_the_rendered_ids_padded_on_the_left(tmp_path, tokenizer):
    got = batch(dataset_of(tmp_path), tokenizer, 0)
    for tokens_P, valid_P, record in zip(got.tokens_BP, got.valid_BP, got.records):
        want = tokenizer.render(record.messages)
        assert tokens_P[-len(want) :].tolist() == want
        assert valid_P.tolist() == [False] * (6 - len(want)) + [True] * len(want)
        assert set(tokens_P[: -len(want)]) == {tokenizer.pad_id}


def test_prompts_are_a_function_of_seed_and_step(tmp_path, tokenizer):
    forward = [batch(dataset_of(tmp_path), tokenizer, step) for step in range(5)]
    data._order.cache_clear()
    dataset = dataset_of(tmp_path)
    for step in reversed(range(5)):
        same(batch(dataset, tokenizer, step), forward[step])
    assert batch(dataset, tokenizer, 0, seed=4).records != forward[0].records


def test_the_order_of_a_seed_is_fixed_for_good():
    # A resumed run has to see what the run would have seen, under any release of numpy.
    assert data._order(0, "math", 0, 8).tolist() == ORDER_0
    assert data._order(0, "math", 1, 8).tolist() != ORDER_0
    assert data._order(0, "code", 0, 8).tolist() != ORDER_0


def test_every_first_place_is_equally_likely():
    first = np.bincount([data._order(seed, "math", 0, 5)[0] for seed in range(2000)], minlength=5)
    assert np.all(np.abs(first - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8))


def test_every_record_is_seen_once_an_epoch(tmp_path, tokenizer):
    dataset = dataset_of(tmp_path)  # 6 math and 4 code: epochs of 3 and of 2 steps
    seen = {task: [] for task in TASKS}
    for step in range(6):
        for record in batch(dataset, tokenizer, step, rollouts=1).records:
            seen[record.task].append(record.source)
    for task, n in (("math", 6), ("code", 4)):
        epochs = [seen[task][i : i + n] for i in range(0, 12, n)]
        assert all(
            sorted(epoch) == sorted(r.source for r in dataset.records[task]) for epoch in epochs
        )
        assert epochs[0] != epochs[1]


def test_nothing_repeats_within_an_epoch_that_ends_inside_a_batch(tmp_path, tokenizer):
    dataset = dataset_of(tmp_path, n_math=5, n_code=3)
    seen = {task: [] for task in TASKS}
    for step in range(15):
        for record in batch(dataset, tokenizer, step, rollouts=1, n_prompts=8).records:
            seen[record.task].append(record.source)
    for task, n in (("math", 5), ("code", 3)):
        assert len(seen[task]) == 60
        assert all(len(set(seen[task][i : i + n])) == n for i in range(0, 60, n))


@pytest.mark.parametrize("n_processes", [2, 3, 4, 6, 12])
def test_the_processes_rows_make_up_the_global_batch(tmp_path, tokenizer, n_processes):
    dataset = dataset_of(tmp_path, completion="w3")
    wide = read(tokenizer, 8)
    arguments = {"completion_length": 3, "teachers": dict.fromkeys(TASKS, wide), "reference": wide}
    whole = batch(dataset, tokenizer, 7, **arguments)
    parts = [
        batch(dataset, tokenizer, 7, process=p, n_processes=n_processes, **arguments)
        for p in range(n_processes)
    ]
    assert {len(part.records) for part in parts} == {12 // n_processes}
    for field in dataclasses.fields(whole):
        pieces = [getattr(part, field.name) for part in parts]
        if field.name == "records":
            assert sum(pieces, ()) == whole.records
        else:
            joined = jax.tree.map(lambda *xs: np.concatenate(xs), *pieces)
            jax.tree.map(np.testing.assert_array_equal, joined, getattr(whole, field.name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_prompts": 5}, r"5 prompts .* equal shares of the 2 tasks .*multiple of 2"),
        ({"n_processes": 5}, "4 prompts . 3 rollouts do not divide into equal rows of 5 processes"),
        ({"process": 2, "n_processes": 2}, "or 2 is not one of them"),
        (
            {"prompt_length": 2},
            r"4 of 4 prompts are longer than data.prompt_length = 2 tokens; the longest has [345], "
            r".*rows\.jsonl:\d+\. Raise",
        ),
    ],
)
def test_batches_that_cannot_be_made_are_refused(tmp_path, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        batch(dataset_of(tmp_path), tokenizer, 0, **changes)


@pytest.mark.parametrize(
    ("n", "rollouts", "tasks"), [(5, 1, TASKS), (0, 1, TASKS), (4, 0, TASKS), (4, 1, ())]
)
def test_group_sizes_refuses_unequal_shares(n, rollouts, tasks):
    with pytest.raises(ValueError, match="do not divide into equal shares"):
        data.group_sizes(n, rollouts, tasks)


def test_completions_end_with_the_end_token_and_are_padded_on_the_right(tmp_path, tokenizer):
    got = batch(dataset_of(tmp_path, completion="w3 w4"), tokenizer, 0, completion_length=5)
    w3, w4 = tokenizer.encode("w3 w4")
    # The pad is the end token here: only the mask tells them apart.
    assert got.completion_BC.tolist() == [[w3, w4, 0, 0, 0]] * 12
    assert got.completion_mask_BC.tolist() == [[True, True, True, False, False]] * 12
    exact = batch(dataset_of(tmp_path, completion="w3 w4"), tokenizer, 0, completion_length=3)
    assert exact.completion_mask_BC.all()


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (None, "4 of 4 records have no completion"),
        (
            "w3 w4",
            "4 of 4 completions are longer than sampling.completion_length = 2 tokens; "
            "the longest has 3",
        ),
        ("w3 <end>", r"completion holds the end token \[0\]"),
    ],
)
def test_completions_that_cannot_be_imitated_are_refused(tmp_path, tokenizer, completion, message):
    dataset = dataset_of(tmp_path, completion=completion)
    with pytest.raises(ValueError, match=message):
        batch(dataset, tokenizer, 0, completion_length=2)
    with pytest.raises(ValueError, match=message.replace("4 of 4", "10 of 10")):
        data.check_lengths(dataset, read(tokenizer, 5), completion_length=2)


def test_check_lengths_counts_every_prompt_and_names_the_longest(tmp_path, tokenizer):
    dataset = dataset_of(tmp_path)
    lengths = {
        r.source: len(tokenizer.render(r.messages)) for rs in dataset.records.values() for r in rs
    }
    assert data.check_lengths(dataset, read(tokenizer, 5)) == max(lengths.values()) == 5
    longer = sum(length > 3 for length in lengths.values())
    assert 0 < longer < 10
    with pytest.raises(
        ValueError, match=f"{longer} of 10 prompts are longer than data.prompt_length = 3"
    ) as error:
        data.check_lengths(dataset, read(tokenizer, 3))
    (named,) = [source for source in lengths if f"has 5, {source}. Raise" in str(error.value)]
    assert lengths[named] == 5


def test_a_prompt_that_the_template_refuses_or_empties_is_named(tmp_path, tokenizer):
    dataset = dataset_of(tmp_path)
    for template, message in (("", "makes nothing"), ("{{ raise_exception('no') }}", "refuses")):
        (tmp_path / "tokenizer.json").write_text(tokenizer.backend.to_str())
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1: .*{message}"):
            data.check_lengths(dataset, read(tokenizer_lib.load(tmp_path), 5))


def test_prefetch_yields_in_order_from_its_start():
    steps = data.prefetch(lambda step: step * step, 3)
    assert [next(steps) for _ in range(5)] == [9, 16, 25, 36, 49]
    steps.close()


def test_prefetch_works_ahead_in_another_thread_and_no_further_than_depth():
    made, enough = [], threading.Event()

    def make(step):
        made.append((step, threading.current_thread()))
        if step == 2:
            enough.set()
        return step

    steps = data.prefetch(make, 0, depth=2)
    assert next(steps) == 0
    assert enough.wait(5)
    time.sleep(0.05)
    assert [step for step, _ in made] == [0, 1, 2]
    assert threading.current_thread() not in {thread for _, thread in made}
    steps.close()
    assert not any(thread.is_alive() for _, thread in made)


def test_closing_a_prefetch_drops_the_steps_that_have_not_begun():
    made, go = [], threading.Event()

    def make(step):
        made.append(step)
        assert step == 0 or go.wait(5)
        return step

    steps = data.prefetch(make, 0, depth=4)
    assert next(steps) == 0
    timer = threading.Timer(0.1, go.set)  # close() waits for the step that has begun
    timer.start()
    steps.close()
    timer.join()
    assert made in ([0], [0, 1])


def test_prefetch_raises_where_the_step_would_come_and_stops():
    def make(step):
        if step == 2:
            raise ValueError("step two")
        return step

    before = threading.active_count()
    steps = data.prefetch(make, 0, depth=4)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(ValueError, match="step two"):
        next(steps)
    assert threading.active_count() == before
    with pytest.raises(StopIteration):
        next(steps)


def test_prefetch_has_to_be_ahead():
    with pytest.raises(ValueError, match="depth is 0"):
        next(data.prefetch(lambda step: step, 0, depth=0))


def test_a_completion_may_not_go_on_past_what_ends_it(tmp_path, tokenizer):
    dataset = dataset_of(tmp_path, completion="w3 w4")
    reader = read(tokenizer, 5)
    data.check_lengths(dataset, reader, completion_length=3)
    (stop,) = tokenizer.encode("w3")
    with pytest.raises(ValueError, match=rf"its completion holds the end token \[{stop}\]"):
        data.check_lengths(dataset, reader, completion_length=3, stop=(stop,))


def test_problems_that_are_trained_and_evaluated_on_are_counted(tmp_path):
    train = dataset_of(tmp_path)
    rows = [row(i) for i in (3, 5, 5, 30)] + [row(20, "code"), row(6, "code")]  # 6: of math alone
    test = data.load(jsonl(tmp_path, rows, "test.jsonl"), TASKS)
    (said,) = data.overlap(train, test)
    assert said.startswith("warning: 4 of the 6 problems of data.test = ")
    other = data.load(jsonl(tmp_path, [row(30), row(31, "code")], "other.jsonl"), TASKS)
    assert data.overlap(train, other) == ()


def test_one_task_of_the_microworld_is_named_with_its_source():
    with pytest.raises(ValueError, match=r"'code' .*, or give microworld:test:math in its place"):
        data.load("microworld:test", ("math",))
    assert data.load("microworld:test:math", ("math",)).tasks == ("math",)


def test_lambdas_that_no_row_names_are_missed(tmp_path):
    train = dataset_of(tmp_path)
    (said,) = data.lambdas_missing(train, True)
    assert said.startswith("warning: objective.lam_by_row = True has no effect: no row of data.tr")
    assert data.lambdas_missing(train, False) == ()
    named = jsonl(tmp_path, [row(0), row(1) | {"lam": 1.5}, row(2, "code")], "named.jsonl")
    assert data.lambdas_missing(data.load(named, TASKS), True) == ()


TURNS = [{"role": "user", "content": "\ud800 w1"}]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("prompt", "\ud800 w1", "prompt"),
        ("messages", TURNS, "content"),
        ("messages", json.dumps(TURNS), "content"),
    ],
    ids=["prompt", "turns", "turns as JSON"],
)
def test_half_a_surrogate_pair_is_named_by_line(tmp_path, key, value, named):
    odd = {k: v for k, v in row(1).items() if k != "prompt"} | {key: value}
    with pytest.raises(ValueError, match=f"rows.jsonl:2: '{named}' is not Unicode text"):
        data.load(jsonl(tmp_path, [row(0), odd, row(2, "code")]), TASKS)
