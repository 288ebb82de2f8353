"""Layouts of presets on their meshes, against files that a reader can check line by line."""

import difflib
import importlib

import golden_shardings as golden
import pytest
import tiny

from gopd_jax.config import Mesh


@pytest.mark.parametrize("name", golden.CASES)
def test_every_array_lies_where_the_golden_file_says(name):
    want, got = golden.path(name).read_text(), golden.text(*golden.CASES[name]())
    changed = list(difflib.unified_diff(want.splitlines(), got.splitlines(), "golden", "now", n=0))
    assert not changed, (
        f"{len(changed)} lines of tests/golden/{name}.txt differ; if that is meant, {golden.HOW} "
        "writes it anew:\n" + "\n".join(changed[:20])
    )


def test_there_is_no_golden_file_without_its_case():
    assert {file.stem for file in golden.GOLDEN.iterdir()} == {*golden.CASES}


def test_every_preset_with_a_mesh_of_its_own_has_a_golden_file():
    files = (tiny.REPOSITORY / "configs").glob("[!_]*.py")
    presets = {file.stem: importlib.import_module(f"configs.{file.stem}") for file in files}
    own = {name for name, module in presets.items() if module.get_config().mesh != Mesh()}
    assert {"qwen3"} <= own <= {*golden.CASES}
