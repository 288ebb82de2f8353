"""Rows that survive kills and continue byte for byte, event files and the stop watch."""

import json
import math
import struct
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from gopd_jax.metrics import StopWatch, Writer, read_rows, to_row
from gopd_jax.types import Mean

FILES = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl")


def row_at(step):
    rng = np.random.default_rng(step)
    row = {"loss": float(np.float32(rng.normal())), "kl_teacher": float(rng.random())}
    return row | ({"grad_norm": math.inf, "skipped": 1.0} if step == 4 else {"skipped": 0.0})


def evaluation_at(step, model, task, accuracy=0.5):
    figures = {"accuracy": accuracy, "stderr": 0.02, "length": 11.5, "truncated": 0.0}
    place = {"step": step, "model": model, "task": task}
    pass_at = {"1": float(accuracy), "2": 0.75, "4": 0.875}
    return place | figures | {"pass_at": pass_at, "problems": 8, "samples": 4}


def sample_at(step, task, completion="1\u20112 \U0001f600 \ud83d"):
    place = {"step": step, "model": "student", "task": task, "prompt": "1+1?"}
    return place | {"completion": completion, "score": 0.0, "reason": "no answer"}


def run(writer, first, last, *, evaluate_start=False):
    """Steps first..last as a training loop writes them: every third one is evaluated."""
    for step in range(first - evaluate_start, last + 1):
        if step:
            writer.write(step, row_at(step), {"seconds": np.random.random()})
        if step % 3 == 0:
            writer.samples(
                [sample_at(step, "math"), sample_at(step, "code"), sample_at(step, "math")]
            )
            writer.evaluation([evaluation_at(step, "student", task) for task in ("math", "code")])
            if step == 0:
                writer.evaluation([evaluation_at(0, "teacher:math", "math", 0.8)])


