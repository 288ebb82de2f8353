"""ExOPD: two domain teachers merged into one student that is drawn past them, lambda = 1.25.

A = lambda (log T - log R) - (log S - log R) at each token that the student samples: T the teacher
of the row's task, R the student's initial weights. arXiv 2602.12125, section 3.

    python -m gopd_jax.main --config=configs/exopd.py
    python -m gopd_jax.main --config=configs/exopd.py:tiny     # two steps, half a minute

Expected: math 81 %, code 86 % (teachers 80, 80; base 44, 48), in 2 minutes.

With models and problems of your own; the reference is the student's directory:

    python -m gopd_jax.main --config=configs/exopd.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.reference.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/exopd")
    c.reference = preset.model("base")
    c.objective.lam = 1.25
    return preset.tiny(c) if "tiny" in words else c
