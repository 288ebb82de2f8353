"""REOPOLD: on-policy distillation whose token reward is bounded below by a mixture.

A = log((1 - alpha) T / S + alpha), alpha = 0.1, at each token that the student samples: log T - log
S where it is near 0 or above, and never below log alpha, so that a few very unlikely tokens do not
rule the update. With :entropy only tokens where the teacher's entropy is at least 0.01 nats count.
arXiv 2603.11137, in its style: of the paper the abstract was at hand, which names mixture-based
reward clipping, entropy-based choice of tokens and a schedule from exploration to refinement;
alpha, the teacher's entropy in place of a dynamic choice, and no schedule are this preset's.

    python -m gopd_jax.main --config=configs/reopold.py
    python -m gopd_jax.main --config=configs/reopold.py:entropy
    python -m gopd_jax.main --config=configs/reopold.py:tiny     # two steps, half a minute

Expected: math 78 %, code 80 % (teachers 81, 81; base 46, 49), in 2 minutes; one run. At the
budget of docs/RESULTS.md, 16 steps of 64 rows, 81 and 82 % over five seeds (plain OPD 82, 80).

With models and problems of your own:

    python -m gopd_jax.main --config=configs/reopold.py --config.student.path=DIR \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.jsonl --config.data.test=test.jsonl \\
        --config.data.prompt_length=2048 --config.sampling.completion_length=16384
"""

from gopd_jax.config import Config
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None, or "entropy" for tokens with an undecided teacher alone; and "tiny"."""
    words = preset.words(arg, "entropy")
    gated = "entropy" in words
    c = preset.two_teachers("runs/reopold" + ("_entropy" if gated else ""))
    c.objective.divergence = "skew_reverse(alpha=0.1)"
    c.objective.estimator = "stop_gradient"  # the clipped reward itself is the advantage
    c.objective.gates = ("teacher_entropy(at_least=0.01)",) if gated else ()
    return preset.tiny(c) if "tiny" in words else c
