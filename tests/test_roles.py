"""What is checked of roles that read otherwise than the student, on loading and in preflight."""

import pytest
import tiny

from gopd_jax import train


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
