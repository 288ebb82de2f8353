"""OPD+: on-policy distillation along another divergence than reverse KL, without its bias.

A = u f'(u) - f(u) - f'(1), u = T / S at each token that the student samples: the gradient of
E_S[f(T / S)]. The advantage -f(u) alone, --config.objective.estimator=stop_gradient, descends
something else for every f but reverse KL's. log u is held within 5 nats, where f grows like u.
arXiv 2606.01039. The argument is one of "jsd", "forward_kl", "jeffreys", "hellinger" and
"skew_forward".

    python -m gopd_jax.main --config=configs/opd_plus.py                # Jensen-Shannon
    python -m gopd_jax.main --config=configs/opd_plus.py:forward_kl     # or another of those below
    python -m gopd_jax.main --config=configs/opd_plus.py:tiny     # two steps, half a minute

Expected: math 80 %, code 80 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 81 and 81 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/opd_plus.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset

OTHERS = ("forward_kl", "jeffreys", "hellinger", "skew_forward")


def get_config(arg: str | None = None) -> Config:
    """arg: "jsd" (or None), "forward_kl", "jeffreys", "hellinger" or "skew_forward"; and "tiny"."""
    words = preset.words(arg, "jsd", *OTHERS)
    divergence = next(iter(words - {"tiny"}), "jsd")
    c = preset.two_teachers("runs/opd_plus" + (f"_{divergence}" if divergence in OTHERS else ""))
    c.objective.divergence = divergence
    c.objective.log_u_clip = 5.0
    return preset.tiny(c) if "tiny" in words else c
