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
from gopd_jax.reader import Reader, each_once, padded, require_fit
from gopd_jax.records import plain, record, rows, task_of
from gopd_jax.types import Prompts, Record, View

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

    def only(self, task: str) -> Dataset:
        """Its records of one task."""
        return dataclasses.replace(self, records={task: self.records[task]})


def load(source: str, tasks: Sequence[str]) -> Dataset:
    """Every record of `source`, checked.

    source is "microworld:train", "microworld:test", a path to a .jsonl or .parquet file, or
    "tfds:NAME:SPLIT" (NAME may be a builder's directory). A row is {messages or prompt, task,
    answer, verifier, completion (optional)}, or verl's {prompt, reward_model: {ground_truth},
    extra_info: {opd_teacher}} as it is. ValueError lists malformed rows by file and line, tasks
    that are not in `tasks`, and tasks without a record.
    """
    if source.startswith("microworld:"):
        return _builtin(source, tuple(tasks))
    return _read(source, tasks)


@functools.lru_cache(maxsize=8)
def _builtin(source: str, tasks: tuple[str, ...]) -> Dataset:
    """Read once a process: a study makes dozens of runs of these rows, at 2 seconds for each."""
    return _read(source, tasks)


def _read(source: str, tasks: Sequence[str]) -> Dataset:
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
        less = "take their rows out of the file"
        if source.startswith("microworld:") and any(found.values()):
            less = f"give {source}:{next(task for task in tasks if found[task])} in its place"
        raise ValueError(
            f"tasks [{counts}] of {source} are not in data.tasks = {tuple(tasks)}; add them there "
            f"(each has a teacher where the objective asks one), or {less}"
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


def overlap(train: Dataset, test: Dataset) -> tuple[str, ...]:
    """A warning where problems to be evaluated on are trained on too."""

    def problems(dataset):
        every = (record for of_task in dataset.records.values() for record in of_task)
        return collections.Counter(json.dumps([r.task, r.messages], sort_keys=True) for r in every)

    trained, held_out = problems(train), problems(test)
    if not (n := sum(count for problem, count in held_out.items() if problem in trained)):
        return ()
    return (
        f"warning: {n} of the {held_out.total()} problems of data.test = {test.source} are in "
        f"data.train = {train.source} too: the accuracy on them is not that on held-out problems",
    )


def lambdas_missing(train: Dataset, by_row: bool) -> tuple[str, ...]:
    """A warning where rows may name lambdas of their own, by_row, and none does."""
    if not by_row or any(r.lam is not None for of_task in train.records.values() for r in of_task):
        return ()
    return (
        f"warning: objective.lam_by_row = True has no effect: no row of data.train = "
        f"{train.source} has a 'lam'",
    )


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
    reader: Reader,
    step: int,
    *,
    seed: int,
    n_prompts: int,
    rollouts: int,
    process: int = 0,
    n_processes: int = 1,
    completion_length: int | None = None,
    teachers: dict[str, Reader] | None = None,
    reference: Reader | None = None,
    lam: dict[str, float] | None = None,
) -> Prompts:
    """One process's rows of the step's global batch of B = n_prompts * rollouts rows.

    A pure function of (seed, step). Rows are sorted by task in dataset.tasks' order, the rollouts
    of a prompt are adjacent, and process p holds rows [p * B / n_processes, ...). A task's records
    are taken in a new order every epoch, each once. With completion_length, the records' own
    completions too: right-padded, one end token appended. reader is the student's; teachers (task
    -> reader, all of one length) and reference are given where they read otherwise; lam (task ->
    lambda of its rows that name none) where rows have lambdas of their own. ValueError for
    a prompt or completion that does not fit, and for rows that do not divide.
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
    records = tuple(picked[group] for group in group_B.tolist())
    tokens_BP, valid_BP = reader.prompts(records)
    completion_BC = completion_mask_BC = None
    if completion_length is not None:
        completion_BC, completion_mask_BC = _completions(
            records, reader.tokenizer, completion_length
        )
    return Prompts(
        tokens_BP=tokens_BP,
        valid_BP=valid_BP,
        task_B=task_B,
        group_B=group_B,
        row_B=row_B,
        records=records,
        completion_BC=completion_BC,
        completion_mask_BC=completion_mask_BC,
        teacher=None if teachers is None else _by_teacher(records, teachers),
        reference=None if reference is None else View(*reference.prompts(records)),
        lam_B=None if lam is None else _lams(records, lam),
    )


def _lams(records: Sequence[Record], lam: dict[str, float]) -> np.ndarray:
    own = [lam[r.task] if r.lam is None else r.lam for r in records]
    return np.array(own, np.float32)


def of_records(records: Sequence[Record], reader: Reader) -> Prompts:
    """These records' prompts, a row each, in this order: evaluation, notebooks.

    Every row is a group and task of its own number 0; row_B counts from 0.
    """
    tokens_BP, valid_BP = reader.prompts(records)
    row_B = np.arange(len(records), dtype=np.int32)
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
    reader: Reader,
    *,
    completion_length: int | None = None,
    stop: Sequence[int] = (),
) -> int:
    """Tokens of the longest prompt, after rendering every record's.

    ValueError counts the prompts that are longer than reader.length and, with completion_length,
    the completions that are missing, longer, or hold an end token or one of `stop`. Nothing is
    dropped.
    """
    everything = [record for records in dataset.records.values() for record in records]
    ids = [reader.ids(record) for record in everything]
    require_fit(ids, everything, reader.length, "prompts", reader.setting)
    if completion_length is not None:
        _completions(everything, reader.tokenizer, completion_length, stop)
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
        fields += () if r.context is None else (r.context,)  # as before where there is none
        fields += () if r.lam is None else ({"lam": r.lam},)
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


def _by_teacher(records: Sequence[Record], teachers: dict[str, Reader]) -> View:
    """Each row as its own task's teacher reads it."""
    rows = [teachers[record.task].prompts([record]) for record in records]
    tokens, valid = (np.concatenate(parts) for parts in zip(*rows))
    return View(tokens, valid)


def _completions(records: Sequence[Record], tokenizer: Tokenizer, length: int, stop=()):
    """(completion_BC, completion_mask_BC) of the records' own completions, right-padded."""
    distinct = {id(record): record for record in records}.values()
    if lacking := [record.source for record in distinct if record.completion is None]:
        raise ValueError(
            f"{len(lacking)} of {len(distinct)} records have no completion, the first is "
            f"{lacking[0]}; objective.source = 'data' needs one in each"
        )
    ids = each_once(
        lambda record: _completion(record, tokenizer, stop),
        records,
        length,
        "completions",
        "sampling.completion_length",
    )
    return padded(ids, length, tokenizer.pad_id, left=False)


def _completion(record: Record, tokenizer: Tokenizer, stop: Sequence[int] = ()) -> list[int]:
    """Ids with one end token; ValueError where another end, or one of `stop`, is among them."""
    ids = tokenizer.encode(record.completion)
    if ends := set(ids) & {*tokenizer.eos_ids, *stop}:
        raise ValueError(
            f"{record.source}: its completion holds the end token {sorted(ends)}; take it out of "
            "the text, to which one end is added"
        )
    return [*ids, tokenizer.end_id]
