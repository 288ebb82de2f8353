"""What is wrong with settings, told before anything is loaded, and what is without effect."""

import math
import re

import pytest

from gopd_jax import method, problems
from gopd_jax.config import Config, Lora, Model


@pytest.fixture
def made(tmp_path):
    """made({"steps": 3, "objective.lam": 2.0}) -> a Config that is right but for these."""
    for name in ("base", "math", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")

    def make(changes=()):
        model = {name: Model(path=str(tmp_path / name)) for name in ("base", "math", "code")}
        config = Config(
            workdir=str(tmp_path / "run"),
            student=model["base"],
            teachers={"math": model["math"], "code": model["code"]},
        )
        for key, value in dict(changes).items():
            *above, name = key.split(".")
            node = config
            for part in above:
                node = node[part] if isinstance(node, dict) else getattr(node, part)
            if isinstance(node, dict):
                node[name] = value
            else:
                setattr(node, name, value)
        return config

    return make


def test_settings_as_they_should_be_have_no_problem(made):
    assert made().problems() == []
    assert made().notes() == []


WRONG = {
    "steps": [
        (0, "steps is 0; it has to be positive"),
        (2.0, "steps is 2.0, a float; it takes int"),
    ],
    "seed": [(-1, "seed is -1; it has to be 0 or more"), (2**32, r"seed is 4294967296; .*2\*\*32")],
    "sampling.temperature": [
        (0.0, "temperature is 0.0; it has to be positive"),
        (math.nan, "temperature is nan; it has to be finite"),
        (math.inf, "temperature is inf; it has to be finite"),
        (True, "temperature is True, a bool; it takes float"),
    ],
    "batch.remat": [
        (
            True,
            "remat is True, a bool; it takes str | None: give 'layers' for what was True, and No",
        ),
        (False, "remat is False, a bool; .*: give 'layers' for what was True, and None"),
        ("True", r"remat is 'True'; it is one of \('layers', 'products', None\): give 'layers'"),
    ],
    "sampling.cache_dtype": [("int4", r"cache_dtype is 'int4'; it is one of \(None, 'int8'")],
    "sampling.weights_dtype": [("bfloat16", r"weights_dtype is 'bfloat16'; it is one of \(None")],
    "batch.attention": [("flash", r"attention is 'flash'; it is one of \('auto', 'xla', 'splash'")],
    "objective.lam": [(-0.5, "lam is -0.5; it has to be 0 or more"), (math.nan, "lam is nan")],
    "lora": [(Lora(targets="("), r"lora.targets is '\(', which is no regular expression: missing")],
    "teachers.math.fingerprint": [("", "fingerprint is ''; give the digits that preflight shows")],
    "objective.source": [("teachers", r"source is 'teachers'; it is one of \('student'")],
    "objective.advantage": [
        ("gdpo", r"there is no 'gdpo'; there are \['gopd', 'grpo', 'imitation'\]"),
        ("gopd(lam=2)", "takes its lambda from objective.lam"),
        ("grpo", "'grpo' compares the rollouts of one prompt and batch.rollouts is 1; use 8"),
        ("imitation", "source = 'student' teach .* use source = 'teacher' or 'data'"),
    ],
    "objective.loss": [("trpo", "there is no 'trpo'")],
    "objective.reduction": [
        ("sequence_sum", r"'sequence_sum'; give it \['length'\]"),
        ("sequence_sum(length=0)", "length has to be a positive number"),
        ("sequence_sum(length='8')", "length has to be a positive number"),
        ("sequence_sum(size=8)", r"no \['size'\]"),
    ],
    "optimizer.schedule": [("linear", r"schedule is 'linear'; it is one of \('constant'")],
    "optimizer.learning_rate": [(0.0, "learning_rate is 0.0; it has to be positive")],
    "optimizer.weight_decay": [(-0.1, "weight_decay is -0.1; it has to be 0 or more")],
    "optimizer.warmup_steps": [
        (-1, "warmup_steps is -1"),
        (80, "warmup_steps = 80 leaves none of steps = 80 at the full rate; lower it"),
    ],
    "optimizer.b1": [(1.0, "b1 is 1.0; .* less than 1")],
    "optimizer.b2": [(-0.1, "b2 is -0.1; .* less than 1")],
    "batch.prompts": [(0, "prompts is 0"), (255, "prompts = 255 is not divisible by the 2 tasks")],
    "batch.rollouts": [(0, "rollouts is 0; it has to be positive")],
    "batch.microbatches": [(0, "microbatches is 0"), (3, "256 rows do not divide into .* = 3")],
    "batch.head_chunk": [(-8, "head_chunk is -8; it has to be positive")],
    "mesh.data": [(0, "mesh.data is 0; it has to be positive")],
    "mesh.fsdp": [(None, "mesh.fsdp is None, a NoneType; it takes int")],
    "evaluation.rows": [(0, "rows is 0")],
    "evaluation.every": [(0, "every is 0"), ("none", r"'none', a str; it takes int \| None")],
    "profile": [
        ("10", "profile is '10' and steps is 80; it takes 'FIRST:END'"),
        ("13:10", "13:10"),
        ("5:5", "5:5"),
        ("78:81", "78:81"),
        ("-1:3", "-1:3"),
    ],
    "data.tasks": [
        ((), r"data.tasks is \(\); name at least one"),
        (("math", "math"), "'math'] more than once"),
        (("math,code",), "is no name of a task; several are written"),
        ("math", r"data.tasks is 'math', a str; it takes tuple\[str, ...\]"),
        (("math", 3), r"it takes tuple\[str"),
        (("math", "law"), r"tasks \['law'\] of data.tasks have no teacher; .*\['code', 'math'\]"),
    ],
    "data.train": [
        ("nowhere.jsonl", "data.train is 'nowhere.jsonl', and there is no such file"),
        ("microworld:dev", "data.train is 'microworld:dev'; give microworld:train"),
        ("microworld", "data.train is 'microworld'; give microworld:train"),
        ("rows.csv", "data.train is 'rows.csv'; give"),
        ("tfds:gsm8k", "data.train is 'tfds:gsm8k'; give"),
    ],
    "student.path": [
        (None, "student.path is not set; give .*--config.student.path=DIR"),
        ("", "student.path is '', which has no config.json"),
        ("gopd_jax/Qwen3-4B", "has no config.json; give .* or ORG/NAME@REVISION of the hub"),
    ],
    "student.dtype": [("float16", r"student.dtype is 'float16'; it is one of \('float32'")],
    "teachers.code": [("/models/code", "teachers.code is '/models/code', a str; it takes Model")],
    "teachers.code.path": [("/nowhere", "teachers.code.path is '/nowhere', which has no config")],
    "teachers": [({}, r"tasks \['code', 'math'\] of data.tasks have no teacher; .* \[\]")],
    "data": [(Model(), r"data is Model\(.*, a Model; it takes Data")],
    "reference": [("base", "reference is 'base', a str; it takes Model | None")],
    "workdir": [
        ("gs://bucket/run", "workdir is 'gs://bucket/run', .* mount the bucket"),
        (" ", "workdir is ' '; give"),
        (__file__ + "/run", r"workdir is .*test_problems.py is no directory that can be written"),
    ],
}


@pytest.mark.parametrize(
    ("key", "value", "words"), [(k, v, w) for k, pairs in WRONG.items() for v, w in pairs]
)
def test_a_wrong_setting_is_one_problem_that_says_what_to_give(made, key, value, words):
    assert made().problems() == []
    found = [p for p in made({key: value}).problems() if re.search(words, p)]
    assert len(found) == 1, made({key: value}).problems()


def test_every_number_has_a_bound(made):
    for key, value, kind in problems.leaves(made()):
        if kind in (int, float, int | None) and not isinstance(value, bool):
            assert any(p.startswith(f"{key} is -1") for p in made({key: -1}).problems()), key


def test_all_problems_are_listed_at_once(made):
    wrong = {
        "objective.lam": 1.25,
        "objective.loss": "trpo",
        "optimizer.schedule": "linear",
        "batch.prompts": 7,
        "batch.microbatches": 4,
        "data.test": "nowhere.parquet",
        "student.path": "/nowhere",
        "profile": "1",
    }
    found = made(wrong).problems()
    assert len(found) == len(wrong)
    for words in (
        "no reference",
        "'trpo'",
        "'linear'",
        "= 7 is not",
        "do not divide",
        "nowhere.parq",
    ):
        assert sum(words in problem for problem in found) == 1, words


def test_extrapolation_asks_for_a_reference_and_takes_it(made, tmp_path):
    (problem,) = made({"objective.lam": 1.25}).problems()
    assert "objective.lam is 1.25 and there is no reference" in problem
    assert "--config.reference=build --config.reference.path" in problem
    reference = Model(path=str(tmp_path / "base"))
    assert made({"objective.lam": 1.25, "reference": reference}).problems() == []
    assert made({"objective.lam": 0.0}).problems() != []


@pytest.mark.parametrize("advantage", ["gopd", "grpo"])
@pytest.mark.parametrize("source", ["teacher", "data"])
def test_an_on_policy_objective_refuses_text_that_others_wrote(made, advantage, source):
    changes = {"objective.advantage": advantage, "objective.source": source, "batch.rollouts": 8}
    (problem,) = made(changes).problems()
    assert f"advantage = '{advantage}' is on-policy and objective.source is '{source}'" in problem


def test_only_methods_that_ask_a_teacher_need_one(made):
    grpo = {"objective.advantage": "grpo", "batch.rollouts": 8, "teachers": {}}
    data = {"objective.advantage": "imitation", "objective.source": "data", "teachers": {}}
    assert made(grpo).problems() == made(data).problems() == []
    (problem,) = made(data | {"objective.source": "teacher"}).problems()
    assert "have no teacher" in problem


# --- notes


def test_a_reference_without_use_is_a_note_and_is_not_loaded(made):
    config = made({"reference": Model(path="/nowhere")})
    assert config.problems() == []
    assert config.notes() == [
        "reference = '/nowhere' is not loaded: objective.lam = 1, where it cancels"
    ]
    assert "reference" not in method.roles(config)


def test_lambda_is_of_the_target_and_not_of_the_teachers_own_entropy(made):
    grpo = {"objective.advantage": "grpo", "batch.rollouts": 8, "objective.lam": 1.25}
    gated = grpo | {"objective.gates": ("teacher_entropy(at_most=1.0)",)}
    gated |= {"objective.ratio_cap": 3.0, "reference": Model(path="/nowhere")}
    config = made(gated)
    assert config.problems() == []
    assert config.notes() == [
        "objective.lam = 1.25 has no effect in objective.advantage = 'grpo'",
        "objective.ratio_cap = 3.0 has no effect in objective.advantage = 'grpo'",
        "reference = '/nowhere' is not loaded: advantage = 'grpo'",
    ]
    assert "teachers.math" in method.roles(config)
    # The gate of T / S is of the target.
    config = made(gated | {"objective.gates": ("trust",)})
    assert config.notes() == []
    assert "reference" in method.roles(config)


def test_a_teacher_without_use_is_a_note_and_is_not_loaded(made):
    config = made({"data.tasks": ("math",), "teachers.code.path": "/nowhere"})
    assert config.problems() == []
    (note,) = config.notes()
    assert note.startswith("teachers ['code'] are not loaded")
    assert method.roles(config).keys() == {"student", "teachers.math"}
    grpo = {"objective.advantage": "grpo", "batch.rollouts": 8, "evaluation.teachers": False}
    assert made(grpo).notes()[0].startswith("teachers ['code', 'math'] are not loaded")


def test_lambda_without_effect_is_a_note(made, tmp_path):
    grpo = {"objective.advantage": "grpo", "batch.rollouts": 8, "objective.lam": 1.25}
    assert made(grpo).notes() == [
        "objective.lam = 1.25 has no effect in objective.advantage = 'grpo'"
    ]
    same = {"objective.lam": 1.25, "reference": Model(path=str(tmp_path / "x" / ".." / "math"))}
    (note,) = made(same).notes()
    assert note.startswith("teachers.math is the reference, so log T - log R = 0")


def test_a_student_that_is_its_own_teacher_is_a_note(made, tmp_path):
    (note,) = made({"teachers.math.path": str(tmp_path / "base")}).notes()
    assert note.startswith("teachers.math is the student itself")


def test_a_teacher_with_the_references_weights_that_sees_more_has_something_to_say(made, tmp_path):
    changes = {"objective.lam": 1.25, "reference": Model(path=str(tmp_path / "base"))}
    changes |= {"teachers.math": Model(path=str(tmp_path / "base"))}
    assert "teachers.math is the reference" in made(changes).notes()[0]
    for key, value in (("context", "solution"), ("template", "think=True"), ("follows", 0.9)):
        notes = made(changes | {f"teachers.math.{key}": value}).notes()
        assert not any("is the reference" in note for note in notes)
