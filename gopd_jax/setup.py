"""What a run needs, loaded and checked before anything is compiled."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax

from gopd_jax import config as settings
from gopd_jax import data, hub, method, processes, sharding
from gopd_jax.assembly import adapted, decoder_of, frozen_of, recipe_of, teachers_used, views
from gopd_jax.evaluate import held_out
from gopd_jax.method import teachers_of
from gopd_jax.models import hf, lora
from gopd_jax.models import params as lm_params
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.models.decoder import Decoder
from gopd_jax.objectives import objective
from gopd_jax.progress import bar
from gopd_jax.reader import Reader, ends_otherwise, find_context, stop_ids
from gopd_jax.recipe import Frozen, Recipe
from gopd_jax.verifiers import verify

TOO_LONG = "x" * 70_000
SLOW_BYTES = 2**29  # float32 parameters that take a second or so to load: a bar shows how far it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """One model of the run, as it was loaded."""

    path: str  # as it was given, or ORG/NAME@COMMIT of the Hugging Face hub
    directory: Path
    digest: str  # of its weights and config.json
    decoder: Decoder
    params: dict | None  # None of a teacher that follows the student
    reader: Reader  # its tokenizer, template and context

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return self.reader.tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that train.run works with."""

    config: settings.Config
    mesh: jax.sharding.Mesh
    roles: dict[str, Role]  # student, reference, teacher:<name>
    train: data.Dataset
    test: data.Dataset
    recipe: Recipe
    frozen: Frozen
    identity: dict[str, str]  # what a checkpoint of this run must agree with

    @property
    def student(self) -> Role:
        return self.roles["student"]


def prepare(config: settings.Config) -> Run:
    """Load and check. ValueError with every problem that a stage can tell, and its cure."""
    c = config
    mesh = checked_mesh(c)
    goal = objective.build(**method.settings(c))
    models = {n.replace("teachers.", "teacher:"): model for n, model in method.roles(c).items()}
    problems: list[str] = []
    roles = _load_roles(models, mesh, c, problems)
    train = _try(problems, data.load, c.data.train, c.data.tasks)
    test = _try(problems, data.load, c.data.test, c.data.tasks)
    _refuse(problems)
    _check_contract(c, roles)
    stop = stop_ids(roles["student"].tokenizer, c.sampling.stop)
    if c.objective.source == "data":
        roles["student"] = _ending(roles["student"], c, stop)
    _check_data(c, train, test, roles, stop)
    teachers = teachers_used(c, goal)
    return Run(
        config=c,
        mesh=mesh,
        roles=roles,
        train=train,
        test=test,
        recipe=recipe_of(c, mesh, goal, roles, teachers, stop),
        frozen=frozen_of(roles, goal, teachers),
        identity=_identity(c, roles, train, test, stop),
    )


def checked_mesh(c: settings.Config, *, devices=None, files: bool = True) -> jax.sharding.Mesh:
    """The mesh over `devices` (None: all). ValueError with every problem of settings and batch.

    files False: for a program that is only compiled, whatever there is on this machine.
    """
    problems = c.problems(files=files)
    axes = c.mesh.data, c.mesh.fsdp, c.mesh.tensor
    more = {name: getattr(c.mesh, name) for name in ("expert", "sequence", "slices")}
    held = {"sampling.slots": c.sampling.slots, "evaluation.rows": c.evaluation.rows}
    held = {key: n for key, n in held.items() if n is not None}
    sizes = (*axes[1:], axes[0] or 1, *more.values(), c.batch.prompts, c.batch.rollouts)
    sizes = (*sizes, c.batch.updates, c.batch.microbatches, *held.values())
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        _refuse(problems)  # which has them
    mesh = _try(problems, sharding.make_mesh, *axes, **more, devices=devices)
    rows = c.batch.prompts * c.batch.rollouts
    if mesh is not None:
        check = sharding.process_share if files else sharding.require_rows
        share = _try(problems, check, mesh, rows)
        shards, several = sharding.n_row_shards(mesh), c.batch.updates > 1
        decoding = sharding.n_decode_shards(mesh)
        pieces = c.batch.updates * c.batch.microbatches
        keys = "batch.updates * batch.microbatches" if several else "batch.microbatches"
        if share and not rows % pieces and rows // pieces % shards:
            problems.append(
                f"a microbatch of {rows} / {keys} = {rows} / {pieces} = {rows // pieces} rows does "
                f"not divide over {sharding.told_shards(mesh)} = {shards}; choose fewer {keys}"
            )
        over = sharding.told_shards(mesh, sharding.DECODE_ROWS)
        problems += [
            f"{key} = {n} does not divide over {over} = {decoding}; choose a multiple of {decoding}"
            for key, n in held.items()
            if n % decoding
        ]
    _refuse(problems)
    return mesh


