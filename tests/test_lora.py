"""Adapters: what they start as, that they alone train, and where they go in the end."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from families import MODELS, random_params
from safetensors.numpy import load_file

from gopd_jax import checkpoint, export, hub, step, train
from gopd_jax.models import decoder as lm
from gopd_jax.models import hf, lora
from gopd_jax.models import params as lm_params
from gopd_jax.models.params import Lora
from gopd_jax.recipe import init_state

LORA = Lora(rank=3, alpha=6.0, targets=r"(q|o|down)_proj")
KEY = jax.random.key(0)


def adapted(cfg, params, seed=0):
    """The model with adapters that all have an effect."""
    cfg = dataclasses.replace(cfg, lora=LORA)
    trained = jax.tree.map(
        lambda x: jax.random.normal(jax.random.key(seed), x.shape) / 3, lora.init(cfg, KEY)
    )
    return cfg, lora.join(trained, params)


def logits(cfg, params):
    tokens_BL = jax.random.randint(KEY, (3, 9), 0, cfg.vocab_size)
    decoder = lm.Decoder(cfg)
    valid_BL = jnp.ones(tokens_BL.shape, bool)
    return lm.logits(decoder, params, lm.hidden(decoder, params, tokens_BL, valid_BL))


@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen2", "gemma3"])
def test_merged_weights_are_the_adapted_model(name):
    cfg = next(cfg for key, cfg in MODELS.items() if key.startswith(name))
    params = jax.tree.map(jnp.asarray, random_params(cfg))
    with_lora, whole = adapted(cfg, params)
    merged = lora.merge(with_lora, whole)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    want = logits(with_lora, whole)
    np.testing.assert_allclose(logits(cfg, merged), want, atol=2e-4, rtol=2e-4)
    assert np.abs(want - logits(cfg, params)).max() > 0.1
    # A x in B's place: the oracle of one matrix, by hand.
    a, b = whole["layers"]["o_lora_a"][1], whole["layers"]["o_lora_b"][1]
    change = 2.0 * np.einsum("hei,io->heo", a, b)
    got = merged["layers"]["o"][1] - params["layers"]["o"][1]
    np.testing.assert_allclose(got, change, atol=1e-5)


def test_new_adapters_change_nothing():
    cfg = dataclasses.replace(MODELS["qwen3"], lora=LORA)
    params = jax.tree.map(jnp.asarray, random_params(MODELS["qwen3"]))
    whole = lora.join(lora.init(cfg, KEY), params)
    np.testing.assert_array_equal(logits(cfg, whole), logits(MODELS["qwen3"], params))
    assert not any(np.any(x) for k, x in whole["layers"].items() if k.endswith("_lora_b"))
    assert all(np.std(x) > 0.05 for k, x in whole["layers"].items() if k.endswith("_lora_a"))
    trained, frozen = lora.split(whole)
    assert {*trained["layers"]} == {f"{n}_lora_{p}" for n in ("q", "o", "down") for p in "ab"}
    assert frozen["layers"]["q"] is params["layers"]["q"]  # nothing is copied
    assert lora.split(params) == (params, None)


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("qwen3", "nothing", "finds none of .*self_attn.q_proj"),
        ("qwen3_moe", "gate_proj", r"finds \['model.layers.*experts.*not implemented"),
        ("qwen3_moe", "mlp.gate", "not implemented"),
    ],
)
def test_targets_that_cannot_be_are_refused(name, targets, said):
    cfg = next(cfg for key, cfg in MODELS.items() if key.startswith(name))
    with pytest.raises(ValueError, match=said):
        lm_params.table(dataclasses.replace(cfg, lora=dataclasses.replace(LORA, targets=targets)))


def setting_with_adapters(setting, shape=(1, 1, 1)):
    recipe, params, frozen, prompts = setting(shape)
    cfg, whole = adapted(recipe.student.cfg, params)
    recipe = dataclasses.replace(
        recipe,
        student=lm.Decoder(cfg),
        reference=lm.Decoder(lora.base_config(cfg)),
    )
    frozen = frozen.replace(base=params, reference=params)
    return recipe, whole, frozen, prompts


def test_a_step_trains_the_adapters_alone_by_the_gradient_of_the_merged_model(setting):
    recipe, whole, frozen, prompts = setting_with_adapters(setting)
    generate, score, update = step.staged(recipe)
    state = init_state(recipe, whole)
    assert {*state.params["layers"]} == {f"{n}_lora_{p}" for n in ("q", "o", "down") for p in "ab"}
    rollout = generate(state.params, frozen, prompts, KEY)
    scores = score(frozen, rollout)
    cfg = recipe.student.cfg
    plain = lm.Decoder(lora.base_config(cfg))
    mask_BT = rollout.mask_BT

    def loss(trained):
        merged = lora.merge(cfg, lora.join(trained, frozen.base))
        hidden_BLD = lm.hidden(plain, merged, rollout.tokens_BL, rollout.valid_BL)
        logits_BTV = lm.logits(plain, merged, hidden_BLD)[:, :-1, : recipe.n_vocab]
        logp_BTV = jax.nn.log_softmax(logits_BTV / recipe.temperature)
        logp_BT = jnp.take_along_axis(logp_BTV, rollout.tokens_BL[:, 1:, None], -1)[..., 0]
        still_BT = jax.lax.stop_gradient(logp_BT)
        gap_BT = scores.teacher_BT - scores.ref_BT
        advantage_BT = 1.25 * gap_BT - (still_BT - scores.ref_BT)
        return -jnp.where(mask_BT, advantage_BT * logp_BT, 0.0).sum() / mask_BT.sum()

    before = jax.device_get(state.params)
    value, grads = jax.value_and_grad(loss)(state.params)
    updates, _ = recipe.optimizer.update(grads, state.opt_state, state.params)
    want = jax.tree.map(jnp.add, state.params, updates)
    got, metrics = update(state, rollout, scores, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-6), got.params, want)
    np.testing.assert_allclose(metrics["loss"].value(), value, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, jax.device_get(got.params))
    assert all(x > 1e-4 for x in jax.tree.leaves(moved))


@pytest.mark.parametrize("shape", [(2, 2, 2)])
def test_adapters_on_a_mesh(setting, shape):
    results = []
    for mesh in ((1, 1, 1), shape):
        recipe, whole, frozen, prompts = setting_with_adapters(setting, mesh)
        state = init_state(recipe, whole)
        state, _, _ = step.fused(recipe)(state, frozen, prompts, KEY)
        results.append(jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *results)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with adapters."""
    from gopd_jax.config import Lora as Settings

    root = tmp_path_factory.mktemp("lora")
    tiny.build(root)
    config = tiny.config(root, steps=3, lora=Settings(rank=2, alpha=4.0))
    return root, config, train.run(config)


