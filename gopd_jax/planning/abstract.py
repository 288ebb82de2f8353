"""What a run would compile, from its settings and the models' config.json: shapes without arrays.

The same Recipe as `setup.prepare` makes, and its arguments as ShapeDtypeStructs that carry the
NamedShardings of the real ones. No weights, tokenizer or data are read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gopd_jax import config as settings
from gopd_jax import hub, method, recipe, setup, sharding
from gopd_jax.assembly import adapted, decoder_of, frozen_of, recipe_of, teachers_used
from gopd_jax.models import lora
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import ModelConfig
from gopd_jax.models.published import PUBLISHED
from gopd_jax.models.safetensors_in import read_json
from gopd_jax.objectives import objective
from gopd_jax.recipe import Frozen, Recipe
from gopd_jax.types import Params, Prompts, View

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Ids:
    """What a Recipe asks of a tokenizer."""

    vocab_size: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Role:
    """One model of the run: setup.Role with shapes in place of arrays."""

    decoder: Decoder
    params: Params | None  # None of a teacher that follows the student
    kept: str  # dtype in which its weights lie on the devices, trained ones in the state
    source: object  # what it is read from; roles of one source share their arrays

    @property
    def tokenizer(self) -> Ids:
        return Ids(self.decoder.cfg.vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The recipe, and what its step takes beside the state."""

    config: settings.Config
    recipe: Recipe
    roles: dict[str, Role]
    frozen: Frozen
    prompts: Prompts
    key: jax.ShapeDtypeStruct

    @property
    def n_prompt(self) -> int:
        """Tokens of a prompt as the student reads it."""
        return self.prompts.tokens_BP.shape[1]

    @property
    def length(self) -> int:
        """Tokens of a whole row: prompt and completion."""
        return self.n_prompt + self.recipe.completion_length


def prepare(c: settings.Config, devices) -> Run:
    """The run on a mesh over `devices`. ValueError with every problem, as setup.prepare."""
    mesh = setup.checked_mesh(c, devices=devices, files=False)
    goal = objective.build(**method.settings(c))
    problems: list[str] = []
    roles = _roles(c, mesh, problems)
    if problems:
        raise ValueError("\n".join(f"- {problem}" for problem in dict.fromkeys(problems)))
    teachers = teachers_used(c, goal)
    stop = _stop_ids(c, roles["student"].decoder.cfg)
    made = recipe_of(c, mesh, goal, roles, teachers, stop)
    return Run(
        config=c,
        recipe=made,
        roles=roles,
        frozen=frozen_of(roles, goal, teachers),
        prompts=_prompts(c, made, teachers),
        key=_laid(jax.eval_shape(lambda: jax.random.key(0)), sharding.replicated(mesh)),
    )


def model_config(path: str) -> tuple[ModelConfig, str]:
    """(the model, dtype of its weights in the files) of a directory or a name.

    Names of PUBLISHED need no download; of others config.json alone is fetched from the hub.
    ValueError where there is no such model.
    """
    directory = Path(path)
    if path in PUBLISHED and not directory.exists():
        file, config = f"the table's {path}", PUBLISHED[path]
    elif (directory / "config.json").is_file():
        file = directory / "config.json"
        config = read_json(file)
    elif hub.parse(path):
        file = hub.fetch(path, "config.json")
        config = read_json(file)
    else:
        raise ValueError(f"{path!r} has no config.json; {GIVE}")
    try:
        cfg = lm_params.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype not in DTYPES:
        raise ValueError(
            f"{file}: dtype is {dtype!r}, so what its weights take is not known; put in the one of "
            f"{list(DTYPES)} that they are stored in"
        )
    return cfg, dtype


GIVE = (
    "give a directory that has, ORG/NAME of the hub, or one of the models whose shapes are known "
    f"here: {', '.join(PUBLISHED)}"
)


