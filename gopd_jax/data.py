"""Problems from files and data sets, and the prompts of a step: a function of (seed, step)."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gopd_jax.models.tokenizer import Tokenizer
from gopd_jax.records import plain, record, rows, task_of
from gopd_jax.types import Prompts, Record

# What is counted, and the setting that limits it.
PROMPTS = ("prompts", "data.prompt_length")
COMPLETIONS = ("completions", "sampling.completion_length")

N_SHOWN = 5  # bad rows that a message lists; it counts them all


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Problems of each task, in the order of the tasks asked for.

    identity is a hash of every record in order, whatever file it came from; source is what was
    read, for messages.
    """

    records: dict[str, tuple[Record, ...]]
    identity: str
    source: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Their order gives task_B its indices and a batch its row order."""
        return tuple(self.records)


def load(source: str, tasks: Sequence[str]) -> Dataset:
    """Every record of `source`, checked.

    source is "microworld:train", "microworld:test", a path to a .jsonl or .parquet file, or
    "tfds:NAME:SPLIT" (NAME may be a builder's directory). A row is {messages or prompt, task,
    answer, verifier, completion (optional)}, or verl's {prompt, reward_model: {ground_truth},
    extra_info: {opd_teacher}} as it is. ValueError lists malformed rows by file and line, tasks
    that are not in `tasks`, and tasks without a record.
    """
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks are {list(tasks)}; name each task once, and at least one")
    found: dict[str, list[Record]] = {task: [] for task in tasks}
    unknown: collections.Counter[str] = collections.Counter()
    malformed: list[str] = []
    for where, raw in rows(source):
        try:
            row = plain(raw)
            if (task := task_of(row)) in found:
                found[task].append(record(row, where))
            else:
                unknown[task] += 1
        except ValueError as error:
            malformed.append(f"{where}: {error}")
    if malformed:
        shown = "\n".join(malformed[:N_SHOWN])
        rest = len(malformed) - N_SHOWN
        more = f"\n... and {rest} more" if rest > 0 else ""
        raise ValueError(f"{source} has {len(malformed)} malformed rows:\n{shown}{more}")
    if unknown:
        counts = ", ".join(f"{task!r} ({n} rows)" for task, n in sorted(unknown.items()))
        raise ValueError(
            f"tasks [{counts}] of {source} have no teacher; teachers are {list(tasks)}. Add them "
            "to data.tasks and teachers, or take their rows out of the file"
        )
    if not any(found.values()):
        raise ValueError(f"{source} is empty; give a source with at least one row of each task")
    if lacking := [task for task in tasks if not found[task]]:
        counts = {task: len(records) for task, records in found.items() if records}
        raise ValueError(
            f"tasks {lacking} have no record in {source}, which has {counts}; take them out of "
            "data.tasks or add rows"
        )
    records = {task: tuple(found[task]) for task in tasks}
    return Dataset(records=records, identity=_identity(records), source=source)


def group_sizes(n_prompts: int, rollouts: int, tasks: Sequence[str]) -> tuple[int, ...]:
    """Rows of each task in a global batch, static: equal shares of the prompts."""
    if not tasks or n_prompts < 1 or rollouts < 1 or n_prompts % len(tasks):
        raise ValueError(
            f"{n_prompts} prompts with {rollouts} rollouts do not divide into equal shares of the "
            f"{len(tasks)} tasks {list(tasks)}; make batch.prompts a multiple of {len(tasks)}"
        )
    return (n_prompts // len(tasks) * rollouts,) * len(tasks)


def prompts(
    dataset: Dataset,
    tokenizer: Tokenizer,
    step: int,
    *,
    seed: int,
    n_prompts: int,
    rollouts: int,
    prompt_length: int,
    process: int = 0,
    n_processes: int = 1,
    completion_length: int | None = None,
) -> Prompts:
    """One process's rows of the step's global batch of B = n_prompts * rollouts rows.

    A pure function of (seed, step). Rows are sorted by task in dataset.tasks' order, the rollouts
    of a prompt are adjacent, and process p holds rows [p * B / n_processes, ...). A task's records
    are taken in a new order every epoch, each once. With completion_length, the records' own
    completions too: right-padded, one end token appended. ValueError for a prompt or completion
    that does not fit, and for rows that do not divide.
    """
    per_task = group_sizes(n_prompts, 1, dataset.tasks)[0]
    if not 0 <= process < n_processes or n_prompts * rollouts % n_processes:
        raise ValueError(
            f"{n_prompts} prompts * {rollouts} rollouts do not divide into equal rows of "
            f"{n_processes} processes, or {process} is not one of them"
        )
    share = n_prompts * rollouts // n_processes
    row_B = np.arange(process * share, (process + 1) * share, dtype=np.int32)
    group_B = row_B // rollouts
    task_B = group_B // per_task
    picked = {}
    for group in np.unique(group_B).tolist():
        task = dataset.tasks[group // per_task]
        picked[group] = _at(dataset, task, step * per_task + group % per_task, seed)
    group_of = group_B.tolist()
    asked = {group: _prompt(record, tokenizer) for group, record in picked.items()}
    _require_fit(list(asked.values()), list(picked.values()), prompt_length, *PROMPTS)
    tokens_BP, valid_BP = _padded(
        [asked[group] for group in group_of], prompt_length, tokenizer.pad_id, left=True
    )
    completion_BC = completion_mask_BC = None
    if completion_length is not None:
        given = {group: _completion(record, tokenizer) for group, record in picked.items()}
        _require_fit(list(given.values()), list(picked.values()), completion_length, *COMPLETIONS)
        completion_BC, completion_mask_BC = _padded(
            [given[group] for group in group_of], completion_length, tokenizer.pad_id, left=False
        )
    return Prompts(
        tokens_BP=tokens_BP,
        valid_BP=valid_BP,
        task_B=task_B,
        group_B=group_B,
        row_B=row_B,
        records=tuple(picked[group] for group in group_of),
        completion_BC=completion_BC,
        completion_mask_BC=completion_mask_BC,
    )


def of_records(records: Sequence[Record], tokenizer: Tokenizer, *, prompt_length: int) -> Prompts:
    """These records' prompts, a row each, in this order: evaluation, notebooks.

    Every row is a group and task of its own number 0; row_B counts from 0.
    """
    ids = [_prompt(record, tokenizer) for record in records]
    _require_fit(ids, records, prompt_length, *PROMPTS)
    tokens_BP, valid_BP = _padded(ids, prompt_length, tokenizer.pad_id, left=True)
    row_B = np.arange(len(ids), dtype=np.int32)
    return Prompts(
        tokens_BP=tokens_BP,
        valid_BP=valid_BP,
        task_B=np.zeros_like(row_B),
        group_B=row_B,
        row_B=row_B,
        records=tuple(records),
    )


def check_lengths(
    dataset: Dataset,
    tokenizer: Tokenizer,
    prompt_length: int,
    *,
    completion_length: int | None = None,
) -> int:
    """Tokens of the longest prompt, after rendering every record's.

    ValueError counts the prompts that are longer than prompt_length and, with completion_length,
    the completions that are missing or longer. Nothing is dropped.
    """
    everything = [record for records in dataset.records.values() for record in records]
    ids = [_prompt(record, tokenizer) for record in everything]
    _require_fit(ids, everything, prompt_length, *PROMPTS)
    if completion_length is not None:
        answers = [_completion(record, tokenizer) for record in everything]
        _require_fit(answers, everything, completion_length, *COMPLETIONS)
    return max(map(len, ids))


def prefetch(make: Callable[[int], Any], start: int, depth: int = 2) -> Iterator[Any]:
    """make(start), make(start + 1), ... in order, `depth` of them ahead in one thread.

    An exception in make is raised where its step would come. close() ends the thread.
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; at least one step has to be ahead")
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        ahead = collections.deque(pool.submit(make, start + i) for i in range(depth))
        try:
            for step in itertools.count(start + depth):
                made = ahead.popleft().result()
                ahead.append(pool.submit(make, step))
                yield made
        finally:
            for future in ahead:
                future.cancel()


