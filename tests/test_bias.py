"""docs/bias.md is what its command says."""

from pathlib import Path

import numpy as np

from benchmarks import bias, toy
from gopd_jax.objectives.divergences import DIVERGENCES

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/bias.md"


def test_the_document_is_the_output_of_its_command():
    assert bias.document() == DOCUMENT.read_text(), (
        "make it again: python -m benchmarks.bias > docs/bias.md"
    )


def test_every_divergence_has_its_row():
    lines = DOCUMENT.read_text().splitlines()
    for name in DIVERGENCES:
        (row,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert row.startswith(f"| {name} | 0.000 | 1.000 |")  # corrected: no bias


def test_bias_and_cosine_are_told_of_vectors():
    want = np.array([3.0, 4.0])
    assert bias.compared(want, want) == "0.000 | 1.000"
    assert bias.compared(-want, want) == "2.000 | -1.000"
    assert bias.compared(np.array([-4.0, 3.0]), want) == "1.414 | 0.000"
    assert toy.LENGTH == 3  # the text of the document says so
