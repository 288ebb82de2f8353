"""What can be told to be wrong with an objective's settings, before anything is loaded."""

import functools
import inspect
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from gopd_jax.objectives.objective import (
    REWARDS,
    TABLES,
    Objective,
    build,
    fed,
    names,
    over_vocabulary,
)
from gopd_jax.spec import resolve

ESTIMATORS = ("corrected", "stop_gradient")
B, T, V = 2, 3, 5  # of the dry run


def objective_problems(settings: dict) -> list[str]:
    """What `build` would object to, and choices that exclude each other: all at once, with cures.

    settings: build's keyword arguments; absent ones are its defaults.
    """
    found = [*_unresolved(settings)]
    if (given := settings.get("estimator", "corrected")) not in ESTIMATORS:
        found.append(f"objective.estimator is {given!r}; it is one of {ESTIMATORS}")
    if not found:
        try:
            made = build(**settings)
        except ValueError as error:
            return [f"objective: {error}"]
        said = {"divergence": "reverse_kl", "credit": "immediate", "baseline": "none"} | settings
        found = [*_dry_run(made), *_without_effect(made, said), *_exclude(made, said)]
    return found


def sound(settings: dict) -> dict:
    """The settings without those that name nothing: what else is wrong can then be told as well."""
    return {k: v for k, v in settings.items() if k not in TABLES or not [*_unresolved({k: v})]}


def _unresolved(settings: dict) -> Iterator[str]:
    for key, entries in TABLES.items():
        given = settings.get(key)
        for text in given if isinstance(given, tuple) else (given,):
            if text in (None, "none"):
                continue
            try:
                function = resolve(text, entries)
            except ValueError as error:
                yield f"objective.{key}: {error}"
                continue
            bound = getattr(function, "keywords", {})
            options = inspect.signature(function).parameters.values()
            missing = [p.name for p in options if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
            # What has a key of its own is given there alone.
            missing = [name for name in missing if name not in ("divergence", "floor")]
            if missing:
                yield f"objective.{key} is {text!r}; give it {missing}: '{text}({missing[0]}=...)'"
            for name, own in (("divergence", "divergence"), ("clip", "log_u_clip")):
                if key in ("advantage", "loss", "task") and name in bound:
                    yield f"objective.{key} is {text!r}; give {name} as objective.{own}"
    if str(settings.get("advantage", "")).startswith("gopd(lam"):
        yield "objective.advantage: gopd takes its lambda from objective.lam"


def _dry_run(made: Objective) -> Iterator[str]:
    """Options of the right names and impossible values: every entry on shapes alone."""
    row, position = jnp.zeros((B, T)), jnp.zeros((B, T))
    whole = dict.fromkeys(made.needs | {"mask_BT"}, row)
    whole |= {
        "mask_BT": row > -1,
        "position_BT": row.astype(int),
        "ids_BT": row.astype(int),
        "end_BT": row > 1,
        "group_B": jnp.zeros(B, int),
        "ended_B": jnp.ones(B, bool),
        **{name: jnp.zeros(B) for name in REWARDS},
        "bootstrap_B": jnp.zeros(B),
        "step": jnp.int32(0),
        **{name: row for name in ("log_u_BT", "token_reward_BT", "credit_BT", "advantage_BT")},
    }
    over_V = jax.nn.log_softmax(jnp.zeros((B, T, V)))
    some = {name: position for entry in _losses(made) for name in names(entry)}
    some |= {name: over_V for name in some if name.endswith("_xV")}
    some |= {"real_xV": over_V < 1, "ids_x": position.astype(int)}
    support = functools.partial(made.support, over_V, over_V, over_V < 1)
    runs = [
        ("divergence", lambda: made.divergence(jnp.zeros(()), jnp.zeros(()))),
        ("lam_schedule", lambda: made.lam_at(jnp.int32(0))),
        ("support", support),
    ]
    if made.weighs:
        runs.append(("advantage, credit, baseline or task", lambda: made.advantages(whole)))
    runs.append(("gates, importance or rejection", lambda: made.weights(whole)))
    some |= {name: over_V for name in some if name.endswith("_xS")} | {"valid_xS": over_V < 1}
    runs += [("loss or regularizers", functools.partial(fed, e, some)) for e in _losses(made)]
    for key, run in runs:
        try:
            jax.eval_shape(run)
        except (ValueError, TypeError) as error:
            yield f"objective.{key}: {error}"


def _losses(made: Objective) -> tuple:
    return (made.loss, *made.regularizers)


def _without_effect(made: Objective, said: dict) -> Iterator[str]:
    """Settings of a part that this loss does not have: whoever gives them expects another."""
    if not made.weighs:
        for key, neutral in (
            *(("credit", "immediate"), ("baseline", "none"), ("estimator", "corrected")),
            *(("advantage_clip", None), ("task", None), ("distil_weight", 1.0)),
        ):
            if (value := said.get(key, neutral)) != neutral:
                yield (
                    f"objective.{key} is {value!r} and objective.loss {said['loss']!r} has no "
                    "advantage; take it out, or use loss = 'policy_gradient'"
                )
    supported = any(name.endswith("_xS") for entry in _losses(made) for name in names(entry))
    if not supported and "local_kl_BT" not in made.needs:
        for key, neutral in (("support", "full"), ("mass", "rest")):
            if (value := said.get(key, neutral)) != neutral:
                yield (
                    f"objective.{key} is {value!r} and objective.loss looks at the sampled token "
                    "alone; use loss = 'exact', or leave it out"
                )
    of_loss = "divergence" in inspect.signature(made.loss).parameters
    of_advantage = made.weighs and "divergence" in inspect.signature(made.advantage).parameters
    if said["divergence"] != "reverse_kl" and not (of_loss or of_advantage):
        yield (
            f"objective.divergence is {said['divergence']!r}, and neither objective.advantage nor "
            "objective.loss measures one; use advantage = 'gopd' or loss = 'exact'"
        )
    if made.task is None and said.get("distil_weight", 1.0) != 1:
        yield "objective.distil_weight has no effect without objective.task; use task = 'grpo'"
    if made.ratio_cap is not None and not made.tilts:
        yield (
            f"objective.ratio_cap is {made.ratio_cap} and caps log T - log R, which counts nothing "
            "at objective.lam = 1; take it out, or raise lam"
        )
    if made.log_u_clip is not None and not (of_advantage or "local_kl_BT" in made.needs):
        yield (
            f"objective.log_u_clip is {made.log_u_clip} and clips the ratio in an advantage, which "
            "this objective has not; take it out, or use advantage = 'gopd'"
        )


def _exclude(made: Objective, said: dict) -> Iterator[str]:
    """Choices that contradict each other."""
    importance, rejection = (
        str(said.get(k, "none")).split("(")[0] for k in ("importance", "rejection")
    )
    if importance == "sequence" and rejection == "token":
        yield (
            "objective.importance weighs whole sequences and objective.rejection takes single "
            "tokens out of them; use rejection = 'sequence(...)', or importance = 'token'"
        )
    if made.task is not None and not REWARDS & {*names(made.task)}:
        yield (
            f"objective.task is {said['task']!r}, which is not of the verifier's reward; use 'grpo'"
        )
    if made.task is not None and REWARDS & {*names(made.advantage)}:
        yield (
            f"objective.task and objective.advantage = {said.get('advantage')!r} are both of the "
            "reward; use advantage = 'gopd', which objective.distil_weight weighs"
        )
    if "agree" in {getattr(g, "func", g).__name__ for g in made.gates} and over_vocabulary(
        made.loss
    ):
        yield "objective.gates has agree, which takes the sign of an advantage; use a sampled loss"
