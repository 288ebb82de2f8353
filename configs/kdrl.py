"""KDRL: reinforcement learning and distillation in one policy gradient.

A = (r - mean r) / std r + c (log T - log S), r = 1 where the verifier passes the completion, over 8
rollouts of a prompt; c = 0.5. arXiv 2506.02208, GRPO with a reverse KL to the teacher, in its joint
form; the paper's coefficient belongs to another scale of rewards and lengths, and its schedules and
its masking of the KL by the reward are not here.

    python -m gopd_jax.main --config=configs/kdrl.py
    python -m gopd_jax.main --config=configs/kdrl.py:tiny     # two steps, half a minute

Expected: math 85 %, code 98 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 78 and 89 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/kdrl.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/kdrl")
    c.objective.task = "grpo"
    c.objective.distil_weight = 0.5
    c.batch.prompts, c.batch.rollouts, c.batch.microbatches = 32, 8, 16
    return preset.tiny(c) if "tiny" in words else c