def _identity(c: settings.Config, roles: dict[str, Role], train, test, stop) -> dict[str, str]:
    """What a continued run has to share with the run that it continues."""
    chat = roles["student"].tokenizer
    if c.objective.source == "data" and chat.end_id != chat.eos_ids[0]:  # once the first was added
        stop = stop, chat.end_id
    return {
        **settings.identity(c),
        **{f"model {name}": role.digest for name, role in roles.items()},
        "data.train content": train.identity,
        "data.test content": test.identity,
        "tokenizer": chat.fingerprint(),
        "ends of completions": json.dumps(stop),
        **{f"reader of {name}": role.reader.fingerprint() for name, role in roles.items()},
    }


def _load_roles(models: dict[str, settings.Model], mesh, c, problems) -> dict[str, Role]:
    """Every role, each model loaded once; what is wrong with any goes to `problems`."""
    loaded: dict[tuple, tuple | None] = {}
    roles = {}
    # The widths of a jit are static: all teachers' prompts are padded to the longest of theirs.
    width = max(
        (_length(m, c) for n, m in models.items() if n.startswith("teacher:")), default=None
    )
    for name, model in models.items():
        if (at := _try(problems, hub.locate, model.path, says=f"{name}: ")) is None:
            continue
        key = (at.directory.resolve(), model.placement)
        if key not in loaded:
            loaded[key] = _try(problems, _load, name, model, at, mesh, c, says=f"{name}: ")
        elif loaded[key] is not None:  # for a role that may read more of the same model
            _try(problems, check_context, name, model, loaded[key][0], c, says=f"{name}: ")
        wide = width if name.startswith("teacher:") else None
        reader = _try(problems, _reader, name, model, loaded[key], c, wide, says=f"{name}: ")
        if loaded[key] is None or reader is None:
            continue
        cfg, params, digest, _ = loaded[key]
        if (wider := adapted(c, name, model, cfg)) is not cfg:
            made = _try(problems, _with_adapters, wider, params, mesh, c.seed)
            cfg, params = (cfg, params) if made is None else (wider, made)
        if model.fingerprint is not None and not digest.startswith(model.fingerprint):
            problems.append(
                f"{name}: {model.path} has the fingerprint {digest[:12]}, and fingerprint is "
                f"{model.fingerprint!r}; this is another model, or its files have changed"
            )
        roles[name] = Role(
            path=at.name,
            directory=at.directory,
            digest=digest,
            decoder=_try(problems, decoder_of, c, mesh, cfg, model, says=f"{name}: "),
            params=params if model.follows is None else None,
            reader=reader,
        )
    return roles


def _with_adapters(cfg: lm_params.ModelConfig, params, mesh, seed: int):
    """params, with new adapters of cfg beside the same arrays."""
    axes, _ = lora.split(lm_params.logical_axes(cfg))
    where = sharding.shardings(mesh, axes)
    draw = jax.jit(lora.init, static_argnums=0, out_shardings=where)
    return lora.join(draw(cfg, jax.random.key(seed)), params)


def _length(model: settings.Model, c: settings.Config) -> int:
    return model.prompt_length or c.data.prompt_length


def _reader(name: str, model: settings.Model, loaded, c, width: int | None) -> Reader | None:
    """How the role reads; ValueError for a context or for template options that make no sense."""
    context = find_context(model.context)
    if loaded is None:
        return None
    return Reader(
        tokenizer=loaded[-1].with_options(model.template),
        length=_length(model, c),
        width=width,
        context=context,
        setting=_length_setting(name, model),
    )


def _length_setting(name: str, model: settings.Model) -> str:
    own = model.prompt_length is not None
    return f"{name.replace('teacher:', 'teachers.')}.prompt_length" if own else "data.prompt_length"


def _load(name: str, model: settings.Model, at: hub.Located, mesh, c: settings.Config):
    """(its ModelConfig, params, digest, tokenizer).

    Weights are as stored: use casts in any case, and `init_state` casts what is trained.
    """
    cfg = hf.load_config(at.directory)
    axes = lm_params.logical_axes(cfg)
    problems = sharding.mesh_problems(mesh, lm_params.abstract_params(cfg), axes, role=name)
    _try(problems, check_context, name, model, cfg, c)
    chat = _try(problems, tokenizers.load(at.directory).within, cfg.vocab_size)
    if problems:
        raise ValueError("; ".join(problems))
    where = sharding.shardings(mesh, axes)
    if model.placement != "device":
        where = sharding.on_host(where)
    n_bytes = sum(4 * x.size for x in jax.tree.leaves(lm_params.abstract_params(cfg)))
    shown = jax.process_index() == 0 and n_bytes > SLOW_BYTES
    params = hf.load_params(
        at.directory,
        cfg,
        shardings=where,
        dtype="stored",
        progress=lambda work: bar(work, f"loading {name}", shown),
    )
    return cfg, params, hf.weights_digest(at.directory, **processes.shared_work()), chat


