"""The microworld's problems against Python's own eval and exec, its tokenizer and its dataset."""

import ast
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gopd_jax import microworld
from gopd_jax.microworld import dataset, tasks, tokenizer

N = 400


@pytest.fixture(scope="module")
def problems():
    return {
        task: [tasks.problem(task, 1, i, split=tasks.SPLITS[i % 2]) for i in range(N)]
        for task in tasks.TASKS
    }


@pytest.fixture(scope="module")
def auto_tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer.build(directory)
    # Beside a model's configuration, whose type must not replace the tokenizer's class.
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    return AutoTokenizer.from_pretrained(str(directory))


def boxed(completion):
    """The boxed value, after checking each line and that all but the first use the one before."""
    *lines, last = completion.split("\n")
    value = None
    for line in lines:
        left, after = line.split("=")
        assert eval(left) == int(after)
        assert value is None or value in re.findall(r"\d+", left)
        value = after
    assert last == f"\\boxed{{{value}}}"
    return value


def test_right_answers_are_pythons_and_wrong_ones_add_first(problems):
    for p in problems["math"]:
        assert p.answer == str(eval(p.key)) == boxed(p.right)
        left_to_right = re.sub(r"^(\d+\+\d+)", r"(\1)", p.key)
        assert boxed(p.wrong) == str(eval(left_to_right)) != p.answer
        assert 0 <= int(p.answer) <= 2 * tasks.LARGEST + 81


SIGNS = {
    "+": r"\+|add|gets|finds|buys|get on",
    "-": r"-|take away|loses|sells|gives|get off",
    "*": r"\*|times|groups of|boxes of",
}


def test_a_problems_words_ask_for_its_expression(problems):
    for p in problems["math"]:
        words = p.messages[0]["content"]
        assert re.findall(r"\d+", words) == re.findall(r"\d+", p.key)
        signs = {sign: len(re.findall(pattern, words)) for sign, pattern in SIGNS.items()}
        assert signs == {sign: p.key.count(sign) for sign in SIGNS}


def failures(program, answer):
    """How many of the answer's tests the program fails."""
    given = json.loads(answer)
    space = {}
    exec(program, space)
    return sum(space[given["entry"]](*t["args"]) != t["want"] for t in given["tests"])


def test_right_programs_pass_every_test_and_wrong_ones_fail_four(problems):
    for p in problems["code"]:
        assert failures(p.right, p.answer) == 0
        assert failures(p.wrong, p.answer) >= 4
        assert 6 <= len(json.loads(p.answer)["tests"]) <= 8


READ_FILTER = {
    r"even numbers": lambda x, k: not x & 1,
    r"odd numbers": lambda x, k: bool(x & 1),
    r"positive numbers": lambda x, k: x >= 1,
    r"negative numbers": lambda x, k: x <= -1,
    r"numbers above (\d+)": lambda x, k: x - k > 0,
    r"numbers below (\d+)": lambda x, k: k - x > 0,
    r"numbers at least (\d+)": lambda x, k: not x < k,
    r"numbers at most (\d+)": lambda x, k: not x > k,
    r"multiples of (\d+)": lambda x, k: x // k * k == x,
}
READ_MAP = {
    r"add (\d+)": lambda x, k: k + x,
    r"subtract (\d+)": lambda x, k: -k + x,
    r"double": lambda x, k: x + x,
    r"triple": lambda x, k: x + x + x,
    r"multiply by (\d+)": lambda x, k: k * x,
    r"square": lambda x, k: x**2,
    r"negate": lambda x, k: 0 - x,
}
READ_FINAL = {
    r"the list": lambda ys: ys,
    r"the sum": lambda ys: sum(ys),
    r"the largest or 0": lambda ys: sorted(ys)[-1] if ys else 0,
    r"the smallest or 0": lambda ys: sorted(ys)[0] if ys else 0,
    r"the count": lambda ys: sum(1 for _ in ys),
    r"them sorted": lambda ys: sorted(ys),
    r"them reversed": lambda ys: list(reversed(ys)),
    r"the first three": lambda ys: [y for i, y in enumerate(ys) if i < 3],
}


