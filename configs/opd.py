"""OPD: on-policy distillation of two domain teachers into one student.

A = log T - log S at each token that the student samples, T the teacher of the row's task: the
gradient of the reverse KL(S || T) on the student's own text. It is G-OPD at lambda = 1, where the
reference cancels. arXiv 2602.12125, section 3.

    python -m gopd_jax.main --config=configs/opd.py
    python -m gopd_jax.main --config=configs/opd.py:tiny     # two steps, half a minute

Expected: math 78 %, code 82 % (teachers 81, 81; base 46, 49), in 2 minutes.

With models and problems of your own:

    python -m gopd_jax.main --config=configs/opd.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/opd")
    return preset.tiny(c) if "tiny" in words else c
