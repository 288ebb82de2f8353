"""What can be told to be wrong with an objective's settings, before anything is loaded."""

import functools
import inspect
import math
from collections.abc import Iterator

import jax
import numpy as np

from gopd_jax.objectives import supports
from gopd_jax.objectives.credit import CREDITS
from gopd_jax.objectives.entries import EARNED, REWARDS, fed, names, over_vocabulary
from gopd_jax.objectives.gates import GATES
from gopd_jax.objectives.importance import IMPORTANCE, REJECTIONS
from gopd_jax.objectives.objective import TABLES, Objective, absent, build
from gopd_jax.spec import plain, resolve

ESTIMATORS = ("corrected", "stop_gradient")
B, T, V = 2, 3, 5  # of the dry run


def objective_problems(settings: dict) -> list[str]:
    """What `build` would object to, and choices that exclude each other: all at once, with cures.

    settings: build's keyword arguments; absent ones are its defaults.
    """
    found = [*_unresolved(settings)]
    if (given := settings.get("estimator", "corrected")) not in ESTIMATORS:
        found.append(f"objective.estimator is {given!r}; it is one of {ESTIMATORS}")
    kept = sound(settings)
    try:
        made = build(**kept)
    except ValueError as error:
        return [*found, f"objective: {error}"]
    said = {p.name: p.default for p in inspect.signature(build).parameters.values()} | kept
    ran = [*_dry_run(made, said)]
    if not found:  # what takes the place of a name that there is not excludes nothing
        ran += [*_without_effect(made, said), *_exclude(made, said)]
    return found + ran


def sound(settings: dict) -> dict:
    """The settings without those that name nothing: what else is wrong can then be told as well."""
    return {k: v for k, v in settings.items() if k not in TABLES or not [*_unresolved({k: v})]}


def _unresolved(settings: dict) -> Iterator[str]:
    for key, entries in TABLES.items():
        given = settings.get(key)
        for text in given if isinstance(given, tuple) else (given,):
            if absent(key, text):
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
            missing = [name for name in missing if name != "divergence"]
            if missing:
                yield f"objective.{key} is {text!r}; give it {missing}: '{text}({missing[0]}=...)'"
            of_ratio = ("advantage", "task")  # cr_opd has a clip of another kind
            for name, own, keys in (
                ("divergence", "divergence", (*of_ratio, "loss")),
                ("clip", "log_u_clip", of_ratio),
            ):
                if key in keys and name in bound:
                    yield f"objective.{key} is {text!r}; give {name} as objective.{own}"
    if str(settings.get("advantage", "")).startswith("gopd(lam"):
        yield "objective.advantage: gopd takes its lambda from objective.lam"


def _dry_run(made: Objective, said: dict) -> Iterator[str]:
    """Options of the right names and impossible values: every entry on shapes alone."""
    row = np.zeros((B, T), np.float32)  # NumPy's: nothing is compiled to refuse a setting
    whole = dict.fromkeys(made.needs | {"mask_BT"}, row)
    whole |= {
        "mask_BT": row > -1,
        "position_BT": row.astype(int),
        "ids_BT": row.astype(int),
        "end_BT": row > 1,
        "group_B": np.zeros(B, int),
        "ended_B": np.ones(B, bool),
        **{name: row[:, 0] for name in REWARDS},
        "bootstrap_B": row[:, 0],
        "step": np.int32(0),
        **{name: row for name in ("log_u_BT", *EARNED)},
    }
    over_V = np.full((B, T, V), -math.log(V), np.float32)
    some = {name: row for entry in _losses(made) for name in names(entry)}
    some |= {name: over_V for name in some if name.endswith("_xV")}
    some |= {"real_xV": over_V < 1, "ids_x": row.astype(int)}
    some |= {name: over_V for name in some if name.endswith("_xS")} | {"valid_xS": over_V < 1}
    of_rows = ("gates", "importance", "rejection")
    of_rows += ("advantage", "credit", "baseline", "task") if made.weighs else ()
    entries = {key: _listed(getattr(made, key)) for key in (*of_rows, "loss", "regularizers")}
    runs = [
        ("divergence", 0, (_of_shape(made.divergence), row, row)),
        ("lam_schedule", 0, (_of_shape(made.lam_at, ()), np.int32(0))),
        ("support", 0, (_supported(made.support), over_V, over_V, over_V < 1)),
        ("mass", 0, (_handled(made.mass), over_V, over_V < 1, row)),
        ("reduction", 0, (_of_shape(made.reduction), row > -1)),
    ]
    for key, functions in entries.items():
        fed_with = some if key in ("loss", "regularizers") else whole
        runs += [(key, i, (_of_tokens(f), fed_with)) for i, f in enumerate(functions)]
    if made.veto is not None:
        runs.append(("veto", 0, (_of_tokens(made.vetoes), whole)))
    errors = [(key, i, error) for key, i, run in runs if (error := _error(*run)) is not None]
    of_divergence = [error for key, _, error in errors if key == "divergence"]
    for key, i, error in errors:
        # A divergence of impossible options is that of the advantage and of the loss, too.
        if key == "divergence" or error not in of_divergence:
            yield f"objective.{key} is {_listed(said[key])[i]!r}: {error}"


