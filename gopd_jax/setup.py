"""What a run needs, loaded and checked before anything is compiled."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from gopd_jax import config as settings
from gopd_jax import data, hub, metrics, sharding, step
from gopd_jax.evaluate import held_out
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.models.decoder import Decoder
from gopd_jax.objectives import objective
from gopd_jax.problems import roles as loaded_roles
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
    params: dict
    tokenizer: tokenizers.Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that train.run works with."""

    config: settings.Config
    mesh: jax.sharding.Mesh
    roles: dict[str, Role]  # student, reference, teacher:<task>
    train: data.Dataset
    test: data.Dataset
    recipe: step.Recipe
    frozen: step.Frozen
    identity: dict[str, str]  # what a checkpoint of this run must agree with

    @property
    def student(self) -> Role:
        return self.roles["student"]


def prepare(config: settings.Config) -> Run:
    """Load and check. ValueError with every problem that a stage can tell, and its cure."""
    c = config
    mesh = _checked_mesh(c)
    goal = objective.build(
        advantage=c.objective.advantage,
        lam=c.objective.lam,
        loss=c.objective.loss,
        reduction=c.objective.reduction,
    )
    uses_teachers = goal.teacher or c.objective.source == "teacher"
    wanted = loaded_roles(c).items()
    models = {name.replace("teachers.", "teacher:"): model for name, model in wanted}
    problems: list[str] = []
    roles = _load_roles(models, mesh, c, problems)
    train = _try(problems, data.load, c.data.train, c.data.tasks)
    test = _try(problems, data.load, c.data.test, c.data.tasks)
    _refuse(problems)
    _check_contract(roles)
    _check_data(c, train, test, roles["student"].tokenizer)
    return Run(
        config=c,
        mesh=mesh,
        roles=roles,
        train=train,
        test=test,
        recipe=_recipe(c, mesh, goal, roles, uses_teachers),
        frozen=step.Frozen(
            teachers=tuple(roles[f"teacher:{task}"].params for task in c.data.tasks)
            if uses_teachers
            else (),
            reference=roles["reference"].params if goal.reference else None,
        ),
        identity=_identity(c, roles, train, test),
    )


