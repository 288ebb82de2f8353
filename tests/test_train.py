"""A run in this process: stopped, crashed anywhere, lengthened, finished again, it is the run."""

import dataclasses
import json
import math
import os
import signal
import threading

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import advance, checkpoint, metrics, results, setup, sharding, train
from gopd_jax.config import Critic, Lora, Model
from gopd_jax.models import hf, lora
from gopd_jax.signals import stop_signals
from gopd_jax.verifiers import verify

ROWS = ("metrics.jsonl", "evaluation.jsonl", "samples.jsonl")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Models and data of the tiny run, and its uninterrupted results in root/run."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.build(root)
    summary = train.run(tiny.config(root))
    assert (summary.step, summary.stopped_by) == (6, None)
    assert summary.export == root / "run" / "export"
    return root


def same_results(got, want, names=ROWS):
    for name in (*names, "export/model.safetensors", "export/tokenizer.json"):
        assert (got / name).read_bytes() == (want / name).read_bytes(), name


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def in_workdir(root, workdir, **changes):
    return tiny.config(root, workdir=str(workdir), **changes)


def test_a_run_says_that_no_row_names_a_lambda(root, tmp_path, capsys):
    changes = {"objective": {"lam": 1.25, "lam_by_row": True}, "checkpoints": {"every": 9}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_judge_all", lambda *_: signal.SIGTERM)  # before a step
        train.run(in_workdir(root, tmp_path / "run", **changes))
    assert "lam_by_row = True has no effect: no row of data.train" in capsys.readouterr().err


def test_a_run_leaves_its_rows_evaluations_and_a_student_that_has_learnt(root):
    rows = read(root / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "reward" in row] == [1, 3, 5]
    assert all(np.isfinite(row["loss"]) and row["skipped"] == 0 for row in rows)
    for row in rows:
        by_task = [row["kl_teacher/math"], row["kl_teacher/code"]]
        assert min(by_task) - 1e-6 <= row["kl_teacher"] <= max(by_task) + 1e-6
    judged = [(r["step"], r["model"]) for r in read(root / "run" / "evaluation.jsonl")[::2]]
    assert judged == [
        *((0, "teacher:math"), (0, "teacher:code"), (0, "student")),
        *((4, "student"), (6, "student")),
    ]
    cfg = hf.load_config(root / "base")
    before, after = (hf.load_params(root / name, cfg) for name in ("base", "run/export"))
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (before, after)))]
    assert min(moved) > 1e-3  # six steps of Adam at 0.01
    assert len({row["length"] for row in rows}) > 1


def test_what_the_run_is_stands_in_run_json(root):
    said = json.loads((root / "run" / "run.json").read_text())
    assert said["config"]["objective"]["lam"] == 1.25
    assert said["models"]["reference"]["digest"] == hf.weights_digest(root / "base")
    assert said["models"]["student"]["parameters"] == (
        sum(x.size for x in jax.tree.leaves(hf.load_params(root / "base", tiny.CFG)))
    )


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_run_after_the_step_in_hand_and_the_run_goes_on(
    root, tmp_path, monkeypatch, number
):
    written = []
    real = metrics.Writer.write

    def write(self, step, row, timing):
        real(self, step, row, timing)
        written.append(step)
        if written == [1, 2]:  # a row comes when the next step is under way: 3 is in hand
            os.kill(os.getpid(), number)

    monkeypatch.setattr(metrics.Writer, "write", write)
    before = signal.getsignal(number)
    config = in_workdir(root, tmp_path, checkpoints={"every": 20})
    summary = train.run(config)
    assert (summary.step, summary.stopped_by, summary.export) == (3, number, None)
    assert written == [1, 2, 3]
    assert signal.getsignal(number) is before
    assert checkpoint._steps(tmp_path / "checkpoints")[-1] == 3
    assert train.run(config).step == 6
    assert written == [1, 2, 3, 4, 5, 6]
    same_results(tmp_path, root / "run")


@pytest.mark.slow
def test_a_signal_before_the_first_step_saves_nothing_and_the_run_starts_over(
    root, tmp_path, monkeypatch
):
    real = metrics.Writer.evaluation

    def evaluation(self, rows):
        real(self, rows)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "evaluation", evaluation)
        summary = train.run(in_workdir(root, tmp_path))
    assert (summary.step, summary.stopped_by) == (0, signal.SIGTERM)
    assert checkpoint._steps(tmp_path / "checkpoints") == []
    assert {row["model"] for row in read(tmp_path / "evaluation.jsonl")} == {"teacher:math"}
    train.run(in_workdir(root, tmp_path))
    same_results(tmp_path, root / "run")


