import datetime
import functools
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from gopd_jax import data

TASKS = ("math", "code")


def row(i=0, task="math", **changes):
    changes = {"verifier": "text", "answer": str(i)} | changes
    return {"prompt": f"w{i}" + " w1" * (i % 3), "task": task, **changes}


def verl_row(i=0, teacher="math"):
    """A row in the layout of verl's data sets."""
    return {
        "data_source": "somewhere",
        "prompt": [{"role": "system", "content": "w9"}, {"role": "user", "content": f"w{i}"}],
        "ability": teacher,
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"index": i, "split": "train", "opd_teacher": teacher},
    }


def jsonl(path, rows, name="rows.jsonl"):
    (path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path / name)


def parquet(path, rows):
    columns = {key: None for row in rows for key in row}
    rows = [columns | row for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path / "rows.parquet")
    return str(path / "rows.parquet")


def test_rows_of_our_schema_become_records(tmp_path):
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    turns = [*chat, {"role": "user", "content": "é\u2028"}]
    rows = [
        row(7, "code", verifier="code(wall_s=1.0)", completion="w2"),
        {"messages": turns, "task": "math", "answer": " x", "verifier": "math", "completion": None},
        {"messages": json.dumps(turns), "task": "math", "answer": "x", "verifier": "math"},
    ]
    source = jsonl(tmp_path, rows)
    got = data.load(source, TASKS)
    assert got.tasks == TASKS
    assert got.source == source
    (code,) = got.records["code"]
    assert code.messages == ({"role": "user", "content": "w7 w1"},)
    assert (code.verifier, code.completion) == ("code(wall_s=1.0)", "w2")
    assert code.source == f"{source}:1"
    assert [r.messages for r in got.records["math"]] == [tuple(turns)] * 2
    assert [r.answer for r in got.records["math"]] == [" x", "x"]
    assert [r.completion for r in got.records["math"]] == [None, None]
    assert [r.source for r in got.records["math"]] == [f"{source}:2", f"{source}:3"]


def test_the_papers_schema_is_read_as_it_is_from_either_file(tmp_path):
    rows = [verl_row(1), verl_row(2, "code"), verl_row(3)]
    got = {
        source: data.load(source, TASKS)
        for source in (jsonl(tmp_path, rows), parquet(tmp_path, rows))
    }
    for source, dataset in got.items():
        assert [(r.answer, r.verifier) for r in dataset.records["math"]] == [
            ("1", "math"),
            ("3", "math"),
        ]
        assert [(r.answer, r.verifier) for r in dataset.records["code"]] == [("2", "code")]
        assert dataset.records["math"][1].messages == tuple(rows[2]["prompt"])
        where = f"{source}[1]" if source.endswith("parquet") else f"{source}:2"
        assert dataset.records["code"][0].source == where


def test_parquet_fills_fields_with_null_that_other_rows_have(tmp_path):
    named = [{"role": "user", "content": "w1", "name": "ann"}]
    rows = [row(0, prompt=named), verl_row(2), row(4, prompt=[{"role": "user", "content": "w4"}])]
    records = data.load(parquet(tmp_path, rows), ("math",)).records["math"]
    assert [r.verifier for r in records] == ["text", "math", "text"]
    assert records[0].messages == tuple(named)
    assert records[2].messages == ({"role": "user", "content": "w4"},)


def test_columns_that_are_not_read_may_hold_anything(tmp_path):
    more = {"made": datetime.date(2026, 1, 2), "image": b"\xff\xd8\x00"}
    path = parquet(tmp_path, [row(0, **more), row(1, **more)])
    assert len(data.load(path, ("math",)).records["math"]) == 2


def test_a_date_that_python_cannot_hold_is_told_with_its_file(tmp_path):
    path = parquet(tmp_path, [row(0), row(1)])
    table = pyarrow.parquet.read_table(path)
    far = pyarrow.array([10**7, 0], pyarrow.int32()).cast(pyarrow.date32())
    pyarrow.parquet.write_table(table.append_column("made", far), path)
    with pytest.raises(ValueError, match=r"rows.parquet is not a parquet file that can be read"):
        data.load(path, ("math",))


def test_identity_is_of_the_content_and_not_of_the_file(tmp_path):
    rows = [row(i) for i in range(3)]
    one = data.load(jsonl(tmp_path, rows), ("math",)).identity
    assert one == data.load(jsonl(tmp_path, rows, "other.jsonl"), ("math",)).identity
    assert one == data.load(parquet(tmp_path, rows), ("math",)).identity
    changed = [rows[::-1], [*rows[:2], row(2, answer="5")], [*rows[:2], row(2, completion="w1")]]
    others = [data.load(jsonl(tmp_path, other), ("math",)).identity for other in changed]
    assert len({one, *others}) == 4


