"""GRPO: reinforcement learning from the verifiers' verdicts, the baseline without a teacher.

A = (r - mean r) / std r over 8 rollouts of one prompt, r = 1 where the verifier passes the
completion. arXiv 2402.03300. The teachers take no part; they are evaluated beside the student.

    python -m gopd_jax.main --config=configs/grpo.py          # on both tasks
    python -m gopd_jax.main --config=configs/grpo.py:math     # on one, "math" or "code"
    python -m gopd_jax.main --config=configs/grpo.py:tiny     # two steps, half a minute

Expected: math 78 %, code 97 % (teachers 81, 81; base 46, 49), in 2 minutes.

With a model and problems of your own, without teachers to compare with:

    python -m gopd_jax.main --config=configs/grpo.py --config.student.path=DIR \\
        --config.evaluation.teachers=false \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: "math" or "code" for that task alone; and "tiny"."""
    words = preset.words(arg, "math", "code")
    task = next(iter(words - {"tiny"}), None)
    c = preset.two_teachers("runs/grpo" + (f"_{task}" if task else ""))
    if task:
        c.data.tasks = (task,)
        c.data.train, c.data.test = f"microworld:train:{task}", f"microworld:test:{task}"
        c.teachers = {task: c.teachers[task]}
    c.objective.advantage = "grpo"
    c.diagnostics.every = None  # no target to compare with
    c.batch.prompts, c.batch.rollouts, c.batch.microbatches = 32, 8, 16
    return preset.tiny(c) if "tiny" in words else c
