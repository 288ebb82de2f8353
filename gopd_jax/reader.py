"""How a role reads a problem: its template and options, and what it is shown beside the prompt.

The student reads the plain prompt. A teacher or reference may read the same problem through its own
chat template, or with a context that makes it a better judge: a solution, a critique. Completion
ids are shared: what a role judges is the student's completion after the role's own prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gopd_jax.models.tokenizer import Tokenizer
from gopd_jax.spec import resolve, table
from gopd_jax.types import Record

Messages = Sequence[dict[str, str]]


# --- contexts: (record) -> the chat turns that a role reads in place of record.messages


def solution(record: Record, *, text: str = "A correct solution:\n{}") -> Messages:
    """The prompt, then the record's own completion. `text` has {} where it goes."""
    return _after(record, text, record.completion, "completion")


def answer(record: Record, *, text: str = "The correct answer: {}") -> Messages:
    """The prompt, then the record's ground truth, without a way to it."""
    return _after(record, text, record.answer, "answer")


def context(record: Record, *, text: str = "{}") -> Messages:
    """The prompt, then the text under "context" in the record's row: a critique, a hint, a page."""
    return _after(record, text, record.context, "context")


CONTEXTS = table(solution, answer, context)


def _after(record: Record, text: str, value: str | None, field: str) -> Messages:
    if value is None:
        raise ValueError(f"{record.source}: the row has no {field!r}, which the context shows")
    if not isinstance(text, str) or "{}" not in text:
        raise ValueError(f"context text {text!r} has no {{}} where the {field} goes; put it in")
    *before, last = record.messages
    if last["role"] != "user":
        raise ValueError(f"{record.source}: its last turn is the {last['role']}'s, not the user's")
    shown = text.replace("{}", value)
    return (*before, {**last, "content": f"{last['content']}\n\n{shown}"})


def find_context(text: str | None) -> Callable[[Record], Messages] | None:
    """The context that a setting names: an entry of CONTEXTS with its options, module:function.

    ValueError where there is none of that name.
    """
    if text is None:
        return None
    module, colon, name = text.partition(":")
    if not colon or "(" in module:
        return resolve(text, CONTEXTS)
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        known = isinstance(error, ImportError | AttributeError | SyntaxError)
        said = str(error) if known else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"context {text!r} cannot be imported: {said}; give one of {sorted(CONTEXTS)}, or "
            "module:function of a module on PYTHONPATH, which takes a Record and returns chat turns"
        ) from error
    if not callable(found):
        raise ValueError(f"context {text!r} is a {type(found).__name__}, not a function")
    return found


# --- ends


def stop_ids(chat: Tokenizer, stop: Sequence[str] | None) -> tuple[int, ...]:
    """Ids that end a completion: those of sampling.stop, or the tokenizer's own."""
    if stop is None:
        return chat.eos_ids
    if unknown := [token for token in stop if token not in chat.contents]:
        raise ValueError(
            f"sampling.stop has {unknown}, which are no tokens of {chat.path}; its own ends are "
            f"{[chat.contents[i] for i in chat.eos_ids]}"
        )
    return tuple(chat.contents.index(token) for token in dict.fromkeys(stop))


def ends_otherwise(chat: Tokenizer) -> list[str]:
    """Where the template ends a turn with a special token that ends no completion: a sentence."""
    added = chat.backend.get_added_tokens_decoder()
    written = [i for i in chat.turn_ids if i in added and added[i].special]
    if not written or chat.end_id in chat.turn_ids:
        return []
    turn, own = chat.contents[written[0]], chat.contents[chat.end_id]
    return [
        f"the data's completions would end with {own!r}, the end of {chat.path}, and its chat "
        f"template ends a turn with {turn!r}; say which: --config.sampling.stop="
        f"\"('{turn}', '{own}')\" or \"('{own}',)\""
    ]


