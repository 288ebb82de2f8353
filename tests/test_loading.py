"""What loading reads, what it holds on the host meanwhile, and what it says on the way."""

import collections
import dataclasses
import io
import json
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from families import MODELS, random_params
from rich.console import Console
from safetensors.numpy import load_file, save_file

from gopd_jax import setup, sharding, train
from gopd_jax.models import decoder as lm
from gopd_jax.models import hf, safetensors_in
from gopd_jax.models import params as lm_params

# Sizes that every mesh of eight divides, in layers enough to be read in pieces.
CFG = dataclasses.replace(
    MODELS["llama 3.1"], vocab_size=128, num_hidden_layers=5, num_key_value_heads=4, head_dim=16
)
BIG = dataclasses.replace(
    CFG, vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=16
)


def write(path, cfg, dtype=ml_dtypes.bfloat16):
    """A checkpoint of random weights; the weights, rounded as they are stored."""
    params = jax.tree.map(
        lambda x: x.astype(dtype).astype(np.float32), random_params(cfg, seed=cfg.vocab_size)
    )
    hf.save(path, cfg, params, max_shard_bytes=200_000)
    for file in path.glob("*.safetensors"):
        save_file({k: v.astype(dtype) for k, v in load_file(file).items()}, file)
    return params


def layout(mesh, cfg=CFG):
    return sharding.shardings(mesh, lm_params.logical_axes(cfg))


@pytest.mark.parametrize(
    ("shape", "n_pieces"),
    [(None, 3), ((1, 1, 1), 5), ((2, 2, 2), 1), ((2, 2, 2), 3), ((1, 8, 1), 5), ((8, 1, 1), 3)],
)
def test_pieces_of_layers_make_the_same_arrays_on_any_mesh(
    tmp_path, make_mesh, monkeypatch, shape, n_pieces
):
    want = write(tmp_path / "model", CFG)
    layer = 4 * 32 * 4 * 16  # bytes of the queries' matrix in float32, the largest of a layer
    per_piece = {1: 5, 3: 2, 5: 1}[n_pieces]
    monkeypatch.setattr(safetensors_in, "PIECE_BYTES", per_piece * layer)
    where = None if shape is None else layout(make_mesh(shape))
    seen = []

    def progress(work):
        seen.append(len(work))
        yield from work

    got = hf.load_params(tmp_path / "model", CFG, shardings=where, progress=progress)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("float32")}
    if shape is None:
        assert not any(x.committed for x in jax.tree.leaves(got))
    else:
        assert jax.tree.map(lambda x: x.sharding, got) == where
    pieces = {
        row.name: len(safetensors_in.pieces(row, CFG, np.dtype("float32"), None))
        for row in lm_params.table(CFG)
    }
    assert (pieces["q"], pieces["embed"], pieces["attention_norm"]) == (n_pieces, 1, 1)
    assert seen == [sum(pieces.values())]


def test_a_stack_whose_layers_are_sharded_is_read_in_one_piece(tmp_path, make_mesh, monkeypatch):
    cfg = dataclasses.replace(CFG, num_hidden_layers=4)
    want = write(tmp_path / "model", cfg)
    monkeypatch.setattr(safetensors_in, "PIECE_BYTES", 1)
    axes = lm_params.logical_axes(cfg)
    where = sharding.shardings(make_mesh((1, 2, 2)), axes, (("layers", "fsdp"), ("mlp", "tensor")))
    got = hf.load_params(tmp_path / "model", cfg, shardings=where)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert got["layers"]["up"].addressable_shards[0].data.shape[0] == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_stored_weights_stay_in_their_dtype(tmp_path, make_mesh, monkeypatch, dtype):
    want = write(tmp_path / "model", CFG, dtype)
    monkeypatch.setattr(safetensors_in, "PIECE_BYTES", 1)
    for where in (None, layout(make_mesh((1, 2, 2)))):
        got = hf.load_params(tmp_path / "model", CFG, shardings=where, dtype="stored")
        assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype(dtype)}
        exact = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), got)
        jax.tree.map(np.testing.assert_array_equal, exact, want)
    with pytest.raises(ValueError, match=r"dtype is 'bfloat16'; it is one of \['float32', 'stor"):
        hf.load_params(tmp_path / "model", CFG, dtype="bfloat16")


