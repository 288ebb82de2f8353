"""Names on the Hugging Face hub, with the library itself on a cache built here and no network."""

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import hub, setup
from gopd_jax.models import hf

COMMIT, OLDER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """huggingface_hub offline, with nothing in its cache yet; a working directory beside it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "cache"


def repository(cache, name="models--org--tiny", commit=COMMIT, branch="main"):
    """A repository in the cache's layout; the directory to put its files into."""
    snapshot = cache / name / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / name / "refs").mkdir(exist_ok=True)
    (cache / name / "refs" / branch).write_text(commit)
    return snapshot


def test_a_name_is_its_cached_directory_and_the_commit_that_it_stands_for(cache):
    newest = repository(cache)
    older = repository(cache, commit=OLDER, branch="v1")
    assert hub.locate("org/tiny") == hub.Located(newest, f"org/tiny@{COMMIT}")
    assert hub.locate("org/tiny@main") == hub.locate(f"org/tiny@{COMMIT}") == hub.locate("org/tiny")
    assert hub.locate("org/tiny@v1") == hub.Located(older, f"org/tiny@{OLDER}")
    assert hub.locate(f"org/tiny@{OLDER}").directory == older


def test_what_is_or_was_to_be_a_path_is_left_alone(cache, tmp_path):
    repository(cache)
    for path in (str(tmp_path), "tiny", "./org/tiny", "org/tiny/", "/org/tiny", "a/b/c", ""):
        assert hub.parse(path) is None, path
        assert str(hub.locate(path).name) == path
    assert hub.parse("org/tiny") == ("org/tiny", "main")
    (tmp_path / "here" / "org").mkdir()
    assert hub.parse("org/tiny") is None
    assert hub.parse("org/tiny@main") == ("org/tiny", "main")
    (tmp_path / "here" / "org" / "tiny").mkdir()
    assert hub.locate("org/tiny").directory.resolve() == tmp_path / "here" / "org" / "tiny"


@pytest.mark.parametrize("name", ["org/absent", "org/tiny@absent", "org/tiny--x..y"])
def test_what_cannot_be_had_is_an_error_with_the_command_that_gets_it(cache, name):
    repository(cache)
    with pytest.raises(ValueError, match="is no directory here, and could not be had") as caught:
        hub.locate(name)
    repo, _, revision = name.partition("@")
    command = f"hf download {repo} --revision {revision or 'main'} --local-dir DIR"
    assert command in str(caught.value)


def test_no_pickle_and_no_code_is_asked_for(cache, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def download(repo, **options):
        asked[repo] = options
        return repository(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.locate("org/tiny@v2")
    patterns = asked["org/tiny"]
    assert patterns.pop("revision") == "v2"
    wanted = [
        *("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"),
        *("generation_config.json", "special_tokens_map.json"),
    ]
    unwanted = [
        *("pytorch_model.bin", "modeling_tiny.py", "original/consolidated.00.pth", "x.pt"),
        *("consolidated.safetensors", "onnx/model.safetensors", "training_args.bin", "x.pkl"),
    ]
    assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


def test_a_run_of_models_of_the_hub_pins_their_commits(cache, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    tiny.build(root)
    snapshot = repository(cache)
    for file in (root / "base").iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    config = tiny.config(root)
    config.student.path = config.reference.path = "org/tiny"
    assert config.problems() == []
    run = setup.prepare(config)
    student = run.roles["student"]
    assert (student.path, student.directory) == (f"org/tiny@{COMMIT}", snapshot)
    assert student.digest == hf.weights_digest(root / "base")
    assert student.params is run.roles["reference"].params
    want = hf.load_params(root / "base", tiny.CFG)
    jax.tree.map(np.testing.assert_array_equal, student.params, want)

    config.student.path = "org/absent"
    with pytest.raises(ValueError, match="student: 'org/absent' is no directory here"):
        setup.prepare(config)
