"""Hugging Face checkpoints both ways: a directory of config.json and *.safetensors.

Nothing is executed on loading: pickled weights (.bin, .pt) are refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np

from gopd_jax.models import params as lm_params
from gopd_jax.models import safetensors_in, safetensors_out
from gopd_jax.models.params import ModelConfig
from gopd_jax.models.safetensors_in import INDEX, WEIGHTS, read_json
from gopd_jax.types import Params

__all__ = ["INDEX", "WEIGHTS", "export", "keep", "load_config", "load_params", "save"]
__all__ += ["weights_digest"]

# The dtypes of an export by our names, and in the files' spelling.
DTYPES = {"bfloat16": "BF16", "float32": "F32"}
TENSORS = "tensors.json"  # beside a kept config.json: how the source stored each tensor
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",  # its stop tokens belong to the chat template
)
# What an export takes over besides, where the source has it; no code and no weights.
COMPANIONS = (
    *TOKENIZER_FILES,
    *("chat_template.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md"),
)


def load_config(path) -> ModelConfig:
    """The model in a checkpoint's directory. ValueError names the file and the cure."""
    file = _directory(path) / "config.json"
    config = read_json(file)
    try:
        return lm_params.from_hf(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_params(
    path,
    cfg: ModelConfig,
    *,
    shardings: Params | None = None,
    dtype: str = "float32",
    progress: Callable[[list], Iterable] | None = None,
) -> Params:
    """Parameters of a checkpoint.

    shardings: a tree of NamedSharding as of abstract_params(cfg); each process then reads only the
    slices that its devices hold. dtype: float32, or stored: each parameter as the files have it
    (where layers of one parameter differ, the narrowest that holds all of them exactly). progress:
    gets the list of pieces and returns an iterator over it, which may show how far it is.

    Layers are read a piece at a time into the devices' memory: on the host are at most 256 MiB of
    one parameter or one tensor of the file, whichever is larger. Every name, shape and dtype is
    checked before anything is read; ValueError names the files and tensors that are missing, left
    over, misshapen, corrupt or not finite.
    """
    if dtype not in ("float32", "stored"):
        raise ValueError(f"dtype is {dtype!r}; it is one of ['float32', 'stored']")
    directory = _directory(path)
    stored = safetensors_in.scan(directory)
    safetensors_in.check(stored, cfg, path)
    work = []
    for row in lm_params.table(cfg):
        into = safetensors_in.dtype_of(row, cfg, stored) if dtype == "stored" else np.dtype(dtype)
        where = None if shardings is None else lm_params.leaf(shardings, row)
        for run in safetensors_in.pieces(row, cfg, into, where):
            work.append((row, run, into, where))

    arrays: dict[str, jax.Array] = {}
    for row, run, into, where in (progress or iter)(work):
        piece = safetensors_in.piece(stored, row, cfg, run, into, where, path)
        if piece.shape != row.shape(cfg):
            stack = arrays.pop(row.path, None)
            piece = safetensors_in.put(stack, piece, run.start, row.shape(cfg), where)
        arrays[row.path] = piece
    return lm_params.tree(cfg, lambda row: arrays[row.path])


def save(
    path,
    cfg: ModelConfig,
    params: Params,
    *,
    dtype="float32",
    tokenizer_dir=None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a new model as a checkpoint that transformers' from_pretrained and load_params read.

    dtype: of the stored weights, float32 or bfloat16. tokenizer_dir: where tokenizer.json and its
    companions are copied from. A checkpoint at `path` is replaced, any other directory refused. The
    directory appears whole or not at all: it is written beside `path` and then renamed. With
    several processes all have to call; process 0 writes.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it is one of {sorted(DTYPES, reverse=True)}")
    names = [name for row in lm_params.table(cfg) for name in row.hf_names(cfg)]
    tensors = safetensors_out.tensors(cfg, params, dict.fromkeys(names, DTYPES[dtype]))
    tokenizer = () if tokenizer_dir is None else _tokenizer_files(tokenizer_dir)

    def fill(new: Path):
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = lm_params.to_hf(cfg) | {"dtype": dtype, "torch_dtype": dtype}
        _write_json(new / "config.json", config)
        _write_json(new / "generation_config.json", {name: config[name] for name in ids})
        for file in tokenizer:
            shutil.copyfile(file, new / file.name)

    _write(Path(path), tensors, fill, max_shard_bytes)


def export(
    path,
    params: Params,
    source,
    *,
    dtype: str = "stored",
    max_shard_bytes: int = 5 * 10**9,
    card: str | None = None,
) -> None:
    """Write a trained model as the checkpoint that it started from, with other weights.

    source: that checkpoint's directory, or what `keep` kept of it. Tensor names, tied weights,
    config.json, tokenizer, template and generation_config.json are the source's. dtype: stored (of
    each tensor as in the source), float32 or bfloat16; config.json changes in its dtype alone, and
    only where the tensors' changes. card: text of README.md. Replaces and appears as in `save`.
    """
    if dtype not in ("stored", *DTYPES):
        raise ValueError(f"dtype is {dtype!r}; it is one of {['stored', *sorted(DTYPES)]}")
    source, cfg = _directory(source), load_config(source)
    dtypes = _stored_dtypes(source)
    changed = dtype != "stored" and set(dtypes.values()) != {DTYPES[dtype]}
    if changed:
        dtypes = dict.fromkeys(dtypes, DTYPES[dtype])
    tensors = safetensors_out.tensors(cfg, params, dtypes)

    def fill(new: Path):
        for file in _companions(source):
            shutil.copyfile(file, new / file.name)
        if changed:
            config = read_json(source / "config.json")
            keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
            config |= dict.fromkeys(keys, dtype)
            text = json.dumps(config, indent=2, ensure_ascii=False)
            (new / "config.json").write_text(text + "\n")
        else:
            shutil.copyfile(source / "config.json", new / "config.json")
        if card is not None:
            (new / "README.md").write_text(card)

    _write(Path(path), tensors, fill, max_shard_bytes)


def keep(source, path, *, eos_ids: tuple[int, ...] | None = None) -> None:
    """Copy to `path` all that `export` needs of a checkpoint besides weights.

    An export then needs neither the checkpoint's directory nor that nobody has changed it. eos_ids:
    what ended the completions in training, where that was not the checkpoint's own.
    """
    source = _directory(source)
    with safetensors_out.replaced(Path(path)) as new:
        for file in (source / "config.json", *_companions(source)):
            shutil.copyfile(file, new / file.name)
        _write_json(new / TENSORS, _stored_dtypes(source))
        if eos_ids is not None:
            file = new / "generation_config.json"
            others = read_json(file) if file.is_file() else {}
            _write_json(file, others | {"eos_token_id": list(eos_ids)})


def weights_digest(path, *, share: tuple[int, int] = (0, 1), add: Callable = lambda x: x) -> str:
    """sha256, in hex, over the bytes of config.json and of the safetensors files.

    share (i, n): read every n-th file from the i-th on, where n processes have the same files and
    `add` gives the sum of an array over all of them.
    """
    directory = _directory(path)
    files = sorted({directory / "config.json", *safetensors_in.files(directory)})
    digests = np.zeros((len(files), hashlib.sha256().digest_size), np.uint8)
    for i in range(share[0], len(files), share[1]):
        with files[i].open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
        digests[i] = np.frombuffer(digest, np.uint8)
    total = hashlib.sha256()
    for file, digest in zip(files, add(digests)):
        total.update(f"{file.name} {digest.tobytes().hex()}\n".encode())
    return total.hexdigest()


def _write(path: Path, tensors, fill: Callable[[Path], None], max_shard_bytes: int) -> None:
    """A directory of the tensors and of what `fill` puts into it, in place of `path`."""
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes is {max_shard_bytes}; it is positive, 5e9 say")
    if jax.process_index() != 0:  # takes its part in gathering the tensors
        safetensors_out.write(path, tensors, max_shard_bytes=max_shard_bytes)
        return
    safetensors_out.require_ours(path)
    with safetensors_out.replaced(path) as new:
        fill(new)
        safetensors_out.write(new, tensors, max_shard_bytes=max_shard_bytes)


def _stored_dtypes(source: Path) -> dict[str, str]:
    """Name -> dtype of each tensor of a checkpoint, or of one that `keep` kept."""
    if (source / TENSORS).is_file():
        return read_json(source / TENSORS)
    stored = safetensors_in.scan(source)
    safetensors_in.check(stored, load_config(source), source)
    return {name: tensor.dtype for name, tensor in stored.items()}


def _companions(source: Path) -> list[Path]:
    return [source / name for name in COMPANIONS if (source / name).is_file()]


def _directory(path) -> Path:
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; give one with config.json and {WEIGHTS}, downloaded "
            "beforehand if it is a name on the Hugging Face hub"
        )
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} holds an adapter (adapter_config.json), which transformers would add to "
            "the weights; merge it: AutoPeftModelForCausalLM.from_pretrained(directory)"
            ".merge_and_unload().save_pretrained(another), and copy the tokenizer's files there"
        )
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json; copy it beside the weights")
    return directory


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def _tokenizer_files(tokenizer_dir) -> list[Path]:
    found = [Path(tokenizer_dir) / name for name in TOKENIZER_FILES]
    if not found[0].is_file():
        raise ValueError(f"tokenizer_dir {tokenizer_dir} has no tokenizer.json; give one that has")
    return [file for file in found if file.is_file()]