class Counted:
    """A lazy view of a tensor that adds up the bytes that are read from it."""

    def __init__(self, view, name, bytes_of):
        self.view, self.name, self.bytes_of = view, name, bytes_of

    def __getitem__(self, index):
        array = self.view[index]
        self.bytes_of[self.name] += array.nbytes
        return array


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 4)])
def test_a_device_is_given_its_own_byte_ranges_and_no_others(tmp_path, make_mesh, shape):
    """Of each tensor as many bytes as there are in the block; merged axes included."""
    want = write(tmp_path / "model", CFG)
    mesh, stored = make_mesh(shape), safetensors_in.scan(tmp_path / "model")
    shards = shape[1] * shape[2]
    for row in lm_params.table(CFG):
        whole, bytes_of = row.shape(CFG), collections.Counter()
        sharded = lm_params.leaf(layout(mesh), row)
        for index in sharded.devices_indices_map(whole).values():
            with safetensors_in.opened(stored, row.hf_names(CFG)) as views:
                counted = {name: Counted(v, name, bytes_of) for name, v in views.items()}
                before = bytes_of.total()
                block = safetensors_in.read(row, counted, CFG, index, np.dtype("float32"))
            np.testing.assert_array_equal(block, lm_params.leaf(want, row)[index])
            assert bytes_of.total() - before == block.size * 2, row
        # All devices together: every byte once for each replica.
        n_parts = np.prod(whole) // np.prod(sharded.shard_shape(whole))
        assert n_parts <= shards
        replicas = mesh.size // n_parts
        assert set(bytes_of.values()) == {
            replicas * 2 * int(np.prod(stored[name].shape)) for name in row.hf_names(CFG)
        }


def test_replicas_on_several_devices_are_read_once(tmp_path, make_mesh, monkeypatch):
    write(tmp_path / "model", CFG)
    sizes, real = [], safetensors_in.read
    monkeypatch.setattr(
        safetensors_in, "read", lambda *a: sizes.append((block := real(*a)).size) or block
    )
    hf.load_params(tmp_path / "model", CFG, shardings=layout(make_mesh((8, 1, 1))))
    assert sum(sizes) == sum(np.prod(row.shape(CFG)) for row in lm_params.table(CFG))


@pytest.mark.parametrize(
    ("shape", "dtype"), [(None, "stored"), ((1, 4, 2), "stored"), ((1, 4, 2), "float32")]
)
def test_the_host_holds_a_small_multiple_of_the_largest_tensor(
    tmp_path, make_mesh, monkeypatch, shape, dtype
):
    """Allocations of NumPy and of the reader, which are the host's share; JAX's are not counted.

    On CPU a device takes over an array of NumPy that is not sharded instead of copying it, so the
    embedding and the head are parameters and not the host's.
    """
    write(tmp_path / "model", BIG)
    monkeypatch.setattr(safetensors_in, "PIECE_BYTES", 1)
    where = None if shape is None else layout(make_mesh(shape), BIG)
    hf.load_params(tmp_path / "model", BIG, shardings=where, dtype=dtype)  # compiles
    stored = safetensors_in.scan(tmp_path / "model")
    largest = max(2 * int(np.prod(tensor.shape)) for tensor in stored.values())
    stack = 2 * BIG.num_hidden_layers * BIG.hidden_size * BIG.intermediate_size
    assert stack == 4 * largest  # which a stack on the host would show as
    tracemalloc.start()
    try:
        params = hf.load_params(tmp_path / "model", BIG, shardings=where, dtype=dtype)
        left, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    width = 4 if dtype == "float32" else 2
    taken_over = 2 * largest * width // 2  # embedding and head
    assert left < taken_over + 0.1 * largest
    assert peak < taken_over + 1.2 * largest, (peak / largest, left / largest)
    del params


