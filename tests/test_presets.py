"""Presets: each says what it is, has no problem, and its tiny form makes two steps."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import microworld, problems, train
from gopd_jax.microworld import dataset
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.planning import abstract

# Every preset with the words of its argument; test_every_preset_is_listed compares with the files.
ARGUMENTS = {
    "opd": [None],
    "exopd": [None],
    "interpolate": [None],
    "strong_to_weak": [None, "student", "teacher"],
    "sft": [None],
    "grpo": [None, "math", "code"],
    "opsd": [None, "ema"],
    "opd_plus": [None, "jsd", "forward_kl", "jeffreys", "hellinger", "skew_forward"],
    "gkd": [None],
    "minillm": [None],
    "distillm": [None, "forward"],
    "vopd": [None, "value"],
    "eopd": [None],
    "reopold": [None, "entropy"],
    "gae_opd": [None],
    "cr_opd": [None],
    "kdrl": [None],
    "qwen3": [None, "1.7b", "4b_moe", "8b"],
}
EVERY = [(name, word) for name, words in ARGUMENTS.items() for word in words]
ON_THE_MICROWORLD = [pair for pair in EVERY if pair[0] != "qwen3"]


def preset(name, arg=None):
    return importlib.import_module(f"configs.{name}").get_config(arg)


def shrunk(word):
    return "tiny" if word is None else f"{word},tiny"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Random checkpoints by the shipped ones' names; the large ones are of another size."""
    root = tmp_path_factory.mktemp("presets")
    tiny.build(root)
    shutil.copytree(root / "base", root / "open_book")
    for seed, name in enumerate(("large_base", "large_teacher")):
        cfg = lm_params.from_hf(lm_params.to_hf(tiny.CFG) | {"hidden_size": 48})
        params = lm_params.init(cfg, jax.random.key(10 + seed))
        hf.save(root / name, cfg, params, dtype="bfloat16", tokenizer_dir=root / "tokenizer")
    return root


