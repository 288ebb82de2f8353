"""Rows of prompts and completions as ids, and their batches: what score and generate work on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gopd_jax.data import N_SHOWN
from gopd_jax.models.tokenizer import Tokenizer
from gopd_jax.records import given, messages_of, plain

PROMPTS = ("prompt", "messages", "prompt_ids")
# token_ids: what score and generate call a completion's ids in their own rows.
COMPLETIONS = ("completion", "completion_ids", "token_ids")

# Widths are multiples of it: rows of two files then often share a compiled program.
ROUND = 32


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the input, as ids."""

    prompt_ids: list[int]
    completion_ids: list[int] | None  # None where completions are to be made
    form: str  # how the prompt was made: chat (template), raw (text as it is) or ids
    where: str  # "file:line" or "source[index]", for messages
    id: Any = None  # the row's own "id", handed on

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids or ())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Rows of about one length, which share a compiled program.

    width: tokens of the longest, rounded up; shortest: tokens of the shortest prompt; n_rows: rows
    of a batch.
    """

    width: int
    shortest: int
    n_rows: int


def read(
    source: Iterable[tuple[str, Any]],
    tokenizer: Tokenizer,
    *,
    name: str,
    scored: bool,
    raw_prompt: bool = False,
    append_eos: bool = False,
    n_context: int,
    n_new: int = 0,
) -> tuple[list[Row], str]:
    """(the rows of (where, row) pairs, sixteen hex digits of their content).

    A row has one of "messages" (chat turns), "prompt" (a user's message, or chat turns) and
    "prompt_ids", and with `scored` one of "completion" (text) and "completion_ids". Messages and
    prompts are rendered through the chat template, ready for the assistant's turn; with raw_prompt
    a "prompt" is encoded as it stands and nothing is added. A completion is the ids of its text
    alone, with append_eos the end token after them; completion_ids are taken as they are. n_new
    tokens have to fit into n_context behind each prompt. ValueError lists the wrong rows by place.
    """
    found, wrong, digest = [], [], hashlib.sha256()
    for where, raw in source:
        try:
            content = plain(raw)
            digest.update(json.dumps(content, sort_keys=True, default=repr).encode() + b"\n")
            row = _row(content, where, tokenizer, scored, raw_prompt, append_eos)
            if (total := row.length + n_new) > n_context:
                parts = [f"a prompt of {len(row.prompt_ids)}"]
                parts += [f"a completion of {len(row.completion_ids)}"] if scored else []
                parts += [f"max_tokens = {n_new}"] if n_new else []
                raise ValueError(
                    f"{' and '.join(parts)} are {total} tokens, and the model's "
                    f"max_position_embeddings is {n_context}; shorten one"
                )
            found.append(row)
        except ValueError as error:
            wrong.append(f"{where}: {error}")
    if wrong:
        rest = len(wrong) - N_SHOWN
        shown = "\n".join(wrong[:N_SHOWN]) + (f"\n... and {rest} more" if rest > 0 else "")
        raise ValueError(f"{name} has {len(wrong)} rows that cannot be used:\n{shown}")
    if not found:
        raise ValueError(f"{name} is empty; give it at least one row")
    return found, digest.hexdigest()[:16]


def _row(content, where, tokenizer, scored, raw_prompt, append_eos) -> Row:
    completion_ids = None
    if scored:
        key = _one_of(COMPLETIONS, content)
        if key == "completion":
            completion_ids = tokenizer.encode(_text(content, key))
            completion_ids += [tokenizer.end_id] * append_eos
        else:
            completion_ids = _ids(content, key, tokenizer)
    key = _one_of(PROMPTS, content)
    if key == "prompt_ids":
        prompt_ids, form = _ids(content, key, tokenizer), "ids"
    elif key == "prompt" and raw_prompt:
        prompt_ids, form = tokenizer.encode(_text(content, key)), "raw"
    else:
        turns = messages_of({key: content[key]})
        for turn in turns:
            _text(turn, "content")
        prompt_ids, form = tokenizer.render(turns), "chat"
    if not prompt_ids:
        raise ValueError(f"{key!r} has no tokens; the first token needs one before it")
    try:
        json.dumps(name := content.get("id"))  # as it will be handed on
    except TypeError as error:
        raise ValueError(f"'id' cannot be written as JSON: {error}") from error
    return Row(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        form=form,
        where=where,
        id=name,
    )


def _one_of(keys: Sequence[str], content: dict) -> str:
    there = [key for key in keys if key in given(content)]
    if len(there) != 1:
        raise ValueError(f"needs one of {list(keys)}; it has {there or sorted(given(content))}")
    return there[0]


def _text(content: dict, key: str) -> str:
    text = content[key]
    if not isinstance(text, str):
        raise ValueError(f"{key!r} is {type(text).__name__}, not text")
    return text


def _ids(content: dict, key: str, tokenizer: Tokenizer) -> list[int]:
    ids = content[key]
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{key!r} is {ids!r:.40}, not a list of integers")
    if outside := [i for i in ids if not 0 <= i < tokenizer.vocab_size]:
        raise ValueError(
            f"{key!r} has {outside[:N_SHOWN]}, which the tokenizer of {tokenizer.path} has not; "
            f"its ids are 0 to {tokenizer.vocab_size - 1}"
        )
    return list(ids)


def batches(
    lengths: Sequence[int], shortest: Sequence[int], *, n_rows: int, multiple: int = 1
) -> list[tuple[Bucket, list[int]]]:
    """Batches of at most n_rows row numbers of one bucket, sorted by the first number in each.

    The bucket of a row is the power of two above its length, so there are few. Run in this order, a
    batch always holds the first row that is not done: results can be written in the rows' order
    with little to keep. A function of the lengths alone: a continued run has the same batches.
    """
    members: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        members.setdefault(max(length - 1, ROUND - 1).bit_length(), []).append(i)
    found = []
    for rows in members.values():
        bucket = Bucket(
            width=-(-max(lengths[i] for i in rows) // ROUND) * ROUND,
            shortest=min(shortest[i] for i in rows),
            n_rows=min(n_rows, -(-len(rows) // multiple) * multiple),
        )
        found += [(bucket, rows[i : i + n_rows]) for i in range(0, len(rows), n_rows)]
    return sorted(found, key=lambda batch: batch[1][0])


def in_order(
    found: Sequence[tuple[Bucket, list[int]]], run: Callable, start: int
) -> Iterator[tuple[list[dict], int]]:
    """(results from number `start` on that are next in order, how many a batch has made).

    run(bucket, numbers) -> a result of each. What comes before its turn waits for it.
    A batch of which any result is still wanted is run whole, so that what comes of a continued run
    is what would have come of it unbroken.
    """
    waiting, after = {}, start
    for bucket, numbers in found:
        if numbers[-1] < start:
            continue
        results = zip(numbers, run(bucket, numbers), strict=True)
        waiting |= {i: result for i, result in results if i >= start}
        ready, n_made = [], sum(i >= start for i in numbers)
        while after in waiting:
            ready.append(waiting.pop(after))
            after += 1
        yield ready, n_made


def filled(numbers: Sequence[int], n_rows: int) -> np.ndarray:
    """Row numbers of a whole batch: the last one again where there are too few."""
    return np.array([*numbers, *[numbers[-1]] * (n_rows - len(numbers))])
