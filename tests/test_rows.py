"""Rows that are read, batched and written: wrong ones, their order, and runs that break off."""

import datetime
import json
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import command, microworld, rows, score
from gopd_jax.models import hf
from gopd_jax.models import tokenizer as tokenizers

CHAT = [{"role": "user", "content": "What is 2 + 3 * 4?"}]


@pytest.fixture(scope="module")
def data():
    return [{"prompt_ids": [5 + i] * (1 + i % 7), "completion_ids": [7, i]} for i in range(9)]


def write_rows(path, data):
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return path


def read(*given):
    chat = tokenizers.load(microworld.path("base"))
    source = ((f"row[{i}]", row) for i, row in enumerate(given))
    return rows.read(source, chat, name="rows", scored=False, raw_prompt=False, n_context=99)


def test_fields_that_are_not_read_may_hold_anything():
    more = {"made": datetime.date(2026, 1, 2), "image": b"\xff\xd8\x00"}
    found, digest = read({"messages": CHAT} | more)
    assert len(found) == 1
    assert digest != read({"messages": CHAT})[1]
    with pytest.raises(ValueError, match=r"row\[0\]: 'id' cannot be written as JSON: .* date"):
        read({"messages": CHAT, "id": more["made"]})
    assert read({"messages": CHAT, "id": ["a", 1]})[0][0].id == ["a", 1]
    with pytest.raises(ValueError, match=r"row\[0\]: 'prompt' is empty or no list of turns: b'"):
        read({"prompt": more["image"]})


def test_a_batch_always_holds_the_first_row_that_is_not_done():
    lengths = np.random.default_rng(2).integers(1, 300, 100).tolist()
    planned = rows.batches(lengths, [1] * 100, n_rows=8, multiple=4)
    done = set()
    for bucket, numbers in planned:
        assert numbers[0] == min(set(range(100)) - done)
        assert len(numbers) <= bucket.n_rows <= 8
        assert bucket.n_rows % 4 == 0
        assert all(bucket.width / 2 - 32 < lengths[i] <= bucket.width for i in numbers)
        done |= set(numbers)
    assert done == set(range(100))
    assert len({bucket for bucket, _ in planned}) == 5  # 32, 64, 128, 256, 300

    def run(bucket, numbers):
        return [{"i": i} for i in numbers]

    for start in (0, 1, 37, 100):
        parts = list(rows.in_order(planned, run, start))
        assert [row["i"] for part, _ in parts for row in part] == list(range(start, 100))
        assert sum(n_made for _, n_made in parts) == 100 - start


def options(**changes):
    usual = {"temperature": 1.0, "raw_prompt": False, "append_eos": False}
    return usual | {"batch": 2, "head_chunk": 64} | changes


def test_a_run_that_breaks_off_anywhere_ends_in_the_same_file(model, data, tmp_path, capsys):
    given, out = write_rows(tmp_path / "data.jsonl", data), tmp_path / "new" / "out.jsonl"
    assert score.write(model, str(given), str(out), **options()) == len(data)
    whole = out.read_bytes()
    assert [json.loads(line) for line in whole.splitlines()] == score.score_rows(
        model, str(given), batch=2
    )
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    capsys.readouterr()
    # Before the first row, after it, within a row, before its end of line, and at the end.
    for cut, n_kept in ((0, 0), (ends[0], 1), (ends[3] + 20, 4), (ends[5] - 1, 5), (None, 9)):
        out.write_bytes(whole[:cut])
        score.write(model, str(given), str(out), **options())
        assert out.read_bytes() == whole
        assert (f"{n_kept} of 9 rows; continuing" in capsys.readouterr().err) == (n_kept > 0)


def test_rows_that_are_there_are_kept_and_not_made_again(model, data, tmp_path, monkeypatch):
    given, out = write_rows(tmp_path / "data.jsonl", data), tmp_path / "out.jsonl"
    score.write(model, str(given), str(out), **options())
    lines = out.read_bytes().splitlines(keepends=True)
    marked = json.dumps(json.loads(lines[0]) | {"sum": 77}).encode() + b"\n"
    out.write_bytes(marked + b"".join(lines[1:7]))
    score.write(model, str(given), str(out), **options())
    assert out.read_bytes() == marked + b"".join(lines[1:])
    # Nothing is left to do: the weights are not even read.
    monkeypatch.setattr(hf, "load_params", None)
    again = command.open_model(model.path, devices=jax.devices()[:1])
    assert score.write(again, str(given), str(out), **options()) == len(data)


