"""What an objective ascends or descends, in a line of text for the log and the report."""

import inspect


def of(made, said: dict, estimator: str) -> str:
    """made: an Objective. said: the settings' strings of advantage, divergence, credit, baseline,
    task, lam_schedule, loss, reduction."""
    last = f"loss = {said['loss']}, reduced by {said['reduction']}"
    if made.weighs:
        return f"{_advantage(made, said, estimator)};  {last}"
    if "divergence" in inspect.signature(made.loss).parameters:
        return f"D = {said['divergence']} of S and T_lam, lambda = {_lam(made, said)};  {last}"
    return last


def _advantage(made, said: dict, estimator: str) -> str:
    """What a token earns; credit and baseline where they are not the plain ones."""
    lam, name = _lam(made, said), said["advantage"].split("(")[0]
    if name != "gopd":
        found = {
            "grpo": "(reward - group mean) / group std  (GRPO)",
            "imitation": "1  (maximum likelihood)",
        }.get(name, said["advantage"])
    elif said["divergence"] != "reverse_kl":
        plus = estimator == "corrected"
        sign = "u f'(u) - f(u) - f'(1)" if plus else "-f(u)"
        found = f"{sign} of {said['divergence']}, u = T_lam / S, lambda = {lam}"
        found += "  (OPD+)" if plus else "  (stop-gradient)"
    elif made.lam == 1 and not made.tilts:
        found = "log T - log S  (plain on-policy distillation)"
    else:
        factor = "lambda" if _varies(made, said) else lam
        found = f"{factor} (log T - log R) - (log S - log R)  (G-OPD, lambda = {lam})"
    if said["credit"] != "immediate":
        found += f", credit {said['credit']}"
    if made.baseline is not None:
        found += f", less baseline {said['baseline']}"
    if made.task is None:
        return f"A = {found}"
    return f"A = {said['task']} of the reward + {made.distil_weight:g} A_distil, A_distil = {found}"


def _varies(made, said: dict) -> bool:
    return made.lam_by_row or said["lam_schedule"] != "constant"


def _lam(made, said: dict) -> str:
    value = "the row's own" if made.lam_by_row else f"{made.lam:g}"
    if said["lam_schedule"] != "constant":
        value += f" by {said['lam_schedule']}"
    return value
