"""Preflight: the real run passes, and each wrong set-up is refused for its reason."""

import copy
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import wrong_setups
from gopd_jax import preflight, report, scoring, train
from gopd_jax.config import Critic
from gopd_jax.models import decoder as lm

QUICK = ("teacher with random", "the teacher's base", "fingerprints", "temperatures", "end with")


def cases():
    quick = {case.name: any(words in case.name for words in QUICK) for case in wrong_setups.CASES}
    return [
        pytest.param(case, id=case.name, marks=() if quick[case.name] else pytest.mark.slow)
        for case in wrong_setups.CASES
    ]


@pytest.mark.parametrize("case", cases())
def test_a_wrong_setup_is_refused_for_its_reason(case, tmp_path):
    said = wrong_setups.refusal(case, tmp_path)
    assert said is not None, "it starts"
    assert re.search(case.says, said, re.DOTALL), said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The microworld's own set-up: its Config, and what preflight finds."""
    root = tmp_path_factory.mktemp("right")
    c = wrong_setups.build(root)
    begun = train.begin(c)
    return c, begun, preflight.run(begun.this)


def test_the_right_setup_passes(right):
    _, begun, report = right
    assert [check for check in report.checks if check.verdict != "ok"] == []
    by_role = {}
    for check in report.checks:
        by_role.setdefault(check.role, {})[check.name] = check.value
    assert by_role.keys() == {"student", "reference", "teacher:math", "teacher:code"}
    for role in begun.this.roles:
        assert by_role[role]["weights"] == begun.this.roles[role].digest[:12]
    assert float(by_role["reference"]["KL from the student"]) == 0
    told = {role: checks["its log-probs"] for role, checks in by_role.items()}
    assert told["student"] == told["reference"]
    assert len({*told.values()}) == 3
    assert 0 < float(by_role["teacher:math"]["KL from the student"]) < 0.5
    assert float(by_role["student"]["|A| as own teacher"]) == 0


@pytest.mark.slow
def test_a_critic_in_closed_form_is_no_matter_of_preflights(tmp_path):
    # Its value takes whole distributions; the questions are about the sampled tokens.
    c = wrong_setups.build(tmp_path)
    c.objective.credit, c.critic = "gae", Critic()
    assert c.problems() == []
    report = preflight.run(train.begin(c).this)
    assert [check for check in report.checks if check.verdict != "ok"] == []


def test_the_example_is_one_row_and_what_is_learnt_is_its_completion(right):
    _, begun, report = right
    text = "".join(token for token, _ in report.example)
    prompt, completion = text.split("assistant\n")
    learnt = "".join(token for token, is_learnt in report.example if is_learnt)
    assert learnt == completion
    assert learnt.endswith("<|im_end|>")
    assert begun.this.train.records["math"][0].messages[0]["content"][:3]


def test_it_is_shown_and_kept(right, tmp_path):
    c, _, report = right
    console = Console(record=True, width=150, force_terminal=True)
    preflight.show(report, console)
    printed = console.export_text(styles=True)
    assert "KL from the student" in printed
    assert "\x1b[32m" in printed  # green
    preflight.write(report, tmp_path)
    kept = json.loads((tmp_path / "preflight.json").read_text())
    assert len(kept["checks"]) == len(report.checks)
    assert kept["checks"][0] == {
        "role": "student",
        "name": "weights",
        "value": report.checks[0].value,
        "limit": "sha256",
        "verdict": "ok",
        "says": "",
    }


def test_a_run_that_may_not_be_refused_goes_on_with_what_was_found(tmp_path, capsys):
    c = wrong_setups.build(tmp_path)
    c.teachers["math"].path = c.student.path
    c.preflight = "warn"
    begun = train.begin(c)
    assert train.check(begun) is begun
    assert "fail: teacher:math: other than the student is no" in capsys.readouterr().err
    kept = json.loads((tmp_path / "run" / "preflight.json").read_text())
    assert "fail" in {check["verdict"] for check in kept["checks"]}


def test_the_report_has_it(right, tmp_path):
    preflight.write(right[2], tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    page = report.write(tmp_path).read_text()
    assert "<summary>Preflight</summary>" in page
    assert "teacher:math: other than the student" in page
    assert "yes (yes): ok" in page


@pytest.mark.slow
def test_words_of_prompts_are_shown_and_not_judged(tmp_path):
    c = wrong_setups.build(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        rows = [json.loads(line) for line in (tmp_path / name).open()]
        lines = (json.dumps({k: v for k, v in row.items() if k != "completion"}) for row in rows)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    report = preflight.run(train.begin(c).this)
    assert {check.verdict for check in report.checks} == {"ok"}
    shown = [check for check in report.checks if check.name == "log-prob of prompts"]
    assert [check.limit for check in shown] == ["none"] * 4
    assert all(float(check.value) < -1 for check in shown)


def test_prompts_of_one_token_have_no_words_that_follow_and_no_check_of_them(right, tmp_path):
    c = copy.deepcopy(right[0])
    for name in ("train", "test"):
        rows = [json.loads(row) for row in Path(getattr(c.data, name)).read_text().splitlines()]
        for row in rows:
            del row["completion"]
            row["messages"] = [{"role": "user", "content": "7"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        setattr(c.data, name, str(tmp_path / f"{name}.jsonl"))
    report = preflight.run(train.begin(c).this)
    assert not any("log-prob of prompts" in check.name for check in report.checks)
    assert "nan" not in {check.value for check in report.checks}


def test_a_number_that_is_none_fails():
    check = preflight._bound("r", "n", math.nan, fail_above=1.0, says="no")
    assert check.verdict == "fail"
    assert preflight._bound("r", "n", 0.9, fail_above=1.0, says="no").says == ""
    assert (
        preflight._bound("r", "n", 0.9, warn_above=0.5, fail_above=1.0, says="x").verdict == "warn"
    )
    assert preflight._bound("r", "n", -1.1, fail_below=-1.0, says="x").verdict == "fail"


def test_mass_is_the_sum_of_the_probabilities_of_the_ids(setting, first_step):
    recipe, _, frozen, _ = setting()
    rollout, decoder, params = first_step[0], recipe.reference, frozen.reference
    options = {"temperature": 0.8, "n_vocab": recipe.n_vocab}
    got_BT = jax.jit(lambda r: scoring.mass(decoder, params, r, (3, 7), chunk=4, **options))(
        rollout
    )
    hidden_BLD = lm.hidden(decoder, params, rollout.tokens_BL, rollout.valid_BL)
    logits_BTV = lm.logits(decoder, params, hidden_BLD)[:, :-1, : recipe.n_vocab]
    want_BT = jax.nn.softmax(logits_BTV / 0.8)[..., np.array([3, 7])].sum(-1)
    np.testing.assert_allclose(got_BT, np.where(rollout.mask_BT, want_BT, 0), atol=1e-6, rtol=1e-5)
