"""Hugging Face checkpoints both ways: a directory of config.json and *.safetensors.

Nothing is executed on loading: pickled weights (.bin, .pt) are refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gopd_jax.models import params as lm_params
from gopd_jax.models.params import ModelConfig, Param
from gopd_jax.types import Params

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")  # what a tensor may be stored as; float32 holds each exactly
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",  # its stop tokens belong to the chat template
)


def load_config(path) -> ModelConfig:
    """The model in a checkpoint's directory. ValueError names the file and the cure."""
    file = _directory(path) / "config.json"
    config = _read_json(file)
    try:
        return lm_params.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_params(path, cfg: ModelConfig, *, shardings: Params | None = None) -> Params:
    """float32 parameters of a checkpoint.

    shardings: a tree of NamedSharding as of abstract_params(cfg); each process then reads only the
    slices that its devices hold. Every name, shape and dtype is checked before anything is read;
    ValueError names the files and tensors that are missing, left over, misshapen or corrupt.
    """
    with contextlib.ExitStack() as stack:
        views = _views(_directory(path), stack)
        _check(views, cfg, path)

        def load(row: Param):
            if shardings is None:
                return jnp.asarray(_read(row, views, cfg, (slice(None),) * len(row.axes)))
            blocks: dict[str, np.ndarray] = {}  # replicas on several devices are read once

            def block(index):
                if str(index) not in blocks:
                    blocks[str(index)] = _read(row, views, cfg, index)
                return blocks[str(index)]

            sharding = lm_params.leaf(shardings, row)
            return jax.make_array_from_callback(row.shape(cfg), sharding, block)

        return lm_params.tree(cfg, load)


def save(path, cfg: ModelConfig, params: Params, *, dtype="float32", tokenizer_dir=None) -> None:
    """Write a checkpoint that transformers' from_pretrained and load_params read.

    dtype: of the stored weights, float32 or bfloat16. tokenizer_dir: where tokenizer.json and its
    companions are copied from. A checkpoint at `path` is replaced, any other directory refused. The
    directory appears whole or not at all: it is written beside `path` and then renamed.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; it is one of ['float32', 'bfloat16']")
    path = Path(path)
    if path.exists() and not (path / "config.json").is_file() and any(path.iterdir()):
        raise ValueError(f"{path} exists and is not a checkpoint; choose another path or remove it")
    tokenizer = () if tokenizer_dir is None else _tokenizer_files(tokenizer_dir)
    tensors = _to_tensors(cfg, params, jnp.dtype(dtype))

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as parent:
        new, old = Path(parent) / "new", Path(parent) / "old"
        new.mkdir()
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = lm_params.to_hf(cfg) | {"dtype": dtype, "torch_dtype": dtype}
        _write_json(new / "config.json", config)
        _write_json(new / "generation_config.json", {name: config[name] for name in ids})
        save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})  # transformers asks for it
        for file in tokenizer:
            shutil.copyfile(file, new / file.name)
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
        finally:
            if old.exists() and not path.exists():
                os.rename(old, path)


def weights_digest(path) -> str:
    """sha256, in hex, over the bytes of config.json and of the safetensors files."""
    directory = _directory(path)
    files = {directory / "config.json", *_files(directory)}
    total = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _directory(path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; give one with config.json and {WEIGHTS}, downloaded "
            "beforehand if it is a name on the Hugging Face hub"
        )
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json; copy it beside the weights")
    return directory


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, the index's where there is one."""
    if (directory / INDEX).is_file():
        index = _read_json(directory / INDEX)
        if not isinstance(index.get("weight_map"), dict):
            raise ValueError(f"{directory / INDEX} has no weight_map; copy it again")
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
    else:
        files = [directory / WEIGHTS]
    if missing := [file.name for file in files if not file.is_file()]:
        pickled = sorted(
            f.name for kind in ("*.bin", "*.pt", "*.pth") for f in directory.glob(kind)
        )
        if pickled:
            raise ValueError(
                f"{directory} has no {missing}, only {pickled}, which are pickles and can run code "
                "when read; convert them with transformers' save_pretrained"
            )
        raise ValueError(f"{directory} has no {missing}; copy the weights again")
    return files


