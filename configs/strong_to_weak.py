"""Strong to weak: a large teacher of both tasks distilled into a small student, lambda = 1.25.

A = lambda (log T - log R) - (log S - log R) at each token that the student samples. log T - log R
is the reward that the teacher's own training left in it if R is the model that training started
from: "reward correction". The student's initial weights are the cheaper R. arXiv 2602.12125,
section 3.

    python -m gopd_jax.main --config=configs/strong_to_weak.py             # R = the student's base
    python -m gopd_jax.main --config=configs/strong_to_weak.py:teacher     # R = the teacher's base
    python -m gopd_jax.main --config=configs/strong_to_weak.py:teacher,tiny   # two steps, a minute

Expected: math 84 %, code 91 % with the student's base as R, 82 and 91 % with the teacher's,
which over three seeds is no difference (teacher 85, 86; base 46, 49), in 2 minutes.

With models and problems of your own:

    python -m gopd_jax.main --config=configs/strong_to_weak.py:teacher --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.reference.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: "student" (or None) or "teacher", whose base is the reference; and "tiny"."""
    words = preset.words(arg, "student", "teacher")
    corrected = "teacher" in words
    c = preset.two_teachers("runs/strong_to_weak" + ("_corrected" if corrected else ""))
    c.teachers = {task: preset.model("large_teacher") for task in c.data.tasks}
    c.reference = preset.model("large_base" if corrected else "base")
    c.objective.lam = 1.25
    return preset.tiny(c) if "tiny" in words else c