def check_context(name: str, model: settings.Model, cfg: lm_params.ModelConfig, c) -> None:
    length = _length(model, c) + c.sampling.completion_length
    if length > cfg.max_position_embeddings:
        raise ValueError(
            f"{_length_setting(name, model)} + sampling.completion_length = {length} tokens, and "
            f"{model.path} has max_position_embeddings = {cfg.max_position_embeddings}; shorten one"
        )


def _check_contract(c: settings.Config, roles: dict[str, Role]) -> None:
    """Completion ids are shared, so every role must read them as the student does."""
    student, problems = roles["student"].tokenizer, []
    for task in c.data.tasks:
        named = {name: roles.get(f"teacher:{name}") for name in teachers_of(c, task)}
        readers = [role.reader for role in named.values() if role is not None]
        if not all(reader.reads_as(readers[0]) for reader in readers[1:]):
            problems.append(
                f"routes mix the teachers {sorted(named)} of task {task!r}, and they read prompts "
                "differently (template or context); mix teachers that read alike"
            )
    for name, role in roles.items():
        _try(problems, tokenizers.require_same_ids, student, role.tokenizer, name)
    _refuse(problems)


def _ending(student: Role, c: settings.Config, stop: tuple[int, ...]) -> Role:
    """The student whose imitated completions end as a run's do.

    ValueError where its template ends a turn with a token that is none of its ends: base models
    with the template of an instruction-tuned one are published so.
    """
    chat = student.tokenizer.ending_with(stop)
    if c.sampling.stop is None:
        _refuse(ends_otherwise(chat))
    return dataclasses.replace(student, reader=dataclasses.replace(student.reader, tokenizer=chat))


def _check_data(c: settings.Config, train: data.Dataset, test, roles, stop) -> None:
    """Every prompt fits, every answer can be verified, there is enough to evaluate on."""
    problems: list[str] = []
    imitates = c.sampling.completion_length if c.objective.source == "data" else None
    own, other = roles["student"].reader, views(c, roles)
    _try(problems, data.check_lengths, train, own, completion_length=imitates, stop=stop)
    _try(problems, data.check_lengths, test, own)
    asked = "teachers" in other or c.objective.source == "teacher" or method.goal(c).needs_teacher
    # A limit holds for a role without a view too: its context was checked against it.
    for task in c.data.tasks if asked else ():
        for name in teachers_of(c, task):
            reader, says = roles[f"teacher:{name}"].reader, f"teacher {name!r} on task {task!r}: "
            if not reader.takes(own):
                _try(problems, data.check_lengths, train.only(task), reader, says=says)
    for name, role in roles.items() if c.evaluation.teachers else ():
        if name.startswith("teacher:") and not role.reader.takes(own):
            says = f"evaluating {name} (--config.evaluation.teachers=False leaves it out): "
            _try(problems, data.check_lengths, test, role.reader, says=says)
    if "reference" in roles and not roles["reference"].reader.takes(own):
        _try(problems, data.check_lengths, train, roles["reference"].reader, says="reference: ")
    _try(problems, held_out, test, c.evaluation.problems)
    if not c.objective.lam_by_row:
        rows = [
            r.source for of_task in train.records.values() for r in of_task if r.lam is not None
        ]
        if rows:
            problems.append(
                f"{len(rows)} rows of {train.source} name a lambda of their own, the first "
                f"{rows[0]}; set --config.objective.lam_by_row=True, or take out their 'lam'"
            )
    for dataset in (train, test):
        for task, records in dataset.records.items():
            # No verifier runs a completion of this length, but each reads its records' answers.
            says = f"{dataset.source}, task {task!r}: "
            _try(problems, verify, [TOO_LONG] * len(records), records, says=says)
    _refuse(problems)


def _try(problems: list[str], function: Callable, *args, says: str = "", **options):
    """function(...), or None where it is a ValueError, whose message goes to `problems`."""
    try:
        return function(*args, **options)
    except ValueError as error:
        problems.append(f"{says}{error}")


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n".join(f"- {problem}" for problem in dict.fromkeys(problems)))
