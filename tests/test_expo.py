"""Extrapolated weights by hand, and between checkpoints on disk."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel

from gopd_jax import expo
from gopd_jax.models import hf
from gopd_jax.models import tokenizer as hf_tokenizer


def test_extrapolation_by_hand():
    base = {"a": np.float32([1.0, 2.0]), "b": {"c": np.float32([[0.0]])}}
    first = {"a": np.float32([2.0, 2.0]), "b": {"c": np.float32([[4.0]])}}
    second = {"a": np.float32([4.0, 0.0]), "b": {"c": np.float32([[0.0]])}}
    got = expo.extrapolate(base, [first, second], alpha=0.25)
    # The means are [3, 1] and 2, so [3 + 2/4, 1 - 1/4] and 2 + 2/4.
    np.testing.assert_array_equal(got["a"], [3.5, 0.75])
    np.testing.assert_array_equal(got["b"]["c"], [[2.5]])
    np.testing.assert_array_equal(expo.extrapolate(base, [first], alpha=0)["a"], first["a"])


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf])
def test_alpha_has_to_be_finite_and_not_negative(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; it is a finite number >= 0"):
        expo.extrapolate({"a": np.zeros(2)}, [{"a": np.ones(2)}], alpha=alpha)


def test_extrapolation_is_between_models_of_one_shape():
    base = {"a": np.zeros((2, 3))}
    with pytest.raises(ValueError, match="no teacher"):
        expo.extrapolate(base, [], alpha=0.5)
    # [1, 3] would broadcast without a word.
    with pytest.raises(ValueError, match=r"teacher 1 .*'a'.* is \(1, 3\) and \(2, 3\)"):
        expo.extrapolate(base, [base, {"a": np.zeros((1, 3))}], alpha=0.5)
    with pytest.raises(ValueError, match=r"teacher 0 .*'b'.* is \(1,\) and None"):
        expo.extrapolate(base, [base | {"b": np.zeros(1)}], alpha=0.5)


@pytest.fixture
def checkpoints(tmp_path, make_model):
    """base, two teachers and a deeper model, with one tokenizer."""
    words = tmp_path / "words"
    write_tokenizer(words)
    for name, seed, n_layers in (("base", 0, 2), ("one", 1, 2), ("two", 2, 2), ("deep", 3, 3)):
        decoder, params = make_model(seed=seed, n_layers=n_layers)
        hf.save(tmp_path / name, decoder.cfg, params, tokenizer_dir=words)
    return tmp_path, decoder.cfg


def write_tokenizer(directory):
    directory.mkdir()
    tokenizer = tokenizers.Tokenizer(WordLevel({"?": 0, "<end>": 1, "a": 2}, "?"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")


def test_the_command_writes_a_checkpoint_between_the_given_ones(checkpoints, make_model):
    path, _ = checkpoints
    argv = [f"--base={path}/base", f"--teachers={path}/one,{path}/two", "--alpha=0.5"]
    expo.main([*argv, f"--out={path}/out"])
    cfg = hf.load_config(path / "out")
    got = hf.load_params(path / "out", cfg)
    base, one, two = (make_model(seed=seed)[1] for seed in (0, 1, 2))
    want = jax.tree.map(lambda w, a, b: 0.75 * (a + b) - 0.5 * w, base, one, two)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
    assert (path / "out" / "tokenizer.json").is_file()


def test_the_command_refuses_another_architecture(checkpoints, capsys):
    path, _ = checkpoints
    argv = [f"--base={path}/base", f"--teachers={path}/one,{path}/deep", "--alpha=0.5"]
    with pytest.raises(SystemExit) as exit_:
        expo.main([*argv, f"--out={path}/out"])
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert f"{path}/deep differs from {path}/base: num_hidden_layers is 3 and 2; " in said
    assert "models of one shape only" in said
    assert "vocab_size" not in said
    assert not (path / "out").exists()


def test_padding_may_differ_and_ends_may_not(checkpoints, capsys):
    path, _ = checkpoints
    file = path / "one" / "config.json"
    more = {"pad_token_id": 5, "max_position_embeddings": 99, "eos_token_id": 2}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    argv = f"--teachers={path}/one", "--alpha=0.5"
    expo.main([f"--base={path}/base", *argv, f"--out={path}/out"])
    assert (path / "out" / "model.safetensors").is_file()
    # What ends completions is said here, and config.json's field is not read beside it.
    own = hf_tokenizer.load(path / "base").eos_ids
    other = next(i for i in range(9) if i not in own)
    ends = json.dumps({"eos_token_id": [*own, other]})
    (path / "one" / "generation_config.json").write_text(ends)
    said = refused(path, capsys, *argv, f"--out={path}/other")
    assert f"completions of {path}/one end with [" in said
    assert "eos_token_id" in said


def test_a_teacher_that_is_the_base_is_refused(checkpoints, capsys):
    path, _ = checkpoints
    shutil.copytree(path / "base", path / "same")
    said = refused(
        path, capsys, f"--teachers={path}/one,{path}/same", "--alpha=0.5", f"--out={path}/out"
    )
    assert f"the weights of {path}/same are those of {path}/base" in said
    argv = [f"--base={path}/base", f"--teachers={path}/one,{path}/same", "--alpha=0"]
    expo.main([*argv, f"--out={path}/mean"])  # plain averaging, with the base too
    assert (path / "mean" / "model.safetensors").is_file()


def refused(path, capsys, *argv):
    """What the command says when it ends with status 2 and leaves every model as it was."""
    files = {f: f.read_bytes() for f in path.rglob("*") if f.is_file()}
    with pytest.raises(SystemExit) as exit_:
        expo.main([f"--base={path}/base", *argv])
    assert exit_.value.code == 2
    assert {f: f.read_bytes() for f in path.rglob("*") if f.is_file()} == files
    return capsys.readouterr().err


@pytest.mark.parametrize("out", ["base", "one", "two/../two", ".", "link"])
def test_the_models_of_an_extrapolation_are_not_replaced(checkpoints, capsys, out):
    path, _ = checkpoints
    (path / "base" / "README.md").write_text("of the base")
    (path / "config.json").write_text("{}")  # so that what lies above passes for a checkpoint
    (path / "link").symlink_to(path / "base")
    argv = [f"--teachers={path}/one,{path}/two", "--alpha=0.5", f"--out={path}/{out}"]
    assert "would replace" in refused(path, capsys, *argv)


@pytest.mark.parametrize("out", ["file/out", "/proc/x/e"])
def test_where_nothing_can_be_written_is_said(checkpoints, capsys, out):
    path, _ = checkpoints
    (path / "file").touch()
    said = refused(path, capsys, f"--teachers={path}/one", "--alpha=0.5", f"--out={path / out}")
    assert f"{path / out} c" in said  # cannot, or could not
    assert "choose another path" in said


def test_no_weights_are_read_for_a_directory_that_cannot_be_written(
    checkpoints, capsys, monkeypatch
):
    path, _ = checkpoints
    monkeypatch.setattr(hf, "load_params", None)
    monkeypatch.setattr(expo.safetensors_out.os, "access", lambda where, mode: where != path)
    said = refused(path, capsys, f"--teachers={path}/one", "--alpha=0.5", f"--out={path}/a/b")
    assert f"{path}/a/b cannot be written, for {path} is no directory that can" in said


def test_teachers_are_names_between_commas(checkpoints, capsys):
    path, _ = checkpoints
    expo.main(
        [
            *(f"--base={path}/base", f"--teachers= {path}/one , {path}/two", "--alpha=0"),
            f"--out={path}/out",
        ]
    )
    capsys.readouterr()
    said = refused(path, capsys, f"--teachers={path}/one,", "--alpha=0", f"--out={path}/x")
    assert "argument --teachers:" in said
    assert "has an empty name" in said


def test_an_alpha_that_leads_out_of_float32_is_said(checkpoints, capsys):
    path, _ = checkpoints
    said = refused(path, capsys, f"--teachers={path}/one", "--alpha=1e39", f"--out={path}/out")
    assert "alpha is 1e+39, too large for these weights" in said