def _identity(records: dict[str, tuple[Record, ...]]) -> str:
    digest = hashlib.sha256()
    for r in itertools.chain.from_iterable(records.values()):
        fields = (r.messages, r.task, r.answer, r.verifier, r.completion)
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


@functools.lru_cache(maxsize=16)
def _order(seed: int, task: str, epoch: int, n: int) -> np.ndarray:
    """A permutation of n. Philox's raw output is fixed for good; numpy's shuffles are not."""
    key = hashlib.sha256(json.dumps([seed, task, epoch]).encode()).digest()[:16]
    bits = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(n)
    order = np.argsort(bits, kind="stable")
    order.flags.writeable = False
    return order


def _at(dataset: Dataset, task: str, position: int, seed: int) -> Record:
    records = dataset.records[task]
    epoch, place = divmod(position, len(records))
    return records[_order(seed, task, epoch, len(records))[place]]


def _prompt(record: Record, tokenizer: Tokenizer) -> list[int]:
    try:
        ids = tokenizer.render(record.messages)
    except ValueError as error:
        raise ValueError(f"{record.source}: {error}") from error
    if not ids:
        raise ValueError(f"{record.source}: the chat template makes nothing of its messages")
    return ids


def _completion(record: Record, tokenizer: Tokenizer) -> list[int] | None:
    """Ids with one end token, or None where the record has no completion."""
    if record.completion is None:
        return None
    ids = tokenizer.encode(record.completion)
    if ends := set(ids) & set(tokenizer.eos_ids):
        raise ValueError(f"{record.source}: its completion holds the end token {sorted(ends)}")
    return [*ids, tokenizer.eos_ids[0]]


def _require_fit(
    ids: Sequence[list[int] | None], records: Sequence[Record], limit: int, what: str, setting: str
) -> None:
    if lacking := [r.source for r, row in zip(records, ids) if row is None]:
        raise ValueError(
            f"{len(lacking)} of {len(records)} records have no completion, the first is "
            f"{lacking[0]}; objective.source = 'data' needs one in each"
        )
    lengths = [len(row) for row in ids]
    if longer := sum(length > limit for length in lengths):
        worst = int(np.argmax(lengths))
        raise ValueError(
            f"{longer} of {len(records)} {what} are longer than {setting} = {limit} tokens; the "
            f"longest has {lengths[worst]}, {records[worst].source}. Raise {setting} to "
            f"{lengths[worst]} or take them out of the data"
        )


def _padded(ids: Sequence[list[int]], width: int, fill: int, *, left: bool):
    """ids int32 and where they are, bool: rows of `width`, padded on their left or right."""
    tokens = np.full((len(ids), width), fill, np.int32)
    valid = np.zeros((len(ids), width), bool)
    for b, row in enumerate(ids):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[b, span], valid[b, span] = row, True
    return tokens, valid
