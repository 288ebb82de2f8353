"""Settings: flags typed by their annotations, identified by what changes a number."""

import dataclasses
import json
import keyword
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from absl import flags
from ml_collections import config_flags

from gopd_jax import config as settings
from gopd_jax import problems, records, verifiers
from gopd_jax.config import Config, Model, Objective, Optimizer
from gopd_jax.objectives import divergences, objective

PRESET = """
from gopd_jax.config import Config, Data, Model


def get_config(arg=None):
    if arg == "typo":
        Config(workdir="run", student=Model()).stepz = 3
    teachers = {"math": Model(path="m"), "code": Model(path="c")}
    return Config(workdir="run", student=Model(path="s"), teachers=teachers)
"""


@pytest.fixture
def parsed(tmp_path):
    """parsed(*flags, preset) -> the Config that the command line makes."""
    (tmp_path / "preset.py").write_text(PRESET)
    settings.accept_none_and_dicts()

    def parse(*words, preset="preset.py"):
        values, argv = flags.FlagValues(), ["main", f"--config={tmp_path / preset}", *words]
        holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        assert values(argv) == ["main"]
        return holder.value

    return parse


# --- flags


@pytest.mark.parametrize(
    ("flag", "key", "value"),
    [
        ("--config.steps=3", "steps", 3),
        ("--config.objective.lam=2", "objective.lam", 2.0),
        ("--config.optimizer.learning_rate=3e-4", "optimizer.learning_rate", 3e-4),
        ("--config.evaluation.teachers=false", "evaluation.teachers", False),
        ("--noconfig.evaluation.teachers", "evaluation.teachers", False),
        ("--config.workdir=/a b", "workdir", "/a b"),
        ('--config.data.tasks=("math",)', "data.tasks", ("math",)),
        ("--config.data.tasks=math", "data.tasks", ("math",)),
        ("--config.evaluation.every=none", "evaluation.every", None),
        ("--config.evaluation.every=7", "evaluation.every", 7),
        ("--config.mesh.data=4", "mesh.data", 4),
        ("--config.mesh.data=None", "mesh.data", None),
        ("--config.profile=10:13", "profile", "10:13"),
        ("--config.profile=none", "profile", None),
        ("--config.teachers.math.path=/t", "teachers.math.path", "/t"),
        ("--config.student.dtype=bfloat16", "student.dtype", "bfloat16"),
        ('--config.routes={"math": "a=0.7, b=0.3"}', "routes.math", "a=0.7, b=0.3"),
        ("--config.objective.task_lam={'math': 1.5}", "objective.task_lam.math", 1.5),
        ("--config.objective.reduction=sequence_sum(length=8)",)
        + ("objective.reduction", "sequence_sum(length=8)"),
    ],
)
def test_a_flag_is_read_as_its_setting_is_annotated_and_changes_no_other(parsed, flag, key, value):
    before = {k: v for k, v, _ in problems.leaves(parsed())}
    after = {k: v for k, v, _ in problems.leaves(parsed(flag))}
    assert {k for k in after if after[k] != before.get(k)} <= {key}
    assert after[key] == value
    assert type(after[key]) is type(value)


def test_an_absent_section_is_built_and_filled_and_taken_away(parsed):
    build = "--config.reference=build"
    assert parsed().reference is None
    assert parsed(build, "--config.reference.path=/r").reference == Model(path="/r")
    assert parsed("--config.reference=none").reference is None
    with pytest.raises(ValueError, match="reference=build"):
        parsed("--config.reference.path=/r")
    unset = parsed(build, "--config.objective.lam=2").problems()
    assert sum(problem.startswith("reference.path is not set; give") for problem in unset) == 1


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.steps=2.5", "steps=2.5"),
        ("--config.steps=many", "steps=many"),
        ("--config.objective.lam=more", "lam=more"),
        ("--config.evaluation.teachers=maybe", "teachers=maybe"),
        ("--config.teachers={}", "not supported"),
        ("--config.routes=math=large", 'write it as Python does: \'{"math": "large"'),
        ("--config.objective.task_lam=1.5", "write it as Python does"),
    ],
)
def test_a_flag_of_the_wrong_type_is_an_error(parsed, flag, words):
    with pytest.raises(flags.Error, match=words):
        parsed(flag)


def test_none_where_it_may_not_be_is_a_problem_of_its_own(parsed):
    config = parsed("--config.steps=none", "--config.objective.lam=none", "--config.workdir=none")
    assert config.problems() == [
        "workdir is None, a NoneType; it takes str",
        "steps is None, a NoneType; it takes int",
        "objective.lam is None, a NoneType; it takes float",
    ]


def test_a_misspelt_setting_in_a_preset_is_an_attribute_error(parsed):
    with pytest.raises(AttributeError, match="stepz"):
        parsed(preset="preset.py:typo")


@pytest.mark.parametrize(
    "key", ["stepz", "objective.lamda", "mesh.data.x", "problems", "teachers.law.path"]
)
def test_a_flag_of_no_setting_is_an_error(parsed, key):
    with pytest.raises((KeyError, ValueError), match=key.rsplit(".", 1)[-1].replace("path", "law")):
        parsed(f"--config.{key}=3")