def _roles(c: settings.Config, mesh: Mesh, problems: list[str]) -> dict[str, Role]:
    """As setup loads them: each model once, however many roles have it."""
    loaded: dict[tuple, tuple | None] = {}
    found = {}
    for setting, model in method.roles(c).items():
        name = setting.replace("teachers.", "teacher:")
        if model.path is None:
            problems.append(f"{setting}.path is not set; {GIVE}")
            continue
        key = (model.path if hub.parse(model.path) else Path(model.path).resolve(), model.placement)
        try:
            if key not in loaded:
                loaded[key] = None
                cfg, stored = model_config(model.path)
                loaded[key] = cfg, stored
                if wrong := sharding.mesh_problems(
                    mesh, lm_params.abstract_params(cfg), lm_params.logical_axes(cfg), role=name
                ):
                    problems += wrong
                    continue
            if loaded[key] is None:
                continue
            cfg, stored = loaded[key]
            setup.check_context(name, model, cfg, c)
            cfg = adapted(c, name, model, cfg)
            decoder = decoder_of(c, mesh, cfg, model)
            params = _params(cfg, mesh, stored, model.placement)
        except ValueError as error:
            cure = f": --config.{setting}.path=Qwen/Qwen3-4B" if str(error).endswith(GIVE) else ""
            problems.append(f"{setting}: {error}{cure}")
            continue
        found[name] = Role(
            decoder=decoder,
            params=params if model.follows is None else None,
            kept=c.optimizer.weights_dtype if name == "student" and c.lora is None else stored,
            source=key,
        )
    return found


def _params(cfg: ModelConfig, mesh: Mesh, stored: str, placement: str) -> Params:
    where = sharding.shardings(mesh, lm_params.logical_axes(cfg))
    if placement != "device":
        where = sharding.on_host(where)

    def one(path, shape, layout):
        adapter = lora.is_adapter(path[-1].key)
        dtype = jnp.float32 if adapter else jnp.dtype(stored)
        return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=layout)

    return jax.tree_util.tree_map_with_path(one, lm_params.abstract_params(cfg), where)


def _stop_ids(c: settings.Config, cfg: ModelConfig) -> tuple[int, ...]:
    """As many ids as end a completion. Which they are changes no shape and no time."""
    if c.sampling.stop is not None:
        return tuple(range(len(c.sampling.stop)))
    if cfg.eos_token_id is None:  # then the tokenizer's files name it
        return (0,)
    return cfg.eos_token_id if isinstance(cfg.eos_token_id, tuple) else (cfg.eos_token_id,)


def _prompts(c: settings.Config, made: Recipe, teachers: tuple[str, ...]) -> Prompts:
    """One global batch. A role has a view of its own where its template or context is set."""
    mesh, n_rows = made.mesh, c.batch.prompts * c.batch.rollouts
    rows = sharding.by_rows(mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((n_rows, *shape), dtype, sharding=rows)

    def view(width):
        return View(tokens_BP=array(jnp.int32, width), valid_BP=array(bool, width))

    def reads_apart(model):
        return model.context is not None or model.template != c.student.template

    def length(model):
        return model.prompt_length or c.data.prompt_length

    # All roles named teacher are padded to the longest of theirs, loaded for evaluation or not.
    judges = {n: m for n, m in method.roles(c).items() if n.startswith("teachers.")}
    apart = any(map(reads_apart, judges.values()))
    width = max(map(length, judges.values()), default=None)
    reference = c.reference if made.reference is not None else None
    imitates = c.objective.source == "data"
    n_prompt, n_new = c.data.prompt_length, c.sampling.completion_length
    return Prompts(
        tokens_BP=array(jnp.int32, n_prompt),
        valid_BP=array(bool, n_prompt),
        task_B=array(jnp.int32),
        group_B=array(jnp.int32),
        row_B=array(jnp.int32),
        completion_BC=array(jnp.int32, n_new) if imitates else None,
        completion_mask_BC=array(bool, n_new) if imitates else None,
        teacher=view(width) if apart else None,
        reference=view(length(reference)) if reference and reads_apart(reference) else None,
        lam_B=array(jnp.float32) if made.objective.lam_by_row else None,
    )


def _laid(shape: jax.ShapeDtypeStruct, where) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where)


def state(run: Run, rollout=None):
    """Shapes, dtypes and shardings of the TrainState; rollout: shapes of one, if it lags."""
    return recipe.abstract_state(run.recipe, rollout)


def loaded(run: Run) -> list[Params]:
    """What setup loaded and a run keeps beside its state, each model once.

    The student's first weights go once there is a state, but for what of them is frozen: another
    role's, or what adapters are trained beside.
    """
    base = run.frozen.base
    whole = {} if base is None else {run.roles["student"].source: base}
    for name, role in run.roles.items():
        if name != "student" and role.params is not None:
            whole[role.source] = role.params
    return [*whole.values()]


def leaves(params: Params | None) -> list:
    """The arrays of a role's parameters, none where there are no own."""
    return jax.tree.leaves(params)