def test_a_file_of_another_run_is_refused_and_left_as_it_is(root, model, data, tmp_path):
    given, out = write_rows(tmp_path / "data.jsonl", data), tmp_path / "out.jsonl"
    score.write(model, str(given), str(out), **options())
    beside = tmp_path / "out.jsonl.identity.json"
    before = out.read_bytes() + b'{"index": 3, "torn'
    out.write_bytes(before)
    others = write_rows(tmp_path / "others.jsonl", data[:-1])
    teacher = command.open_model(root / "teacher_math", devices=jax.devices()[:1])
    rounded = command.open_model(root / "base", dtype="bfloat16", devices=jax.devices()[:1])

    def refused(match, model=model, given=given, **changes):
        with pytest.raises(ValueError, match=match) as error:
            score.write(model, str(given), str(out), **options(**changes))
        assert out.read_bytes() == before
        assert "remove" in str(error.value)

    refused(r"- temperature: 1.0 there, 0.5 now", temperature=0.5)
    refused(r"- append_eos: False there, True now", append_eos=True)
    refused(r"- raw_prompt: False there, True now", raw_prompt=True)
    refused(r"- data: \w+ there, \w+ now", given=others)
    refused(r"- model: \w+ there, \w+ now", model=teacher)
    refused(r"- dtype: float32 there, bfloat16 now", model=rounded)
    # A file of the version whose identity said less is continued.
    saved = json.loads(beside.read_text())
    beside.write_text(json.dumps({k: v for k, v in saved.items() if k not in command.UNRECORDED}))
    refused(r"- encoding: nothing there", append_eos=True)
    score.write(model, str(given), str(out), **options())
    out.write_bytes(before)
    before = before.replace(b'"index": 4', b'"index": 5')
    out.write_bytes(before)
    refused(r"out.jsonl:5 is not row \{'index': 4\}")
    before = b"notes of mine\n"
    out.write_bytes(before)
    refused(r"out.jsonl:1 is not row")
    for damaged in ("", json.dumps(saved)[:-1], "[]"):
        beside.write_text(damaged)
        refused(r"out.jsonl.identity.json is damaged \(.*\), so what made .*out.jsonl is not known")
    beside.unlink()
    refused(r"exists without out.jsonl.identity.json")


WRONG = {
    "needs one of .*'completion'": [{"prompt": "a"}, {"prompt": "a", "completion": None}],
    "needs one of .*'prompt_ids'": [
        {"completion": "b"},
        {"prompt": "a", "prompt_ids": [3], "completion": "b"},
        {"prompt": "a", "messages": CHAT, "completion": "b"},
    ],
    "it has .'completion', 'completion_ids'.": [
        {"prompt": "a", "completion": "b", "completion_ids": [3]}
    ],
    "the tokenizer of .* has not; its ids are 0 to 511": [
        {"prompt_ids": [512], "completion_ids": [1]},
        {"prompt_ids": [5], "completion_ids": [1, -1]},
    ],
    "not a list of integers": [
        {"prompt_ids": [True], "completion_ids": [1]},
        {"prompt_ids": [5], "completion_ids": [1.0]},
        {"prompt_ids": "5", "completion_ids": [1]},
    ],
    "'prompt_ids' has no tokens": [{"prompt_ids": [], "completion_ids": [1]}],
    "is empty": [{"prompt": " ", "completion": "b"}, {"messages": [], "completion": "b"}],
    "'completion' is int, not text": [{"prompt": "a", "completion": 3}],
    "'completion' is not Unicode text": [{"prompt": "a", "completion": "\ud800"}],
    "'prompt' is not Unicode text": [{"prompt": "\ud800", "completion": "b"}],
    "a row is a JSON object, and this is list": [[3]],
    "a prompt of 2000 and a completion of 49 are 2049 tokens.* is 2048": [
        {"prompt_ids": [5] * 2000, "completion_ids": [5] * 49}
    ],
}


@pytest.mark.parametrize(
    ("match", "row"), [(match, row) for match, some in WRONG.items() for row in some], ids=str
)
def test_a_wrong_row_is_refused_before_weights_are_read(root, tmp_path, monkeypatch, match, row):
    monkeypatch.setattr(hf, "load_params", None)
    model = command.open_model(root / "base", devices=jax.devices()[:1])
    given = write_rows(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, row])
    with pytest.raises(ValueError, match=match) as error:
        score.write(model, str(given), str(tmp_path / "out.jsonl"), **options())
    assert f"{given} has 1 rows that cannot be used:\n{given}:2: " in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_wrong_rows_are_counted_and_the_first_are_shown(model, tmp_path):
    given = tmp_path / "data.jsonl"
    given.write_text('{"prompt": "a", "completion": "b"}\n\n' + '{"prompt": "a"\n' * 7)
    with pytest.raises(ValueError, match="has 7 rows") as error:
        score.score_rows(model, str(given))
    assert [f"{given}:{i}: not JSON" in str(error.value) for i in (3, 7, 8)] == [True, True, False]
    assert str(error.value).endswith("... and 2 more")
    given.write_text("\n")
    with pytest.raises(ValueError, match="is empty; give it at least one row"):
        score.score_rows(model, str(given))


@pytest.mark.slow
def test_a_killed_process_is_continued_to_the_same_file(root, tmp_path):
    draw = np.random.default_rng(3)
    data = [
        {"prompt_ids": draw.integers(0, 90, p).tolist(), "completion_ids": [7] * (p % 50)}
        for p in draw.integers(1, 300, 400).tolist()
    ]
    given = write_rows(tmp_path / "data.jsonl", data)

    def start(out):
        words = [sys.executable, "-m", "gopd_jax.score", f"--model={root / 'base'}"]
        words += [f"--data={given}", f"--out={out}", "--batch=2"]
        return subprocess.Popen(
            words, env=tiny.environment(1), cwd=tmp_path, stderr=subprocess.DEVNULL
        )

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert start(whole).wait(tiny.TIMEOUT) == 0
    n_kills = 0
    for n_rows in (1, 100, 250):
        process = start(out)
        while process.poll() is None and (
            not out.exists() or out.read_bytes().count(b"\n") < n_rows
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        n_kills += process.wait() == -signal.SIGKILL
    assert n_kills >= 2
    assert start(out).wait(tiny.TIMEOUT) == 0
    assert out.read_bytes() == whole.read_bytes()
