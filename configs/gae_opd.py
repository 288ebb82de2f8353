"""GAE-OPD: credit for what a token leads to, with a value head that starts from the local KL.

A = sum over l of (gamma lambda)^l delta_(t + l), delta_t = r_t + gamma V(s_(t + 1)) - V(s_t), with
r = log T - log S, gamma = 1, lambda = 0.95 and V = -KL(S || T) of the state + a learnt part.
Generalised advantage estimation, arXiv 1506.02438, of the reward of distillation; the survey arXiv
2606.22793 names the combination and has not tested it.

    python -m gopd_jax.main --config=configs/gae_opd.py
    python -m gopd_jax.main --config=configs/gae_opd.py:tiny     # two steps, half a minute

Expected: math 81 %, code 93 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 83 and 91 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/gae_opd.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config, Critic
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "tiny"."""
    words = preset.words(arg)
    c = preset.two_teachers("runs/gae_opd")
    c.objective.credit = "gae(gamma=1.0, lam=0.95)"
    c.critic = Critic()
    return preset.tiny(c) if "tiny" in words else c
