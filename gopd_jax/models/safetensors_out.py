"""Writing *.safetensors: our arrays as the tensors of a checkpoint, one at a time.

The format's header needs only names, shapes and dtypes, so a file is written front to back while
no more than one tensor is on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gopd_jax.models import params as lm_params
from gopd_jax.models.params import ModelConfig, Param
from gopd_jax.models.safetensors_in import (
    EMBED,
    FLOATS,
    HEAD,
    INDEX,
    WEIGHTS,
    all_finite,
    n_stacked,
    some,
)
from gopd_jax.types import Params


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to be written; dtype in safetensors' spelling, read() gives it on the host."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(FLOATS[self.dtype]).itemsize


def tensors(cfg: ModelConfig, params: Params, dtypes: Mapping[str, str]) -> list[Tensor]:
    """The model's tensors in the order of its layers, each of dtypes[its name].

    A name of `dtypes` beyond the model's is the head that is tied to the embedding. ValueError
    unless `params` are exactly the model's.
    """
    rows = lm_params.table(cfg)
    _check(cfg, params, rows)
    places: list[tuple[str, Param, tuple[int, ...]]] = []
    for stacked, run in itertools.groupby(rows, key=lambda row: n_stacked(row) > 0):
        named = [
            (name, row, place if stacked else ())
            for row in run
            for name, place in zip(row.hf_names(cfg), _places(row, cfg))
        ]
        # Stable, so that within a layer the order is the table's.
        places += sorted(named, key=lambda entry: entry[2][:1])
    if HEAD in dtypes and cfg.tie_word_embeddings:
        embed = next(row for name, row, _ in places if name == EMBED)
        places.append((HEAD, embed, ()))

    def tensor(name, row, place):
        array, dtype = lm_params.leaf(params, row), FLOATS[dtypes[name]]

        def read():
            # float16 has a smaller range; what becomes infinite in it is refused when written.
            with np.errstate(over="ignore"):
                return np.ascontiguousarray(row.to_hf(on_host(array, place), cfg).astype(dtype))

        return Tensor(name, dtypes[name], row.hf_shape(cfg), read)

    return [tensor(*entry) for entry in places]


def write(directory: Path, found: Sequence[Tensor], *, max_shard_bytes: int) -> None:
    """The tensors as model.safetensors, or as several files and their index where they are larger.

    A file holds at most max_shard_bytes, or one larger tensor. With several processes all have to
    call; process 0 writes.
    """
    shards: list[list[Tensor]] = [[]]
    for tensor in found:
        if shards[-1] and sum(t.n_bytes for t in shards[-1]) + tensor.n_bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    stem, n = WEIGHTS.removesuffix(".safetensors"), len(shards)
    names = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    names = names if n > 1 else [WEIGHTS]
    for name, shard in zip(names, shards):
        _write_file(directory / name, shard)
    if n > 1 and jax.process_index() == 0:
        index = {
            "metadata": {
                "total_parameters": sum(math.prod(tensor.shape) for tensor in found),
                "total_size": sum(tensor.n_bytes for tensor in found),
            },
            "weight_map": {t.name: name for name, shard in zip(names, shards) for t in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def on_host(array, place: tuple[int, ...] = ()) -> np.ndarray:
    """array[place] as NumPy, of a jax.Array of any sharding or a NumPy array.

    Collective where the array lies on several processes: each of them gets the values.
    """
    if not isinstance(array, jax.Array):
        return np.asarray(array)[place]
    if len(array.devices()) == 1 and not place:
        return np.asarray(array)
    array = _at(array, *place)  # on the devices: a stack is larger than what is wanted of it
    if not array.is_fully_addressable:
        everywhere = NamedSharding(array.sharding.mesh, P())
        return np.asarray(jax.device_put(array, everywhere).addressable_data(0))
    # np.asarray(array) would keep its copy for as long as the array lives.
    out = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            out[shard.index] = np.asarray(shard.data)
    return out


def require_ours(path: Path) -> None:
    """ValueError for what is there and is no checkpoint, no adapter and no empty directory.

    And for a path below something that is no directory, or none that can be written.
    """
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(
            f"{path} cannot be written, for {parent} is no directory that can; choose another path"
        )
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return
    if path.exists() and (path.is_file() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not a checkpoint; choose another path or remove it")


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """What cannot be written for a new checkpoint is a ValueError that names its path.

    Of a full disk, or of a file system that cannot be written by anybody, the error names it not.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path} could not be written ({error}); choose another path, or make room there"
        ) from error


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A new directory to fill, which becomes `path` at the end: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as parent:
        new, old = Path(parent) / "new", Path(parent) / "old"
        new.mkdir()
        yield new
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
        finally:
            if old.exists() and not path.exists():
                os.rename(old, path)


@jax.jit
def _at(array, *place):
    for i in place:
        array = jax.lax.dynamic_index_in_dim(array, i, 0, keepdims=False)
    return array


def _places(row: Param, cfg: ModelConfig) -> Iterator[tuple[int, ...]]:
    """Where on the array's stacked axes each of row.hf_names lies."""
    return np.ndindex(row.shape(cfg)[: n_stacked(row)])


def _check(cfg: ModelConfig, params: Params, rows: Sequence[Param]) -> None:
    paths = {
        "/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }
    if left_over := paths - {row.path for row in rows}:
        raise ValueError(f"params have {some(left_over)}, which {cfg.architecture} has not")
    for row in rows:
        if (shape := tuple(lm_params.leaf(params, row).shape)) != row.shape(cfg):
            raise ValueError(
                f"params[{row.path!r}] has shape {shape} and the model's config describes "
                f"{row.shape(cfg)}; save with the config that the params came with"
            )


def _write_file(file: Path, shard: Sequence[Tensor]) -> None:
    """One file, byte for byte as the safetensors library writes it: wide dtypes first, by name."""
    shard = sorted(shard, key=lambda t: (-np.dtype(FLOATS[t.dtype]).itemsize, t.dtype, t.name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.n_bytes
        entry = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
        header[tensor.name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with contextlib.ExitStack() as stack:
        out = None
        if jax.process_index() == 0:
            out = stack.enter_context(file.open("wb"))
            out.write(len(text).to_bytes(8, "little") + text)
        for tensor in shard:
            array = tensor.read()
            if not all_finite(array):
                cure = "if they are finite in training, write with dtype float32"
                if tensor.dtype == "F32":
                    cure = "no dtype holds these, so take an earlier step"
                raise ValueError(
                    f"{tensor.name} holds values that are NaN or infinite in {tensor.dtype}; {cure}"
                )
            if out is not None:
                out.write(array.reshape(-1).view(np.uint8).data)
