"""Checkpoints against transformers' own models (marker torch), and round trips."""

import dataclasses
import json
import os
import shutil

import families
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from families import (
    GEMMA3,
    LLAMA,
    MODELS,
    QWEN3,
    batch,
    our_logits,
    random_params,
    torch_load,
    torch_logits,
)
from safetensors.numpy import load_file, save_file

from gopd_jax import sharding
from gopd_jax.models import hf, hf_config, safetensors_out
from gopd_jax.models import params as lm_params
from gopd_jax.models.safetensors_in import read

EACH = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS.keys())


@pytest.fixture
def saved(tmp_path):
    """(path, cfg, params) of a checkpoint to damage."""
    path, params = tmp_path / "model", random_params(QWEN3)
    hf.save(path, QWEN3, params)
    return path, QWEN3, params


@pytest.mark.torch
@EACH
def test_what_we_save_transformers_loads_with_equal_logits(cfg, tmp_path):
    params = random_params(cfg)
    hf.save(tmp_path / "model", cfg, params)
    want_BLV, valid_BL = torch_logits(torch_load(tmp_path / "model")), batch()[1]
    got_BLV = our_logits(cfg, params)
    assert want_BLV.std() > 0.5
    np.testing.assert_allclose(got_BLV[valid_BL], want_BLV[valid_BL], atol=1e-4)


@pytest.mark.torch
@EACH
def test_what_transformers_saves_we_load_with_equal_logits(cfg, tmp_path):
    model = families.torch_random(cfg)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / hf.INDEX).is_file()
    loaded = hf.load_config(tmp_path / "model")
    assert loaded == cfg
    got_BLV = our_logits(loaded, hf.load_params(tmp_path / "model", loaded))
    want_BLV, valid_BL = torch_logits(model), batch()[1]
    np.testing.assert_allclose(got_BLV[valid_BL], want_BLV[valid_BL], atol=1e-4)


@pytest.mark.torch
@EACH
def test_greedy_decoding_equals_transformers_token_for_token(cfg, tmp_path):
    params = random_params(cfg, seed=3)
    hf.save(tmp_path / "model", dataclasses.replace(cfg, eos_token_id=None), params)
    want_BC = families.torch_greedy(torch_load(tmp_path / "model"))
    np.testing.assert_array_equal(families.our_greedy(cfg, params), want_BC)


@pytest.mark.torch
def test_the_text_part_of_a_gemma_that_reads_images_can_be_taken_out_as_the_refusal_says(tmp_path):
    import transformers

    text = {k: v for k, v in lm_params.to_hf(GEMMA3).items() if k != "architectures"}
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "patch_size"), 14)
    vision = sizes | {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    whole = transformers.Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match="reads images too"):
        hf.load_config(tmp_path / "whole")
    names = {"DIR": tmp_path / "whole", "OUT": tmp_path / "text"} | {
        n: getattr(transformers, n) for n in ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM")
    }
    exec(hf_config.TEXT_OF_GEMMA3, names)
    cfg = hf.load_config(tmp_path / "text")
    assert cfg == GEMMA3
    got_BLV, valid_BL = our_logits(cfg, hf.load_params(tmp_path / "text", cfg)), batch()[1]
    np.testing.assert_allclose(got_BLV[valid_BL], torch_logits(whole)[valid_BL], atol=1e-4)


@EACH
def test_a_saved_model_is_loaded_bit_for_bit(cfg, tmp_path):
    params = random_params(cfg)
    hf.save(tmp_path / "runs" / "model", cfg, params)
    assert hf.load_config(tmp_path / "runs" / "model") == cfg
    loaded = hf.load_params(tmp_path / "runs" / "model", cfg)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["model"]


def test_names_and_layout_are_those_of_hugging_face(saved):
    path, cfg, params = saved
    tensors = load_file(path / hf.WEIGHTS)
    assert len(tensors) == 2 + 11 * cfg.num_hidden_layers
    layer = params["layers"]
    # y = W x with W [out, in], heads in runs of head_dim rows.
    want = layer["q"][1].reshape(32, 4 * 12).T
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], want)
    want = layer["o"][0].reshape(4 * 12, 32).T
    np.testing.assert_array_equal(tensors["model.layers.0.self_attn.o_proj.weight"], want)
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], layer["up"][0].T)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], params["embed"])


def test_bfloat16_is_stored_rounded_and_read_as_float32(tmp_path):
    params = random_params(LLAMA)
    hf.save(tmp_path / "model", LLAMA, params, dtype="bfloat16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = hf.load_params(tmp_path / "model", LLAMA)
    want = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, loaded, want)


def test_any_block_of_any_parameter_is_read_as_a_slice_of_the_whole(saved):
    path, cfg, params = saved
    views = load_file(path / hf.WEIGHTS)
    draw = np.random.default_rng(0)
    for row in lm_params.table(cfg):
        for _ in range(20):
            shape = row.shape(cfg)
            bounds = [sorted(draw.integers(0, size + 1, 2)) for size in shape]
            index = tuple(slice(None) if draw.random() < 0.3 else slice(*b) for b in bounds)
            if 0 not in np.empty(shape)[index].shape:
                got = read(row, views, cfg, index, np.float32)
                np.testing.assert_array_equal(got, lm_params.leaf(params, row)[index])


