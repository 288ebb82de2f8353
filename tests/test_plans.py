"""The record of plans: continued where it stopped, and what gave no answer is told as such."""

import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import plans
from benchmarks.plans import CELLS, Cell
from benchmarks.plans_record import Record
from configs import qwen3
from gopd_jax import config
from gopd_jax.planning.phases import PHASES

CELL = Cell("8b", "v6e:16x16")


@pytest.fixture(autouse=True)
def versions(monkeypatch):
    monkeypatch.setattr(plans.metadata, "version", lambda name: "1.2")


def phase(peak=2**30, fits=True):
    memory = {"arguments": peak // 4, "temporaries": peak // 2, "peak": peak}
    return {
        "memory": memory if fits else None,
        "needed": None if fits else peak,
        "fits": fits,
        "flops": {"narrow": 2e15, "float32": 1e15},
        "compile_seconds": 61.0,
        "buffers": ["0.50 GiB f32[1,4,8,8] of dot_general"],
        "collective_bytes_from_hlo": {"all-gather": 3 * 2**30, "all-reduce": 2**30},
        "least_collective_bytes": 2 * 2**30,
        "decode": {"moved": 3 * 2**30, "weights": 2**30, "cache": 2**30, "live": 2**29},
        "estimated_seconds": {},
    }


def plan_of(name, length=16384, **options):
    c = config.to_dict(qwen3.get_config("8b"))
    del c["lora"], c["batch"]["attention"]  # as if they had come later
    c["sampling"]["completion_length"] = length
    return {
        "mesh": {"data": 1, "fsdp": 32, "tensor": 8},
        "usable_bytes": 32 * 2**30,
        "phases": {name: phase(**options)},
        "estimated_seconds": {f"{name}: compute": 10.0},
        "assumed": ["this and that"],
        "verdict": "fits",
        "change_that_fits": None,
        "config": c,
    }


def process(status=0, stderr="", written=None, late=False):
    """subprocess.run that leaves `written` in the file of --json."""

    def run(command, *, timeout, **options):
        if late:
            raise subprocess.TimeoutExpired(command, timeout)
        file = next(word for word in command if word.startswith("--json=")).removeprefix("--json=")
        if written is not None:
            Path(file).write_text(json.dumps(written))
        return types.SimpleNamespace(returncode=status, stderr=stderr)

    return run


def line(what="fused", **options):
    return plans.answer(CELL, what, 5.0, run=process(**options))


def test_a_phase_is_one_process_of_the_plan_command():
    command = plans.asked(CELL, "update")
    assert command[:3] == [sys.executable, "-m", "gopd_jax.plan"]
    assert command[3:5] == ["--config=configs/qwen3.py:8b", "--topology=v6e:16x16"]
    assert command[-2:] == ["--phase=update", "--nochanges"]
    assert "--nochanges" not in plans.asked(CELL, "change")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"status": -9}, "killed by signal 9, as for lack of memory"),
        ({"status": -11}, "killed by signal 11"),
        ({"late": True}, "no answer after 5 s"),
        ({"status": 1, "stderr": "Traceback\nKeyError: 'x'\n"}, "KeyError: 'x'"),
        ({"status": 3, "stderr": "compiling\nthe compiler failed: INTERNAL\nmore"}, "INTERNAL"),
    ],
)
def test_a_process_that_gives_no_answer_is_told_and_asked_again(tmp_path, options, says):
    record = Record(tmp_path / "plans.jsonl")
    record.add(line(**options))
    assert says in record.get(CELL, "fused")["said"]
    assert not record.answered(CELL, "fused")
    assert "fused" in [*plans.wanted(CELL, record)]
    assert says in plans.document(record)


def test_input_of_ours_that_is_refused_stops_the_run():
    with pytest.raises(ValueError, match=r"gopd_jax.plan.*\nlibtpu is not installed"):
        line(status=2, stderr="libtpu is not installed\n")


def test_what_has_an_answer_is_not_asked_again_after_a_kill_in_the_middle_of_a_line(tmp_path):
    file = tmp_path / "plans.jsonl"
    record = Record(file)
    assert [*plans.wanted(CELL, record)] == [*PHASES]
    for name in ("generate", "score"):
        record.add(line(name, written=plan_of(name)))
    whole = file.read_text()
    record.add(line("update", written=plan_of("update")))
    file.write_text(whole + file.read_text()[len(whole) :][:100])
    again = Record(file)
    assert [*plans.wanted(CELL, again)] == ["update", "fused", "evaluate"]
    again.add(line("update", written=plan_of("update")))
    last = Record(file)
    assert [*plans.wanted(CELL, last)] == ["fused", "evaluate"]
    assert last.of == again.of
    assert [*plans.wanted(Cell("8b", "v5p:4x4x4"), last)] == [*PHASES]


def test_what_was_answered_of_other_settings_is_asked_again(tmp_path):
    record = Record(tmp_path / "plans.jsonl")
    record.add(line(written=plan_of("fused", length=100)))
    before_widths = plan_of("fused")
    del before_widths["config"]["sampling"]["buckets"]  # which the preset sets to 8
    record.add(line(written=before_widths))
    assert [*plans.wanted(CELL, record, ("fused",))] == ["fused"]
    assert plans.document(record).count("not compiled yet") == len(CELLS)
    of_flags = plan_of("fused")
    of_flags["config"]["mesh"]["fsdp"] = 32  # the cell's, not the preset's
    record.add(line(written=of_flags))
    assert record.answered(CELL, "fused")