class Crash(BaseException):
    """Nothing in the code under test catches it."""


def crashing(monkeypatch, owner, name, at, *, after=True):
    """The at-th call of owner.name raises Crash, after or before its work."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **options):
        calls.append(1)
        if len(calls) == at and not after:
            raise Crash
        result = real(*args, **options)
        if len(calls) == at:
            raise Crash
        return result

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (metrics.Writer, "write", 1),  # before the first checkpoint
        # Step 4 is evaluated, and has neither a row nor a checkpoint.
        pytest.param(metrics.Writer, "evaluation", 4, marks=pytest.mark.slow),
        pytest.param(metrics.Writer, "samples", 2, marks=pytest.mark.slow),
        pytest.param(metrics.Writer, "write", 5, marks=pytest.mark.slow),
        pytest.param(checkpoint, "save", 2, marks=pytest.mark.slow),
        pytest.param(results, "export", 1, marks=pytest.mark.slow),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_run_that_breaks_off_anywhere_goes_on_as_if_it_had_not(
    root, tmp_path, monkeypatch, owner, name, at
):
    config = in_workdir(root, tmp_path)
    with monkeypatch.context() as patch:
        crashing(patch, owner, name, at)
        with pytest.raises(Crash):
            train.run(config)
    assert train.run(config).step == 6
    same_results(tmp_path, root / "run")


def test_a_finished_run_started_again_exports_again_and_says_so(root, tmp_path, capfd, monkeypatch):
    workdir = tmp_path / "run"
    os.system(f"cp -r {root}/run {workdir}")
    (workdir / "export" / "model.safetensors").unlink()
    (workdir / ".export.half").mkdir()
    monkeypatch.setattr(train.Stepper, "dispatch", None)  # it must not train
    summary = train.run(in_workdir(root, workdir))
    assert (summary.step, summary.stopped_by, summary.export) == (6, None, workdir / "export")
    assert "at step 6 of 6: nothing is left to train" in capfd.readouterr().err
    assert not (workdir / ".export.half").exists()
    same_results(workdir, root / "run")


def test_a_schedule_is_of_the_steps_in_which_the_student_learns(root):
    config = tiny.config(
        root,
        steps=10,
        objective={"credit": "gae"},
        critic=Critic(warmup_steps=4),
        optimizer={"schedule": "cosine", "warmup_steps": 2},
        batch={"epochs": 2},
    )
    rate = setup.prepare(config).recipe.learning_rate
    peak = config.optimizer.learning_rate
    # Four updates to the full rate and eight down to 0: those of the six steps that are left.
    np.testing.assert_allclose([rate(i) for i in (0, 4, 8, 12)], [0, peak, peak / 2, 0], atol=1e-9)


def test_a_student_that_lost_more_than_two_standard_errors_is_named():
    def rows(math_, code, stderr=0.03):
        found = (("math", math_), ("code", code))
        return [{"task": task, "accuracy": x, "stderr": stderr} for task, x in found]

    before = rows(0.44, 0.5, 0.04)  # two errors of the difference are ten points
    told = train.worse(before, rows(0.33, 0.41))
    assert told == ("warning: the student got worse on 'math' from 44.0 ± 4.0 % to 33.0 ± 3.0 %")
    assert train.worse(before, rows(0.0, 0.0, 0.0)).count(" from ") == 2
    assert train.worse(before, rows(0.35, 0.9)) is None
    for none in (None, math.nan):  # one problem tells no error
        assert train.worse(rows(0.9, 0.9, none), rows(0.0, 0.0)) is None
    assert train.worse([], rows(0.0, 0.0)) is None


def test_a_teacher_that_is_not_ahead_is_doubted_where_there_is_room_to_be():
    def of(accuracy, stderr=0.03):
        return {"accuracy": accuracy, "stderr": stderr}

    ahead, level = {"teacher:a": of(0.9)}, {"teacher:b": of(0.43)}
    assert [*train.doubts("math", of(0.4), ahead)] == []
    (said,) = train.doubts("math", of(0.4), ahead | level)
    assert "teacher:b is not clearly better than the student on 'math', 43.0 ± 3.0 %" in said
    assert [*train.doubts("math", of(0.4, None), level)] == []  # one problem tells no error
    (said,) = train.doubts("math", of(1.0, 0.0), {"teacher:a": of(1.0, 0.0)} | level)
    assert "the student solves every problem of 'math'" in said
    assert [*train.doubts("math", of(1.0, 0.0), {})] == []


@pytest.mark.slow
def test_a_finished_run_is_made_longer_by_more_steps(root, tmp_path):
    train.run(in_workdir(root, tmp_path, steps=4))
    train.run(in_workdir(root, tmp_path, steps=6))
    same_results(tmp_path, root / "run")


def test_checkpoint_settings_and_mesh_may_change(root, tmp_path):
    begun = train.begin(
        in_workdir(root, root / "run", checkpoints={"every": 5}, mesh={"fsdp": 2, "tensor": 2})
    )
    assert begun.step == 6
    params, mesh = begun.state.params, begun.this.mesh
    assert sharding.shape(mesh) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert params["embed"].sharding.mesh == mesh
    exported = hf.load_params(root / "run" / "export", tiny.CFG)
    for a, b in zip(*map(jax.tree.leaves, (params, exported))):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_rewards_in_the_objective_are_those_of_the_verifiers(root, tmp_path, monkeypatch):
    scores = []

    def noting(texts, records):
        # Random models solve nothing: the score here is whether a text has an even length.
        found = [
            dataclasses.replace(v, score=float(len(t) % 2 == 0))
            for v, t in zip(verify(texts, records), texts)
        ]
        scores.append([verdict.score for verdict in found])
        return found

    monkeypatch.setattr(advance, "verify", noting)
    config = in_workdir(
        root,
        tmp_path,
        steps=2,
        objective={"advantage": "grpo", "lam": 1.0},
        batch={"prompts": 4, "rollouts": 4},
        evaluation={"teachers": False},
    )
    train.run(config)
    rows = read(tmp_path / "metrics.jsonl")
    assert len(scores) == 2
    for row, score in zip(rows, scores):
        np.testing.assert_allclose(row["reward"], np.mean(score), atol=1e-6)
        np.testing.assert_allclose(row["reward/math"], np.mean(score[:8]), atol=1e-6)
        np.testing.assert_allclose(row["reward/code"], np.mean(score[8:]), atol=1e-6)
        assert row["grad_norm"] > 0


@pytest.mark.slow
def test_imitation_learns_from_what_the_teachers_write(root, tmp_path):
    imitation = {"advantage": "imitation", "source": "teacher", "lam": 1.0}
    rate = {"learning_rate": 3e-3}
    batch = {"prompts": 32}  # each step's loss is of other problems
    config = in_workdir(root, tmp_path, steps=40, objective=imitation, batch=batch, optimizer=rate)
    train.run(config)
    losses = [row["loss"] for row in read(tmp_path / "metrics.jsonl")]
    assert np.mean(losses[-8:]) < np.mean(losses[:8]) - 0.2


def test_imitation_refuses_a_completion_that_ends_before_its_end(root, tmp_path):
    # The tiny models end at common characters, so that random ones do; written answers hold them.
    imitation = {"advantage": "imitation", "source": "data", "lam": 1.0}
    long = {"completion_length": 64}
    with pytest.raises(ValueError, match="its completion holds the end token"):
        train.run(in_workdir(root, tmp_path, objective=imitation, sampling=long))


def test_a_second_signal_acts_at_once_and_an_ignored_one_stays_ignored():
    # A shell starts background jobs with SIGINT ignored; the test must not depend on its caller.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with stop_signals() as stop:
        assert stop() is None
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
            assert stop() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_left_alone_outside_of_the_main_thread():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with stop_signals() as stop:
            seen.append((stop(), signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


def test_the_profiled_steps_are_first_to_end():
    assert [list(train._steps(text)) for text in ("1:3", None)] == [[1, 2], []]


@pytest.mark.parametrize("shared", [False, True])
def test_the_students_first_weights_are_given_up_unless_they_are_the_references(
    root, tmp_path, shared
):
    lam, reference = (1.25, Model(path=str(root / "base"))) if shared else (1.0, None)
    changes = {"steps": 1, "objective": {"lam": lam}, "reference": reference}
    begun = train.begin(in_workdir(root, tmp_path, **changes))
    first = jax.tree.leaves(begun.this.student.params)
    train.finish(begun)
    assert {x.is_deleted() for x in first} == {not shared}
    assert not any(x.is_deleted() for x in jax.tree.leaves(begun.this.frozen))


def test_adapters_leave_the_weights_beside_them(root, tmp_path):
    changes = {"steps": 1, "lora": Lora(rank=2), "objective": {"lam": 1.0}, "reference": None}
    begun = train.begin(in_workdir(root, tmp_path, **changes))
    adapters, base = lora.split(begun.this.student.params)
    train.finish(begun)
    assert all(x.is_deleted() for x in jax.tree.leaves(adapters))
    assert not any(x.is_deleted() for x in jax.tree.leaves(base))
