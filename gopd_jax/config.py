"""Every setting of a run: its type, its default and one comment. `Config.problems()` checks them.

Each is a flag, typed by its annotation: `--config.objective.lam=1.5`, `--config.profile=none`,
`--config.data.tasks='("math", "code")'`, `--config.routes='{"math": "large"}'`. A section that may
be None needs `--config.reference=build` before its fields.
"""

import ast
import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import MISSING, dataclass, field

from absl import flags
from ml_collections import config_flags

from gopd_jax import problems


@dataclass(slots=True, kw_only=True)
class Model:
    """One model: a Hugging Face directory, or ORG/NAME or ORG/NAME@REVISION of the hub."""

    path: str | None = None  # of config.json, *.safetensors, tokenizer.json; None: not given yet
    dtype: str = "float32"  # of the computation; logits and log-probs are float32 in any case
    template: str | None = None  # options of its chat template: "enable_thinking=False"
    context: str | None = None  # shown to it alone: solution, answer, context, module:function
    prompt_length: int | None = None  # tokens of the prompt as it reads it; None: data's
    placement: str = "device"  # of a frozen model's weights: device, host, host_layers
    follows: float | None = None  # a teacher that is the student's moving average of this decay
    fingerprint: str | None = None  # first digits of its sha256 as preflight shows it, to insist on


@dataclass(slots=True, kw_only=True)
class Data:
    """Problems: microworld:train or microworld:train:math, .jsonl, .parquet, tfds:NAME:SPLIT."""

    train: str = "microworld:train"  # problems to train on, drawn anew each epoch
    test: str = "microworld:test"  # held-out problems; the first of each task are evaluated
    tasks: tuple[str, ...] = ("math", "code")  # each has equal rows in a batch
    prompt_length: int = 64  # tokens; a longer prompt is an error that counts them


@dataclass(slots=True, kw_only=True)
class Sampling:
    """How the student samples."""

    temperature: float = 1.0  # of every role: it divides the logits wherever log-probs are taken
    completion_length: int = 32  # tokens, end token included
    stop: tuple[str, ...] | None = None  # tokens that end a completion; None: the student's own
    slots: int | None = None  # rows decoded at one time, refilled as they end; None: all of a step
    buckets: int = 1  # widths of the cache: a token reads the least that holds what is there
    prompt_buckets: int = 1  # widths that a batch's prompts are cut to, as short as its longest
    cache_dtype: str | None = None  # of keys and values: int8, float8_e4m3fn; None: the student's
    weights_dtype: str | None = None  # of the student's matrices as it samples, of the same
    lag: int = 0  # steps by which the sampling weights are older, as asynchronous sampling has it


@dataclass(slots=True, kw_only=True)
class Batch:
    """One step's rows: prompts * rollouts of them."""

    prompts: int = 256  # distinct prompts a step
    rollouts: int = 1  # completions of each prompt
    updates: int = 1  # optimizer updates of one batch, each of as many of its rows
    epochs: int = 1  # passes of these updates over the batch
    microbatches: int = 1  # pieces that an update runs one after another, same gradient
    head_chunk: int = 64  # positions whose logits exist at one time in scoring and in the loss
    buckets: int = 1  # widths that microbatches, sorted by length, are cut to: short ones cost less
    remat: str | None = None  # what the backward pass computes again: layers, or all but products
    attention: str = "auto"  # of whole rows: xla, splash (TPU), cudnn (GPU); auto: the device's own


