"""SFT: maximum likelihood on completions that the teachers sample, the off-policy baseline.

A = 1 at each token that the teacher of the row's task sampled: the loss is -log S, the gradient
that of the forward KL(T || S) on the teachers' text. It is the baseline of arXiv 2602.12125.

    python -m gopd_jax.main --config=configs/sft.py
    python -m gopd_jax.main --config=configs/sft.py:tiny     # two steps, half a minute

Expected: math 78 %, code 81 % (teachers 81, 81; base 46, 49), in 2 minutes.

On completions in a file instead of the teachers' samples: --config.objective.source=data. With
models and problems of your own:

    python -m gopd_jax.main --config=configs/sft.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/sft")
    c.objective.source = "teacher"
    c.objective.advantage = "imitation"
    c.diagnostics.every = None  # no target to compare with
    return preset.tiny(c) if "tiny" in words else c
