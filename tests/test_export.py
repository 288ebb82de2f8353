"""A student out of a run in the format that it came in, bit for bit, with a card."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from families import MODELS, random_params, torch_load, torch_logits
from safetensors.numpy import load_file, save_file

from gopd_jax import card, export, results, sharding, train
from gopd_jax.models import hf, safetensors_out
from gopd_jax.models import params as lm_params

KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "merges.txt")


def source(path, cfg, dtype=ml_dtypes.bfloat16, tied_head=False, **changes):
    """A checkpoint as others write it: fields and files that mean nothing to us, odd spacing."""
    path.mkdir(parents=True)
    hf.save(path / "ours", cfg, random_params(cfg))
    tensors = {k: v.astype(dtype) for k, v in load_file(path / "ours" / hf.WEIGHTS).items()}
    if tied_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors |= {name: tensors[name].astype(dt) for name, dt in changes.items()}
    save_file(tensors, path / hf.WEIGHTS, metadata={"format": "pt"})
    config = json.loads((path / "ours" / "config.json").read_text())
    del config["dtype"]
    config |= {
        "torch_dtype": np.dtype(dtype).name,
        "transformers_version": "4.51.0",
        "_name_or_path": "né",
    }
    shutil.rmtree(path / "ours")
    (path / "config.json").write_text(json.dumps(config, indent=3, ensure_ascii=False))
    for name in KEPT:
        (path / name).write_text(f'{{"file": "{name}"}}')
    (path / "modeling_x.py").write_text("raise SystemExit")
    return path


def same_tensors(got, want):
    got, want = load_file(got), load_file(want)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype, name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("tied_head", [False, True])
@pytest.mark.parametrize("load", ["float32", "stored"])
def test_import_and_export_give_the_same_files(tmp_path, dtype, tied_head, load):
    cfg = MODELS["qwen3"]
    path = source(tmp_path / "source", cfg, dtype, tied_head)
    params = hf.load_params(path, cfg, dtype=load)
    hf.export(tmp_path / "out", params, path)
    for name in (hf.WEIGHTS, "config.json", *KEPT):
        assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes(), name
    assert {f.name for f in (tmp_path / "out").iterdir()} == {hf.WEIGHTS, "config.json", *KEPT}


def test_tensors_of_several_dtypes_and_an_untied_head_come_back_too(tmp_path):
    cfg = MODELS["llama 3.1"]
    odd = {"model.layers.1.input_layernorm.weight": np.float32, "lm_head.weight": np.float16}
    path = source(tmp_path / "source", cfg, **odd)
    params = hf.load_params(path, cfg, dtype="stored")
    norm, head = params["layers"]["attention_norm"], params["head"]
    assert (norm.dtype, head.dtype) == (np.float32, np.float16)  # the layers' dtypes differ
    assert params["layers"]["q"].dtype == params["embed"].dtype == ml_dtypes.bfloat16
    hf.export(tmp_path / "out", params, path)
    assert (tmp_path / "out" / hf.WEIGHTS).read_bytes() == (path / hf.WEIGHTS).read_bytes()


def test_what_is_kept_of_a_source_exports_like_the_source(tmp_path):
    cfg = MODELS["qwen3"]
    path = source(tmp_path / "source", cfg, tied_head=True)
    params = hf.load_params(path, cfg)
    hf.keep(path, tmp_path / "kept")
    assert not list((tmp_path / "kept").glob("*.safetensors")) + list(tmp_path.glob("kept/*.py"))
    hf.export(tmp_path / "a", params, path)
    shutil.rmtree(path)
    hf.export(tmp_path / "b", params, tmp_path / "kept")
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b").iterdir())
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("stop", [None, ("<|im_start|>", "<|im_end|>")])
def test_an_export_ends_where_the_student_was_trained_to(tmp_path, stop):
    tiny.build(tmp_path)
    begun = train.begin(tiny.config(tmp_path, sampling={"stop": stop}))
    results.write_run(tmp_path / "run", begun.this)
    file = tmp_path / "run" / results.SOURCE / "generation_config.json"
    before = json.loads((tmp_path / "base" / "generation_config.json").read_text())
    ends = before["eos_token_id"] if stop is None else list(begun.this.recipe.eos_ids)
    assert json.loads(file.read_text()) == before | {"eos_token_id": ends}
    assert len(ends) == (88 if stop is None else 2)


def test_another_dtype_changes_the_tensors_and_that_field_of_the_config(tmp_path):
    cfg = MODELS["qwen3"]
    path = source(tmp_path / "source", cfg)
    params = hf.load_params(path, cfg)
    hf.export(tmp_path / "out", params, path, dtype="float32")
    config, was = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", path))
    assert config == was | {"torch_dtype": "float32"}
    assert list(config) == list(was)
    got = hf.load_params(tmp_path / "out", cfg, dtype="stored")
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, got, params)
    hf.export(tmp_path / "same", params, path, dtype="bfloat16")
    assert (tmp_path / "same" / "config.json").read_bytes() == (path / "config.json").read_bytes()


@pytest.mark.parametrize("cfg", [MODELS["qwen3"], MODELS["llama 3.1"]], ids=["tied", "untied"])
def test_large_exports_are_split_under_the_names_of_hugging_face(tmp_path, cfg):
    path = source(tmp_path / "source", cfg)
    params, limit = hf.load_params(path, cfg), 12_000
    hf.export(tmp_path / "out", params, path, max_shard_bytes=limit)
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    n = len(files)
    assert n > 2
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    index, found = json.loads((tmp_path / "out" / hf.INDEX).read_text()), {}
    for file in files:
        tensors = load_file(tmp_path / "out" / file)
        assert sum(array.nbytes for array in tensors.values()) <= limit
        assert {index["weight_map"][name] for name in tensors} == {file}
        found |= tensors
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    save_file(found, tmp_path / "joined")
    same_tensors(tmp_path / "joined", path / hf.WEIGHTS)
    # A layer lies together, in the first file the embedding: what loads by layers reads in order.
    assert index["weight_map"]["model.embed_tokens.weight"] == files[0]
    first, last = (index["weight_map"][f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
    assert first < last
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(tmp_path / "out", cfg), params)


def test_a_file_is_byte_for_byte_what_the_library_writes(tmp_path):
    draw = np.random.default_rng(0).normal
    arrays = {
        **{f"b{i}": draw(size=(i + 1, 3)).astype(ml_dtypes.bfloat16) for i in (2, 0, 1)},
        **{f"f{i}": draw(size=5).astype(np.float32) for i in (1, 0)},
        **{"a": draw(size=(2, 2, 2)).astype(np.float16), 'odd "né"': np.ones(3, np.float32)},
    }
    spelled = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}
    tensors = [
        safetensors_out.Tensor(name, spelled[x.dtype.name], x.shape, lambda x=x: x)
        for name, x in arrays.items()
    ]
    safetensors_out.write(tmp_path, tensors, max_shard_bytes=10**6)
    save_file(arrays, tmp_path / "want", metadata={"format": "pt"})
    assert (tmp_path / hf.WEIGHTS).read_bytes() == (tmp_path / "want").read_bytes()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_a_sharded_student_is_written_like_a_whole_one(tmp_path, make_mesh, shape):
    cfg = MODELS["qwen3"] if shape[2] > 1 else MODELS["llama 3.1"]
    path = source(tmp_path / "source", cfg, np.float16)
    layout = sharding.shardings(make_mesh(shape), lm_params.logical_axes(cfg))
    if shape[2] > 1:  # the vocabulary of 97 does not divide
        layout = sharding.shardings(
            make_mesh(shape), lm_params.logical_axes(cfg), (("heads", "tensor"), ("embed", "fsdp"))
        )
    hf.export(tmp_path / "out", hf.load_params(path, cfg, shardings=layout), path)
    assert (tmp_path / "out" / hf.WEIGHTS).read_bytes() == (path / hf.WEIGHTS).read_bytes()


def test_a_wider_dtype_is_no_cure_for_weights_that_are_not_finite(tmp_path):
    cfg = MODELS["qwen3"]
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), random_params(cfg))
    with pytest.raises(ValueError, match="in F32; no dtype holds these") as refused:
        hf.save(tmp_path / "out", cfg, params)
    assert "write with dtype" not in str(refused.value)


def test_weights_beyond_a_dtypes_range_and_wrong_options_are_refused(tmp_path):
    cfg = MODELS["qwen3"]
    path = source(tmp_path / "source", cfg, np.float16)
    params = jax.tree.map(np.array, hf.load_params(path, cfg))
    with pytest.raises(ValueError, match=r"dtype is 'int8'; it is one of \['stored', 'bfloat16'"):
        hf.export(tmp_path / "out", params, path, dtype="int8")
    with pytest.raises(ValueError, match="max_shard_bytes is 0; it is positive"):
        hf.export(tmp_path / "out", params, path, max_shard_bytes=0)
    params["final_norm"][0] = 1e5
    with pytest.raises(ValueError, match=r"norm.weight holds .* infinite in F16; .* float32"):
        hf.export(tmp_path / "out", params, path)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]
    hf.export(tmp_path / "out", params, path, dtype="float32")


@pytest.mark.torch
@pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_transformers_reads_an_export_as_it_reads_the_source(tmp_path, cfg, dtype):
    path = source(tmp_path / "source", cfg, dtype, tied_head=cfg.tie_word_embeddings)
    (path / "generation_config.json").unlink()
    hf.export(tmp_path / "out", hf.load_params(path, cfg), path, max_shard_bytes=12_000)
    from transformers import AutoModelForCausalLM

    was, now = (AutoModelForCausalLM.from_pretrained(p) for p in (path, tmp_path / "out"))
    assert was.config.to_dict() | {"_name_or_path": ""} == now.config.to_dict() | {
        "_name_or_path": ""
    }
    assert was.dtype == now.dtype
    assert str(now.dtype) == f"torch.{np.dtype(dtype).name}"
    np.testing.assert_array_equal(
        torch_logits(torch_load(path)), torch_logits(torch_load(tmp_path / "out"))
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a finished run of 4 steps from a bfloat16 student, whose source has gone."""
    root = tmp_path_factory.mktemp("tiny")
    tiny.build(root)
    hf.save(
        root / "base",
        tiny.CFG,
        hf.load_params(root / "base", tiny.CFG),
        dtype="bfloat16",
        tokenizer_dir=root / "tokenizer",
    )
    changes = {"evaluation": {"every": None, "teachers": False}, "steps": 4}
    summary = train.run(tiny.config(root, **changes))
    assert summary.step == 4
    shutil.move(root / "base", root / "moved")
    (root / "preset.py").unlink()
    return root / "run"