def test_a_run_shares_the_base_with_the_reference_and_keeps_adapters_alone(finished):
    root, config, summary = finished
    this = train.prepare(config)
    base, reference = this.frozen.base["layers"]["q"], this.frozen.reference["layers"]["q"]
    assert base is reference  # no second copy
    assert this.student.params["layers"]["q"] is base
    teacher = this.roles["teacher:math"]
    assert teacher.decoder.cfg.lora is None
    assert not any(lora.is_adapter(name) for name in teacher.params["layers"])
    kept = checkpoint.restore_params(
        summary.workdir, 3, lora.split(lm_params.abstract_params(this.student.decoder.cfg))[0]
    )
    assert all(lora.is_adapter(name) for name in kept["layers"])
    state = train.begin(config).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), kept)


def test_exports_of_a_run_with_adapters(finished, tmp_path):
    root, config, summary = finished
    cfg = hf.load_config(summary.export)
    merged = hf.load_params(summary.export, cfg)
    base = hf.load_params(root / "base", cfg)
    assert np.abs(merged["layers"]["q"] - base["layers"]["q"]).max() > 1e-4
    np.testing.assert_array_equal(merged["embed"], base["embed"])
    export.export(config.workdir, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(summary.export / "model.safetensors").items():
        np.testing.assert_array_equal(again[name], tensor, err_msg=name)
    export.export(config.workdir, tmp_path / "adapter", adapter=True)
    described = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (described["r"], described["lora_alpha"]) == (2, 4.0)
    assert described["base_model_name_or_path"] == str(root / "base")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    a, b = tensors[f"{q}.lora_A.weight"], tensors[f"{q}.lora_B.weight"]
    name = "model.layers.0.self_attn.q_proj.weight"
    change = again[name] - load_file(root / "base" / "model.safetensors")[name]
    np.testing.assert_allclose(change, 2.0 * b @ a, atol=1e-6)


def test_an_export_refuses_another_base(finished, tmp_path):
    root, config, _ = finished
    file = root / "base" / "config.json"
    before = file.read_text()
    file.write_text(before + "\n")
    try:
        with pytest.raises(ValueError, match="adapters were trained beside"):
            export.export(config.workdir, tmp_path / "out")
        export.export(config.workdir, tmp_path / "adapter", adapter=True)
    finally:
        file.write_text(before)


def test_an_adapter_replaces_an_adapter_and_nothing_else(finished, tmp_path):
    _, config, _ = finished
    for _ in range(2):
        export.export(config.workdir, tmp_path / "adapter", adapter=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ValueError, match="thesis exists and is not a checkpoint"):
        export.export(config.workdir, tmp_path / "thesis", adapter=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="leave out --dtype"):
        export.export(config.workdir, tmp_path / "adapter", adapter=True, dtype="bfloat16")


def test_a_longer_run_may_be_exported_in_another_form(finished, tmp_path):
    """The export that a run has left gives way to the next, adapter or merged."""
    _, config, summary = finished
    for form, file in (("adapter", "adapter_model.safetensors"), ("merged", "config.json")):
        again = dataclasses.replace(config, lora=dataclasses.replace(config.lora, export=form))
        train.run(again)  # of which no step is left
        assert (summary.export / file).is_file()
    assert not (summary.export / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "base", "revision"),
    [("org/model@0123abc", "org/model", "0123abc"), ("./models/a@b", "./models/a@b", None)],
)
def test_an_adapter_names_its_base_as_peft_looks_it_up(tmp_path, name, base, revision):
    cfg = dataclasses.replace(MODELS["qwen3"], lora=LORA)
    assert hub.named(name) == (base, revision)
    where = {"base_model": base, "revision": revision, "card": "card"}
    lora.save_adapter(tmp_path / "out", cfg, lora.init(cfg, KEY), **where)
    described = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (described["base_model_name_or_path"], described["revision"]) == (base, revision)


@pytest.mark.torch
def test_peft_loads_the_adapter_to_the_same_logits(finished, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    root, config, summary = finished
    export.export(config.workdir, tmp_path / "adapter", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(root / "base", dtype="float32")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(summary.export, dtype="float32").eval()
    tokens = torch.arange(24).reshape(2, 12) + 5
    with torch.no_grad():
        got, want = model(tokens).logits, merged(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(root / "base", dtype="float32")(tokens).logits
    assert torch.allclose(got, want, atol=1e-4)
    assert (want - plain).abs().max() > 1e-3
