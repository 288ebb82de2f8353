"""Checkpoints that are damaged or not implemented are refused, with the file and the cure named."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from families import MODELS
from safetensors.numpy import load_file, save_file

from gopd_jax.models import hf
from gopd_jax.models import params as lm_params

CONFIG = lm_params.ModelConfig(
    architecture="qwen3",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
)


@pytest.fixture
def path(tmp_path):
    """A sound checkpoint, to be damaged."""
    draw = np.random.default_rng(0).normal
    params = lm_params.tree(CONFIG, lambda row: draw(0, 1, row.shape(CONFIG)).astype(np.float32))
    hf.save(tmp_path / "model", CONFIG, params)
    return tmp_path / "model"


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def edit_weights(path, change):
    tensors = load_file(path / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, path / hf.WEIGHTS)


def cut(path, n_bytes, file=hf.WEIGHTS):
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[:n_bytes])


def pickled(path):
    (path / hf.WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(b"")


NORM = "model.norm.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(path, change=None, **halves):
    """The checkpoint as two files and an index, whose map `change` may falsify."""
    tensors = load_file(path / hf.WEIGHTS)
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[:9], names[9:])))
    for file, part in parts.items():
        extra = halves.get(file.split("-")[1], {})
        save_file({name: tensors[name] for name in part} | extra, path / file)
    index = {name: file for file, part in parts.items() for name in part}
    if change is not None:
        change(index)
    (path / hf.INDEX).write_text(json.dumps({"weight_map": index}))
    (path / hf.WEIGHTS).unlink()


def store_as(path, dtype):
    """The final norm in a dtype of one byte, which NumPy has not."""
    edit_weights(path, lambda t: t.update({NORM: t[NORM].astype(np.int8)}))
    content = (path / hf.WEIGHTS).read_bytes()
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    header[NORM]["dtype"] = dtype
    text = json.dumps(header).encode()
    (path / hf.WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + n :])


def spoil(tensors, value, name="model.layers.1.mlp.up_proj.weight"):
    tensors[name][17, 5] = value


DAMAGE = {
    "no directory": (shutil.rmtree, "is not a directory; give one with config.json"),
    "no config": (lambda p: (p / "config.json").unlink(), "has no config.json; copy it"),
    "half a config": (lambda p: (p / "config.json").write_text("{"), "config.json is not JSON"),
    "a size that is text": (
        lambda p: edit_config(p, hidden_size="32", head_dim=0),
        r"gives \{'hidden_size': '32', 'head_dim': 0\}, and each is a number of 1 or more; copy",
    ),
    "a number that is text": (
        lambda p: edit_config(p, rms_norm_eps="1e-6"),
        r"gives \{'rms_norm_eps': '1e-6'\}; each is a number above 0",
    ),
    "a switch that is text": (
        lambda p: edit_config(p, tie_word_embeddings="false"),
        r"gives \{'tie_word_embeddings': 'false'\}; each is true or false",
    ),
    "no theta": (
        lambda p: edit_config(p, rope_theta=0, rope_parameters=None),
        r"gives \{'rope_theta': 0\}; each is a number above 0",
    ),
    "a stretch that is text": (
        lambda p: edit_config(
            p, rope_parameters=None, rope_scaling={"rope_type": "linear", "factor": "4"}
        ),
        r"rope_type 'linear' .* gives \{'factor': '4'\}; each is a number above 0",
    ),
    "a word for a stretch": (
        lambda p: edit_config(p, rope_scaling="linear"),
        "rope_scaling is 'linear' and .*; each is an object",
    ),
    "rope in two places": (
        # transformers then takes 10000 for theta.
        lambda p: edit_config(
            p,
            rope_theta=None,
            rope_scaling={"rope_type": "linear", "factor": 4},
            rope_parameters={"rope_theta": 500.0},
        ),
        "beside which transformers does not read the rope_theta of rope_parameters",
    ),
    "an adapter beside it": (
        lambda p: (p / "adapter_config.json").write_text("{}"),
        "holds an adapter .* merge it: AutoPeftModelForCausalLM",
    ),
    "an adapter alone": (
        lambda p: (p / "config.json").rename(p / "adapter_config.json"),
        "holds an adapter .* merge it: AutoPeftModelForCausalLM",
    ),
    "git lfs pointer": (
        lambda p: (p / hf.WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid s"),
        "model.safetensors is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "dangling link": (
        lambda p: ((p / hf.WEIGHTS).unlink(), (p / hf.WEIGHTS).symlink_to("../blobs/ab12")),
        r"has \['model.safetensors'\], but as a directory or as a link to nothing.*copy the files",
    ),
    "no weights": (lambda p: (p / hf.WEIGHTS).unlink(), r"has no \['model.safetensors'\]; copy"),
    "pickle": (pickled, r"only \['pytorch_model.bin'\], which are pickles.*save_pretrained"),
    "truncated": (lambda p: cut(p, -1), "model.safetensors is truncated or corrupt.*copy it again"),
    "truncated header": (lambda p: cut(p, 50), "model.safetensors is truncated or corrupt"),
    "empty": (lambda p: cut(p, 0), "model.safetensors is truncated or corrupt"),
    "index without map": (lambda p: (p / hf.INDEX).write_text("{}"), "has no weight_map"),
    "missing tensor": (
        lambda p: edit_weights(p, lambda t: t.pop(NORM)),
        r"lack \['model.norm.weight'\] and have nothing beyond",
    ),
    "left-over tensor": (
        lambda p: edit_weights(p, lambda t: t.update(extra=t[NORM])),
        r"lack nothing and have \['extra'\] beyond",
    ),
    "fewer layers": (
        lambda p: edit_config(p, num_hidden_layers=1),
        r"have \['model.layers.1.*and 7 more beyond what config.json \(qwen3, 1 layers",
    ),
    "wrong shape": (
        lambda p: edit_config(p, vocab_size=98),
        r"model.embed_tokens.weight has shape \(97, 32\) and config.json describes \(98, 32\)",
    ),
    "quantised": (
        lambda p: edit_weights(p, lambda t: t.update({NORM: t[NORM].astype(np.int8)})),
        "model.norm.weight is stored as I8",
    ),
    "8 bits": (
        lambda p: store_as(p, "F8_E4M3"),
        r"model.norm.weight is stored as F8_E4M3, not one of .*use the unquantised checkpoint",
    ),
    "nan": (
        lambda p: edit_weights(p, lambda t: spoil(t, np.nan)),
        "model.layers.1.mlp.up_proj.weight holds values that are NaN or infinite; copy the weights",
    ),
    "infinity": (
        lambda p: edit_weights(p, lambda t: spoil(t, -np.inf)),
        "model.layers.1.mlp.up_proj.weight holds values that are NaN or infinite",
    ),
    "infinity in bfloat16": (
        lambda p: edit_weights(
            p, lambda t: t.update({NORM: np.full(32, np.inf, ml_dtypes.bfloat16)})
        ),
        "model.norm.weight holds values that are NaN or infinite",
    ),
    "nan in float16": (
        lambda p: edit_weights(p, lambda t: t.update({NORM: np.full(32, np.nan, np.float16)})),
        "model.norm.weight holds values that are NaN or infinite",
    ),
    "truncated shard": (
        lambda p: (shard(p), cut(p, -1, SHARDS[1])),
        "00002-of-00002.safetensors is truncated or corrupt.*copy it again",
    ),
    "missing shard": (
        lambda p: (shard(p), (p / SHARDS[1]).unlink()),
        r"has no \['model-00002-of-00002.safetensors'\]; copy the weights again",
    ),
    "no index": (
        lambda p: (shard(p), (p / hf.INDEX).unlink()),
        "has neither model.safetensors nor model.safetensors.index.json, which says",
    ),
    "index names more": (
        lambda p: shard(p, lambda index: index.update(extra=SHARDS[0])),
        r"says that extra is in model-00001-of-00002.safetensors, and no file has it \(1 such",
    ),
    "index names another file": (
        lambda p: shard(p, lambda index: index.update({NORM: SHARDS[0]})),
        "norm.weight is in model-00001-of-00002.safetensors, and it is in model-00002-of-00002",
    ),
    "index names fewer": (
        lambda p: shard(p, lambda index: index.pop(NORM)),
        r"the files hold \['model.norm.weight'\], which model.safetensors.index.json does not name",
    ),
    "a tensor in two files": (
        lambda p: shard(p, **{"00001": {NORM: np.ones(32, np.float32)}}),
        r"00002.safetensors and \['model-00001-.*'\] both hold \['model.norm.weight'\]; copy",
    ),
    "index of pickles": (
        lambda p: shard(p, lambda index: index.update({NORM: "pytorch_model.bin"})),
        "names the file 'pytorch_model.bin'; only .*safetensors beside the index are read",
    ),
    "index of another directory": (
        lambda p: shard(p, lambda index: index.update({NORM: "../other/model.safetensors"})),
        "names the file '../other/model.safetensors'; only",
    ),
    "two models": (
        lambda p: (
            shutil.copy(p / hf.WEIGHTS, p / "x"),
            shard(p),
            (p / "x").rename(p / hf.WEIGHTS),
        ),
        "has both model.safetensors and model.safetensors.index.json of other files",
    ),
    "half an index": (
        lambda p: (shard(p), (p / hf.INDEX).write_text("[]")),
        "index.json holds a list, not an object",
    ),
    "another head": (
        lambda p: edit_weights(
            p, lambda t: t.update({"lm_head.weight": 0 * t["model.embed_tokens.weight"]})
        ),
        "config.json ties the head.*set tie_word_embeddings to false",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_named_with_its_cure(path, damage, message):
    damage(path)
    with pytest.raises(ValueError, match=message) as caught:
        hf.load_params(path, hf.load_config(path))
    assert str(path) in str(caught.value)


def test_a_tied_head_that_is_stored_too_is_accepted(path):
    want = hf.load_params(path, CONFIG)
    edit_weights(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(path, CONFIG), want)


def test_what_old_llamas_store_of_their_rope_is_left_alone(path, tmp_path):
    want = hf.load_params(path, CONFIG)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(path, lambda t: t.update({name: np.ones(6, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(path, CONFIG), want)
    hf.export(tmp_path / "out", want, path)
    assert name not in load_file(tmp_path / "out" / hf.WEIGHTS)


UNSUPPORTED = {
    "architecture": (
        {"model_type": "gpt2"},
        r"'gpt2' is not supported; there are \['gemma3_text', 'l",
    ),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    "bias": ({"attention_bias": True}, "attention_bias = True"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias = True"),
    "window of no layer": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        r"sliding_window = None and layer_types = \('full_attention', 'sliding_attention'\): a win",
    ),
    "window without width": (
        {"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 1},
        "sliding_window = 0; it is 1 or more",
    ),
    "kind of layer": (
        {"layer_types": ["full_attention", "chunked"]},
        r"layer_types has \['chunked",
    ),
    "layers": ({"layer_types": ["full_attention"]}, "names 1 layers and num_hidden_layers is 2"),
    "half yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        r"rope_type 'yarn' needs \['original_max_position_embeddings'\]",
    ),
    "rope": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
    "new rope": ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
    "rope field": (
        {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 2, 2]}},
        "rope_type 'default' has unknown field mrope_section",
    ),
    "unknown field": ({"logit_scale": 0.5, "zeta": 1}, "unknown field logit_scale, zeta in the co"),
    "another head": (
        {"architectures": ["Qwen3ForSequenceClassification"]},
        r"architectures = \['Qwen3ForSequenceClassification'\] \(only 'Qwen3ForCausalLM'",
    ),
    "experts": ({"num_experts": 4}, "unknown field num_experts"),
    "images": ({"model_type": "gemma3"}, r"reads images too.*t.save_pretrained\(OUT\)"),
    "interleaved rope": ({"rope_interleaved": True}, "rope_interleaved = True"),
    "half rope": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "two thetas": ({"rope_parameters": {"rope_theta": 1e6}}, r"two rope_theta, \[10000.0, 1000000"),
    "two ropes": (
        {"rope_parameters": {"factor": 2.0}, "rope_scaling": {"factor": 4.0}},
        r"differ in \['factor'\]",
    ),
    "llama3 without factor": ({"rope_scaling": {"rope_type": "llama3"}}, r"needs \['factor', "),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "own code": ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    "no width": ({"hidden_size": None}, r"has no \['hidden_size'\]"),
    "no theta": ({"rope_theta": None}, "no rope_theta"),
    "heads": ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads = 3"),
    "odd width": ({"head_dim": 7}, "head_dim = 7 is odd"),
}


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_mathematics_that_is_not_implemented_is_refused(changes, message, tmp_path):
    config = lm_params.to_hf(CONFIG)
    del config["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message) as caught:
        hf.load_config(tmp_path)
    assert str(tmp_path) in str(caught.value)


MOE, GEMMA3, MISTRAL, QWEN2 = (
    MODELS[n] for n in ("qwen3_moe", "gemma3_text", "mistral, sliding", "qwen2")
)
UNSUPPORTED_OF = {
    "dense layers among routed ones": (MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
    "every second layer routed": (MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    "routed and sliding": (MOE, {"use_sliding_window": True}, "use_sliding_window = True"),
    "two numbers of experts": (MOE, {"num_local_experts": 8}, r"two num_experts, \[4, 8\]"),
    "no experts": (
        MOE,
        {"num_experts": None},
        r"needs sizes of its experts; \{'num_experts': None",
    ),
    "more than all experts": (MOE, {"num_experts_per_tok": 5}, "5 is more than num_experts = 4"),
    "capped logits": (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
    "capped scores": (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    "both ways": (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention = T"),
    "exact gelu": (GEMMA3, {"hidden_activation": "gelu"}, "hidden_activation = 'gelu'"),
    "one rope for two": (
        GEMMA3,
        {"rope_parameters": {"rope_type": "default"}},
        r"rope_parameters of a gemma3_text model has \['rope_type'\]",
    ),
    "yarn in gemma": (
        GEMMA3,
        {
            "rope_parameters": None,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        },
        "only rope_type 'linear' on the full layers.*YarnRope",
    ),
    "full layers in mistral": (
        MISTRAL,
        {"layer_types": ["full_attention", "sliding_attention"]},
        "in a mistral model, which is 'sliding_attention' throughout with sliding_window = 5",
    ),
    "no bias": (QWEN2, {"attention_bias": False}, "attention_bias = False"),
}


@pytest.mark.parametrize(
    ("cfg", "changes", "message"), UNSUPPORTED_OF.values(), ids=UNSUPPORTED_OF.keys()
)
def test_what_one_architecture_can_ask_for_and_is_not_implemented_is_refused(cfg, changes, message):
    with pytest.raises(ValueError, match=message):
        lm_params.from_hf(lm_params.to_hf(cfg) | changes)


@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS.keys())
def test_an_unknown_field_is_named_in_every_architecture(cfg):
    with pytest.raises(ValueError, match=f"unknown field zeta in .* this {cfg.architecture} model"):
        lm_params.from_hf(lm_params.to_hf(cfg) | {"zeta": 2.0})