@pytest.mark.slow
def test_the_command_writes_what_the_run_wrote_at_its_end(run, tmp_path, capsys):
    export.main([f"--workdir={run}", f"--out={tmp_path / 'out'}"])
    said = f"model after step 4: {tmp_path / 'out'}"
    assert capsys.readouterr().out == f"{said}\n"
    export.main([f"--workdir={run}", f"--out={tmp_path / 'out'}"])
    assert capsys.readouterr().out == f"{said} (in the place of the checkpoint that was there)\n"
    names = {file.name for file in (run / "export").iterdir()}
    assert names == {file.name for file in (tmp_path / "out").iterdir()}
    assert {hf.WEIGHTS, "config.json", "tokenizer.json", "README.md"} <= names
    for name in names:
        got, want = ((path / name).read_bytes() for path in (tmp_path / "out", run / "export"))
        assert got == want, name
    source_config = run.parent / "moved" / "config.json"
    assert (tmp_path / "out" / "config.json").read_bytes() == source_config.read_bytes()
    stored = load_file(tmp_path / "out" / hf.WEIGHTS)
    assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_an_earlier_step_and_another_dtype(run, tmp_path):
    assert export.export(run, tmp_path / "2", step=2, dtype="float32", max_shard_gb=1e-4) == 2
    assert export.export(run, tmp_path / "4", dtype="float32") == 4
    assert (tmp_path / "2" / hf.INDEX).is_file()
    early, late, rounded = (
        hf.load_params(path, tiny.CFG) for path in (tmp_path / "2", tmp_path / "4", run / "export")
    )
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (early, late)))]
    assert min(moved) > 0
    exact = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), late)
    jax.tree.map(np.testing.assert_array_equal, exact, rounded)
    assert "2 steps of" in (tmp_path / "2" / "README.md").read_text()