def test_a_slice_of_a_tensor_is_read_without_the_rest_of_it(tmp_path):
    """Of the library: a file with a hole of 4 GiB in it, of which 1 MiB is asked for."""
    shape, file = [2**20, 2**11], tmp_path / hf.WEIGHTS
    header = {"a": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 2**32]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + 2**32)
    (tensor,) = safetensors_in.scan(tmp_path).values()
    assert list(tensor.shape) == shape
    tracemalloc.start()
    try:
        with safetensors_in.opened({"a": tensor}, ["a"]) as views:
            rows, columns = views["a"][2**19 : 2**19 + 256], views["a"][:4096, 2**10 : 2**10 + 128]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.nbytes == columns.nbytes == 2**20
    assert peak < 2.2 * 2**20


def test_frozen_models_stay_as_they_are_stored_and_give_the_same_numbers(tmp_path):
    tiny.build(tmp_path)
    for name in ("base", "teacher_math"):
        params = hf.load_params(tmp_path / name, tiny.CFG)
        words = tmp_path / "tokenizer"
        hf.save(tmp_path / name, tiny.CFG, params, dtype="bfloat16", tokenizer_dir=words)
    roles = setup.prepare(tiny.config(tmp_path)).roles
    assert roles["reference"].params is roles["student"].params
    for name, dtype in (
        ("student", "bfloat16"),
        ("teacher:math", "bfloat16"),
        ("teacher:code", "float32"),
    ):
        assert {x.dtype for x in jax.tree.leaves(roles[name].params)} == {np.dtype(dtype)}

    teacher, tokens_BL = roles["teacher:math"], np.arange(24).reshape(2, 12)

    @jax.jit
    def logits(params):
        hidden_BLD = lm.hidden(teacher.decoder, params, tokens_BL, tokens_BL >= 0)
        return lm.logits(teacher.decoder, params, hidden_BLD)

    whole = jax.tree.map(lambda x: x.astype(np.float32), teacher.params)
    np.testing.assert_array_equal(logits(teacher.params), logits(whole))


def test_a_bar_is_shown_for_models_that_take_a_while_on_process_0(tmp_path, monkeypatch):
    tiny.build(tmp_path)
    text, real = io.StringIO(), setup.bar

    def bar(work, description, enabled):
        console = Console(file=text, width=100)
        return real(work, description, enabled, console=console, period=0)

    monkeypatch.setattr(setup, "bar", bar)
    setup.prepare(tiny.config(tmp_path))
    assert text.getvalue() == ""
    monkeypatch.setattr(setup, "SLOW_BYTES", 1)
    setup.prepare(tiny.config(tmp_path))
    n = len(lm_params.table(tiny.CFG))
    for name in ("student", "teacher:math", "teacher:code"):
        assert f"loading {name} 1/{n}  " in text.getvalue()
        assert f"loading {name} {n}/{n}  0:00 left\n" in text.getvalue()
    assert "reference" not in text.getvalue()  # the student's weights
    shown = text.getvalue()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    setup.prepare(tiny.config(tmp_path))
    assert text.getvalue() == shown


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_run_from_narrow_files_is_that_of_the_same_weights_in_float32_files(tmp_path, dtype):
    """Student, teachers and reference; what is trained is float32 in both, and so are products."""

    def losses(stored):
        root = tmp_path / np.dtype(stored).name
        root.mkdir()
        tiny.build(root)
        for file in root.glob("*/*.safetensors"):
            rounded = {k: v.astype(dtype) for k, v in load_file(file).items()}
            save_file({k: v.astype(stored) for k, v in rounded.items()}, file)
        train.run(tiny.config(root, steps=2))
        rows = map(json.loads, (root / "run" / "metrics.jsonl").open())
        return [row["loss"] for row in rows if "loss" in row], root / "run" / "export"

    (narrow, narrow_export), (wide, wide_export) = losses(dtype), losses(np.float32)
    assert len(wide) == 2
    np.testing.assert_allclose(narrow, wide, rtol=1e-6)
    stored, full = (load_file(path / "model.safetensors") for path in (narrow_export, wide_export))
    assert {x.dtype for x in stored.values()} == {np.dtype(dtype)}
    for name, x in full.items():
        step = ml_dtypes.finfo(dtype).eps * np.abs(x) + 1e-6
        assert np.all(np.abs(stored[name].astype(np.float32) - x) <= step), name
