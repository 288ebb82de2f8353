"""What an objective ascends or descends, in a line of text for the log and the report."""

import inspect


def of(made, said: dict, estimator: str) -> str:
    """made: an Objective. said: the settings' strings of advantage, divergence, loss, reduction."""
    lam, name = made.lam, said["advantage"].split("(")[0]
    if name != "gopd" or not made.weighs:
        first = {
            "grpo": "A = (reward - group mean) / group std  (GRPO)",
            "imitation": "A = 1  (maximum likelihood)",
        }.get(name if made.weighs else "", "")
    elif said["divergence"] != "reverse_kl":
        sign = "u f'(u) - f(u)" if estimator == "corrected" else "-f(u)"
        first = f"A = {sign} of {said['divergence']}, u = T_lam / S, lambda = {lam:g}  (OPD+)"
    elif lam == 1 and not made.tilts:
        first = "A = log T - log S  (plain on-policy distillation)"
    else:
        first = f"A = {lam:g} (log T - log R) - (log S - log R)  (G-OPD, lambda = {lam:g})"
    if not made.weighs and "divergence" in inspect.signature(made.loss).parameters:
        first = f"D = {said['divergence']} of S and T_lam, lambda = {lam:g}"
    last = f"loss = {said['loss']}, reduced by {said['reduction']}"
    return f"{first};  {last}" if first else last