# --- the reader


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """One role's way from a Record to token ids.

    length: tokens that a prompt may have; setting: its name, for messages. width: of the rows,
    where other roles' are longer. context: a function of CONTEXTS or a user's; None shows the plain
    prompt. The template's options are the tokenizer's.
    """

    tokenizer: Tokenizer
    length: int
    context: Callable[[Record], Messages] | None = None
    setting: str = "data.prompt_length"
    width: int | None = None

    def ids(self, record: Record) -> list[int]:
        """ValueError names the record where template or context refuse it."""
        try:
            turns = record.messages if self.context is None else _shown(self.context, record)
            ids = self.tokenizer.render(turns)
        except ValueError as error:
            told = str(error)
            raise ValueError(
                told if record.source in told else f"{record.source}: {told}"
            ) from error
        if not ids:
            raise ValueError(f"{record.source}: the chat template makes nothing of its messages")
        return ids

    def prompts(self, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BP int32 left-padded, valid_BP bool). ValueError counts those that do not fit."""
        ids = each_once(self.ids, records, self.length, "prompts", self.setting)
        return padded(ids, self.width or self.length, self.tokenizer.pad_id, left=True)

    def fingerprint(self) -> str:
        """Sixteen hex digits of what makes its prompts: ids, template, options, context's code."""
        chat = self.tokenizer
        made_by = chat.template_fingerprint(), chat.encoding_fingerprint(), _code(self.context)
        return hashlib.sha256("\n".join(made_by).encode()).hexdigest()[:16]

    def reads_as(self, other: Reader) -> bool:
        """Whether every record has the same ids under both."""
        ours, theirs = self.tokenizer, other.tokenizer
        return (
            self.context is None
            and other.context is None
            and ours.template_fingerprint() == theirs.template_fingerprint()
            and ours.encoding_fingerprint() == theirs.encoding_fingerprint()
        )

    def takes(self, other: Reader) -> bool:
        """Whether every prompt that the other has room for has the same ids here, and room."""
        return self.length >= other.length and self.reads_as(other)


def _code(context: Callable | None) -> str:
    """The file of a user's context, helpers and all; "" where a setting says all there is to it."""
    function = getattr(context, "func", context)  # options are a functools.partial
    if function is None or function in CONTEXTS.values():
        return ""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # no function of Python: its name is all that can be told
        return repr(type(function))
    return Path(file).read_text() if file and Path(file).is_file() else ""


def _shown(context: Callable, record: Record) -> Messages:
    """What a context makes of a record, checked: a user's function may raise or return anything."""
    try:
        value = context(record)
    except ValueError:  # in its own words
        raise
    except Exception as error:
        function = getattr(context, "func", context)
        name = getattr(function, "__qualname__", repr(function))
        raise ValueError(
            f"{record.source}: the context {getattr(function, '__module__', None)}:{name} raises "
            f"{type(error).__name__}: {error}"
        ) from error
    turns = list(value) if isinstance(value, list | tuple) else None
    if not turns or not all(
        isinstance(t, dict) and all(isinstance(t.get(k), str) for k in ("role", "content"))
        for t in turns
    ):
        raise ValueError(f"the context returned {value!r:.80}, not turns of role and content")
    return turns


def each_once(ids_of, records: Sequence[Record], limit: int, what: str, setting: str) -> list:
    """ids_of(record) of each record, checked to fit; the rollouts of a prompt are one record."""
    distinct = {id(record): record for record in records}
    read = {key: ids_of(record) for key, record in distinct.items()}
    require_fit(list(read.values()), list(distinct.values()), limit, what, setting)
    return [read[id(record)] for record in records]


def require_fit(
    ids: Sequence[list[int]], records: Sequence[Record], limit: int, what: str, setting: str
) -> None:
    """ValueError that counts the rows longer than `limit` tokens and names the longest."""
    lengths = [len(row) for row in ids]
    if longer := sum(length > limit for length in lengths):
        worst = int(np.argmax(lengths))
        raise ValueError(
            f"{longer} of {len(records)} {what} are longer than {setting} = {limit} tokens; the "
            f"longest has {lengths[worst]}, {records[worst].source}. Raise {setting} to "
            f"{lengths[worst]} or take them out of the data"
        )


def padded(ids: Sequence[list[int]], width: int, fill: int, *, left: bool):
    """ids int32 and where they are, bool: rows of `width`, padded on their left or right."""
    tokens = np.full((len(ids), width), fill, np.int32)
    valid = np.zeros((len(ids), width), bool)
    for b, row in enumerate(ids):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[b, span], valid[b, span] = row, True
    return tokens, valid
