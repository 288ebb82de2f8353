"""Reading *.safetensors: what the files of a checkpoint hold, and blocks of our arrays from them.

A file is mapped only while a block is read from it, and only the pages that the block lies on are
touched, so that what stays on the host is one block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gopd_jax.models import params as lm_params
from gopd_jax.models.params import ModelConfig, Param

POINTER = b"version https://git-lfs"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a tensor may be stored as; float32 holds each of them exactly.
FLOATS = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
# Layers are read so many at a time that a piece has this size, and one at a time if that is larger.
PIECE_BYTES = 2**28
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file holds it; dtype in safetensors' spelling: BF16."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_json(file: Path) -> dict:
    """ValueError unless the file holds a JSON object."""
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not an object; copy it again")
    return value


def files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, the index's where there is one."""
    weight_map = _weight_map(directory)
    names = [WEIGHTS] if weight_map is None else sorted(set(weight_map.values()))
    if missing := [name for name in names if not (directory / name).is_file()]:
        here = sorted(file.name for file in directory.iterdir())
        if odd := [name for name in missing if name in here]:
            raise ValueError(
                f"{directory} has {odd}, but as a directory or as a link to nothing (a hub's cache "
                "copied without its blobs?); copy the files themselves"
            )
        tensors = [name for name in here if name.endswith(".safetensors")]
        pickled = [name for name in here if name.endswith((".bin", ".pt", ".pth"))]
        if pickled and not tensors:
            raise ValueError(
                f"{directory} has no {missing}, only {pickled}, which are pickles and can run code "
                "when read; convert them with transformers' save_pretrained"
            )
        if tensors and weight_map is None:
            raise ValueError(
                f"{directory} has neither {WEIGHTS} nor {INDEX}, which says what of {tensors} to "
                "read; copy the index"
            )
        raise ValueError(f"{directory} has no {missing}; copy the weights again")
    return [directory / name for name in names]


def scan(directory: Path) -> dict[str, Stored]:
    """Name -> tensor of every file, from the headers alone.

    ValueError for a file that is cut off, a name in two files, or an index that says otherwise.
    """
    found: dict[str, Stored] = {}
    for file in files(directory):
        try:
            with safe_open(file, framework="numpy") as handle:
                views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
                here = {
                    name: Stored(file, view.get_dtype(), tuple(view.get_shape()))
                    for name, view in views.items()
                }
        except SafetensorError as error:
            with file.open("rb") as opened:
                if opened.read(len(POINTER)) == POINTER:
                    raise ValueError(
                        f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in "
                        "its repository"
                    ) from error
            raise ValueError(f"{file} is truncated or corrupt ({error}); copy it again") from error
        if twice := here.keys() & found.keys():
            others = sorted({found[name].file.name for name in twice})
            raise ValueError(
                f"{file} and {others} both hold {some(twice)}; copy weights and {INDEX} again, "
                "from one checkpoint"
            )
        found |= here
    _check_index(directory, found)
    # Old Llamas store what rope_theta says. transformers does not read it either.
    return {name: tensor for name, tensor in found.items() if not name.endswith(".inv_freq")}


def check(stored: Mapping[str, Stored], cfg: ModelConfig, path) -> None:
    """ValueError unless the tensors are exactly those of the model, in shape and dtype."""
    shapes = {n: row.hf_shape(cfg) for row in lm_params.table(cfg) for n in row.hf_names(cfg)}
    left_over, missing = stored.keys() - shapes.keys(), shapes.keys() - stored.keys()
    if stores_tied_head(cfg, stored):
        left_over -= {HEAD}
    if missing or left_over:
        raise ValueError(
            f"{path}: the weights lack {some(missing)} and have {some(left_over)} beyond what "
            f"config.json ({cfg.architecture}, {cfg.num_hidden_layers} layers, "
            f"tie_word_embeddings = {cfg.tie_word_embeddings}) describes; copy config.json and "
            "weights from one checkpoint"
        )
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {stored[name].shape} and config.json describes {shape}; "
                "copy config.json and weights from one checkpoint"
            )
    for name in stored:
        if stored[name].dtype not in FLOATS:
            raise ValueError(
                f"{path}: {name} is stored as {stored[name].dtype}, not one of {tuple(FLOATS)}; "
                "use the unquantised checkpoint"
            )
    if stores_tied_head(cfg, stored):
        _check_tied(stored, path)


def stores_tied_head(cfg: ModelConfig, names: Iterable[str]) -> bool:
    """Whether the files hold the head besides the embedding that it is tied to."""
    return cfg.tie_word_embeddings and HEAD in names