def test_a_change_is_asked_for_only_where_the_step_does_not_fit(tmp_path):
    record = Record(tmp_path / "plans.jsonl")
    for name in PHASES:
        record.add(line(name, written=plan_of(name)))
    assert [*plans.wanted(CELL, record)] == []
    record.add(line("fused", status=1, written=plan_of("fused", fits=False, peak=40 * 2**30)))
    assert [*plans.wanted(CELL, record)] == ["change"]
    made = plan_of("fused", fits=False) | {"change_that_fits": "--config.batch.prompts=512"}
    record.add(line("change", status=1, written=made))
    assert [*plans.wanted(CELL, record)] == []
    text = plans.document(record)
    assert "40.00 of 32.00 | does not fit; fits with `--config.batch.prompts=512`" in text


def test_the_document_has_every_cell_and_the_stages_seconds(tmp_path):
    record = Record(tmp_path / "plans.jsonl")
    assert plans.document(record).count("not compiled yet") == len(CELLS)
    for name in PHASES:
        record.add(line(name, written=plan_of(name)))
    text = plans.document(record)
    assert text.count("not compiled yet") == len(CELLS) - 1
    # 1024 rows of 16384 tokens in the three stages' 30 seconds; the fused program's are the same
    assert "| 1 × 32 × 8 | 1.00 of 32.00 | fits | 30 s, 559,241 tokens/s |" in text
    assert "| 3.00 GiB, 1.50 × (2.00 ×) | 4 GiB, 2.00 × |" in text
    assert "| update | 1.00 | 0.25 | 0.50 | fits | 3.0 | 61 s |" in text
    assert "- fused: 0.50 GiB f32[1,4,8,8] of dot_general" in text
    assert "- this and that" in text


def test_settings_of_evaluation_count_for_its_answers_alone(tmp_path):
    record = Record(tmp_path / "plans.jsonl")
    for name in ("fused", "evaluate"):
        other = plan_of(name)
        other["config"]["evaluation"]["rows"] = 1024
        record.add(line(name, written=other))
    assert [*plans.wanted(CELL, record, ("fused", "evaluate"))] == ["evaluate"]
    record.add(line("evaluate", written=plan_of("evaluate")))
    assert record.answered(CELL, "evaluate")


def test_a_teacher_that_cannot_be_evaluated_is_told_beside_the_steps_verdict(tmp_path):
    record = Record(tmp_path / "plans.jsonl")
    record.add(line("fused", written=plan_of("fused")))
    record.add(line("evaluate", written=plan_of("evaluate")))
    assert "| fits | " in plans.document(record)
    record.add(line("evaluate", status=1, written=plan_of("evaluate", fits=False, peak=2**36)))
    text = plans.document(record)
    cure = "with `evaluation.teachers=False`, as evaluating its teacher takes 64.00"
    assert f"| 1.00 of 32.00 | fits; {cure} | " in text
    assert "| evaluate | 64.00 |" in text


def test_a_rollout_that_was_compiled_alone_is_told_as_such(tmp_path):
    record = Record(tmp_path / "plans.jsonl")
    record.add(line("generate", written=plan_of("generate")))
    text = plans.document(record)
    assert "| rollout 1.00 of 32.00 | not compiled yet; its rollout fits |" in text
    record.add(line("generate", status=1, written=plan_of("generate", fits=False)))
    assert "its rollout does not fit" in plans.document(record)


def test_a_note_goes_with_the_answers_that_it_is_about(tmp_path):
    file = tmp_path / "plans.jsonl"
    file.write_text(json.dumps({"note": "counted too high"}) + "\n")
    record = Record(file)
    record.add(line())
    assert "\n\ncounted too high\n\n" in plans.document(Record(file))
    file.unlink()  # to begin anew
    assert "counted" not in plans.document(Record(file))


def test_phases_that_are_named_are_asked_for_alone(tmp_path):
    record = Record(tmp_path / "plans.jsonl")
    assert [*plans.wanted(CELL, record, ("fused", "generate"))] == ["generate", "fused"]
    record.add(line("fused", status=1, written=plan_of("fused", fits=False)))
    assert [*plans.wanted(CELL, record, ("fused",))] == []
    assert [*plans.wanted(CELL, record, ("change",))] == ["change"]


def test_the_flags_of_each_cell_make_a_mesh_of_its_slice_and_divide_the_rows():
    from gopd_jax.planning.chips import n_devices

    for cell in CELLS:
        given = dict(flag.removeprefix("--config.").split("=") for flag in cell.flags)
        c = qwen3.get_config(cell.preset)
        fsdp = int(given.get("mesh.fsdp", c.mesh.fsdp))
        tensor = int(given.get("mesh.tensor", c.mesh.tensor))
        pieces = int(given.get("batch.microbatches", c.batch.microbatches))
        assert n_devices(cell.topology) == fsdp * tensor
        assert c.batch.prompts == fsdp * pieces  # one row of a microbatch to each row shard
