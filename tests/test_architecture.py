"""The worked examples of ARCHITECTURE.md, put into a copy of the code as a reader would."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    "symmetric_chi2": ("divergences.py", "test_divergences.py", 8),
    "confident": ("advantages.py", "test_objective_tables.py", 3),
}


def example(name: str) -> tuple[str, str]:
    """(the function, the table's name) of the code block that defines it."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "ARCHITECTURE.md").read_text(), re.M | re.S
    )
    block = next(b for b in blocks if b.startswith(f"def {name}("))
    function, table = block.split("\n\n\n")
    assert table.rstrip().endswith(f"{name})")
    return function, table.split(" = ")[0]


def added(tree: Path, name: str, change=lambda text: text) -> None:
    function, table = example(name)
    file = tree / "gopd_jax/objectives" / EXAMPLES[name][0]
    text, n = re.subn(
        rf"^({table} = table\(.*?),?\s*\)$",
        lambda found: f"{change(function)}\n\n\n{found[1]}, {name})",
        file.read_text(),
        flags=re.M | re.S,
    )
    assert n == 1
    file.write_text(text)


def contracts(tree: Path, name: str) -> tuple[int, int]:
    """(passed, failed) of the tests that take the entry up."""
    command = [sys.executable, "-m", "pytest", f"tests/{EXAMPLES[name][1]}", "-k", name, "-p"]
    done = subprocess.run(
        [*command, "no:cacheprovider"], cwd=tree, capture_output=True, text=True, timeout=600
    )
    counts = [re.search(rf"(\d+) {word}", done.stdout) for word in ("passed", "failed")]
    assert any(counts), done.stdout + done.stderr
    passed, failed = (0 if found is None else int(found[1]) for found in counts)
    return passed, failed


@pytest.fixture
def tree(tmp_path):
    for part in ("gopd_jax", "tests", "benchmarks"):
        left_out = shutil.ignore_patterns("checkpoints", "__pycache__")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_contracts_take_an_example_up_unedited(tree, name):
    added(tree, name)
    passed, failed = contracts(tree, name)
    assert failed == 0
    assert passed >= EXAMPLES[name][2]


@pytest.mark.parametrize(
    ("name", "slip"),
    [("symmetric_chi2", ("+ neyman", "- neyman")), ("confident", ("mask_BT & (", "("))],
)
def test_the_contracts_notice_an_example_with_a_slip(tree, name, slip):
    function, _ = example(name)
    assert slip[0] in function
    added(tree, name, lambda text: text.replace(*slip))
    _, failed = contracts(tree, name)
    assert failed > 0
