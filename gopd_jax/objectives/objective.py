"""An objective: the entries of the tables that a run combines, and what they need to be fed."""

import dataclasses
import functools
from collections.abc import Callable

from gopd_jax.objectives.advantages import ADVANTAGES
from gopd_jax.objectives.baselines import group_relative
from gopd_jax.objectives.losses import LOSSES
from gopd_jax.objectives.reductions import REDUCTIONS
from gopd_jax.spec import resolve


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Resolved functions of one objective, and which scores they use; hashable, static in a jit."""

    advantage: Callable  # (scores, mask_BT) -> A_BT
    loss: Callable  # (logp_BT, advantage_BT) -> loss_BT
    reduction: Callable  # (mask_BT) -> weight_BT
    baseline: Callable | None  # (reward_B, group_B) -> reward_B, over the whole batch
    teacher: bool  # scores.teacher_BT is used
    reference: bool  # scores.ref_BT is used
    reward: bool  # scores.reward_B is used
    formula: str  # what is ascended, for the log and the report


def build(*, advantage: str, lam: float, loss: str, reduction: str) -> Objective:
    """Resolve the names of an objective. ValueError for a name or option that does not exist."""
    chosen = resolve(advantage, ADVANTAGES)
    name = getattr(chosen, "func", chosen).__name__
    if name == "gopd":
        chosen = functools.partial(chosen, lam=lam)
    formulas = {
        "gopd": "A = log T - log S  (plain on-policy distillation)"
        if lam == 1
        else f"A = {lam:g} (log T - log R) - (log S - log R)  (G-OPD, lambda = {lam:g})",
        "grpo": "A = (reward - group mean) / group std  (GRPO)",
        "imitation": "A = 1  (maximum likelihood)",
    }
    return Objective(
        advantage=chosen,
        loss=resolve(loss, LOSSES),
        reduction=resolve(reduction, REDUCTIONS),
        baseline=group_relative if name == "grpo" else None,
        teacher=name == "gopd",
        reference=name == "gopd" and lam != 1,
        reward=name == "grpo",
        formula=f"{formulas[name]};  loss = {loss}, reduced by {reduction}",
    )


def objective_problems(advantage: str, loss: str, reduction: str) -> list[str]:
    """What `build` would object to, all at once."""
    found = []
    for key, text, entries in (
        ("advantage", advantage, ADVANTAGES),
        ("loss", loss, LOSSES),
        ("reduction", reduction, REDUCTIONS),
    ):
        try:
            resolve(text, entries)
        except ValueError as error:
            found.append(f"objective.{key}: {error}")
    if advantage.startswith("gopd("):
        found.append("objective.advantage: gopd takes its lambda from objective.lam")
    return found