def test_sharded_loading_reads_into_the_given_shardings(saved):
    path, cfg, params = saved
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    shardings = sharding.shardings(mesh, lm_params.logical_axes(cfg))
    loaded = hf.load_params(path, cfg, shardings=shardings)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert jax.tree.map(lambda x: x.sharding, loaded) == shardings


def test_a_checkpoint_in_several_files_is_read_through_its_index(saved):
    path, cfg, params = saved
    tensors, files = load_file(path / hf.WEIGHTS), ("a.safetensors", "b.safetensors")
    names = sorted(tensors)
    halves = dict(zip(files, (names[:9], names[9:])))
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, path / file)
    where = {name: file for file, part in halves.items() for name in part}
    (path / hf.INDEX).write_text(json.dumps({"weight_map": where}))
    (path / hf.WEIGHTS).unlink()
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(path, cfg), params)
    (path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \['b.safetensors'\]; copy the weights again"):
        hf.load_params(path, cfg)


def test_the_digest_tells_weights_and_config_apart_and_nothing_else(saved, tmp_path):
    path, cfg, params = saved
    digest = hf.weights_digest(path)
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").unlink()
    assert hf.weights_digest(tmp_path / "copy") == digest
    params["final_norm"][0] = np.nextafter(params["final_norm"][0], np.float32(2))
    hf.save(path, cfg, params)
    hf.save(tmp_path / "eps", dataclasses.replace(cfg, rms_norm_eps=1e-5), params)
    assert len({digest, hf.weights_digest(path), hf.weights_digest(tmp_path / "eps")}) == 3


def test_processes_that_share_the_work_make_the_same_digest(saved):
    path, cfg, params = saved
    hf.save(path, cfg, params, max_shard_bytes=12_000)
    n_files, seen = len(list(path.glob("*.safetensors"))) + 1, []
    assert n_files > 3

    def note(digests):
        seen.append(digests)
        return digests

    for i in range(3):
        hf.weights_digest(path, share=(i, 3), add=note)
    assert [(part != 0).any(1).sum() for part in seen] == [
        len(range(i, n_files, 3)) for i in range(3)
    ]
    shared = hf.weights_digest(path, share=(1, 3), add=lambda own: sum(seen))
    assert shared == hf.weights_digest(path)


def test_tokenizer_files_come_along(saved, tmp_path):
    _, cfg, params = saved
    source = tmp_path / "tokenizer"
    source.mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer.json"):
        hf.save(tmp_path / "new", cfg, params, tokenizer_dir=source)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "weights.bin"):
        (source / name).write_text(name)
    hf.save(tmp_path / "new", cfg, params, tokenizer_dir=source)
    found = {file.name for file in (tmp_path / "new").iterdir()}
    want = {"config.json", hf.WEIGHTS, *(f.name for f in source.iterdir())} - {"weights.bin"}
    assert found == want
    assert (tmp_path / "new" / "generation_config.json").read_text() == "generation_config.json"


@pytest.mark.parametrize("stage", ["writing", "renaming"])
def test_a_save_that_fails_leaves_the_old_checkpoint_and_no_rubbish(saved, monkeypatch, stage):
    path, cfg, params = saved
    digest, rename = hf.weights_digest(path), os.rename

    def full(*args, **kwargs):
        raise OSError("no space left")

    def stuck(source, target):
        return full() if source.name == "new" else rename(source, target)

    if stage == "writing":
        monkeypatch.setattr(safetensors_out, "_write_file", full)
    else:
        monkeypatch.setattr(os, "rename", stuck)
    with pytest.raises(OSError, match="no space"):
        hf.save(path, cfg, random_params(cfg, seed=1))
    assert hf.weights_digest(path) == digest
    assert [file.name for file in path.parent.iterdir()] == ["model"]


def test_save_refuses_another_directory_another_dtype_and_another_models_params(saved):
    path, cfg, params = saved
    other = path.parent / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("")
    with pytest.raises(ValueError, match="thesis exists and is not a checkpoint"):
        hf.save(other, cfg, params)
    with pytest.raises(ValueError, match=r"dtype is 'float16'; it is one of"):
        hf.save(path, cfg, params, dtype="float16")
    untied = MODELS["qwen3, untied"]
    with pytest.raises(ValueError, match=r"params have no 'head'"):
        hf.save(path, untied, params)
    with pytest.raises(ValueError, match=r"params have \['head'\], which qwen3 has not"):
        hf.save(path, cfg, random_params(untied))
    with pytest.raises(ValueError, match=r"'embed'\] has shape \(97, 32\).*\(99, 32\)"):
        hf.save(path, dataclasses.replace(cfg, vocab_size=99), params)


@EACH
def test_both_spellings_of_rope_say_the_same(cfg):
    new = lm_params.to_hf(cfg)
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        new.pop(name, None)
    assert lm_params.from_hf(old) == lm_params.from_hf(new) == cfg


def test_fields_that_change_nothing_are_accepted():
    config = lm_params.to_hf(QWEN3)
    config |= {"attention_dropout": 0.1, "sliding_window": 4096, "max_window_layers": 28}
    config |= {"use_cache": False, "layer_types": ["full_attention"] * 2, "pretraining_tp": 1}
    assert lm_params.from_hf(config) == QWEN3