def dtype_of(row: Param, cfg: ModelConfig, stored: Mapping[str, Stored]) -> np.dtype:
    """The narrowest dtype that holds all tensors of a row exactly: theirs, where they agree."""
    dtypes = {np.dtype(FLOATS[stored[name].dtype]) for name in row.hf_names(cfg)}
    return np.dtype(functools.reduce(jnp.promote_types, sorted(dtypes, key=str)))


def pieces(row: Param, cfg: ModelConfig, dtype: np.dtype, sharding) -> list[slice]:
    """Runs of the row's first axis to be read one after another; one run if it is not stacked."""
    shape, n_first = row.shape(cfg), row.shape(cfg)[0]
    whole = [slice(0, n_first)]
    if not n_stacked(row):
        return whole
    if sharding is not None:
        spans = [index[0] for index in sharding.devices_indices_map(shape).values()]
        if any(span.indices(n_first)[:2] != (0, n_first) for span in spans):
            return whole  # each device takes some of the layers
    n = max(1, PIECE_BYTES // (np.prod(shape[1:], dtype=np.int64) * dtype.itemsize))
    return [slice(start, min(start + n, n_first)) for start in range(0, n_first, n)]


def n_stacked(row: Param) -> int:
    """How many leading axes of our array run over tensors of the file: layers, experts."""
    return len(row.axes) - len(row.tensor_axes)


@contextlib.contextmanager
def opened(stored: Mapping[str, Stored], names: Iterable[str]):
    """Name -> lazy view of each tensor; the files are mapped inside this alone."""
    with contextlib.ExitStack() as stack:
        handles = {
            file: stack.enter_context(safe_open(file, framework="numpy"))
            for file in sorted({stored[name].file for name in names})
        }
        yield {name: handles[stored[name].file].get_slice(name) for name in names}


def names_in(row: Param, cfg: ModelConfig, index: tuple[slice, ...]) -> np.ndarray:
    """Names of the tensors that a block of our array lies in, by their place on its stacked axes"""
    stacked = n_stacked(row)
    names = np.array(row.hf_names(cfg), dtype=object).reshape(row.shape(cfg)[:stacked])
    return names[(*index[:stacked], ...)]


def read(row: Param, views: Mapping, cfg: ModelConfig, index, dtype, where="") -> np.ndarray:
    """Block of our array at `index`, a slice an axis, from no more of the files than it needs.

    Of axes that are merged in the file, the first is sliced on reading and the others after it.
    ValueError for a value that is not finite; `where` names the checkpoint in it.
    """
    sizes, stacked = lm_params.axis_sizes(cfg), n_stacked(row)
    spans = {axis: s.indices(n)[:2] for axis, s, n in zip(row.axes, index, row.shape(cfg))}
    block_sizes, cut = dict(sizes), []
    for group in row.groups:
        start, stop = spans[group[0]]
        inner = int(np.prod([sizes[axis] for axis in group[1:]], dtype=np.int64))
        cut.append(slice(start * inner, stop * inner))
        block_sizes[group[0]] = stop - start
    sliced = {group[0] for group in row.groups}
    rest = tuple(slice(None) if a in sliced else slice(*spans[a]) for a in row.tensor_axes)

    names = names_in(row, cfg, index)
    shape = tuple(stop - start for start, stop in (spans[axis] for axis in row.axes))
    block = np.empty(shape, dtype)
    assert block.shape[:stacked] == names.shape
    for place in np.ndindex(names.shape):
        tensor = views[names[place]][tuple(cut)]
        if not all_finite(tensor):
            raise ValueError(
                f"{where}: {names[place]} holds values that are NaN or infinite; copy the weights "
                "again, or use an earlier checkpoint of that training"
            )
        block[place] = row.from_hf(tensor, block_sizes)[rest]
    return block


def all_finite(array: np.ndarray, n_piece: int = 2**20) -> bool:
    """Whether no float of `array` is NaN or infinite, which have all bits of the exponent set."""
    exponent = {2: 0x7F80, 4: 0x7F800000}[array.dtype.itemsize]
    exponent = 0x7C00 if array.dtype == np.float16 else exponent
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    exponent = words.dtype.type(exponent)
    # Pieces, so that the masked copy stays in the cache: as fast as reading.
    return all(
        (words[i : i + n_piece] & exponent).max() != exponent for i in range(0, len(words), n_piece)
    )


def some(names: Iterable[str], n_shown: int = 4) -> str:
    """The first few names of a set, for a message."""
    names = sorted(names)
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return f"{names[:n_shown]}{more}" if names else "nothing"


def _weight_map(directory: Path) -> dict[str, str] | None:
    """The index's tensor -> file; None where there is no index."""
    file = directory / INDEX
    if not file.is_file():
        return None
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{file} has no weight_map; copy it again")
    names = {name for name in weight_map.values() if isinstance(name, str)}
    odd = [n for n in weight_map.values() if not isinstance(n, str) or Path(n).name != n]
    if odd := odd + [name for name in names if not name.endswith(".safetensors")]:
        raise ValueError(
            f"{file} names the file {odd[0]!r}; only *.safetensors beside the index are read: copy "
            "the index and its files again"
        )
    if (directory / WEIGHTS).is_file() and WEIGHTS not in names:
        raise ValueError(
            f"{directory} has both {WEIGHTS} and {INDEX} of other files, which can be two models; "
            "remove one"
        )
    return weight_map


def _check_index(directory: Path, found: Mapping[str, Stored]) -> None:
    """ValueError unless the index, where there is one, says what the files hold."""
    if (weight_map := _weight_map(directory)) is None:
        return
    actual = {name: tensor.file.name for name, tensor in found.items()}
    if wrong := sorted(name for name in weight_map if actual.get(name) != weight_map[name]):
        name = wrong[0]
        lies = f"it is in {actual[name]}" if name in actual else "no file has it"
        raise ValueError(
            f"{directory / INDEX} says that {name} is in {weight_map[name]}, and {lies} "
            f"({len(wrong)} such tensors); copy index and weights again, from one checkpoint"
        )
    if extra := actual.keys() - weight_map.keys():
        raise ValueError(
            f"{directory}: the files hold {some(extra)}, which {INDEX} does not name; copy index "
            "and weights again, from one checkpoint"
        )


def _check_tied(stored: Mapping[str, Stored], path, n_rows: int = 8192) -> None:
    """ValueError unless a stored head equals the embedding it is tied to, a block at a time."""
    same, n_all = stored[EMBED].shape == stored[HEAD].shape, stored[EMBED].shape[0]
    with opened(stored, (EMBED, HEAD)) as views:
        embed, head = views[EMBED], views[HEAD]
        blocks = [slice(i, min(i + n_rows, n_all)) for i in range(0, n_all, n_rows)]
        same = same and not any(np.any(embed[block] != head[block]) for block in blocks)
    if not same:
        raise ValueError(
            f"{path}: config.json ties the head to the embedding and lm_head.weight differs from "
            "it; set tie_word_embeddings to false, or remove lm_head.weight"
        )


def piece(stored, row: Param, cfg: ModelConfig, run: slice, dtype, sharding, where) -> jax.Array:
    """A run of the row's first axis, on the devices; what several of them hold is read once.

    sharding: of the whole parameter; None leaves the array uncommitted on the default device.
    """
    shape = row.shape(cfg)
    whole = run == slice(0, shape[0])

    def block_at(index):
        # The first axis of a run is not sharded: `pieces` does not cut one that is.
        index = index if whole else (run, *index[1:])
        with opened(stored, names_in(row, cfg, index).reshape(-1)) as views:
            return read(row, views, cfg, index, dtype, where)

    if sharding is None:
        return jnp.asarray(block_at((run, *(slice(None),) * (len(shape) - 1))))
    # Asks once for a block that several devices hold.
    return jax.make_array_from_callback((run.stop - run.start, *shape[1:]), sharding, block_at)


def put(stack: jax.Array | None, piece: jax.Array, start: int, shape, sharding) -> jax.Array:
    """The stack of `shape` with a piece at `start` of its first axis, in the stack's own memory.

    stack: None makes one. sharding: of stack and piece; None leaves the stack uncommitted.
    """
    new, update = _stacking(sharding)
    stack = new(tuple(shape), piece.dtype) if stack is None else stack
    # Else the host would read ahead of the devices, and hold what they have not taken yet.
    return update(stack, piece, start, 0).block_until_ready()


@functools.cache
def _stacking(sharding):
    """Jitted: an empty stack; a stack with a piece put in."""
    # Named, because the compiler's own choice is equal to it in effect alone.
    options = {} if sharding is None else {"out_shardings": sharding}
    return (
        jax.jit(jnp.zeros, static_argnums=(0, 1), **options),
        jax.jit(jax.lax.dynamic_update_slice_in_dim, static_argnums=3, donate_argnums=0, **options),
    )