@dataclass(slots=True, kw_only=True)
class Objective:
    """What is learnt from, as names in the tables of gopd_jax/objectives/: "name(option=value)"."""

    source: str = "student"  # who writes the completions: student (on-policy), teacher, data
    lam: float = 1.0  # G-OPD's lambda: 1 is OPD, > 1 extrapolates (ExOPD), 0 stays at the reference
    lam_schedule: str = "constant"  # or linear(steps=..), cosine(steps=..), from start=1.0 to lam
    task_lam: dict[str, float] = field(default_factory=dict)  # task -> its lambda, in place of lam
    lam_by_row: bool = False  # rows of the data may name their own under "lam"
    ratio_cap: float | None = None  # nats that log T - log R of a token counts at most
    mixture: str = "probability"  # where the teachers of a task are averaged: probability, log
    advantage: str = "gopd"  # token reward of a sampled token: gopd, grpo, imitation
    divergence: str = "reverse_kl"  # from the target, of advantage = gopd and of exact losses
    estimator: str = "corrected"  # of a sampled divergence (OPD+); stop_gradient is biased
    log_u_clip: float | None = None  # nats of log T - log S in the advantage; 5 if f is unbounded
    credit: str = "immediate"  # return_to_go, discounted(gamma=..), k_step(k=..), gae(lam=..)
    baseline: str = "none"  # batch_mean, position_mean, leave_one_out, local_kl, value
    advantage_clip: float | None = None  # of the finished advantage
    gates: tuple[str, ...] = ()  # token weights: trust, first(n=..), skip_end, drift(..), ...
    importance: str = "none"  # weights of tokens that other weights sampled: token, sequence
    rejection: str = "none"  # of tokens too far off-policy: token(cap=..), sequence(cap=..)
    veto: float | None = None  # a row with a token below this log-ratio goes as a whole
    loss: str = "policy_gradient"  # ppo, k1, k2, k3; over the vocabulary: exact, cr_opd, ...
    support: str = "full"  # ids of an exact loss: top_k(k=.., of="teacher"), student, union, ..
    mass: str = "rest"  # what becomes of the others: one bucket, renormalised, raw
    regularizers: tuple[str, ...] = ()  # entropy(weight=..), anchor(weight=..)
    task: str | None = None  # grpo: the verifier's reward, to which the distillation is added
    distil_weight: float = 1.0  # of the distillation, then
    reduction: str = "token_mean"  # token_mean, sequence_mean, sequence_sum(length=...)


@dataclass(slots=True, kw_only=True)
class Critic:
    """The value head of credit = "gae(..)" and of baseline = "value"."""

    learning_rate: float = 1e-3  # of Adam; the policy has its own
    width: int = 64  # of the hidden layer
    closed_form: bool = True  # V holds the state's own expected reward, -KL, from the start
    warmup_steps: int = 0  # first steps, in which the head learns and the student does not
    value_clip: float | None = None  # nats that V may move in one batch and still be rewarded


@dataclass(slots=True, kw_only=True)
class Diagnostics:
    """Exact figures of a few rows: divergences, overlap with the target, the gradient's cosine."""

    every: int | None = None  # steps between them; None: never
    rows: int = 16  # of the batch
    top_k: int = 16  # ids of each model in overlap and tail


@dataclass(slots=True, kw_only=True)
class Optimizer:
    """AdamW; a step whose gradient is not finite is skipped and counted."""

    learning_rate: float = 1e-5  # after the warm-up
    schedule: str = "constant"  # constant, or cosine to 0 at the last step
    warmup_steps: int = 0  # linear, from 0, after those of a critic
    b1: float = 0.9  # decay of the gradient's mean
    b2: float = 0.999  # decay of the gradient's mean square
    weight_decay: float = 0.01  # times the learning rate, a step
    clip_norm: float = 1.0  # of the gradient's global norm
    moment_dtype: str = "float32"  # of the gradient's mean; bfloat16 saves 2 bytes a weight
    weights_dtype: str = "float32"  # of what is trained; bfloat16 is rounded to at random, saves 2


@dataclass(slots=True, kw_only=True)
class Lora:
    """Low-rank adapters on the student: they alone are trained."""

    rank: int = 16  # of each adapter
    alpha: float = 32.0  # an adapter counts alpha / rank times
    targets: str = r"(q|k|v|o|gate|up|down)_proj"  # searched for in Hugging Face's module names
    export: str = "merged"  # what a finished run writes: merged weights, or a PEFT adapter


@dataclass(slots=True, kw_only=True)
class Mesh:
    """Devices along each axis."""

    data: int | None = None  # replicas; None takes the devices that the other axes leave
    fsdp: int = 1  # shards of parameters and optimizer state, and rows
    expert: int = 1  # shards of experts beside those of tensor, and rows
    sequence: int = 1  # shards of a row's positions, and of parameters; of rows while decoding
    tensor: int = 1  # shards of heads, MLP and vocabulary
    slices: int = 1  # TPU slices that the replicas are spread over; data counts over all of them


