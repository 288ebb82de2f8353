"""The quickstart notebook: it is stored clean, runs from top to bottom, and shows what it says."""

import ast
import html
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import tiny
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "notebooks" / "quickstart.ipynb"

# Run after the last cell, in the notebook's own process.
SUMMARY = """
import json
print(json.dumps({
    "lam": config.objective.lam,
    "n_tokens": int(before[0].mask_BT[some].sum()),
    "kl": [row["kl_teacher"] for row in history],
    "start": at_start,
    "end": at_end,
}))
"""
SPAN = re.compile(
    r'<span title="A = (\S+) +log S = (\S+) +log T = (\S+) +log R = (\S+)" '
    r'style="background:rgb\((\d+),(\d+),(\d+)\)[^"]*">([^<]*)</span>'
)


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(SUMMARY, id="summary"))
    NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute(env=tiny.environment(1) | {"XLA_FLAGS": tiny.optimized()})  # it trains for minutes
    return {cell["id"]: cell for cell in notebook.cells}


def _html(cell) -> str:
    (output,) = (o for o in cell.outputs if "text/html" in o.get("data", {}))
    return output["data"]["text/html"]


def test_it_is_stored_without_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert [cell["id"] for cell in code if cell.outputs or cell.execution_count] == []


def test_it_uses_public_names_only(notebook):
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    nodes = list(ast.walk(ast.parse(code)))
    names = [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    names += [a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names]
    assert "prepare" in names
    assert [name for name in names if name.startswith("_")] == []


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["colour", "after"])
def test_each_sampled_token_shows_the_advantage_of_its_numbers(executed, cell):
    summary = json.loads(executed["summary"].outputs[-1].text)
    spans = SPAN.findall(_html(executed[cell]))
    A, S, T, R = np.array([span[:4] for span in spans], float).T
    lam = summary["lam"]
    np.testing.assert_allclose(A, lam * (T - R) - (S - R), atol=3e-4)  # four decimals are shown
    assert any(html.unescape(span[7]) == "<|im_end|>" for span in spans)
    if cell == "colour":
        assert len(spans) == summary["n_tokens"]
        # The student is the reference before the first step.
        np.testing.assert_allclose(S, R, atol=2e-4)
        red, blue = (np.array([span[i] for span in spans], int) for i in (4, 6))
        assert np.all(np.sign(blue - red)[np.abs(A) > 0.1] == np.sign(A)[np.abs(A) > 0.1])


@pytest.mark.slow
def test_twenty_steps_bring_the_student_to_its_teachers(executed):
    summary = json.loads(executed["summary"].outputs[-1].text)
    kl = summary["kl"]
    assert len(kl) == 20
    assert np.mean(kl[-3:]) < 0.6 * np.mean(kl[:3])
    for task in ("math", "code"):
        assert summary["end"][task] > summary["start"][task]