@pytest.fixture
def world(checkpoints, tmp_path, monkeypatch):
    """The microworld with random models and few problems; runs are written under tmp_path."""
    for module in (microworld, importlib.import_module("gopd_jax.microworld.preset")):
        monkeypatch.setattr(module, "path", lambda name: str(checkpoints / name))
    monkeypatch.setattr(dataset, "ROWS", {"train": 64, "test": 16})
    monkeypatch.setenv("GOPD_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_preset_is_listed():
    files = (tiny.REPOSITORY / "configs").glob("*.py")
    assert {file.stem for file in files} - {"__init__"} == ARGUMENTS.keys()


@pytest.mark.parametrize(("name", "word"), ON_THE_MICROWORLD)
@pytest.mark.parametrize("form", [lambda word: word, shrunk], ids=["whole", "tiny"])
def test_a_preset_has_neither_problems_nor_settings_without_effect(world, name, word, form):
    config = preset(name, form(word))
    assert config.problems() == []
    assert config.notes() == []


@pytest.mark.parametrize(("name", "word"), EVERY)
def test_the_tiny_form_is_small_and_of_the_same_method(name, word):
    whole, small = preset(name, word), preset(name, shrunk(word))
    assert small.objective == whole.objective
    assert small.workdir != whole.workdir
    assert (small.steps, small.evaluation.problems) == (2, 4)
    assert small.batch.prompts * small.batch.rollouts <= 16


def test_a_checkpoint_that_is_not_there_is_a_problem_and_not_an_exception(monkeypatch, tmp_path):
    module = importlib.import_module("gopd_jax.microworld.preset")
    monkeypatch.setattr(module, "path", lambda name: str(tmp_path / name))
    found = preset("exopd").problems()
    roles = ("student", "reference", "teachers.math", "teachers.code")
    assert sorted(problem.split(".path is")[0] for problem in found) == sorted(roles)


def test_qwen3_names_each_placeholder_and_nothing_else():
    found = preset("qwen3").problems()
    placeholders = re.findall(r"^(\S+) is '/(?:models|data)/", "\n".join(found), re.MULTILINE)
    models = ["student.path", "reference.path", "teachers.math.path", "teachers.code.path"]
    assert sorted(placeholders) == sorted([*models, "data.train", "data.test"])
    assert len(found) == len(placeholders)
    assert all(f"--config.{key}=" in text for key, text in zip(placeholders, found))


def test_qwen3_is_the_papers_recipe():
    settings = {key: value for key, value, _ in problems.leaves(preset("qwen3"))}
    recipe = {
        "objective.lam": 1.25,
        "objective.reduction": "sequence_mean",
        "batch.prompts": 1024,
        "batch.rollouts": 1,
        "data.prompt_length": 2048,
        "sampling.completion_length": 16384,
        "sampling.temperature": 1.0,
        "optimizer.learning_rate": 1e-5,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": 0.01,
        "optimizer.clip_norm": 1.0,
        "optimizer.b1": 0.9,
        "optimizer.b2": 0.999,
        "steps": 50,
    }
    assert {key: settings[key] for key in recipe} == recipe
    rows = settings["batch.prompts"] * settings["batch.rollouts"]
    assert rows % (settings["batch.microbatches"] * settings["mesh.fsdp"]) == 0


@pytest.mark.parametrize("word", ["1.7b", "4b_moe", "8b"])
def test_qwen3_of_a_published_size_differs_in_its_models_alone_and_needs_data(word):
    config, default = preset("qwen3", word), preset("qwen3")
    assert [text.split(" ")[0] for text in config.problems()] == ["data.train", "data.test"]
    assert config.student.path == config.reference.path
    for model in (config.student, *config.teachers.values()):
        cfg, _ = abstract.model_config(model.path)
        assert cfg.num_key_value_heads % config.mesh.tensor == 0
        assert cfg.max_position_embeddings >= 2048 + 16384
    apart = ("teachers.", "routes.")
    values, same = (
        {key: x for key, x, _ in problems.leaves(c) if not key.startswith(apart)}
        for c in (config, default)
    )
    differ = {key for key in values if values[key] != same[key]}
    assert differ == {"workdir", "student.path", "reference.path"}


@pytest.mark.parametrize(("name", "word"), EVERY)
def test_no_two_roles_share_an_object(name, word):
    # A flag changes a model in place: --config.reference.path must leave the student alone.
    config = preset(name, word)
    models = [config.student, config.reference, *config.teachers.values()]
    models = [model for model in models if model is not None]
    assert len({id(model) for model in models}) == len(models)


def test_the_methods_differ_as_their_names_say():
    def method(name, arg=None):
        c = preset(name, arg)
        o, path = c.objective, c.reference and c.reference.path
        reference = path and os.path.basename(path)
        return o.source, o.advantage, o.lam, reference, c.batch.rollouts, c.data.tasks

    both = ("math", "code")
    assert method("opd") == ("student", "gopd", 1.0, None, 1, both)
    assert method("exopd") == ("student", "gopd", 1.25, "base", 1, both)
    assert method("interpolate") == ("student", "gopd", 0.5, "base", 1, both)
    assert method("strong_to_weak") == method("strong_to_weak", "student") == method("exopd")
    assert method("strong_to_weak", "teacher") == ("student", "gopd", 1.25, "large_base", 1, both)
    assert method("sft") == ("teacher", "imitation", 1.0, None, 1, both)
    assert method("grpo") == ("student", "grpo", 1.0, None, 8, both)
    assert method("grpo", "code") == ("student", "grpo", 1.0, None, 8, ("code",))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_word_lists_the_known(name):
    known = sorted({"tiny", *(word for word in ARGUMENTS[name] if word)})
    with pytest.raises(ValueError, match="'fast'") as error:
        preset(name, "fast,tiny")
    assert sorted(re.findall(r"'([\w.]+)'", str(error.value).split("the words are")[1])) == known


@pytest.mark.parametrize(
    ("name", "arg"), [("strong_to_weak", "teacher,student"), ("grpo", "math,code")]
)
def test_words_that_exclude_each_other_are_an_error(name, arg):
    with pytest.raises(ValueError, match="give one of them"):
        preset(name, arg)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_docstring_has_formula_source_commands_and_result(name):
    text = importlib.import_module(f"configs.{name}").__doc__
    assert f"python -m gopd_jax.main --config=configs/{name}.py" in text
    assert re.search(r"^ +A = |^A = ", text, re.MULTILINE)
    assert "arXiv" in text
    assert len(re.findall(r"^Expected: ", text, re.MULTILINE)) == 1
    settings = [key for key, _, _ in problems.leaves(preset(name))]
    for flag in re.findall(r"--config\.([\w.]*\w)", text):
        assert flag in settings, flag
    for word in filter(None, ARGUMENTS[name]):
        assert word == "student" or f"{name}.py:{word}" in text or f'"{word}"' in text


@pytest.mark.parametrize("name", ["exopd", "qwen3"])
def test_a_preset_is_read_by_its_path_from_any_directory(tmp_path, name):
    # A directory of the user's own by the same name must not come between.
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").touch()
    program = (
        "import sys; from absl import flags; from ml_collections import config_flags;"
        "holder = config_flags.DEFINE_config_file('config'); flags.FLAGS(sys.argv);"
        "print(holder.value.workdir)"
    )
    for cwd, path in ((tiny.REPOSITORY, "configs"), (tmp_path, tiny.REPOSITORY / "configs")):
        done = subprocess.run(
            [sys.executable, "-c", program, f"--config={path}/{name}.py:tiny"],
            cwd=cwd,
            env=os.environ | {"PYTHONPATH": str(tiny.REPOSITORY)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.stdout == f"runs/{name}-tiny\n", done.stderr


# A critic, a loss over the vocabulary, the verifiers' reward, another prompt of the teacher's.
BEHIND_PREFLIGHT = "gae_opd", "gkd", "kdrl", "opsd"
ALONE = [(name, word) for name, word in EVERY if word or name not in BEHIND_PREFLIGHT]


@pytest.mark.parametrize(
    ("name", "word"),
    [pytest.param(*p, marks=[] if p[0] == "exopd" else pytest.mark.slow) for p in ALONE],
)
def test_the_tiny_form_makes_two_steps(world, name, word):
    config = preset(name, shrunk(word))
    config.preflight = "off"  # of random models
    makes_two_steps(config)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEHIND_PREFLIGHT)
def test_the_tiny_form_begins_with_preflight_and_makes_two_steps(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    makes_two_steps(preset(name, "tiny"))


def makes_two_steps(config):
    summary = train.run(config)
    assert (summary.step, config.steps) == (2, 2)
    rows = [json.loads(line) for line in (summary.workdir / "metrics.jsonl").open()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    assert (summary.export / "model.safetensors").is_file()