@dataclass(slots=True, kw_only=True)
class Checkpoints:
    """When the run's state is written. It is also written at the end and on SIGTERM."""

    every: int = 20  # steps between two of them
    keep: int = 2  # newest checkpoints kept


@dataclass(slots=True, kw_only=True)
class Evaluation:
    """Accuracy on held-out problems, before and after; each teacher's beside it."""

    problems: int = 256  # of each task
    samples: int = 4  # completions of each problem: avg@samples, pass@k for k up to them
    every: int | None = 20  # steps between the student's evaluations; None: only first and last
    verify_every: int | None = 5  # steps between verdicts on training rollouts; None: never
    teachers: bool = True  # evaluate every teacher once
    rows: int | None = None  # completions sampled at one time; None: as many as a step has


@dataclass(slots=True, kw_only=True)
class Config:
    """A run. Presets in configs/ return one; they say only what differs."""

    workdir: str  # checkpoints, metrics.jsonl, report.html and the exported model go here
    student: Model  # the model that is trained, from these weights
    teachers: dict[str, Model] = field(default_factory=dict)  # name -> model; a task's by its name
    routes: dict[str, str] = field(default_factory=dict)  # task -> a teacher, or "a=0.7, b=0.3"
    reference: Model | None = None  # R of the objective; needed when lam != 1, else not loaded
    steps: int = 80  # optimizer steps of the whole run; a finished run continues under a larger one
    seed: int = 0  # of data order and sampling
    data: Data = field(default_factory=Data)  # problems and their tasks
    sampling: Sampling = field(default_factory=Sampling)  # how the completions are drawn
    batch: Batch = field(default_factory=Batch)  # rows of one step
    objective: Objective = field(default_factory=Objective)  # what is learnt from
    critic: Critic | None = None  # value head, for credit and baselines that need one
    optimizer: Optimizer = field(default_factory=Optimizer)  # how its gradient is applied
    lora: Lora | None = None  # adapters in place of the student's own weights; None: all train
    mesh: Mesh = field(default_factory=Mesh)  # devices along each axis
    checkpoints: Checkpoints = field(default_factory=Checkpoints)  # when the state is written
    diagnostics: Diagnostics = field(default_factory=Diagnostics)  # what is looked at besides
    evaluation: Evaluation = field(default_factory=Evaluation)  # accuracy, of what and when
    preflight: str = "refuse"  # what follows a failed check before step 0: refuse, warn; or off
    profile: str | None = None  # "10:13" traces what comes after step 10 until 13; None: no trace

    def problems(self, *, files: bool = True) -> list[str]:
        """Everything wrong with these settings that can be told without loading anything.

        A setting of the wrong type is reported alone: the other checks rely on the types. files
        False: leave out whether models, data and workdir are there.
        """
        return problems.find(self, files=files)

    def notes(self) -> list[str]:
        """Settings that are allowed and have no effect in this run, for the log."""
        return problems.unused(self)


