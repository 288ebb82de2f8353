"""Low-rank adapters: W + (alpha / rank) A B beside chosen matrices, of which only A and B train.

Adapters are rows of the parameter table like any other (models.params), so that sharding, shapes
and files come from there. arXiv 2106.09685.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from gopd_jax.models.params import ModelConfig, adapted, axis_sizes, leaf, table
from gopd_jax.models.safetensors_out import replaced, require_ours
from gopd_jax.types import Params


def base_config(cfg: ModelConfig) -> ModelConfig:
    """The model without its adapters."""
    return dataclasses.replace(cfg, lora=None)


def is_adapter(path: str) -> bool:
    """Whether a path of the params dict is an adapter's."""
    return path.endswith(("_lora_a", "_lora_b"))


def split(params: Params) -> tuple[Params, Params | None]:
    """(what trains, what is frozen): the adapters and the rest; all and None where there are none.

    Every array is in one of the two as it was; nothing is copied.
    """
    adapters = {k: x for k, x in params["layers"].items() if is_adapter(k)}
    if not adapters:
        return params, None
    rest = {k: x for k, x in params["layers"].items() if not is_adapter(k)}
    return {"layers": adapters}, params | {"layers": rest}


def join(trained: Params, frozen: Params | None) -> Params:
    """What `split` took apart."""
    if frozen is None:
        return trained
    return frozen | {"layers": frozen["layers"] | trained["layers"]}


def init(cfg: ModelConfig, key) -> Params:
    """Adapters that change nothing yet: A uniform as PEFT draws it, B zero; float32."""
    rows = [row for row in table(cfg) if is_adapter(row.path)]
    sizes, found = axis_sizes(cfg), {}
    for i, row in enumerate(rows):
        if row.name.endswith("_b"):
            found[row.name] = jnp.zeros(row.shape(cfg), jnp.float32)
            continue
        fan_in = math.prod(sizes[axis] for axis in row.groups[1])
        bound, key_of_row = fan_in**-0.5, jax.random.fold_in(key, i)
        found[row.name] = jax.random.uniform(key_of_row, row.shape(cfg), jnp.float32, -bound, bound)
    return {"layers": found}


def merge(cfg: ModelConfig, params: Params) -> Params:
    """The base's params with every adapter added to its matrix, float32 inside, in its dtype."""
    layers = dict(params["layers"])
    for row in adapted(table(base_config(cfg)), cfg.lora):
        a, b = (layers.pop(f"{row.name}_lora_{part}") for part in "ab")
        n_in, base = len(row.groups[1]), leaf(params, row)
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        flat_a = a.reshape(a.shape[0], -1, a.shape[-1])
        flat_b = b.reshape(b.shape[0], b.shape[1], -1)
        change = jnp.einsum("nir,nro->nio", flat_a, flat_b, precision="highest")
        change = cfg.lora.scale * change.reshape(*a.shape[: 1 + n_in], *b.shape[2:])
        layers[row.name] = (base.astype(jnp.float32) + change).astype(base.dtype)
    return params | {"layers": layers}


def save_adapter(
    path, cfg: ModelConfig, trained: Params, *, base_model: str, revision: str | None, card: str
) -> None:
    """Write adapters as a directory that PEFT's PeftModel.from_pretrained loads over the base.

    trained: what `split` calls so, as arrays that this process has whole. base_model: a path, or
    ORG/NAME with the commit as its revision. card: text of README.md. ValueError where `path` is
    something else by now.
    """
    require_ours(Path(path))
    tensors = {}
    for row in (row for row in table(cfg) if is_adapter(row.path)):
        for name, one in zip(row.hf_names(cfg), np.asarray(leaf(trained, row))):
            tensors[name] = np.ascontiguousarray(row.to_hf(one, cfg).astype(np.float32))
    modules = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in tensors}
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": cfg.lora.rank,
        "lora_alpha": cfg.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with replaced(Path(path)) as new:
        (new / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")
        (new / "README.md").write_text(card)
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
