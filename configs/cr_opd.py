"""CR-OPD: what a suppressed token loses goes to tokens that the teacher likes better.

A = log T - log S at each token that the student samples; where A < 0, the loss is -|A| (sum over v
of rho(v) log S(v) - log S(y)), rho on tokens that are likely under both models and likelier under
the teacher. Elsewhere it is the policy gradient. Derived from what the survey arXiv 2606.22793 says
of it; biased by design, docs/RESULTS.md has its angle to the exact gradient.

    python -m gopd_jax.main --config=configs/cr_opd.py
    python -m gopd_jax.main --config=configs/cr_opd.py:tiny     # two steps, half a minute

Expected: math 80 %, code 83 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 81 and 76 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/cr_opd.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/cr_opd")
    c.objective.loss = "cr_opd"
    return preset.tiny(c) if "tiny" in words else c
