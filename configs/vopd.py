"""vOPD: on-policy distillation with a control variate, the local KL in closed form.

A = log T - log S + KL(S || T) of the state: the expected value of the first two terms is taken off,
which leaves the gradient's mean as it is and lowers its variance. The loss looks at the sampled
token alone. arXiv 2605.07865. With :value credit is the sum of later rewards, and a value head
learns what is taken off, on top of the closed form.

    python -m gopd_jax.main --config=configs/vopd.py
    python -m gopd_jax.main --config=configs/vopd.py:value
    python -m gopd_jax.main --config=configs/vopd.py:tiny     # two steps, half a minute

Expected: math 80 %, code 80 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 82 and 83 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/vopd.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config, Critic
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "value" for returns against a learnt value; and "tiny"."""
    words = preset.words(arg, "value")
    learnt = "value" in words
    c = preset.two_teachers("runs/vopd" + ("_value" if learnt else ""))
    c.objective.baseline = "value" if learnt else "local_kl"
    if learnt:
        c.objective.credit = "return_to_go"
        c.critic = Critic()
    return preset.tiny(c) if "tiny" in words else c
