"""The host never stalls the devices: what is dispatched before what is waited for."""

import gzip
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gopd_jax import advance, checkpoint, data, metrics, processes, signals, train
from gopd_jax.setup import prepare
from gopd_jax.types import TrainState
from gopd_jax.verifiers import Verdict


def noting(monkeypatch, events, owner, name, told):
    """Calls of owner.name are noted, before their work, as told(*args)."""
    real = getattr(owner, name)

    def wrapped(*args, **options):
        events.append(told(*args))
        return real(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)


# --- the loop


@pytest.mark.slow
def test_a_row_is_waited_for_when_the_next_step_is_dispatched_and_before_its_checkpoint(
    root, tmp_path, monkeypatch
):
    events = []
    noting(monkeypatch, events, train.Stepper, "dispatch", lambda _, state, p, i: f"start {i + 1}")
    noting(monkeypatch, events, metrics.Writer, "write", lambda _, at, *rest: f"row {at}")
    noting(monkeypatch, events, checkpoint, "save", lambda manager, at, *rest: f"save {at}")
    noting(monkeypatch, events, metrics.Writer, "evaluation", lambda _, rows: "judge")
    config = tiny.config(
        root,
        workdir=str(tmp_path),
        checkpoints={"every": 4},
        evaluation={"every": None, "teachers": False},
        profile="4:6",
    )
    train.run(config)
    assert events == [
        "judge",
        *("start 1", "start 2", "row 1", "start 3", "row 2", "start 4", "row 3", "row 4", "save 4"),
        *("start 5", "start 6", "row 5", "judge", "row 6", "save 6"),
    ]
    steps, until = traced(tmp_path / "profile")
    assert list(steps) == ["5", "6"]
    assert until > steps["6"] + 1e3  # microseconds: the last one's programs are in the trace too


def traced(folder):
    """({step: where it begins} of the host's steps, the end of the last program) of a trace."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = {e["args"]["step_num"]: e["ts"] for e in events if e.get("name") == "train"}
    ran = [e for e in events if e.get("name", "").startswith("ThunkExecutor::Execute")]
    return steps, max(e["ts"] + e["dur"] for e in ran)


def test_an_error_in_the_prompts_is_the_users_and_comes_after_the_rows_of_finished_steps(
    root, tmp_path, monkeypatch
):
    real = data.prompts

    def prompts(dataset, reader, step, **options):
        if step == 3:
            raise ValueError("row 3 is broken")
        return real(dataset, reader, step, **options)

    monkeypatch.setattr(data, "prompts", prompts)
    config = tiny.config(
        root, workdir=str(tmp_path), checkpoints={"every": 20}, evaluation={"teachers": False}
    )
    with pytest.raises(ValueError, match="row 3 is broken"):
        train.run(config)
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2, 3]


# --- a step whose reward the host has to find


class Staged:
    """A Stepper of GRPO whose programs note that they are called and give back names."""

    def __init__(self, root, monkeypatch, lag):
        objective = {"advantage": "grpo", "lam": 1.0, "importance": "token" if lag else "none"}
        batch = {"prompts": 4, "rollouts": 2}
        config = tiny.config(root, objective=objective, sampling={"lag": lag}, batch=batch)
        self.run = prepare(config)
        self.events, self.lag = [], lag
        self.stepper = advance.Stepper(self.run)
        self.stepper.generate, self.stepper.score = self.generate, self.score
        self.stepper.update, self.written = self.update, 0
        monkeypatch.setattr(processes, "to_host", self.fetch)
        monkeypatch.setattr(advance, "completions", lambda tokenizer, rollout: rollout)
        monkeypatch.setattr(advance, "verify", self.verify)

    def generate(self, params, frozen, rows, key):
        self.events.append(f"generate {self.written}")
        self.written += 1
        return f"rollout {self.written - 1}"

    def score(self, frozen, rollout):
        self.events.append(f"score {rollout.split()[1]}")
        return self

    def replace(self, reward_B):
        """Of the scores, which are this object too."""
        self.events.append("reward")
        return self

    def update(self, state, rollout, scores, frozen):
        self.events.append(f"update {rollout.split()[1]}")
        return state, {}

    def fetch(self, rollout):
        self.events.append(f"fetch {rollout.split()[1]}")
        return rollout

    def verify(self, rollout, records):
        number = int(rollout.split()[1])
        assert records == self.stepper.make(number).records
        self.events.append(f"verify {number}")
        return [Verdict(1.0, "") for _ in records]

    def go(self, steps):
        state = self.stepper.begin(TrainState(jnp.int32(0), {}, ()))
        for i in range(steps):
            state, _ = self.stepper.dispatch(state, self.stepper.make(i + self.lag), i)
        return self.events


@pytest.mark.parametrize("lag", [1, 2])
def test_the_next_rollout_is_dispatched_before_the_host_verifies_the_older_one(
    root, monkeypatch, lag
):
    events = Staged(root, monkeypatch, lag).go(2)
    assert events == [f"generate {i}" for i in range(lag)] + [
        event
        for i in range(2)
        for event in (
            *(f"generate {i + lag}", f"score {i}"),
            *(f"fetch {i}", f"verify {i}", "reward", f"update {i}"),
        )
    ]


def test_without_a_lag_the_frozen_models_score_while_the_host_verifies(root, monkeypatch):
    events = Staged(root, monkeypatch, 0).go(1)
    assert events == ["generate 0", "score 0", "fetch 0", "verify 0", "reward", "update 0"]


def test_a_continued_run_verifies_what_waits_by_the_problems_it_was_asked(root, monkeypatch):
    staged = Staged(root, monkeypatch, 2)
    state = staged.stepper.begin(
        TrainState(jnp.int32(5), {}, (), pending=("rollout 5", "rollout 6"))
    )
    staged.written = 7
    for i in (5, 6, 7):
        state, _ = staged.stepper.dispatch(state, staged.stepper.make(i + 2), i)
    verified = [event for event in staged.events if event.startswith("verify")]
    assert verified == ["verify 5", "verify 6", "verify 7"]  # each held to its records there


# --- several processes


def test_the_largest_number_of_all_processes_is_an_array_on_every_device():
    for n in (0, 2, 15):
        found = processes.largest(n)
        assert isinstance(found, jax.Array)
        assert {int(np.asarray(shard.data)) for shard in found.addressable_shards} == {n}
        assert len(found.addressable_shards) == jax.local_device_count()


def test_several_processes_learn_of_a_signal_one_question_later(monkeypatch):
    with signals.stop_signals() as stop:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        assert stop() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() is None  # the answer of before the signal
        assert stop() == signal.SIGTERM
