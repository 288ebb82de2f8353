"""Rows of files and data sets, and the records that they are checked to be."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gopd_jax.spec import resolve
from gopd_jax.types import Record
from gopd_jax.verifiers import VERIFIERS

# verl's rows name no verifier, and their data_source and style say too little to choose one.
VERIFIER_OF_TEACHER = {"math": "math", "code": "code"}

_MICROWORLD = re.compile(r"microworld:(?P<split>train|test)(:(?P<task>math|code))?")
_TFDS = re.compile(r"tfds:(?P<name>.+):(?P<split>[^:\[\]]+(\[[^\]]*\])?)")


def rows(source: str) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row of a source; a line of .jsonl is left as its bytes.

    `where` is "file:line" or "source[index]". ValueError for a source that cannot be read.
    """
    if match := _MICROWORLD.fullmatch(source):
        from gopd_jax.microworld import dataset

        found = _indexed(f"microworld:{match['split']}", dataset.load(match["split"]))
        return (pair for pair in found if match["task"] in (None, pair[1]["task"]))
    if match := _TFDS.fullmatch(source):
        return _indexed(source, _tfds(source, match["name"], match["split"]))
    path = Path(source)
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(
            f"{source!r} is not a source; give microworld:train or microworld:test (of one task: "
            "microworld:train:math), a .jsonl or .parquet file, or tfds:NAME:SPLIT"
        )
    if not path.is_file():
        raise ValueError(f"there is no file {source}")
    return _parquet_rows(source) if path.suffix == ".parquet" else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as lines:
        for n, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}:{n}", line


def _parquet_rows(source: str) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(1024))
            for i, row in enumerate(itertools.chain.from_iterable(batches)):
                yield f"{source}[{i}]", row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # also of dates
        raise ValueError(f"{source} is not a parquet file that can be read: {error}") from error


def _indexed(source: str, sequence: Sequence) -> Iterator[tuple[str, dict]]:
    """Many at a time: asked for one by one, rows of an array_record file take twice as long."""
    for start in range(0, len(sequence), 1024):
        indices = range(start, min(start + 1024, len(sequence)))
        for i, row in zip(indices, sequence.__getitems__(indices)):
            yield f"{source}[{i}]", row


def _tfds(source: str, name: str, split: str) -> Sequence:
    import tensorflow_datasets as tfds  # seconds; array_record needs no TensorFlow

    try:
        builder = tfds.builder_from_directory(name) if "/" in name and Path(name).is_dir() else None
        return (builder or tfds.builder(name)).as_data_source(split=split)
    except Exception as error:  # a registry error, an assertion or a missing file, by cause
        raise ValueError(
            f"{source} cannot be read: {error}\nPrepare it with tfds.builder({name!r}, "
            "file_format='array_record').download_and_prepare(), or give the directory that holds "
            "its dataset_info.json, and one of its splits"
        ) from error


def plain(row: Any) -> dict:
    """A row as plain Python, whatever read it. ValueError where it is no JSON object."""
    if isinstance(row, bytes):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row is a JSON object, and this is {type(row).__name__}")
    return {key: _plain(value, key) for key, value in row.items()}


def _plain(value: Any, key: str) -> Any:
    """Numpy's and TFDS's values as Python's: text for bytes, lists for arrays. `key`: its own."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:  # an image, say: whoever wants a text here refuses it
            return value
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"{key!r} is not Unicode text: {error}") from error
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist(), key)
    if isinstance(value, dict):
        return {name: _plain(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, key) for item in value]
    return value


def given(value: dict) -> dict:
    """A table has every key in every row: a null is a key that the row has not."""
    return {key: item for key, item in value.items() if item is not None}


def _get(row: dict, path: str) -> str:
    """The text at "key" or "key.key". ValueError says which is missing, empty or no text."""
    value, where = row, ""
    for key in path.split("."):
        if not isinstance(value, dict) or value.get(key) is None:
            is_object = isinstance(value, dict)
            has = f"has {sorted(given(value))}" if is_object else f"is {value!r:.40}"
            raise ValueError(f"{where or 'the row'} has no {key!r}; it {has}")
        value, where = value[key], f"{where}.{key}".lstrip(".")
    if not isinstance(value, str):
        raise ValueError(f"{path!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{path!r} is empty")
    return value


def _is_verl(row: dict) -> bool:
    return "reward_model" in given(row)


def task_of(row: dict) -> str:
    """The label of the teacher that scores a plain row. ValueError where there is none."""
    return _get(row, "extra_info.opd_teacher" if _is_verl(row) else "task")


def record(row: dict, where: str) -> Record:
    """The checked record of a plain row of either schema. ValueError says what is wrong."""
    task = task_of(row)
    if _is_verl(row):
        answer = _get(row, "reward_model.ground_truth")
        if (verifier := VERIFIER_OF_TEACHER.get(task)) is None:
            raise ValueError(
                f"no verifier is known for teacher label {task!r}, only for "
                f"{sorted(VERIFIER_OF_TEACHER)}; give the row as messages, task, answer, verifier"
            )
    else:
        answer, verifier = _get(row, "answer"), _get(row, "verifier")
        _check_verifier(verifier)
    return Record(
        messages=messages_of(row),
        task=task,
        answer=answer,
        verifier=verifier,
        source=where,
        **{k: _get(row, k) for k in ("completion", "context") if k in given(row)},
        **{k: _lam(row[k]) for k in ("lam",) if k in given(row)},
    )


def _lam(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ValueError(f"'lam' is {value!r}; a row's lambda is a number of 0 or more")
    return float(value)


@functools.cache
def _check_verifier(verifier: str) -> None:
    resolve(verifier, VERIFIERS)


def messages_of(row: dict) -> tuple[dict[str, str], ...]:
    """Chat turns from "messages" (a list, or its JSON) or "prompt" (a list, or the user's text).

    ValueError says what is wrong.
    """
    has = given(row)
    if ("messages" in has) == ("prompt" in has):
        raise ValueError(f"needs one of 'messages' and 'prompt'; it has {sorted(has)}")
    key = "messages" if "messages" in has else "prompt"
    turns = has[key]
    if isinstance(turns, str) and key == "prompt":
        turns = [{"role": "user", "content": turns}]
    elif isinstance(turns, str):
        try:
            turns = json.loads(turns)
        except ValueError as error:
            raise ValueError(f"{key!r} is text and not the JSON of a list: {error}") from error
        turns = _plain(turns, key)
    if isinstance(turns, dict) and all(isinstance(column, list) for column in turns.values()):
        # TFDS keeps a sequence of features as columns.
        turns = [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{key!r} is empty or no list of turns: {turns!r:.40}")
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise ValueError(f"{key}[{i}] is {type(turn).__name__}, not role and content")
        turn = given(turn)
        for name in {"role": None, "content": None} | turn:
            if not isinstance(turn.get(name), str):
                raise ValueError(f"{key}[{i}] has no text under {name!r}: {turn!r:.60}")
        messages.append(turn)
    if not messages[-1]["content"].strip():
        raise ValueError(f"the last turn of {key!r} is empty")
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{key!r} ends with the assistant's turn; put that under 'completion'")
    return tuple(messages)
