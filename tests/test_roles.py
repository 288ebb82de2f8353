"""What is checked of roles that read otherwise than the student, on loading and in preflight."""

import json

import pytest
import tiny

from benchmarks import wrong_setups
from gopd_jax import microworld, preflight, train
from gopd_jax.config import Model, Objective


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("built")
    tiny.build(root)
    return root


@pytest.mark.parametrize(
    ("math", "said"),
    [
        # A second role of a model that is loaded already, with more to read.
        (
            {"path": "base", "context": "solution", "prompt_length": 9999},
            r"- teacher:math: teachers.math.prompt_length \+ sampling.completion_length = 10005",
        ),
        # It reads as the student does, so that no step renders anew; its evaluation does.
        (
            {"path": "teacher_math", "prompt_length": 3},
            r"evaluating teacher:math \(--config.evaluation.teachers=False leaves it out\): .*"
            r"longer than teachers.math.prompt_length = 3 tokens",
        ),
        # Another teacher's longer limit is not its own.
        (
            {"path": "teacher_math", "context": "solution"},
            r"'math' on task 'math': .*longer than data.prompt_length = 48",
        ),
    ],
)
def test_prompts_as_a_teacher_reads_them_are_held_against_its_own_limits(built, math, said):
    teachers = {
        "math": tiny.settings.Model(**math | {"path": str(built / math["path"])}),
        "code": tiny.settings.Model(path=str(built / "teacher_code"), prompt_length=200),
    }
    with pytest.raises(ValueError, match=said):
        train.prepare(tiny.config(built, teachers=teachers))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher_math": 20},
            "teacher 'math' on task 'math': .* longer than teachers.math.prompt_length = 20 tokens",
        ),
        ({"base": 20}, "reference: .* longer than reference.prompt_length = 20 tokens"),
        # Of teachers that are mixed, the second is shown what the first reads.
        (
            {"teacher_code": 20, "routes": {"math": "math=0.5, code=0.5"}},
            "teacher 'code' on task 'math': .* longer than teachers.code.prompt_length = 20 tokens",
        ),
    ],
    ids=str,
)
def test_a_limit_holds_for_a_role_that_reads_as_the_student(built, changes, said):
    """Its model's context is checked against that limit, and the rows are the student's."""

    def model(name):
        return Model(path=str(built / name), prompt_length=changes.get(name))

    c = tiny.config(
        built,
        teachers={"math": model("teacher_math"), "code": model("teacher_code")},
        reference=model("base"),
        routes=changes.get("routes", {}),
        evaluation={"teachers": False},
    )
    with pytest.raises(ValueError, match=said):
        train.prepare(c)


def test_a_limit_of_a_teacher_that_nobody_asks_is_of_its_evaluation_alone(built):
    teachers = {name: Model(path=str(built / f"teacher_{name}")) for name in ("math", "code")}
    short = built / "short.jsonl"
    rows = [json.loads(line) for line in (built / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["messages"] = [{"role": "user", "content": "1+1"}]
    short.write_text("".join(json.dumps(row) + "\n" for row in rows))
    teachers["math"].prompt_length = 20
    c = tiny.config(built, teachers=teachers, reference=None, data={"test": str(short)})
    c.objective, c.batch.rollouts = Objective(advantage="grpo"), 2
    assert train.prepare(c).roles["teacher:math"].reader.length == 20


def test_the_student_alone_recomputes_its_layers(built):
    recipe = train.prepare(tiny.config(built, batch={"remat": "layers"})).recipe
    assert recipe.student.remat == "layers"
    assert not any(model.remat for model in (*recipe.teachers, recipe.reference))


def verdicts(c) -> dict:
    """(role, check) -> verdict of what preflight finds."""
    report = preflight.run(train.begin(c).this)
    return {(check.role, check.name): check.verdict for check in report.checks}


def test_a_teacher_that_sees_more_than_the_reference_of_its_own_weights_passes(tmp_path):
    """And is asked about the rows that it teaches alone: the others have nothing to show it."""
    c = wrong_setups.build(tmp_path)
    path = str(microworld.path("open_book"))
    c.student.path = c.reference.path = path
    c.teachers["math"] = Model(path=path, context="solution", prompt_length=96)
    c.evaluation.teachers = False
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for row in rows:
        if row["task"] == "code":
            del row["completion"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = verdicts(c)
    assert "fail" not in found.values()
    assert found["teacher:math", "other than the reference"] == "ok"


@pytest.mark.slow
def test_a_teacher_that_writes_is_another_than_the_student_in_any_dtype(tmp_path):
    c = wrong_setups.build(tmp_path)
    c.teachers["math"] = Model(path=c.student.path, dtype="bfloat16")
    c.objective, c.reference = Objective(source="teacher", advantage="imitation"), None
    found = verdicts(c)
    assert found["teacher:math", "other than the student"] == "fail"
    assert found["teacher:code", "other than the student"] == "ok"


@pytest.mark.slow
def test_other_ends_of_a_model_in_host_memory_are_weighed(tmp_path):
    c = wrong_setups.build(tmp_path)
    wrong_setups.other_end(tmp_path, c)
    c.teachers["math"].placement = "host"
    assert verdicts(c)["teacher:math", "mass on '<|im_end|>'"] == "fail"