def test_the_program_takes_none_and_refuses_it_where_it_may_not_be(tmp_path):
    (tmp_path / "preset.py").write_text(PRESET)
    done = subprocess.run(
        [*(sys.executable, "-m", "gopd_jax.main", f"--config={tmp_path / 'preset.py'}")]
        + ["--config.evaluation.every=none", "--config.seed=none"],
        capture_output=True,
        text=True,
        cwd=tiny.REPOSITORY,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "seed is None, a NoneType; it takes int" in done.stderr
    assert "every" not in done.stderr


OWN = """
from gopd_jax.objectives.divergences import DIVERGENCES, neyman, pearson


def symmetric_chi2(log_s, log_t):
    return pearson(log_s, log_t) + neyman(log_s, log_t)


DIVERGENCES["symmetric_chi2"] = symmetric_chi2
"""


def test_a_preset_brings_entries_of_its_own(parsed, tmp_path, monkeypatch):
    entry, text = "symmetric_chi2", (tiny.REPOSITORY / "ARCHITECTURE.md").read_text()
    verifier = re.search(r"^```python\n(from gopd_jax.verifiers .*?)^```$", text, re.M | re.S)[1]
    row = {"prompt": "A?", "task": "math", "answer": "A", "verifier": "contains"}
    flag = f"--config.objective.divergence={entry}"
    assert any(f"there is no '{entry}'" in problem for problem in parsed(flag).problems())
    with pytest.raises(ValueError, match="there is no 'contains'"):
        records.record(row, "here")
    monkeypatch.setitem(divergences.DIVERGENCES, entry, None)  # both are taken away at the end
    monkeypatch.setitem(verifiers.VERIFIERS, "contains", None)
    (tmp_path / "own.py").write_text(OWN + verifier + PRESET)
    config = parsed(flag, preset="own.py")
    assert not any(entry in problem for problem in config.problems())
    made = objective.build(divergence=entry, lam=1.0, loss="exact")
    s, t = np.log(np.float32([0.25, 0.5])), np.log(np.float32([0.5, 0.25]))
    np.testing.assert_allclose(made.divergence(s, t), [0.375, 0.375], rtol=1e-6)
    scores = [v.score for v in verifiers.verify(["an A", "a"], [records.record(row, "here")] * 2)]
    assert scores == [1.0, 0.0]


# --- identity


def run(**changes) -> Config:
    teachers = {"math": Model(path="m"), "code": Model(path="c")}
    return Config(workdir="run", student=Model(path="s"), teachers=teachers, **changes)


def test_identity_is_every_setting_that_changes_a_number():
    left_out = {
        "steps",
        "profile",
        "preflight",
        "workdir",
        "data.train",
        "data.test",
        "student.path",
    }
    left_out |= {"teachers.math.path", "teachers.code.path"}
    keys = {key for key, _, _ in problems.leaves(run())}
    left_out |= {key for key in keys if key.startswith(("mesh.", "checkpoints.", "diagnostics."))}
    passing = (".placement", *settings.PARTS_MAY_CHANGE, *settings.LATER)
    left_out |= {key for key in keys if f".{key}".endswith(passing)}
    left_out.remove("data.prompt_length")  # never off
    assert settings.identity(run()).keys() == keys - left_out
    assert "reference.dtype" in settings.identity(run(reference=Model()))


def test_an_integer_in_a_preset_and_the_same_number_as_a_flag_are_one_identity():
    assert settings.identity(run(objective=Objective(lam=1))) == settings.identity(run())
    assert settings.identity(run(objective=Objective(lam=2))) != settings.identity(run())
    whole, real = (run(objective=Objective(log_u_clip=value)) for value in (5, 5.0))
    assert settings.identity(whole) == settings.identity(real)


def test_settings_of_a_task_are_kept_whatever_its_name():
    own = settings.identity(run())
    assert settings.identity(run(objective=Objective(task_lam={"updates": 1.0}))) != own
    for name in ("path", "xpath", "lora.export", "lag"):
        for changes in ({"objective": Objective(task_lam={name: 2.0})}, {"routes": {name: "math"}}):
            assert settings.identity(run(**changes)) != settings.identity(run())


def test_more_steps_continue_a_run_unless_its_schedule_ends_with_them():
    assert settings.identity(run(steps=160)) == settings.identity(run())
    cosine = {"optimizer": Optimizer(schedule="cosine")}
    assert settings.identity(run(**cosine, steps=160)) != settings.identity(run(**cosine))


# --- config.py as the list of settings


def test_every_setting_has_a_type_and_a_comment():
    lines = Path(settings.__file__).read_text().splitlines()
    sections = [c for c in vars(settings).values() if dataclasses.is_dataclass(c)]
    assert len(sections) == 13
    for section in sections:
        start = next(
            i for i, line in enumerate(lines) if line.startswith(f"class {section.__name__}")
        )
        for field in dataclasses.fields(section):
            line = next(x for x in lines[start:] if x.startswith(f"    {field.name}: "))
            comment = line.partition("  # ")[2]
            assert len(comment) > 5, f"{section.__name__}.{field.name}"
            assert not isinstance(field.type, str)  # a string would not type a flag
        assert section.__slots__ == tuple(f.name for f in dataclasses.fields(section))


def test_no_setting_is_a_python_keyword_or_hides_a_method_of_dict():
    for key, _, _ in problems.leaves(Config(workdir="", student=Model())):
        for part in key.split("."):
            assert not keyword.iskeyword(part)
            assert not hasattr(dict, part)


def test_a_config_comes_back_from_its_plain_values_after_json():
    teachers = {"math": Model(path="m", template="a=1"), "code": Model(path="c")}
    made = Config(
        workdir="run",
        student=Model(path="s"),
        reference=Model(path="r"),
        teachers=teachers,
        objective=Objective(lam=1.5, task_lam={"math": 2.0}, gates=("agree",)),
        optimizer=Optimizer(schedule="cosine"),
    )
    plain = json.loads(json.dumps(settings.to_dict(made)))
    assert settings.from_dict(plain) == made
    del plain["objective"]["task_lam"], plain["optimizer"]
    fewer = settings.from_dict(plain)
    assert fewer.objective == dataclasses.replace(made.objective, task_lam={})
    assert fewer.optimizer == Optimizer()
