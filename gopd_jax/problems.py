"""What can be told to be wrong with a Config before anything is loaded.

Each check returns sentences that name the setting, its value and the cure.
"""

import copy
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path

from gopd_jax import hub, method

DTYPES = ("float32", "bfloat16")
PLACEMENTS = ("device", "host", "host_layers")
EXPORTS = ("merged", "adapter")
PREFLIGHTS = ("refuse", "warn", "off")
SCHEDULES = ("constant", "cosine")
REMAT = ("layers", "products", None)
ATTENTION = ("auto", "xla", "splash", "cudnn")
EIGHT_BITS = (None, "int8", "float8_e4m3fn")
FULL = (".dtype", "moment_dtype", "optimizer.weights_dtype")  # settings of DTYPES
# Of settings whose values had another form before.
CURES = {"batch.remat": ": give 'layers' for what was True, and None (a flag's none) for False"}

# A number is positive unless it is named here.
MAY_BE_ZERO = (
    *("seed", "objective.lam", "optimizer.warmup_steps", "optimizer.weight_decay"),
    *("sampling.lag", "critic.warmup_steps", "objective.distil_weight", "objective.task_lam"),
)
MAY_BE_NEGATIVE = ("objective.veto",)
BELOW_ONE = ("optimizer.b1", "optimizer.b2", "follows")


def find(config, *, files: bool = True) -> list[str]:
    """Every problem; those of type alone where there are any, because the rest relies on them.

    files False: without those that look at this machine's disk, for a run that is only planned.
    """
    if wrong := [
        f"{key} is {value!r}, a {type(value).__name__}; it takes {_spelled(kind)}"
        f"{CURES.get(key, '')}"
        for key, value, kind in leaves(config)
        if not _is(value, kind)
    ]:
        return wrong
    checks = (_numbers, _choices, method.find, _views, _models, _tasks, _sources, _batch)
    checks = (*checks, _times, _workdir)
    used = [check for check in checks if files or check not in (_models, _sources, _workdir)]
    return [problem for check in used for problem in check(config)]


def unused(config) -> list[str]:
    """Settings without effect: allowed, so that one flag can turn a preset into another method."""
    c, found, loaded = config, [*method.unused(config)], method.roles(config)
    made = method.goal(c)
    if made is not None and made.needs_teacher:
        paths = {name: os.path.realpath(m.path) for name, m in loaded.items() if m.path is not None}
        for name in sorted(name for name in paths if name.startswith("teachers.")):
            model, same = loaded[name], paths[name] == paths.get("reference")
            if same and model.follows is None and _reads(model) == _reads(loaded["reference"]):
                found.append(f"{name} is the reference, so log T - log R = 0 and lam has no effect")
            elif paths[name] == paths.get("student") and _reads(model) == _reads(c.student):
                found.append(f"{name} is the student itself: before the first step log T = log S")
    return found


def leaves(value, key: str = "", kind=None) -> Iterator[tuple[str, object, object]]:
    """(key, value, annotation) of each setting, sections and teachers opened: "mesh.data", 2, int.

    A section of the wrong type is left whole.
    """
    if dataclasses.is_dataclass(value) and (kind is None or _is(value, kind)):
        for f in dataclasses.fields(value):
            yield from leaves(getattr(value, f.name), f"{key}.{f.name}" if key else f.name, f.type)
    elif isinstance(value, dict) and _is(value, kind):
        for name in sorted(value):
            yield from leaves(value[name], f"{key}.{name}", typing.get_args(kind)[1])
    else:
        yield key, value, kind


def changed(config, values: dict[str, object]):
    """A copy of the Config with these values by key, "mesh.data" say, teachers' by their names.

    AttributeError for a key of a section that is None.
    """
    made = copy.deepcopy(config)
    for key, value in values.items():
        *sections, name = key.split(".")
        if sections[1:] and sections[0] == "teachers":  # whose names may have dots
            sections = ["teachers", ".".join(sections[1:])]
        at = made
        for section in sections:
            at = at[section] if isinstance(at, dict) else getattr(at, section)
        setattr(at, name, value)
    return made


def _reads(model) -> tuple:
    """What a model makes of a prompt besides its own files."""
    return model.context, model.template


