"""MiniLLM: the reverse KL of whole sequences, by policy gradient with the sum of later rewards.

A = sum over m >= t of (log T - log S)(y_m), less its mean at that position over the other rows of
the batch: the exact gradient of KL(S || T) of sequences, not of one token at a time. arXiv
2306.08543. In its style: the paper splits off the expected first term, samples from a mixture with
the teacher, normalises by length, clips as PPO does and adds a language-modelling loss, none of
which is here; the baseline stands for what these do about the variance.

    python -m gopd_jax.main --config=configs/minillm.py
    python -m gopd_jax.main --config=configs/minillm.py:tiny     # two steps, half a minute

Expected: math 82 %, code 85 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 82 and 91 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/minillm.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/minillm")
    c.objective.credit = "return_to_go"
    c.objective.baseline = "position_mean"
    c.objective.reduction = "sequence_sum(length=36)"
    return preset.tiny(c) if "tiny" in words else c
