"""What the README tells its reader to type, open and write exists and is accepted."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

import gopd_jax.plan  # noqa: F401  its flags and those of main are defined on import
from gopd_jax import generate, score
from gopd_jax.config import Config, Lora
from gopd_jax.records import plain, record

CONFIGS = ("gopd_jax.main", "gopd_jax.plan")  # commands that take --config
ROWS = {"gopd_jax.score": score, "gopd_jax.generate": generate}  # commands with absl's flags
ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def commands() -> list[list[str]]:
    """Every `python -m ...` and launch/local.sh of code blocks and of text, as words."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", README)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    parts = [re.sub(r"^launch/local.sh \d+ --", "python -m gopd_jax.main", p) for p in parts]
    return [shlex.split(part) for part in parts if part.startswith("python -m")]


def of_module(name: str) -> list[list[str]]:
    return [words[3:] for words in commands() if words[2] == name]


def parsed(words: list[str], monkeypatch) -> Config:
    """The config of a gopd_jax.main command; absl and ml_collections are the judges."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    ours = [w for w in words if w.startswith("--config")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main", *ours])  # where ml_collections looks for overrides
    assert values(sys.argv) == ["main"]
    return holder.value


def test_it_begins_with_the_two_commands():
    assert blocks("sh")[:2] == [
        "pip install -r requirements.txt && python -m gopd_jax.main --config=configs/exopd.py\n",
        "pip install -r requirements.txt && python -m pytest -n 2 --dist loadfile\n",
    ]
    assert (ROOT / "requirements.txt").is_file()


def test_the_modules_that_it_runs_exist():
    modules = {words[2] for words in commands()}
    assert {"gopd_jax.main", "gopd_jax.report", "pytest"} <= modules
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []


@pytest.mark.parametrize("words", [w for n in CONFIGS for w in of_module(n)], ids=" ".join)
def test_every_flag_of_a_command_with_a_config_is_accepted(words, monkeypatch):
    assert isinstance(parsed(words, monkeypatch), Config)
    other = [re.match(r"--(\w+)", word)[1] for word in words if not word.startswith("--config")]
    assert [name for name in other if name not in flags.FLAGS] == []


def test_settings_and_presets_in_its_text_are_accepted(monkeypatch):
    texts = re.findall(r"`--(config[^`\s]*)`", README)
    settings = {text.split("=")[0].removeprefix("config.") for text in texts if "." in text}
    settings = {s for s in settings if not s.startswith("config")}
    assert {"mesh.data", "mesh.fsdp", "mesh.tensor", "batch.microbatches"} <= settings
    for setting in settings:
        node = parsed(["--config=configs/exopd.py"], monkeypatch)
        for name in setting.split("."):
            assert (name in node) if isinstance(node, dict) else hasattr(node, name), setting
            node = node[name] if isinstance(node, dict) else getattr(node, name)
            node = Lora() if name == "lora" else node
    for text in texts:
        if text.startswith("config="):
            assert isinstance(parsed([f"--{text}"], monkeypatch), Config)


@pytest.mark.parametrize(
    "name", sorted({words[2] for words in commands()} - {"pytest", *CONFIGS, *ROWS})
)
def test_flags_of_the_other_programs_are_theirs(name):
    source = Path(importlib.util.find_spec(name).origin).read_text()
    given = {re.match(r"--\w+", word)[0] for words in of_module(name) for word in words}
    assert given
    assert [flag for flag in given if f'"{flag}"' not in source] == []


@pytest.mark.parametrize("name", ROWS)
def test_flags_of_the_commands_on_rows_are_theirs(name):
    section = README.split("## Two small commands")[1].split("\n## ")[0]
    defined = ROWS[name].define_flags()
    given = of_module(name)
    assert given
    for words in given:
        assert defined([name, *words]) == [name]
        assert all(defined[flag].value for flag in ("model", "data", "out"))
    everything = score.define_flags(), generate.define_flags()
    for flag in re.findall(r"`--([\w.]+)", section):
        assert any(flag in values for values in everything), flag


def test_the_table_has_every_preset_and_the_words_it_takes(monkeypatch):
    table = README.split("## Presets")[1].split("##")[0]
    rows = re.findall(r"^\| `(configs/\w+\.py)` \|(.*)\|$", table, re.MULTILINE)
    there = sorted(f"configs/{p.name}" for p in (ROOT / "configs").glob("[!_]*.py"))
    assert sorted(path for path, _ in rows) == there
    for path, text in rows:
        for word in ["tiny", *re.findall(r"`:(\w+)`", text)]:
            assert isinstance(parsed([f"--config={path}:{word}"], monkeypatch), Config)


def test_its_rows_of_data_are_problems():
    records = [
        record(plain(line.encode()), "README")
        for block in blocks("json")
        for line in block.splitlines()
    ]
    assert [r.task for r in records] == ["math", "code", "math"]
    assert [r.verifier for r in records] == ["math", "code", "math"]
    assert records[0].messages == records[2].messages
    assert json.loads(records[1].answer)["tests"][0]["want"] == 3


def test_its_preset_lacks_nothing_but_the_readers_files():
    block, teachers = blocks("python")
    namespace = {}
    exec(block, namespace)
    exec(teachers, names := {})
    assert {*names["routes"].values()} == names["teachers"].keys()
    config = namespace["get_config"]()
    found = config.problems()
    assert all("models/" in problem or ".jsonl" in problem for problem in found)
    assert len(found) == 5  # three models, two files
    config.data.tasks = ("geography",)
    assert len(config.problems()) > len(found) - 1  # so the list is not deaf


def test_its_error_is_what_the_program_says(monkeypatch):
    (block,) = blocks("text")
    config = parsed(["--config=configs/exopd.py", "--config.batch.prompts=127"], monkeypatch)
    assert block.removeprefix("- ").rstrip("\n") in config.problems()


def test_the_files_that_it_names_exist():
    linked = re.findall(r"\]\(([^):#]+)\)", README)
    named = re.findall(r"((?:configs|notebooks|launch|gopd_jax|docs)/[\w./]*\w)", README)
    assert {"ARCHITECTURE.md", "docs/report.png"} <= set(linked)
    assert "notebooks/quickstart.ipynb" in named
    assert [name for name in linked + named if not (ROOT / name).exists()] == []


def test_results_have_their_place():
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    assert README.count(begin) == README.count(end) == 1
    assert README.index(begin) < README.index(end)