def to_dict(config: Config) -> dict:
    """The settings as plain values, for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> Config:
    """The Config of what `to_dict` made, also after JSON; what a section lacks is its default."""
    return _typed(Config, values)


def _typed(kind, value):
    if isinstance(kind, types.UnionType):
        kind = typing.get_args(kind)[0]  # of X | None
    if value is None:
        return None
    if dataclasses.is_dataclass(kind):
        of = {f.name: f.type for f in dataclasses.fields(kind) if f.name in value}
        return kind(**{name: _typed(one, value[name]) for name, one in of.items()})
    if typing.get_origin(kind) is dict:
        return {name: _typed(typing.get_args(kind)[1], x) for name, x in value.items()}
    return tuple(value) if typing.get_origin(kind) is tuple else value


# Settings that may change between a run and its continuation: they change no number it computes.
MAY_CHANGE = ("workdir", "checkpoints", "diagnostics", "preflight", "profile", "mesh")
# Parts of others of which the same is true.
PARTS_MAY_CHANGE = (
    *(".fingerprint", ".lora.export", ".evaluation.rows"),
    *(".sampling.slots", ".sampling.buckets", ".sampling.prompt_buckets"),
)
# Read from files, which are identified by their content; and where weights lie.
BY_CONTENT = (".path", ".data.train", ".data.test", ".placement")
BY_TASK = ("objective", "routes")  # whose last names are tasks, "path" perhaps
# Options of later versions: absent from a run's identity while they are at their defaults, so that
# a run of an earlier version is continued.
LATER = {
    **dict.fromkeys(("template", "context", "prompt_length", "follows", "stop", "lora", "critic")),
    "lag": 0,
    "updates": 1,
    "epochs": 1,
    "buckets": 1,
    "remat": None,
    "attention": "auto",
    **dict.fromkeys(("moment_dtype", "weights_dtype"), "float32"),
    **dict.fromkeys(("sampling.cache_dtype", "sampling.weights_dtype")),
    **{
        f"objective.{f.name}": f.default if f.default_factory is MISSING else f.default_factory()
        for f in dataclasses.fields(Objective)
        if f.name not in ("source", "advantage", "lam", "loss", "reduction")
    },
}
# Settings of which an earlier version had another value for the same thing: name -> that one.
FORMERLY = {"batch.remat": {"layers": True}}


def identity(config: Config) -> dict[str, str]:
    """Setting -> value, of all that a resumed run must share with the run that it continues.

    Paths are left out: models and data are identified by their content. So is the number of steps,
    unless the learning rate's schedule ends with them: a finished run can be made longer.
    """
    found = {}
    for key, value, kind in problems.leaves(config):
        ends = key == "steps" and config.optimizer.schedule == "constant"
        group = key.split(".")[0]
        part = group not in BY_TASK and f".{key}".endswith(BY_CONTENT + PARTS_MAY_CHANGE)
        if group in MAY_CHANGE or part or ends:
            continue
        value = FORMERLY.get(key, {}).get(value, value)
        last = LATER.get(key.split(".")[-1], MISSING) if group not in BY_TASK else MISSING
        later = LATER.get(key, last)
        if later is not MISSING and value == later:
            continue
        # lam = 1 in a preset and --config.objective.lam=1, which is read as 1.0, are one setting.
        found[key] = json.dumps(float(value) if _is_number(value, kind) else value)
    return found


def _is_number(value, kind) -> bool:
    floats = kind is float or float in typing.get_args(kind)
    return floats and isinstance(value, int | float) and not isinstance(value, bool)


def digest(values: dict) -> str:
    """Sixteen hex digits of a plain dict's content."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


class _OrNone(flags.ArgumentParser):
    """Another parser's values, and None for "none"."""

    def __init__(self, parser: flags.ArgumentParser):
        self.parser = parser

    def parse(self, argument):
        return None if argument in (None, "none", "None") else self.parser.parse(argument)

    def flag_type(self):
        return f"{self.parser.flag_type()} or none"


class _Mapping(flags.ArgumentParser):
    """A dict as Python writes it."""

    def parse(self, argument):
        try:
            value = argument if isinstance(argument, dict) else ast.literal_eval(argument)
        except (ValueError, SyntaxError):
            value = None
        if not isinstance(value, dict):
            raise ValueError("""write it as Python does: '{"math": "large", "code": "large"}'""")
        return value

    def flag_type(self):
        return "dict"


def accept_none_and_dicts() -> None:
    """Let flags say none, as in --config.evaluation.every=none, and dicts, as in
    --config.routes='{"math": "large"}'; call it before flags are parsed.

    ml_collections reads a setting that may be None by the parser of its other type, which has no
    word for None. Where a setting may not be None, Config.problems() says so.
    """
    for mapping in (dict[str, str], dict[str, float]):
        config_flags.register_flag_parser_for_type(mapping, _Mapping())
    config_flags.register_flag_parser_for_type(int, _OrNone(flags.IntegerParser()))
    config_flags.register_flag_parser_for_type(float, _OrNone(flags.FloatParser()))
    config_flags.register_flag_parser_for_type(str, _OrNone(flags.ArgumentParser()))