def test_the_card_says_what_the_student_was_made_of(run):
    text, said = (run / "export" / "README.md").read_text(), card.read_run(run)
    for role in ("student", "reference", "teacher:math", "teacher:code"):
        model = said["models"][role]
        assert f"| {role} | {model['path']} | {model['parameters']:,} | {model['digest']} |" in text
    assert f"`{said['formula']}`" in text
    assert "λ = 1.25; completions written by: student" in text
    assert "4 steps of 8 x 1 completions by gopd_jax 0." in text
    assert f"| train | {said['config']['data']['train']} | {said['identity']['data.train content']}"
    rows = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 4}
    for row in rows:
        figure = f"{100 * row['accuracy']:.1f} ± {100 * row['stderr']:.1f} %"
        assert f"| student | {row['step']} | {row['task']} | {figure} | 3 x 2 |" in text
    settings = text.split("```json\n")[1].split("```")[0]
    assert json.loads(settings) == said["config"]


def test_the_card_of_a_run_that_was_evaluated_on_one_problem(run, tmp_path):
    for name in ("run.json", "evaluation.jsonl"):
        shutil.copy(run / name, tmp_path)
    file = tmp_path / "evaluation.jsonl"
    rows = [json.loads(line) | {"stderr": None} for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert f"| math | {100 * rows[0]['accuracy']:.1f} % | 3 x 2 |" in card.text(tmp_path, 4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task_lam": {"code": 2.0}}, "- λ = 1.25 on math, 2.0 on code; completions"),
        ({"task_lam": {"math": 1.5, "code": 2.0}}, "- λ = 1.5 on math, 2.0 on code; completions"),
        ({"lam_by_row": True}, "- λ = 1.25, or a row's own; completions"),
        ({"lam_schedule": "linear(steps=9)"}, "- λ = 1.25, linear(steps=9); completions"),
        ({"advantage": "grpo"}, "- completions written by"),
    ],
)
def test_the_card_names_the_lambda_that_was_used(run, tmp_path, changes, says):
    said = card.read_run(run)
    said["config"]["objective"] |= changes
    (tmp_path / "run.json").write_text(json.dumps(said))
    assert says in card.text(tmp_path, 4)


