"""How the entries of the tables are fed: by the names of their parameters, or by position.

An entry's positional parameters name the quantities that it needs, its keyword-only ones are
options. So what a step has to compute is read off the entries, and a new one is nowhere else named.
"""

import functools
import inspect
from collections.abc import Callable

from gopd_jax.spec import plain

# Whole rows, [B, T] or [B]. What comes of the frozen models' distributions over the vocabulary:
TARGETS = {"target_BT", "log_u_BT", "teacher_BT", "teacher_entropy_BT", "local_kl_BT"}
DRAWN = TARGETS - {"teacher_BT", "teacher_entropy_BT"} | {"target_x", "target_xV", "target_xS"}
VALUES = {"value_BT", "bootstrap_B"}
REWARDS = {"reward_B", "relative_reward_B"}  # the verifier's; compared within its prompt's rollouts
EARNED = {"token_reward_BT", "credit_BT", "advantage_BT"}  # of a sampled token
ROWS = {
    *("mask_BT", "position_BT", "ids_BT", "end_BT", "group_B", "ended_B", "step", *REWARDS),
    *("student_BT", "sampler_BT", "ref_BT", "entropy_BT", *TARGETS, *VALUES),
    *EARNED,
}
# Some positions of any leading shape; of the vocabulary (_xV) or of the support (_xS).
POSITIONS = {
    *("logp_x", "student_x", "sampler_x", "target_x", "ref_x", "ids_x", "advantage_x"),
    *("student_xV", "target_xV", "ref_xV", "real_xV", "student_xS", "target_xS", "valid_xS"),
}


@functools.cache
def names(function: Callable) -> tuple[str, ...]:
    """The quantities that an entry needs: its positional parameters."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def fed(function: Callable, quantities: dict):
    """function of those of the quantities that it names."""
    return function(**{name: quantities[name] for name in names(function)})


def over_vocabulary(function: Callable) -> bool:
    """Whether an entry takes log-probs of more than the sampled token."""
    return any(name.endswith(("_xV", "_xS")) for name in names(function))


# Setting -> what an entry may ask for by name.
BY_NAME = {
    **dict.fromkeys(("advantage", "task"), ROWS - EARNED),
    "credit": ROWS - EARNED | {"token_reward_BT"},
    "baseline": ROWS - {"advantage_BT"},
    **dict.fromkeys(("gates", "importance", "rejection"), ROWS),
    **dict.fromkeys(("loss", "regularizers"), POSITIONS),
}
# Setting -> what an entry is called with, in this order.
BY_POSITION = {
    "divergence": ("log_s", "log_t"),
    "lam_schedule": ("step", "lam"),
    "support": ("student_xV", "target_xV", "real_xV"),
    "mass": ("logp_xS", "valid_xS"),
    "reduction": ("mask_BT",),
}
OPTIONAL = {"mass": {"outside_x"}}  # fed by name where an entry has it, after those above


def check(key: str, function: Callable) -> None:
    """ValueError unless an entry of objective.key takes what it is going to be fed."""
    title, asked = getattr(plain(function), "__name__", repr(function)), names(function)
    if key in BY_NAME and (unknown := set(asked) - BY_NAME[key]):
        raise ValueError(
            f"{title} asks for {sorted(unknown)}, which no step computes; its positional "
            f"parameters are among {sorted(BY_NAME[key])}, and options are keyword-only"
        )
    if key not in BY_POSITION:
        return
    order = BY_POSITION[key]
    followed = set(asked[len(order) :]) - OPTIONAL.get(key, set())
    if asked[: len(order)] != order or followed:
        raise ValueError(
            f"{title} takes ({', '.join(asked)}), and objective.{key} is called by position with "
            f"({', '.join(order)}); give its parameters these names in this order, and make "
            "options keyword-only"
        )
