"""GKD: generalised Jensen-Shannon divergence over the whole vocabulary, on the student's own text.

A = (1 - beta) log(beta u + 1 - beta), u = T / S, for every token of the vocabulary, weighed by S:
the gradient of beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S, beta = 0.5, of
each state. All text is the student's (the paper's lambda = 1), at temperature 1. arXiv 2306.13649.

    python -m gopd_jax.main --config=configs/gkd.py
    python -m gopd_jax.main --config=configs/gkd.py:tiny     # two steps, half a minute

Expected: math 78 %, code 80 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 83 and 83 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/gkd.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/gkd")
    c.objective.loss = "exact"
    c.objective.divergence = "jsd(beta=0.5)"
    return preset.tiny(c) if "tiny" in words else c