def read(entries, words):
    """The one entry that `words` speak of, its constant and its place."""
    ((match, function),) = [
        (m, function) for pattern, function in entries.items() if (m := re.search(pattern, words))
    ]
    return function, int(match[1]) if match.groups() else None, match.start()


def test_a_programs_words_ask_for_it(problems):
    for p in problems["code"]:
        words = p.messages[0]["content"]
        keeps, k, at = read(READ_FILTER, words)
        apply, map_k, map_at = read(READ_MAP, words)
        final, _, final_at = read(READ_FINAL, words)
        assert at < map_at < final_at
        for test in json.loads(p.answer)["tests"]:
            kept = [x for x in test["args"][0] if keeps(x, k)]
            assert final([apply(x, map_k) for x in kept]) == test["want"]


def test_problems_are_a_function_of_their_arguments(problems):
    for task in tasks.TASKS:
        for i in reversed(range(20)):
            again = tasks.problem(task, 1, i, split=tasks.SPLITS[i % 2])
            assert again == problems[task][i]
        assert tasks.problem(task, 2, 0, split="train") != problems[task][0]


def test_problems_are_those_that_the_shipped_checkpoints_learnt():
    # A change here makes other data: raise dataset.VERSION and train the checkpoints again.
    made = [tasks.problem(t, 0, i, split="test") for t in tasks.TASKS for i in range(100)]
    text = "\n".join(repr((p.messages, p.answer, p.right, p.wrong)) for p in made)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "73bcf497a6c245dd"


def test_unknown_task_and_split_name_what_there_is():
    with pytest.raises(ValueError, match=r"'maths'.*'math', 'code'"):
        tasks.problem("maths", 0, 0, split="train")
    with pytest.raises(ValueError, match=r"'dev'.*'train', 'test'"):
        tasks.problem("math", 0, 0, split="dev")


def test_record_carries_the_problem(problems):
    p = problems["code"][0]
    record = tasks.record(p, completion=p.wrong, source="here:1")
    assert (record.messages, record.task, record.answer) == (p.messages, "code", p.answer)
    assert (record.verifier, record.completion, record.source) == ("code", p.wrong, "here:1")


def test_prompts_and_answers_are_short_and_make_the_round_trip(problems, auto_tokenizer):
    limits = {"math": (30, 30), "code": (30, 26)}  # mean tokens of prompts and completions
    for task, (prompt_mean, completion_mean) in limits.items():
        prompts, completions = [], []
        for p in problems[task]:
            ids = auto_tokenizer.apply_chat_template(
                list(p.messages), add_generation_prompt=True, return_dict=False
            )
            words = p.messages[0]["content"]
            assert auto_tokenizer.decode(ids) == (
                f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n"
            )
            prompts.append(len(ids))
            for text in (p.right, p.wrong):
                ids = auto_tokenizer(text + tokenizer.END).input_ids
                assert auto_tokenizer.decode(ids) == text + tokenizer.END
                completions.append(len(ids))
        assert max(prompts) <= 44
        assert max(completions) <= 36
        assert sum(prompts) / len(prompts) <= prompt_mean
        assert sum(completions) / len(completions) <= completion_mean


def test_tokenizer_has_512_tokens_and_single_digits(auto_tokenizer):
    assert len(auto_tokenizer) == 512
    assert (auto_tokenizer.eos_token, auto_tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    for token in auto_tokenizer.get_vocab():
        assert len(token) == 1 or not re.search(r"\d", token)
    assert auto_tokenizer.convert_ids_to_tokens(auto_tokenizer("x+2026").input_ids)[-4:] == [
        *"2026"
    ]


def test_tokenizer_keeps_any_text(auto_tokenizer):
    for text in ("  two  spaces\t\r\n\n", "naïve 数学 🙂", "it's\u00a0'ere", "e\u0301 is not é"):
        assert auto_tokenizer.decode(auto_tokenizer(text).input_ids) == text


def test_tokenizer_is_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        tokenizer.build(tmp_path / name, problems=500)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_too_few_problems_for_the_vocabulary_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="train on more"):
        tokenizer.build(tmp_path, problems=1)