def events(workdir):
    """All event files' records, from the framing alone: length, crc, record, crc."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(workdir):
    return [(v.tag, e.step, v.simple_value) for e in events(workdir) for v in e.summary.value]


def test_to_row_divides_totals_by_counts_and_adds_the_extra():
    metrics = {"kl_teacher": Mean.of(jnp.array([1.0, 2.0, 6.0]), jnp.array([True, True, False]))}
    row = to_row(metrics | {"skipped": jnp.int32(1), "grad_norm": 2}, tokens=7)
    assert row == {"kl_teacher": 1.5, "skipped": 1.0, "grad_norm": 2.0, "tokens": 7.0}
    assert {type(value) for value in row.values()} == {float}
    assert math.isnan(to_row({"reward": Mean.of(jnp.ones(2), jnp.zeros(2, bool))})["reward"])
    with pytest.raises(ValueError, match=r"\['loss'\] are given twice"):
        to_row({"loss": 1.0}, loss=2.0)


@pytest.mark.parametrize("checkpoint", [0, 3, 6])
@pytest.mark.parametrize("tail", [b"", b'{"step": 8, "los', b"\0\0\0\0"])
def test_a_killed_and_continued_run_leaves_the_uninterrupted_files(tmp_path, checkpoint, tail):
    with Writer(tmp_path / "whole", resume_step=0) as writer:
        run(writer, 1, 9, evaluate_start=True)
    with Writer(tmp_path / "killed", resume_step=0) as writer:
        run(writer, 1, 7, evaluate_start=True)
    for name in (*FILES, "timing.jsonl"):
        with (tmp_path / "killed" / name).open("ab") as file:
            file.write(tail)
    with Writer(tmp_path / "killed", resume_step=checkpoint) as writer:
        run(writer, checkpoint + 1, 9, evaluate_start=checkpoint == 0)
    for name in FILES:
        got, want = (tmp_path / "killed" / name, tmp_path / "whole" / name)
        assert got.read_bytes() == want.read_bytes(), name
    assert [row["step"] for row in read_rows(tmp_path / "killed/timing.jsonl")] == [*range(1, 10)]


def test_an_evaluation_done_again_takes_the_place_of_the_first(tmp_path):
    with Writer(tmp_path, resume_step=0) as writer:
        writer.evaluation(
            [evaluation_at(0, model, "math") for model in ("student", "teacher:math")]
        )
        writer.evaluation([evaluation_at(0, "student", "math", 0.75)])
    rows = read_rows(tmp_path / "evaluation.jsonl")
    assert [(row["model"], row["accuracy"]) for row in rows] == [
        ("student", 0.75),
        ("teacher:math", 0.5),
    ]


def test_lines_are_strict_json_and_text_comes_back_as_it_was(tmp_path):
    with Writer(tmp_path, resume_step=0) as writer:
        writer.write(4, row_at(4) | {"reward": math.nan}, {})
        writer.samples([sample_at(4, "math")])
        writer.evaluation([evaluation_at(4, "student", "math", np.float32(0.5))])
    refuse = lambda name: pytest.fail(f"{name} is not JSON")  # noqa: E731
    for name in FILES:
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["grad_norm"] is None
    assert row["reward"] is None
    assert row["loss"] == row_at(4)["loss"]
    assert "\U0001f600" in (tmp_path / "samples.jsonl").read_text()  # legible without a parser
    (row,) = read_rows(tmp_path / "samples.jsonl")
    assert row["completion"] == sample_at(4, "math")["completion"]


def test_a_figure_that_is_not_finite_is_null_and_no_point_on_the_board(tmp_path):
    with Writer(tmp_path, resume_step=0) as writer:
        writer.evaluation([evaluation_at(0, "student", "math") | {"stderr": math.nan}])
    (row,) = read_rows(tmp_path / "evaluation.jsonl")
    assert row["stderr"] is None
    drawn = {tag.rsplit("/", 1)[1] for tag, _, _ in scalars(tmp_path)}
    assert drawn == {"accuracy", "length", "truncated", "pass_at_1", "pass_at_2", "pass_at_4"}


def test_a_complete_last_row_without_its_line_end_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.25}')
    with Writer(tmp_path, resume_step=2) as writer:
        writer.write(3, {"loss": 0.125}, {})
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.5, 0.25, 0.125]


def test_a_broken_line_that_no_kill_explains_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a JSON object"):
        Writer(tmp_path, resume_step=3)


def test_a_step_written_twice_and_an_incomplete_result_are_errors(tmp_path):
    with Writer(tmp_path, resume_step=0) as writer:
        writer.write(1, row_at(1), {})
        with pytest.raises(ValueError, match=r"step 1 comes after step 1.*resume_step"):
            writer.write(1, row_at(1), {})
        with pytest.raises(ValueError, match=r"it needs .*'stderr'"):
            writer.evaluation([{"step": 1, "model": "student", "task": "math", "accuracy": 1.0}])


def test_no_clock_reading_is_in_the_metrics_and_other_processes_write_nothing(tmp_path):
    with Writer(tmp_path / "first", resume_step=0) as writer:
        writer.write(1, row_at(1), {"seconds": 2.5, "tokens_per_second": 80.0})
    (row,) = read_rows(tmp_path / "first/metrics.jsonl")
    assert row.keys() == {"step", "loss", "kl_teacher", "skipped"}
    assert read_rows(tmp_path / "first/timing.jsonl") == [
        {"step": 1, "seconds": 2.5, "tokens_per_second": 80.0}
    ]
    with Writer(tmp_path / "second", resume_step=0, enabled=False) as writer:
        run(writer, 1, 3)
    assert not (tmp_path / "second").exists()


def test_event_files_hold_the_rows_and_hide_what_a_continued_run_repeats(tmp_path):
    with Writer(tmp_path, resume_step=0) as writer:
        run(writer, 1, 4)
    before = scalars(tmp_path)
    assert ("metrics/loss", 2, np.float32(row_at(2)["loss"])) in before
    assert ("evaluation/math/student/accuracy", 3, 0.5) in before
    assert [step for tag, step, _ in before if tag == "timing/seconds"] == [1, 2, 3, 4]
    with Writer(tmp_path, resume_step=2) as writer:
        run(writer, 3, 4)
    assert [e.step for e in events(tmp_path) if e.HasField("session_log")] == [1, 3]
    assert [step for tag, step, _ in scalars(tmp_path) if tag == "metrics/loss"] == [
        *(1, 2, 3, 4),
        *(3, 4),
    ]


def test_tokens_per_second_leave_out_evaluating_and_saving():
    clock = types.SimpleNamespace(now=0.0)
    watch = StopWatch(lambda: clock.now)
    for phase, seconds in (("data", 1.0), ("step", 6.0), ("step", 2.0), ("evaluate", 30.0)):
        with watch(phase):
            clock.now += seconds
    clock.now += 1.0  # in no phase, and still part of training
    row = watch.lap(500)
    assert row == {
        **{"seconds": 40.0, "tokens_per_second": 50.0},
        **{"seconds/data": 1.0, "seconds/step": 8.0, "seconds/evaluate": 30.0},
    }
    clock.now += 2.0
    assert watch.lap(10) == {"seconds": 2.0, "tokens_per_second": 5.0}


def test_what_is_not_finite_is_null_in_the_rows_and_absent_from_event_files(tmp_path):
    with Writer(tmp_path, resume_step=0) as writer:
        writer.write(1, {"loss": 1.0, "probe/auroc": float("nan")}, {})
    assert '"probe/auroc": null' in (tmp_path / "metrics.jsonl").read_text()
    assert [tag for tag, _, _ in scalars(tmp_path)] == ["metrics/loss"]
