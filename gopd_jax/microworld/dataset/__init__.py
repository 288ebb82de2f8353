"""The microworld's problems as a TensorFlow Datasets data set, built on first use."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

VERSION = "1.1.0"
ROWS = {"train": 16384, "test": 2048}  # half of each split's rows for each of the two tasks


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """A split's rows by index: dicts of the strings messages (JSON), task, answer, verifier and
    completion (the right worked answer)."""

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, str]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return _decoded(self.source[index])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, str]]:
        return [_decoded(row) for row in self.source.__getitems__(indices)]


def _decoded(row: dict[str, bytes]) -> dict[str, str]:
    return {key: value.decode() for key, value in row.items()}


def cache_directory() -> Path:
    """$GOPD_JAX_DATA, or ~/.cache/gopd_jax."""
    return Path(os.environ.get("GOPD_JAX_DATA") or Path.home() / ".cache" / "gopd_jax").absolute()


def load(split: str) -> Rows:
    """The rows of "train" or "test"; the first call on a machine builds both, in seconds."""
    if split not in ROWS:
        raise ValueError(f"the microworld has no split {split!r}; it has {sorted(ROWS)}")
    import tensorflow_datasets as tfds  # takes seconds to import

    directory = cache_directory() / "microworld" / VERSION
    if not directory.is_dir():
        _build(directory)
    return Rows(tfds.builder_from_directory(directory).as_data_source(split=split))


def _build(directory: Path) -> None:
    """Writes the dataset beside `directory` and renames it: another process never sees a half."""
    from gopd_jax.microworld.dataset.builder import Microworld

    n_rows = sum(ROWS.values())
    print(f"building the microworld dataset, {n_rows} rows, in {directory}", file=sys.stderr)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=directory.parent))
    try:
        builder = Microworld(data_dir=str(scratch), file_format="array_record")
        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the program
            builder.download_and_prepare()
        try:
            Path(builder.data_dir).rename(directory)
        except OSError:
            if not directory.is_dir():  # otherwise another process was first, with equal content
                raise
    finally:
        shutil.rmtree(scratch)