BUILD = """
import sys
from pathlib import Path
import gopd_jax.microworld
assert not {"jax", "numpy", "transformers"} & sys.modules.keys()

class WithoutTensorFlow:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        hidden = name.split(".")[0] == "tensorflow"
        return None if hidden else self.finder.find_spec(name, *rest)

sys.meta_path[:] = [WithoutTensorFlow(finder) for finder in sys.meta_path]
from gopd_jax.microworld import dataset
dataset.ROWS.update(train=32, test=16)
print([*dataset.load("train"), *dataset.load("test")])
"""


def test_two_processes_build_the_dataset_at_once_without_tensorflow(tmp_path):
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD],
            env={**os.environ, "GOPD_JAX_DATA": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    (out_a, err_a), (out_b, err_b) = [process.communicate(timeout=120) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], err_a + err_b
    assert out_a == out_b
    assert len(ast.literal_eval(out_a)) == 48
    assert "building the microworld dataset" in err_a + err_b
    assert [d.name for d in (tmp_path / "microworld").iterdir()] == [dataset.VERSION]


def test_a_dataset_that_another_process_finished_first_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ROWS", {"train": 4, "test": 2})
    directory = tmp_path / "microworld" / dataset.VERSION
    directory.mkdir(parents=True)
    (directory / "theirs").touch()
    dataset._build(directory)
    assert [f.name for f in directory.iterdir()] == ["theirs"]
    assert list(directory.parent.iterdir()) == [directory]


def test_dataset_holds_distinct_problems_by_turns(tmp_path, monkeypatch):
    monkeypatch.setenv("GOPD_JAX_DATA", str(tmp_path))
    rows = {split: list(dataset.load(split)) for split in dataset.ROWS}
    assert {split: len(r) for split, r in rows.items()} == {"train": 16384, "test": 2048}
    completions = [row["completion"] for r in rows.values() for row in r]  # each fixes its problem
    assert len(set(completions)) == len(completions)
    for r in rows.values():
        assert [row["task"] for row in r] == ["math", "code"] * (len(r) // 2)
    for row in rows["test"][:200]:
        (turn,) = json.loads(row["messages"])
        assert turn["role"] == "user"
        if row["verifier"] == "math":
            assert boxed(row["completion"]) == row["answer"]
        else:
            assert failures(row["completion"], row["answer"]) == 0
    with pytest.raises(IndexError, match="16384"):
        dataset.load("train")[16384]


def test_no_problem_is_in_both_splits():
    for task in tasks.TASKS:
        keys = {
            split: {tasks.problem(task, 3, i, split=split).key for i in range(1500)}
            for split in tasks.SPLITS
        }
        assert not keys["train"] & keys["test"]


def test_an_unknown_split_of_the_dataset_names_what_there_is():
    with pytest.raises(ValueError, match=r"'dev'.*'test', 'train'"):
        dataset.load("dev")


def test_an_unknown_checkpoint_names_what_there_is():
    with pytest.raises(ValueError, match=r"'bass'.*'base', 'teacher_math'"):
        microworld.path("bass")


def test_enough_problems_exist():
    # Where the strategies' sums over one element differ, so does every other result of it.
    n = dict.fromkeys(tasks.SPLITS, 0)
    for f, f_entry in tasks.FILTERS.items():
        for m, m_entry in tasks.MAPS.items():
            for k, map_k in itertools.product(f_entry.ks, m_entry.ks):
                asked = tasks.Pipeline(f, k, m, map_k, "sum")
                if any(
                    asked.run([x], test_mapped=True) != asked.run([x], test_mapped=False)
                    for x in range(-40, 41)
                ):
                    for final in tasks.FINALS:
                        n[tasks.split_of(str(asked._replace(final=final)))] += 1
    assert n["train"] > 20000
    assert n["test"] > 2000


def test_shipped_checkpoints_are_those_of_the_manifest():
    shipped = Path(microworld.path("base")).parent
    listed = json.loads((shipped / "manifest.json").read_text())
    found = {
        str(file.relative_to(shipped)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in shipped.rglob("*")
        if file.is_file() and file.name != "manifest.json"
    }
    assert found == listed
    assert {str(Path(name).parent) for name in listed} >= set(microworld.NAMES)
    assert sum(file.stat().st_size for file in shipped.rglob("*") if file.is_file()) < 30e6
