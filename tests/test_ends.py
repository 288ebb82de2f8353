"""Where a run is said to end: its last evaluation, and how many steps it may be given."""

import json
import os
import signal

import pytest
import tiny

from gopd_jax import metrics, train

ROWS = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl", "export/model.safetensors")


@pytest.fixture
def stopped(monkeypatch):
    """stopped(config) -> the step after which a signal has stopped the run."""

    def run(config):
        write = metrics.Writer.write

        def stopping(self, step, row, timing):
            write(self, step, row, timing)
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr(metrics.Writer, "write", stopping)
            summary = train.run(config)
        assert summary.stopped_by == signal.SIGTERM
        return summary.step

    return run


def test_a_run_that_ends_where_it_was_stopped_is_evaluated_there(
    root, tmp_path, monkeypatch, stopped
):
    cheap = {"evaluation": {"teachers": False, "problems": 2, "samples": 1, "verify_every": None}}
    a, b = (str(tmp_path / name) for name in "ab")
    reached = stopped(tiny.config(root, workdir=a, **cheap))
    assert reached == 2
    train.run(tiny.config(root, workdir=a, steps=reached, **cheap))
    train.run(tiny.config(root, workdir=b, steps=reached, **cheap))
    for name in ROWS:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    rows = [json.loads(row) for row in (tmp_path / "a" / "evaluation.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 0, 2, 2]
    monkeypatch.setattr(train, "evaluate", None)  # once is enough
    train.run(tiny.config(root, workdir=a, steps=reached, **cheap))


def test_fewer_steps_of_a_schedule_that_ends_with_them_are_told_the_number_that_cures(
    root, tmp_path, stopped
):
    cheap = {"workdir": str(tmp_path), "optimizer": {"schedule": "cosine"}}
    cheap["evaluation"] = {"teachers": False, "problems": 2, "samples": 1, "verify_every": None}
    stopped(tiny.config(root, **cheap))
    with pytest.raises(
        ValueError, match="is of another run:\n  steps: 6 in the checkpoint, 1 now\nUndo the"
    ) as error:
        train.begin(tiny.config(root, steps=1, **cheap))
    assert "or more" not in str(error.value)
    assert train.begin(tiny.config(root, **cheap)).step == 2