BAD_ROWS = [
    ('{"prompt": ', "not JSON"),
    (b'{"prompt": "\xff"}', "not JSON: 'utf-8' codec"),
    ("[1]", "a row is a JSON object, and this is list"),
    (
        json.dumps({"prompt": "w1", "task": "math", "answer": "1"}),
        "the row has no 'verifier'; it has ['answer', 'prompt', 'task']",
    ),
    (json.dumps({"prompt": "w1", "answer": "1", "verifier": "text"}), "the row has no 'task'"),
    (json.dumps(row(answer=3)), "'answer' is int, not text"),
    (json.dumps(row(answer=" ")), "'answer' is empty"),
    (json.dumps(row(completion="")), "'completion' is empty"),
    (json.dumps(row(verifier="judge")), "there is no 'judge'; there are ['code', 'math', 'text']"),
    (json.dumps(row(verifier="code(wall=1)")), "code has no ['wall']"),
    (json.dumps(row(prompt=None)), "needs one of 'messages' and 'prompt'"),
    (json.dumps(row(messages=[])), "needs one of 'messages' and 'prompt'"),
    (json.dumps(row(prompt=" ")), "the last turn of 'prompt' is empty"),
    (json.dumps(row(prompt=[])), "'prompt' is empty or no list of turns"),
    (json.dumps(row(prompt={"role": "user", "content": "abcd"})), "no list of turns"),
    (json.dumps(row(prompt=["w1"])), "prompt[0] is str, not role and content"),
    (json.dumps(row(prompt=[{"role": "user"}])), "prompt[0] has no text under 'content'"),
    (json.dumps(row(prompt=[{"role": "user", "content": [1]}])), "no text under 'content'"),
    (json.dumps(row(prompt=[{"role": "user", "content": "w1", "n": 1}])), "no text under 'n'"),
    (json.dumps(row(prompt=[{"role": "assistant", "content": "w1"}])), "under 'completion'"),
    (json.dumps(row(prompt=None, messages="w1")), "'messages' is text and not the JSON of a list"),
    (
        json.dumps(verl_row() | {"extra_info": {"index": 1}}),
        "extra_info has no 'opd_teacher'; it has ['index']",
    ),
    (json.dumps(verl_row() | {"extra_info": "x"}), "extra_info has no 'opd_teacher'; it is 'x'"),
    (
        json.dumps(verl_row() | {"reward_model": {"style": "rule"}}),
        "reward_model has no 'ground_truth'",
    ),
    (
        json.dumps(verl_row(teacher="law")),
        "no verifier is known for teacher label 'law', only for ['code', 'math']",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(json.dumps(row()).encode() + b"\n\n" + line + b"\n" + b"\n")
    with pytest.raises(ValueError) as error:
        data.load(str(path), ("math", "law"))
    assert f"{path} has 1 malformed rows:\n{path}:3: " in str(error.value)
    assert message in str(error.value)


def test_five_malformed_rows_are_shown_and_all_are_counted(tmp_path):
    source = jsonl(tmp_path, [row(), *[{"task": "math"}] * 7])
    with pytest.raises(ValueError, match="has 7 malformed rows") as error:
        data.load(source, ("math",))
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in lines[1:6]] == [f"{source}:{n}" for n in range(2, 7)]
    assert lines[6:] == ["... and 2 more"]


def test_tasks_that_are_left_out_are_counted(tmp_path):
    source = jsonl(tmp_path, [row(), row(1, "law"), row(2, "art"), row(3, "law")])
    counts = r"tasks \['art' \(1 rows\), 'law' \(2 rows\)\]"
    with pytest.raises(
        ValueError, match=counts + r" of .* not in data\.tasks = \('math', 'code'\)"
    ):
        data.load(source, TASKS)


def test_a_task_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tasks \['code'\] have no record in .*'math': 1"):
        data.load(jsonl(tmp_path, [row()]), TASKS)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file_is_refused(tmp_path, text):
    (tmp_path / "empty.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"empty\.jsonl is empty"):
        data.load(str(tmp_path / "empty.jsonl"), TASKS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such.jsonl", r"there is no file no/such\.jsonl"),
        ("rows.csv", r"'rows\.csv' is not a source; give microworld:train"),
        ("microworld:dev", "'microworld:dev' is not a source"),
        ("tfds:only_a_name", "is not a source"),
        (
            "tfds:gopd_jax_has_no_such:train",
            "(?s)tfds:gopd_jax_has_no_such:train cannot be read.*download_and_prepare",
        ),
        ("tfds:/no/such/folder:train[:10]", "(?s)cannot be read.*tfds.builder\\('/no/such/folder'"),
    ],
)
def test_a_source_that_is_not_there_is_named_with_what_to_give(source, message):
    with pytest.raises(ValueError, match=message):
        data.load(source, TASKS)


def test_a_broken_parquet_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        data.load(str(tmp_path / "a.parquet"), TASKS)


@pytest.mark.parametrize("tasks", [(), ("math", "math")])
def test_tasks_are_named_once(tmp_path, tasks):
    with pytest.raises(ValueError, match="name each task once"):
        data.load(jsonl(tmp_path, [row()]), tasks)


class Rows(list):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


def test_microworld_rows_are_taken_from_its_dataset_once_a_process(monkeypatch):
    import types

    import gopd_jax.microworld

    asked = []

    def load(split):
        asked.append(split)
        turns = json.dumps([{"role": "user", "content": "w1"}])
        row = {"messages": turns, "answer": "1", "verifier": "text", "completion": "w2"}
        return Rows(row | {"task": task} for task in TASKS * 700)  # more than are read at a time

    module = types.ModuleType("gopd_jax.microworld.dataset")
    module.load = load
    monkeypatch.setitem(sys.modules, "gopd_jax.microworld.dataset", module)
    monkeypatch.setattr(gopd_jax.microworld, "dataset", module, raising=False)
    monkeypatch.setattr(data, "_builtin", functools.cache(data._read))
    got = data.load("microworld:test", TASKS)
    assert data.load("microworld:test", list(TASKS)) is got
    assert asked == ["test"]
    sources = [[record.source for record in got.records[task]] for task in TASKS]
    assert sources == [[f"microworld:test[{i}]" for i in range(n, 1400, 2)] for n in (0, 1)]
    assert got.records["code"][0].messages == ({"role": "user", "content": "w1"},)


BUILDER = """
import numpy as np
import tensorflow_datasets as tfds


class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({
            "prompt": tfds.features.Sequence({"role": text, "content": text}),
            "reward_model": {"style": text, "ground_truth": text},
            "extra_info": {"index": np.int64, "opd_teacher": text},
        }))

    def _split_generators(self, manager):
        return {"train": self._generate_examples(6), "test": self._generate_examples(2)}

    def _generate_examples(self, n):
        for i in range(n):
            turns = [{"role": "system", "content": "é"}, {"role": "user", "content": f"w{i}"}]
            yield i, {
                "prompt": turns,
                "reward_model": {"style": "rule", "ground_truth": str(i)},
                "extra_info": {"index": i, "opd_teacher": ["math", "code"][i % 2]},
            }
"""


def test_tfds_is_read_as_a_data_source_without_tensorflow(tmp_path, monkeypatch):
    package = tmp_path / "chats"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "chats_dataset_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(str(tmp_path))
    from chats.chats_dataset_builder import Builder

    builder = Builder(data_dir=tmp_path / "out", file_format="array_record")
    builder.download_and_prepare()
    got = data.load(f"tfds:{builder.data_dir}:train", TASKS)
    records = [*got.records["math"], *got.records["code"]]
    assert sorted(r.answer for r in records) == list("012345")
    for r in records:
        assert r.messages == (
            {"role": "system", "content": "é"},
            {"role": "user", "content": f"w{r.answer}"},
        )
        assert r.verifier == TASKS[int(r.answer) % 2]
        assert r.source.startswith(f"tfds:{builder.data_dir}:train[")
    part = data.load(f"tfds:{builder.data_dir}:train[:5]", TASKS)
    assert sum(map(len, part.records.values())) == 5
    assert data.load(f"tfds:{builder.data_dir}:train", TASKS).identity == got.identity
    with pytest.raises(ValueError, match="dev cannot be read"):
        data.load(f"tfds:{builder.data_dir}:dev", TASKS)
    # This process may have other libraries loaded: a fresh one tells what the reading needs.
    script = (
        "import sys\nfrom gopd_jax import data\n"
        f"print(len(data.load('tfds:{builder.data_dir}:test', ('math', 'code')).records['code']))\n"
        "print('tensorflow' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "False", "False"]