def _checked_mesh(c: settings.Config) -> jax.sharding.Mesh:
    """The mesh. ValueError with every problem of the settings, the devices and the batch."""
    problems = c.problems()
    sizes = (c.mesh.data or 1, c.mesh.fsdp, c.mesh.tensor, c.batch.prompts, c.batch.rollouts)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        _refuse(problems)  # which has them
    mesh = _try(problems, sharding.make_mesh, c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
    rows = c.batch.prompts * c.batch.rollouts
    if mesh is not None:
        share = _try(problems, sharding.process_share, mesh, rows)
        shards, pieces = sharding.n_row_shards(mesh), c.batch.microbatches
        if share and pieces > 0 and not rows % pieces and rows // pieces % shards:
            problems.append(
                f"a microbatch of {rows} / batch.microbatches = {rows} / {pieces} = "
                f"{rows // pieces} rows does not divide over mesh.data * mesh.fsdp = {shards}; "
                "choose fewer batch.microbatches"
            )
    _refuse(problems)
    return mesh


def _recipe(c: settings.Config, mesh, goal, roles: dict[str, Role], uses_teachers) -> step.Recipe:
    """What the step is compiled from."""
    chat = roles["student"].tokenizer
    optimizer, rate = step.make_optimizer(**dataclasses.asdict(c.optimizer), steps=c.steps)
    teachers = [roles[f"teacher:{task}"].decoder for task in c.data.tasks] if uses_teachers else ()
    return step.Recipe(
        mesh=mesh,
        student=roles["student"].decoder,
        teachers=tuple(teachers),
        reference=roles["reference"].decoder if goal.reference else None,
        objective=goal,
        optimizer=optimizer,
        learning_rate=rate,
        source=c.objective.source,
        group_rows=data.group_sizes(c.batch.prompts, c.batch.rollouts, c.data.tasks),
        completion_length=c.sampling.completion_length,
        temperature=c.sampling.temperature,
        eos_ids=chat.eos_ids,
        n_vocab=chat.vocab_size,
        microbatches=c.batch.microbatches,
        head_chunk=c.batch.head_chunk,
    )


def _identity(c: settings.Config, roles: dict[str, Role], train, test) -> dict[str, str]:
    """What a continued run has to share with the run that it continues."""
    return {
        **settings.identity(c),
        **{f"model {name}": role.digest for name, role in roles.items()},
        "data.train content": train.identity,
        "data.test content": test.identity,
        "tokenizer": roles["student"].tokenizer.fingerprint(),
    }


def _load_roles(models: dict[str, settings.Model], mesh, c, problems) -> dict[str, Role]:
    """Each model once, however many roles it has; what is wrong with any goes to `problems`."""
    loaded: dict[tuple, Role | None] = {}
    roles = {}
    for name, model in models.items():
        if (at := _try(problems, hub.locate, model.path, says=f"{name}: ")) is None:
            continue
        key = (at.directory.resolve(), model.dtype)
        if key not in loaded:
            loaded[key] = _try(problems, _load, name, model, at, mesh, c, says=f"{name}: ")
        roles[name] = loaded[key]
    return roles


def _load(name: str, model: settings.Model, at: hub.Located, mesh, c: settings.Config) -> Role:
    cfg = hf.load_config(at.directory)
    axes = lm_params.logical_axes(cfg)
    problems = sharding.mesh_problems(mesh, lm_params.abstract_params(cfg), axes, role=name)
    length = c.data.prompt_length + c.sampling.completion_length
    if length > cfg.max_position_embeddings:
        problems.append(
            f"data.prompt_length + sampling.completion_length = {length} tokens, and {model.path} "
            f"has max_position_embeddings = {cfg.max_position_embeddings}; shorten one"
        )
    chat = tokenizers.load(at.directory)
    if chat.vocab_size > cfg.vocab_size:
        problems.append(
            f"{model.path}: the tokenizer has {chat.vocab_size} ids and the embedding "
            f"{cfg.vocab_size} rows; the two files are not of one model"
        )
    if problems:
        raise ValueError("; ".join(problems))
    n_bytes = sum(4 * x.size for x in jax.tree.leaves(lm_params.abstract_params(cfg)))
    shown = jax.process_index() == 0 and n_bytes > SLOW_BYTES
    return Role(
        path=at.name,
        directory=at.directory,
        digest=hf.weights_digest(at.directory),
        decoder=Decoder(cfg, dtype=model.dtype),
        params=hf.load_params(
            at.directory,
            cfg,
            shardings=sharding.shardings(mesh, axes),
            # Only what is trained needs more bits than the file has: use casts in any case.
            dtype="float32" if name == "student" else "stored",
            progress=lambda work: metrics.bar(work, f"loading {name}", shown),
        ),
        tokenizer=chat,
    )


def _check_contract(roles: dict[str, Role]) -> None:
    """Completion ids and prompts are shared, so every role must read both as the student does."""
    student, problems = roles["student"].tokenizer, []
    for name, role in roles.items():
        _try(problems, tokenizers.require_same_ids, student, role.tokenizer, name)
        theirs, ours = role.tokenizer.template_fingerprint(), student.template_fingerprint()
        if theirs != ours:
            problems.append(
                f"{name} at {role.path} has the chat template {theirs} and the student at "
                f"{roles['student'].path} has {ours}; every role is shown the student's prompt, so "
                "copy the student's chat template into that directory if the model was trained "
                "with it, or choose another model"
            )
        if set(role.tokenizer.eos_ids) != set(student.eos_ids):
            problems.append(
                f"{name} at {role.path} ends a completion with ids "
                f"{sorted(role.tokenizer.eos_ids)} and the student with {sorted(student.eos_ids)}; "
                "make eos_token_id in their generation_config.json agree, or lengths will run away"
            )
    _refuse(problems)


def _check_data(c: settings.Config, train: data.Dataset, test: data.Dataset, chat) -> None:
    """Every prompt fits, every answer can be verified, there is enough to evaluate on."""
    problems: list[str] = []
    imitates = c.sampling.completion_length if c.objective.source == "data" else None
    limit = c.data.prompt_length
    _try(problems, data.check_lengths, train, chat, limit, completion_length=imitates)
    _try(problems, data.check_lengths, test, chat, limit)
    _try(problems, held_out, test, c.evaluation.problems)
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
