"""Where parameters, moments and caches lie, as text: `python -m tests.golden_shardings` writes it.

A line is an array's name, its shape, its PartitionSpec and the part of it that a device holds. No
device of the mesh has to exist.
"""

import dataclasses
import math
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from configs import exopd, qwen3
from gopd_jax import recipe, sharding
from gopd_jax.batching import decode_copy
from gopd_jax.config import Lora, Mesh
from gopd_jax.models import cache as caching
from gopd_jax.models import decoder as lm
from gopd_jax.models.params import abstract_params
from gopd_jax.planning import abstract

GOLDEN = Path(__file__).parent / "golden"
HOW = "python -m tests.golden_shardings"


def qwen(model: str, mesh: Mesh, **changes):
    """configs/qwen3.py with every role of one published shape."""
    config = qwen3.get_config()
    for role in (config.student, config.reference, *config.teachers.values()):
        role.path = model
    config.mesh = mesh
    for key, value in changes.items():
        setattr(config, key, value)
    return config


# File -> (config, devices).
CASES = {
    # The preset's own mesh, on v5p:4x4x4.
    "qwen3": lambda: (qwen("Qwen/Qwen3-4B", qwen3.get_config().mesh), 64),
    # docs/plan.md, on v5e:4x4.
    "qwen3_v5e_4x4": lambda: (qwen("Qwen/Qwen3-1.7B", Mesh(fsdp=16)), 16),
    "qwen3_v5e_4x4_tensor": lambda: (qwen("Qwen/Qwen3-1.7B", Mesh(fsdp=4, tensor=4)), 16),
    "microworld_2x2x2": lambda: (microworld(Mesh(data=2, fsdp=2, tensor=2)), 8),
    "moe_2x2x2": lambda: (qwen("Qwen/Qwen3-30B-A3B", Mesh(data=2, fsdp=2, tensor=2)), 8),
    # docs/plan.md: its 128 experts over 4 devices, whose rows differ.
    "moe_expert": lambda: (qwen("Qwen/Qwen3-30B-A3B", Mesh(fsdp=16, expert=4)), 64),
    "microworld_sequence": lambda: (microworld(Mesh(data=2, sequence=2, tensor=2)), 8),
    "lora_2x2x2": lambda: (
        qwen("Qwen/Qwen3-1.7B", Mesh(data=2, fsdp=2, tensor=2), lora=Lora(rank=16)),
        8,
    ),
}


def microworld(mesh: Mesh):
    """configs/exopd.py on a mesh."""
    config = exopd.get_config()
    config.mesh = mesh
    return config


def text(config, n_devices: int) -> str:
    """The golden file of a config on a mesh of that many devices, which need not be there."""
    sizes = {axis: getattr(config.mesh, axis) for axis in sharding.AXES}
    sizes["data"] = sizes["data"] or n_devices // math.prod([*sizes.values()][1:])
    types = (AxisType.Auto,) * len(sizes)
    mesh = AbstractMesh((*sizes.values(),), sharding.AXES, axis_types=types)
    # Models and optimizer do not depend on the mesh: they are made for one device.
    run = abstract.prepare(dataclasses.replace(config, mesh=Mesh()), jax.devices("cpu")[:1])
    made = dataclasses.replace(run.recipe, mesh=mesh)
    state = recipe.abstract_state(made)
    parts = {
        "train params": state.params,
        "train moments": state.opt_state,
        "decode params": decode_params(mesh, made.student),
        "decode cache": decode_cache(mesh, run, "tpu"),
        "decode cache on CPUs": decode_cache(mesh, run, "cpu"),
    }
    lines = [f"mesh {' x '.join(f'{name} {size}' for name, size in sharding.shape(mesh).items())}"]
    for part, tree in parts.items():
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            spec = ", ".join(str(told(mesh, axes)) for axes in x.sharding.spec)
            held = x.sharding.shard_shape(x.shape)
            lines.append(f"{part} {name} {list(x.shape)} ({spec}) {list(held)}")
    return "\n".join(lines) + "\n"


def told(mesh, axes):
    """An entry of a PartitionSpec without the axes that are left out where they have one device."""
    if axes is None or isinstance(axes, str):
        return axes
    axes = tuple(axis for axis in axes if axis in sharding.shape(mesh))
    return axes[0] if len(axes) == 1 else axes


def constraints(function, *shapes) -> list:
    """(shape and dtype, sharding that it is constrained to) of each result of a function."""
    jaxpr = jax.make_jaxpr(function)(*shapes).jaxpr
    held = {
        eqn.outvars[0]: eqn.params["sharding"]
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "sharding_constraint"
    }
    return [(out.aval, held.get(out)) for out in jaxpr.outvars]


def decode_params(mesh, decoder):
    """The copy that the rollout reads, laid out as batching.decode_copy constrains it."""
    shapes = abstract_params(decoder.cfg)
    found = constraints(lambda params: decode_copy(mesh, decoder, params), shapes)
    leaves = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where) for x, where in found]
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def decode_cache(mesh, run, platform: str):
    """Keys and values of the whole batch, laid out as decoder.prefill constrains them there."""
    c, decoder = run.config, run.recipe.student
    n_rows, width = c.batch.prompts * c.batch.rollouts, c.data.prompt_length
    length = width + c.sampling.completion_length

    def fill(params, tokens_BP, valid_BP):
        cache = lm.prefill(decoder, params, tokens_BP, valid_BP, length=length)[1]
        return cache.k_NBKLE, cache.v_NBKLE

    tokens = (jax.ShapeDtypeStruct((n_rows, width), dtype) for dtype in (jnp.int32, bool))
    there = mock.patch.object(caching, "platform", return_value=platform)
    with there, sharding.use(run.recipe.mesh, sharding.DECODE):
        found = constraints(fill, abstract_params(decoder.cfg), *tokens)
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, where.spec))
        for name, (x, where) in zip(("k", "v"), found)
    }


def path(name: str) -> Path:
    return GOLDEN / f"{name}.txt"


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, case in CASES.items():
        path(name).write_text(text(*case()))
        print(path(name))