def _is(value, kind) -> bool:
    """Whether a value is of an annotated type; an int passes for a float, a bool for neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(_is(value, one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is(one, arguments[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if kind in (int, float):
        numbers = int if kind is int else (int, float)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, kind)


def _spelled(kind) -> str:
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace("gopd_jax.config.", "")


def _numbers(c) -> Iterator[str]:
    for key, value, _ in leaves(c):
        if not isinstance(value, (int, float)) or isinstance(value, bool) or key in MAY_BE_NEGATIVE:
            continue
        if not math.isfinite(value):
            yield f"{key} is {value}; it has to be finite"
        elif key.endswith(BELOW_ONE) and not 0 <= value < 1:
            yield f"{key} is {value}; it has to be at least 0 and less than 1"
        elif (may := key.startswith(MAY_BE_ZERO)) and value < 0:
            yield f"{key} is {value}; it has to be 0 or more"
        elif not may and not key.endswith(BELOW_ONE) and value <= 0:
            yield f"{key} is {value}; it has to be positive"
    if c.seed >= 2**32:
        yield f"seed is {c.seed}; it has to be less than 2**32"


def _choices(c) -> Iterator[str]:
    for key, value, choices in (
        ("optimizer.schedule", c.optimizer.schedule, SCHEDULES),
        ("objective.source", c.objective.source, method.SOURCES),
        ("preflight", c.preflight, PREFLIGHTS),
        ("batch.attention", c.batch.attention, ATTENTION),
        ("sampling.cache_dtype", c.sampling.cache_dtype, EIGHT_BITS),
        ("sampling.weights_dtype", c.sampling.weights_dtype, EIGHT_BITS),
        ("batch.remat", c.batch.remat, REMAT),
        *([("lora.export", c.lora.export, EXPORTS)] if c.lora else ()),
        *((k, value, DTYPES) for k, value, _ in leaves(c) if k.endswith(FULL)),
        *((k, value, PLACEMENTS) for k, value, _ in leaves(c) if k.endswith(".placement")),
    ):
        if value not in choices:
            yield f"{key} is {value!r}; it is one of {choices}{CURES.get(key, '')}"
    for key, value, _ in leaves(c):
        if key.endswith(".fingerprint") and value is not None and not re.match("[0-9a-f]", value):
            yield f"{key} is {value!r}; give the digits that preflight shows under weights"
    try:
        re.compile(c.lora.targets if c.lora else "")
    except re.error as error:
        yield f"lora.targets is {c.lora.targets!r}, which is no regular expression: {error}"


def _views(c) -> Iterator[str]:
    """How roles read prompts, and which weights they have, beyond what each may."""
    for key, why in (
        ("context", "the student reads the plain prompt; give a teacher the context"),
        ("prompt_length", "data.prompt_length is the student's"),
    ):
        if (value := getattr(c.student, key)) is not None:
            yield f"student.{key} is {value!r}; {why}"
    if c.student.placement != "device":
        yield f"student.placement is {c.student.placement!r}; only frozen models can lie elsewhere"
    yield from _streamed(c)
    followers = {f"teachers.{n}": m for n, m in c.teachers.items() if m.follows is not None}
    for role, model in (("student", c.student), ("reference", c.reference)):
        if model is not None and model.follows is not None:
            yield f"{role}.follows is {model.follows}; only a teacher can follow the student"
    if len({model.follows for model in followers.values()}) > 1:
        said = {role: model.follows for role, model in followers.items()}
        yield f"teachers follow the student at several decays, {said}; give one for all of them"
    for role, model in followers.items():
        paths = model.path, c.student.path
        if None not in paths and len({os.path.realpath(path) for path in paths}) > 1:
            yield (
                f"{role} follows the student and has another path, {model.path!r}; its weights are "
                f"the student's average, so give {c.student.path!r}"
            )
        if model.placement != "device":
            yield f"{role} follows the student, which is on the device; leave its placement"
    if followers and c.objective.source == "teacher":
        yield (
            f"objective.source = 'teacher' and {sorted(followers)} follow the student; let frozen "
            "teachers write, or use source = 'student'"
        )
    if c.sampling.stop is not None and not c.sampling.stop:
        yield "sampling.stop is (); name the tokens that end a completion, or none for the model's"


def _streamed(c) -> Iterator[str]:
    """Whether a model of which a layer at a time is on the device has to write completions."""
    by_layer = [r for r, m in method.roles(c).items() if m.placement == "host_layers"]
    if not (teachers := [role for role in by_layer if role.startswith("teachers.")]):
        return
    what = f"{teachers} have placement = 'host_layers', and each token that they write would bring"
    if c.objective.source == "teacher":
        yield (
            f"objective.source = 'teacher', {what} in every layer; give them placement = 'host', "
            "or use source = 'student'"
        )
    if c.evaluation.teachers:
        yield (
            f"evaluation.teachers = True, {what} in every layer; leave it out, "
            "--config.evaluation.teachers=False, or give them placement = 'host'"
        )


def _models(c) -> Iterator[str]:
    for role, model in method.roles(c).items():
        flag = f"--config.{role}.path=DIR"
        if model.path is None:
            yield f"{role}.path is not set; give the directory of a Hugging Face checkpoint: {flag}"
        elif not (Path(model.path) / "config.json").is_file() and not hub.parse(model.path):
            yield (
                f"{role}.path is {model.path!r}, which has no config.json; give the directory of a "
                f"Hugging Face checkpoint, or ORG/NAME@REVISION of the hub: {flag}"
            )


def _tasks(c) -> Iterator[str]:
    tasks = c.data.tasks
    if not tasks:
        yield "data.tasks is (); name at least one task, --config.data.tasks='(\"math\",)'"
    if repeated := sorted({task for task in tasks if tasks.count(task) > 1}):
        yield f"data.tasks is {tasks}, with {repeated} more than once; name each task once"
    if odd := [task for task in tasks if not task or re.search(r"[\s,]", task)]:
        yield (
            f"data.tasks is {tasks}, and {odd} is no name of a task; several are written "
            '--config.data.tasks=\'("math", "code")\''
        )


def _sources(c) -> Iterator[str]:
    for key, source in (("data.train", c.data.train), ("data.test", c.data.test)):
        is_file = Path(source).suffix in (".jsonl", ".parquet")
        if is_file and not Path(source).is_file():
            yield f"{key} is {source!r}, and there is no such file; give --config.{key}=FILE"
        known = re.fullmatch(r"microworld:(train|test)(:(math|code))?|tfds:.+:[^:]+", source)
        if not is_file and not known:
            yield (
                f"{key} is {source!r}; give microworld:train or microworld:test (of one task: "
                "microworld:train:math), a .jsonl or .parquet file, or tfds:NAME:SPLIT"
            )


def _batch(c) -> Iterator[str]:
    b, n_tasks = c.batch, len(c.data.tasks)
    if n_tasks and b.prompts % n_tasks:
        yield (
            f"batch.prompts = {b.prompts} is not divisible by the {n_tasks} tasks of data.tasks = "
            f"{c.data.tasks}; make it a multiple of {n_tasks}"
        )


def _times(c) -> Iterator[str]:
    if 0 < c.steps <= c.optimizer.warmup_steps:
        yield (
            f"optimizer.warmup_steps = {c.optimizer.warmup_steps} leaves none of steps = {c.steps} "
            "at the full rate; lower it, or raise steps"
        )
    if c.profile is not None:
        span = re.fullmatch(r"(\d+):(\d+)", c.profile, re.ASCII)
        if not span or not int(span[1]) < int(span[2]) <= c.steps:
            yield (
                f"profile is {c.profile!r} and steps is {c.steps}; it takes 'FIRST:END' with "
                "FIRST < END <= steps, '10:13' for three steps"
            )


def _workdir(c) -> Iterator[str]:
    if not c.workdir.strip():
        yield f"workdir is {c.workdir!r}; give the run a directory, --config.workdir=DIR"
        return
    if re.match(r"\w+://", c.workdir):
        yield (
            f"workdir is {c.workdir!r}, and a run writes to a file system; mount the bucket and "
            "give its directory"
        )
        return
    parent = Path(c.workdir).absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        yield (
            f"workdir is {c.workdir!r}, and {parent} is no directory that can be written; give "
            "another --config.workdir=DIR"
        )