def _views(directory: Path, stack: contextlib.ExitStack) -> dict:
    """Tensor name -> lazy view of it, open until the stack closes."""
    views = {}
    for file in _files(directory):
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
            names = handle.keys()
            views |= {name: handle.get_slice(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupt ({error}); copy it again") from error
    return views


def _check(views: dict, cfg: ModelConfig, path) -> None:
    """ValueError unless the tensors are exactly those of the model, in shape and dtype."""
    shapes = {n: row.hf_shape(cfg) for row in lm_params.table(cfg) for n in row.hf_names(cfg)}
    left_over, missing = views.keys() - shapes.keys(), shapes.keys() - views.keys()
    if cfg.tie_word_embeddings and "lm_head.weight" in left_over:
        _check_tied(views, path)
        left_over -= {"lm_head.weight"}
    if missing or left_over:
        raise ValueError(
            f"{path}: the weights lack {_some(missing)} and have {_some(left_over)} beyond what "
            f"config.json ({cfg.architecture}, {cfg.num_hidden_layers} layers, "
            f"tie_word_embeddings = {cfg.tie_word_embeddings}) describes; copy config.json and "
            "weights from one checkpoint"
        )
    for name, shape in shapes.items():
        found = tuple(views[name].get_shape())
        if found != shape:
            raise ValueError(
                f"{path}: {name} has shape {found} and config.json describes {shape}; copy "
                "config.json and weights from one checkpoint"
            )
        if views[name].get_dtype() not in FLOATS:
            raise ValueError(
                f"{path}: {name} is stored as {views[name].get_dtype()}, not one of {FLOATS}; "
                "use the unquantised checkpoint"
            )


def _check_tied(views: dict, path, n_rows: int = 8192) -> None:
    """ValueError unless a stored head equals the embedding it is tied to, a block at a time."""
    embed, head = (views[n] for n in ("model.embed_tokens.weight", "lm_head.weight"))
    same, n_all = embed.get_shape() == head.get_shape(), embed.get_shape()[0]
    blocks = [slice(i, min(i + n_rows, n_all)) for i in range(0, n_all, n_rows)]
    if not same or any(np.any(embed[block] != head[block]) for block in blocks):
        raise ValueError(
            f"{path}: config.json ties the head to the embedding and lm_head.weight differs from "
            "it; set tie_word_embeddings to false, or remove lm_head.weight"
        )


def _some(names, n_shown: int = 4) -> str:
    names = sorted(names)
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return f"{names[:n_shown]}{more}" if names else "nothing"


def _read(row: Param, views: dict, cfg: ModelConfig, index: tuple[slice, ...]) -> np.ndarray:
    """float32 block of our array at `index`, from no more of the files than it needs.

    Of axes that are merged in the file, the first is sliced on reading and the others after it.
    """
    sizes = lm_params.axis_sizes(cfg)
    spans = {axis: s.indices(sizes[axis])[:2] for axis, s in zip(row.axes, index)}
    block_sizes, cut = dict(sizes), []
    for group in row.groups:
        start, stop = spans[group[0]]
        inner = int(np.prod([sizes[axis] for axis in group[1:]], dtype=np.int64))
        cut.append(slice(start * inner, stop * inner))
        block_sizes[group[0]] = stop - start
    sliced = {group[0] for group in row.groups}
    rest = tuple(slice(None) if a in sliced else slice(*spans[a]) for a in row.tensor_axes)

    def one(name):
        return row.from_hf(views[name][tuple(cut)], block_sizes)[rest].astype(np.float32)

    names = np.reshape(row.hf_names(cfg), [sizes[axis] for axis in row.stack])
    names = names[tuple(slice(*spans[axis]) for axis in row.stack)]
    tensors = np.stack([one(name) for name in names.flat])
    return tensors.reshape(*names.shape, *tensors.shape[1:])


def _to_tensors(cfg: ModelConfig, params: Params, dtype) -> dict[str, np.ndarray]:
    """Hugging Face name -> tensor. ValueError unless params are exactly the model's."""
    rows = lm_params.table(cfg)
    paths = {
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    if left_over := paths - {row.path for row in rows}:
        raise ValueError(f"params have {_some(left_over)}, which {cfg.architecture} has not")
    tensors = {}
    for row in rows:
        array = lm_params.leaf(params, row)
        if tuple(array.shape) != row.shape(cfg):
            raise ValueError(
                f"params[{row.path!r}] has shape {tuple(array.shape)} and the model's config "
                f"describes {row.shape(cfg)}; save with the config that the params came with"
            )
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            raise ValueError(
                f"params[{row.path!r}] lies on several processes; gather it first with "
                "jax.experimental.multihost_utils.process_allgather(params, tiled=True)"
            )
        host = np.asarray(array)
        for name, one in zip(row.hf_names(cfg), host.reshape(-1, *host.shape[len(row.stack) :])):
            tensors[name] = np.ascontiguousarray(row.to_hf(one, cfg).astype(dtype))
    return tensors


def _tokenizer_files(tokenizer_dir) -> list[Path]:
    found = [Path(tokenizer_dir) / name for name in TOKENIZER_FILES]
    if not found[0].is_file():
        raise ValueError(f"tokenizer_dir {tokenizer_dir} has no tokenizer.json; give one that has")
    return [file for file in found if file.is_file()]
