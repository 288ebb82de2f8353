"""The list of mutants fits the code, and its verdicts are what pytest says."""

import ast
import dataclasses
from pathlib import Path

import pytest

from benchmarks import mutants
from benchmarks.mutants_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
STEP = (
    "models/cache",
    "models/moe",
    "update",
    "heads",
    "step",
    "critic",
    "scoring",
    "batching",
    "sampler",
    "diagnose",
)


@pytest.mark.parametrize("mutant", [pytest.param(m, id=m.name) for m in MUTANTS])
def test_a_mutant_is_one_slip_in_code_that_still_parses(mutant):
    text = mutants.mutated(mutant)
    assert text != (ROOT / mutant.file).read_text()
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse((ROOT / mutant.file).read_text()))
    assert mutant.slips
    assert mutant.targets
    for target in mutant.targets:
        file, _, test = target.partition("::")
        source = (ROOT / file).read_text()
        assert f"def {test.split('[')[0]}(" in source, f"{target} is no test"


def test_the_list_is_of_the_objectives_and_of_the_step():
    names = [m.name for m in MUTANTS]
    assert len(set(names)) == len(names)
    assert len({(m.file, m.old, m.new) for m in MUTANTS}) == len(names)
    of_objectives = [m.file for m in MUTANTS if m.file.startswith("gopd_jax/objectives/")]
    of_step = [m.file for m in MUTANTS if m.file in {f"gopd_jax/{name}.py" for name in STEP}]
    assert len(of_objectives) >= 60
    assert len(of_step) >= 15
    assert len(of_objectives) + len(of_step) == len(names)


def test_the_document_has_a_row_for_every_mutant():
    rows = [line.split(" | ") for line in mutants.DOCUMENT.read_text().splitlines()[1:]]
    rows = [(r[0].removeprefix("| "), r[1]) for r in rows if len(r) == 4][1:]
    made = "make it again: python -m benchmarks.mutants"
    assert rows == [(m.name, m.file) for m in MUTANTS], made


def test_a_text_that_is_not_there_once_is_refused():
    gone = dataclasses.replace(MUTANTS[0], old="no such text")
    with pytest.raises(ValueError, match=r"its old text occurs 0 times in .*follow the code"):
        mutants.mutated(gone)


def test_only_what_is_there_can_be_chosen():
    assert [m.name for m in mutants.chosen(MUTANTS[3].name, None)] == [MUTANTS[3].name]
    assert {m.file for m in mutants.chosen(None, "credit.py")} == {"gopd_jax/objectives/credit.py"}
    with pytest.raises(ValueError, match=r"no mutant is called \['none-such'\]"):
        mutants.chosen("none-such", None)
    with pytest.raises(ValueError, match=r"no mutant of 'none.py'; files are"):
        mutants.chosen(None, "none.py")


TESTS = """
from gopd_jax.code import double


def test_double():
    assert double(2) == 4
"""


def test_a_verdict_is_of_what_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "SHARED", ())  # this code imports none of them
    tree = tmp_path / "tree"
    for name in ("gopd_jax", "tests"):
        (tree / name).mkdir(parents=True)
    (tree / "pyproject.toml").write_text("[tool.pytest.ini_options]\npythonpath = ['.']\n")
    code = "def check(x):\n    raise ValueError(x)\n\n\ndef double(x):\n    return 2 * x\n"
    (tree / "gopd_jax/code.py").write_text(code)
    (tree / "tests/test_code.py").write_text(TESTS)
    assert mutants.outcome(tree, ("tests/test_code.py",)) == (0, None)
    test = "tests/test_code.py::test_double"
    for new, word, by in (
        ("3 * x", "killed", test),
        ("check(x)", "killed", test),  # by a ValueError of the code
        ("x + x", "survived", ""),
        ("y", "broken", test),  # a NameError says nothing of the test
        ("raise ValueError", "broken", ""),  # it does not import
    ):
        slip = Mutant(
            name="slip",
            file="gopd_jax/code.py",
            old="return 2 * x",
            new=f"return {new}",
            slips="",
            tests=("test_code.py::test_double",),
        )
        found = mutants.verdict(slip, tree)
        assert (found.word, found.by) == (word, by)
        assert (tree / "gopd_jax/code.py").read_text() == code  # as it was