def test_what_cannot_be_exported_is_said(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for arguments, words in (
        ([f"--workdir={tmp_path}"], "has no run.json, so it is no run's workdir"),
        ([f"--workdir={run}", "--step=3"], r"has checkpoints of the steps [2, 4], not of 3"),
        ([f"--workdir={run}", "--max_shard_gb=nan"], "max_shard_gb is nan; it is a positive"),
        ([f"--workdir={run}", f"--out={run}"], "would replace the run itself"),
        ([f"--workdir={run}", f"--out={run.parent}"], "would replace the run itself"),
        ([f"--workdir={run}", "--out=/proc/x/e"], "/proc/x/e could not be written"),
        ([f"--workdir={run}", f"--out={run}/run.json/x"], "run.json/x cannot be written"),
    ):
        out = [f"--out={tmp_path / 'out'}"] if "--out" not in str(arguments) else []
        with pytest.raises(SystemExit, match="2"):
            export.main([*arguments, *out])
        assert words in capsys.readouterr().err
    shutil.rmtree(copy / "source")
    with pytest.raises(ValueError, match="copy has no source, which a run writes when it starts"):
        export.export(copy, tmp_path / "out")
    shutil.copytree(run / "source", copy / "source")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ValueError, match="copy has no checkpoint yet"):
        export.export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_run_is_made_from_is_not_replaced(run, tmp_path, capsys):
    copy, models = tmp_path / "copy", tmp_path / "models"
    shutil.copytree(run, copy)
    said = card.read_run(copy)
    for role, model in said["models"].items():
        model["path"] = str(models / role.replace(":", "_"))
        shutil.copytree(copy / "export", model["path"])
    said["models"]["reference"]["path"] = "an/organisation@main"  # on the hub, and so nowhere here
    (copy / "run.json").write_text(json.dumps(said))
    (models / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(copy / "source")
    for out, words in (
        (copy / "source", "would replace what its exports are made from"),
        (tmp_path / "link", "would replace what its exports are made from"),
        (copy / "source" / "x", "would lie in what its exports are made from"),
        (copy / "checkpoints", "would replace its checkpoints"),
        (copy / "checkpoints" / "x", "would lie in its checkpoints"),
        (models / "student", "would replace the run's model of student"),
        (models / "teacher_math", "would replace the run's model of teacher:math"),
        (models, "would replace the run's model of student"),
    ):
        files = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")}
        with pytest.raises(SystemExit, match="2"):
            export.main([f"--workdir={copy}", f"--out={out}"])
        assert words in capsys.readouterr().err
        assert {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*")} == files
    for out in (copy / "export", copy / "beside"):
        assert export.export(copy, out, step=2) == 2


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    sums = next((copy / "checkpoints" / "4" / "checksums").glob("metadata"))
    saved = json.loads(sums.read_text())
    saved[".params['embed']"] += 1
    sums.write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"cannot be read: not what was saved is .params\['embed'"):
        export.export(copy, tmp_path / "out")
    assert export.export(copy, tmp_path / "out", step=2) == 2
