"""What sentences about a run are made of: its settings, means of its rows, and what to try.

Rows are those of metrics.jsonl, settings the plain values of run.json. A key may be absent or None
in either.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from collections.abc import Iterable

from gopd_jax import config as settings
from gopd_jax import problems
from gopd_jax.objectives.entries import names, over_vocabulary
from gopd_jax.objectives.objective import TABLES

# Rows that are looked at: of a run's beginning and of its end. So a step costs the same at the end
# of a long run, and what has passed is forgotten.
WINDOW = 200
EIGHT_BITS = ("sampling.cache_dtype", "sampling.weights_dtype")
TUPLES = ("objective.gates", "objective.regularizers")  # settings of several entries


def setting(config: dict, key: str, default=None):
    """The value under a dotted key; `default` where it is absent or None."""
    for name in key.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return default if config is None else config


def lam_of(config: dict) -> float:
    """The largest of the tasks' lambdas."""
    own, lam = setting(config, "objective.task_lam", {}), setting(config, "objective.lam", 1.0)
    tasks = setting(config, "data.tasks", ())
    return max((own.get(task, lam) for task in tasks), default=lam)


def lower(config: dict, lam: float) -> str:
    """The flag of another lambda; words where tasks have their own, which it would not reach."""
    if setting(config, "objective.task_lam"):
        return "smaller ones in --config.objective.task_lam"
    return f"--config.objective.lam={round(float(lam), 5)}"


def sampled(config: dict) -> bool:
    """Whether the gradient is of the sampled tokens, and not of each state's distribution."""
    loss = TABLES["loss"].get(setting(config, "objective.loss", "").split("(")[0])
    return loss is None or "advantage_x" in names(loss) or not over_vocabulary(loss)


def quarter(config: dict) -> int:
    """Of the limit of a completion, in tokens."""
    return max(1, setting(config, "sampling.completion_length", 1) // 4)


def slower(config: dict) -> str:
    """The flag of a third of the learning rate."""
    rate = setting(config, "optimizer.learning_rate", 1e-5) / 3
    return f"--config.optimizer.learning_rate={rate:.1g}"


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def some(rows: Iterable[dict], key: str, n: int) -> list[tuple[float, int]]:
    """(value, place) of the first n of `rows` that have a finite number under `key`."""
    found = []
    for i, row in enumerate(rows):
        if is_number(value := row.get(key)):
            found.append((value, i))
            if len(found) == n:
                break
    return found


def mean(pairs: list[tuple[float, int]], n: int) -> float | None:
    """Of n values; None where there are fewer."""
    return sum(value for value, _ in pairs) / n if len(pairs) == n else None


def last(rows: list[dict], key: str, n: int) -> float | None:
    """Mean of the last n values in the window; None where there are fewer."""
    return mean(some(reversed(rows[-WINDOW:]), key, n), n)


def ends(rows: list[dict], key: str, n: int) -> tuple[float, float] | None:
    """Means of the first n and of the last n values; None where these are not 2 n values."""
    end = some(reversed(rows[-WINDOW:]), key, n)
    if len(end) < n:
        return None
    begin = some(rows[:WINDOW], key, n)
    if len(begin) < n or begin[-1][1] >= len(rows) - 1 - end[-1][1]:
        return None
    return mean(begin, n), mean(end, n)


def same_weights(rows, config, n: int) -> bool:
    """Whether the sampler had the weights that the scores are of, in the same numbers."""
    rounded = any(setting(config, key) for key in EIGHT_BITS)
    return not (rounded or setting(config, "sampling.lag", 0) or last(rows, "staleness", n))


def closer(config: dict) -> str | None:
    """What would bring the sampler closer to the student, where a setting parts them."""
    found = [f"--config.{key}=none" for key in EIGHT_BITS if setting(config, key)]
    if setting(config, "sampling.lag", 0):
        found.insert(0, "a smaller --config.sampling.lag")
    return " or ".join(found) or None


def percent(share: float) -> str:
    """Two digits of a share: "0.12 %", "71 %"."""
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def refused(config: dict, flag: str) -> bool:
    """Whether a run would be refused for `flag`, --config.KEY=VALUE; False for other words.

    Nor is it told of settings that are not right themselves: a part of some, or a later version's.
    """
    given = re.fullmatch(r"--config\.([\w.]+)=('.*'|\S+)", flag)
    if given is None:
        return False
    text = json.dumps(config, sort_keys=True)
    return not _wrong(text) and _wrong(text, *given.groups())


@functools.lru_cache(maxsize=1024)  # 20 ms, and advice is sought at every row
def _wrong(config: str, key: str | None = None, value: str = "") -> bool:
    found = {name: x for name, x in json.loads(config).items() if x is not None}
    made = settings.from_dict({"workdir": "run", "student": {}} | found)
    if key is not None:
        try:
            entry = ast.literal_eval(value.strip("'"))
        except (ValueError, SyntaxError):
            entry = None if value == "none" else value.strip("'")
        try:
            made = problems.changed(made, {key: entry})
        except AttributeError:  # of a section that is none here
            return True
    return bool(made.problems(files=False))


def say(config: dict, found: str, *cures: tuple[str, str, str] | str | None) -> str:
    """`found`, and what to try of what is not set already.

    A cure is words, None, or (key, entry, why): a flag that sets the key, or adds to a tuple of
    entries; left out where the entry's name, without options, is in the setting already, and where
    a run with it would be refused.
    """
    told = []
    for cure in cures:
        why = ""
        if isinstance(cure, tuple):
            key, entry, why = cure
            now = setting(config, key)
            if entry.split("(")[0] in str(now):
                continue
            value = entry
            if key in TUPLES:
                value = "(" + "".join(f'"{each}",' for each in (*(now or ()), entry)) + ")"
            # Options and tuples hold signs that a shell would read.
            value = f"'{value}'" if set(value) & set('()"') else value
            cure = f"--config.{key}={value}"
        if cure and not refused(config, cure):
            told.append(cure + (f" ({why})" if why else ""))
    return f"{found}; try {', or '.join(told)}." if told else f"{found}."
