"""OPSD: a model taught by itself, which sees the solution (on-policy self-distillation).

A = log T - log S at each token that the student samples: S reads the problem, T the problem and its
solution, and T's weights are the student's initial ones. No other model takes part. arXiv
2601.18734; with the sampled-token estimate of the reverse KL instead of their full divergence.

    python -m gopd_jax.main --config=configs/opsd.py
    python -m gopd_jax.main --config=configs/opsd.py:ema      # T follows the student, decay 0.9
    python -m gopd_jax.main --config=configs/opsd.py:tiny     # two steps, half a minute

Expected: math 90 %, code 99 % (the start, 44, 49; the teacher, with the solution in sight, 92, 99),
in 2 minutes.

The teacher is evaluated as it teaches, with the solution in sight. With a model and problems of
your own, whose rows have a worked "completion" (or --config.teachers.self.context=context for a
critique under "context", or mymodule:function for what you make of a row):

    python -m gopd_jax.main --config=configs/opsd.py --config.student.path=DIR \\
        --config.teachers.self.path=DIR --config.teachers.self.prompt_length=8192 \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "ema" for a teacher that follows the student; and "tiny"."""
    words = preset.words(arg, "ema")
    moving = "ema" in words
    c = preset.two_teachers("runs/opsd" + ("_ema" if moving else ""))
    c.student = preset.model("open_book")
    teacher = preset.model("open_book")
    teacher.context, teacher.prompt_length = "solution", 96
    teacher.follows = 0.9 if moving else None
    c.teachers = {"self": teacher}
    c.routes = dict.fromkeys(c.data.tasks, "self")
    return preset.tiny(c) if "tiny" in words else c
