"""The Recipe of a run, and views of its rows, from its settings and its loaded models."""

import dataclasses

from gopd_jax import config as settings
from gopd_jax import data, sharding
from gopd_jax.critic import Critic
from gopd_jax.method import teacher_names, teachers_of
from gopd_jax.models import attention, lora
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import Lora, ModelConfig
from gopd_jax.objectives.objective import Objective
from gopd_jax.optimizer import make_optimizer
from gopd_jax.recipe import Frozen, Mixture, Recipe


def decoder_of(c: settings.Config, mesh, cfg: ModelConfig, model: settings.Model) -> Decoder:
    """A role's decoder, with the attention that batch.attention comes to on the mesh's devices.

    ValueError with the cure where one is named that cannot run this model there.
    """
    name, _ = attention.choose(c.batch.attention, cfg, model.dtype, mesh.devices.flat[0])
    by_layer = model.placement == "host_layers"
    return Decoder(cfg, dtype=model.dtype, attention=name, by_layer=by_layer)


def adapted(c: settings.Config, name: str, model: settings.Model, cfg: ModelConfig) -> ModelConfig:
    """cfg, with the run's adapters where the role has them: the student, and who follows it."""
    if c.lora is None or (name != "student" and model.follows is None):
        return cfg
    options = {key: getattr(c.lora, key) for key in ("rank", "alpha", "targets")}
    return dataclasses.replace(cfg, lora=Lora(**options))


def teachers_used(c: settings.Config, goal: Objective) -> tuple[str, ...]:
    """Names of the teachers that score or write, each once, in the order of the tasks."""
    return teacher_names(c) if goal.needs_teacher or c.objective.source == "teacher" else ()


def frozen_of(roles, goal: Objective, teachers: tuple[str, ...]) -> Frozen:
    """What no gradient reaches, of roles and teachers as in `recipe_of`."""
    return Frozen(
        teachers=tuple(roles[f"teacher:{name}"].params for name in teachers),
        reference=roles["reference"].params if goal.needs_reference else None,
        base=lora.split(roles["student"].params)[1],
    )


def attention_told(c: settings.Config, mesh, roles) -> str:
    """One line: which attention whole rows take and why, by role where they differ."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, role in roles.items():
        cfg, dtype = role.decoder.cfg, role.decoder.dtype
        chosen = attention.choose(c.batch.attention, cfg, dtype, mesh.devices.flat[0])
        found.setdefault(chosen, []).append(name)
    told = [
        f"{name} ({why})" + ("" if len(found) == 1 else f" of {', '.join(of)}")
        for (name, why), of in found.items()
    ]
    return f"attention of whole rows: {'; '.join(told)}"


def views(c: settings.Config, roles) -> dict:
    """Readers of the teachers and of the reference where they read otherwise than the student.

    roles: name -> setup.Role. Options of data.prompts: teachers by task, reference; absent where
    they read as it does.
    """
    own, found = roles["student"].reader, {}
    teachers = {t: roles.get(f"teacher:{next(iter(teachers_of(c, t)))}") for t in c.data.tasks}
    if all(teachers.values()):
        readers = {task: role.reader for task, role in teachers.items()}
        if not all(reader.reads_as(own) for reader in readers.values()):
            found["teachers"] = readers
    if "reference" in roles and not roles["reference"].reader.reads_as(own):
        found["reference"] = roles["reference"].reader
    return found


def recipe_of(c: settings.Config, mesh, goal, roles, teachers: tuple[str, ...], stop) -> Recipe:
    """What the step is compiled from.

    goal: its Objective; roles: name -> setup.Role; teachers: names of those that score or write;
    stop: ids that end a completion. ValueError for devices of experts where no role has any.
    """
    sharding.require_experts(mesh, routed=any(r.decoder.cfg.traits.routed for r in roles.values()))
    n_updates = c.batch.updates * c.batch.epochs
    schedule = dataclasses.asdict(c.optimizer)
    schedule["warmup_steps"] *= n_updates
    head = None if c.critic is None or not goal.needs_critic else c.critic
    steps = c.steps - (head.warmup_steps if head else 0)  # in which the student learns
    optimizer, rate = make_optimizer(**schedule, steps=steps * n_updates, seed=c.seed)
    routes, mixture = _routes(c, teachers)
    decays = {c.teachers[name].follows for name in teachers} - {None}
    return Recipe(
        mesh=mesh,
        student=dataclasses.replace(roles["student"].decoder, remat=c.batch.remat),
        teachers=tuple(roles[f"teacher:{name}"].decoder for name in teachers),
        routes=routes,
        mixture=mixture,
        reference=roles["reference"].decoder if goal.needs_reference else None,
        objective=goal,
        optimizer=optimizer,
        learning_rate=rate,
        source=c.objective.source,
        group_rows=data.group_sizes(c.batch.prompts, c.batch.rollouts, c.data.tasks),
        completion_length=c.sampling.completion_length,
        temperature=c.sampling.temperature,
        eos_ids=stop,
        n_vocab=roles["student"].tokenizer.vocab_size,
        microbatches=c.batch.microbatches,
        updates=c.batch.updates,
        epochs=c.batch.epochs,
        slots=c.sampling.slots,
        sampling_buckets=c.sampling.buckets,
        prompt_buckets=c.sampling.prompt_buckets,
        cache_dtype=c.sampling.cache_dtype,
        sampling_dtype=c.sampling.weights_dtype,
        lag=c.sampling.lag,
        critic=head and Critic(**dataclasses.asdict(head), seed=c.seed),
        head_chunk=c.batch.head_chunk,
        buckets=c.batch.buckets,
        ema_decay=next(iter(decays), None),
        weights_dtype=c.optimizer.weights_dtype,
    )


def _routes(c: settings.Config, teachers: tuple[str, ...]):
    """(Recipe.routes, its Mixture or None) of teachers by name."""
    if not teachers:
        return (), None
    shares = [teachers_of(c, task) for task in c.data.tasks]
    slots = range(max(len(share) for share in shares))
    # A task with fewer teachers than another repeats its first at weight 0.
    padded = [[*s.items(), *[(next(iter(s)), 0.0)] * (len(slots) - len(s))] for s in shares]
    routes = tuple(tuple(teachers.index(task[i][0]) for task in padded) for i in slots)
    if len(slots) == 1:
        return routes, None
    weights = tuple(tuple(task[i][1] for task in padded) for i in slots)
    return routes, Mixture(weights=weights, space=c.objective.mixture)