def _error(run, *quantities) -> str | None:
    try:
        jax.eval_shape(run, *quantities)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _of_shape(function, shape=(B, T)):
    """The function, and ValueError where what it returns has another shape: it would broadcast."""

    def run(*quantities):
        found = np.shape(function(*quantities))
        if found != shape:
            raise ValueError(
                f"it returns the shape {found}, and of {B} rows of {T} tokens it has to return "
                f"{shape}"
            )

    return run


def _of_tokens(function):
    return _of_shape(functools.partial(fed, function))


def _supported(support):
    """As `_of_shape`: ids and whether they are valid, for each position, or None."""

    def run(*quantities):
        if (chosen := support(*quantities)) is None:
            return
        shapes = [np.shape(x) for x in chosen]
        if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0][:-1] != (B, T):
            raise ValueError(
                f"it returns the shapes {shapes} for {V} ids at {B} x {T} positions; return "
                "(ids_xS, valid_xS), both [..., S], or None for every id"
            )

    return run


def _handled(mass):
    """Of one shape, whatever that is: log-probs and whether they are valid, for each position."""

    def run(logp_xS, valid_xS, outside_x):
        found = supports.handled(mass, logp_xS, valid_xS, lambda: outside_x)
        shapes = [np.shape(x) for x in found]
        if len(shapes) != 2 or shapes[0] != shapes[1] or shapes[0][:-1] != (B, T):
            raise ValueError(
                f"it returns the shapes {shapes} for a support of {V} ids at {B} x {T} positions; "
                "return (logp_xS, valid_xS), both [..., S]"
            )

    return run


def _listed(entries) -> tuple:
    return entries if isinstance(entries, tuple) else () if entries is None else (entries,)


def _losses(made: Objective) -> tuple:
    return (made.loss, *made.regularizers)


def over_support(made: Objective) -> bool:
    """Whether a state's distributions are compared over the support, whatever a critic does."""
    losses = any(name.endswith("_xS") for entry in _losses(made) for name in names(entry))
    return losses or "local_kl_BT" in made.needs


def _without_effect(made: Objective, said: dict) -> Iterator[str]:
    """Settings of a part that this loss does not have: whoever gives them expects another."""
    if not made.weighs:
        for key, neutral in (
            *(("advantage", "gopd"), ("credit", "immediate"), ("baseline", "none")),
            ("estimator", "corrected"),
            *(("advantage_clip", None), ("task", None), ("distil_weight", 1.0)),
        ):
            if (value := said.get(key, neutral)) != neutral:
                yield (
                    f"objective.{key} is {value!r} and objective.loss {said['loss']!r} has no "
                    "advantage; take it out, or use loss = 'policy_gradient'"
                )
    if not over_support(made) and not made.needs_critic:  # a critic's closed form is a divergence
        why = "looks at the sampled token alone; use loss = 'exact', or leave it out"
        if over_vocabulary(made.loss):
            why = "chooses ids of its own by its options, teacher_k for one; leave it out"
        for key, neutral in (("support", "full"), ("mass", "rest")):
            if (value := said.get(key, neutral)) != neutral:
                yield f"objective.{key} is {value!r} and objective.loss {why}"
    of_loss = "divergence" in inspect.signature(made.loss).parameters
    of_advantage = made.weighs and "divergence" in inspect.signature(made.advantage).parameters
    # Of a loss that has no advantage, none would be asked.
    measured = "advantage = 'gopd'" if made.weighs else "loss = 'policy_gradient'"
    if said["divergence"] != "reverse_kl" and not (of_loss or of_advantage):
        yield (
            f"objective.divergence is {said['divergence']!r}, and neither objective.advantage nor "
            f"objective.loss measures one; use {measured} or loss = 'exact'"
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
            f"this objective has not; take it out, or use {measured}"
        )


def _exclude(made: Objective, said: dict) -> Iterator[str]:
    """Choices that contradict each other."""
    importance, rejection = (plain(e) for e in (made.importance, made.rejection))
    if importance is IMPORTANCE["sequence"] and rejection is REJECTIONS["token"]:
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
    of_token = {name for name in names(made.advantage) if name.endswith("_BT")} - {"mask_BT"}
    if made.weighs and not of_token and made.credit is not CREDITS["immediate"]:
        yield (
            f"objective.credit is {said['credit']!r} and sums what tokens earn, and "
            f"objective.advantage = {said['advantage']!r} gives each of them what the whole row "
            "earns, so it would count once for every later token; use credit = 'immediate'"
        )
    of_advantage = made.weighs and "divergence" in inspect.signature(made.advantage).parameters
    plus = said["estimator"] == "corrected" and said["divergence"] != "reverse_kl"
    if plus and of_advantage and not made.corrected:
        yield (
            f"objective.estimator = 'corrected' completes gopd's reward and objective.advantage is "
            f"{said['advantage']!r}; set estimator = 'stop_gradient', and let the entry itself "
            "return what its reward's gradient lacks (divergences.corrected)"
        )
    if GATES["agree"] in map(plain, made.gates) and over_vocabulary(made.loss):
        yield "objective.gates has agree, which takes the sign of an advantage; use a sampled loss"
