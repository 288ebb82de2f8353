"""EOPD: reverse KL, and forward KL besides where the teacher itself is undecided.

A = log T - log S for every token of the vocabulary, weighed by S: the gradient of KL(S || T) of
each state, to which KL(T || S) over the teacher's 16 likeliest tokens is added where the teacher's
entropy is above 0.8 nats. arXiv 2603.07079, whose code was not at hand: threshold, k and the weight
of 1 are defaults of objective.loss. The microworld's teachers are seldom so undecided.

    python -m gopd_jax.main --config=configs/eopd.py
    python -m gopd_jax.main --config=configs/eopd.py:tiny     # two steps, half a minute

Expected: math 78 %, code 83 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 82 and 81 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/eopd.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/eopd")
    c.objective.loss = "entropy_gated(threshold=0.8, k=16)"
    return preset.tiny(c) if "tiny" in words else c
