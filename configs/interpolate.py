"""Interpolation: a student half-way between its own initial weights and its teachers.

A = lambda (log T - log R) - (log S - log R) with lambda = 0.5: the student is drawn to
T^lambda R^(1 - lambda), normalised, R its initial weights. lambda = 0 stays at R, 1 is OPD.
arXiv 2602.12125, section 3.

    python -m gopd_jax.main --config=configs/interpolate.py
    python -m gopd_jax.main --config=configs/interpolate.py:tiny     # two steps, half a minute

Expected: math 66 %, code 67 % (teachers 81, 81; base 46, 49), in 2 minutes.

With models and problems of your own; the reference is the student's directory:

    python -m gopd_jax.main --config=configs/interpolate.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.reference.path=DIR --config.objective.lam=0.75 \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/interpolate")
    c.reference = preset.model("base")
    c.objective.lam = 0.5
    return preset.tiny(c) if "tiny" in words else c
