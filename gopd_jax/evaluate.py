"""Accuracy of a model on held-out problems: avg@n with its standard error, pass@k, length, cuts."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np

from gopd_jax import data, processes, sharding
from gopd_jax.reader import Reader
from gopd_jax.types import Record
from gopd_jax.verifiers import verify

N_SHOWN = 4  # completions of each task kept for reading


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What one evaluation found, as the rows that metrics.Writer takes."""

    rows: list[dict]  # one a task: accuracy, stderr, length, truncated, problems, samples
    samples: list[dict]  # a few completions of each task with their verdicts

    def accuracy(self) -> dict[str, float]:
        return {row["task"]: row["accuracy"] for row in self.rows}


def completions(tokenizer, rollout) -> list[str]:
    """The text of each row's completion, special tokens dropped; rollout on the host."""
    first = rollout.n_prompt - 1
    tokens_BC, mask_BC = rollout.tokens_BL[:, first + 1 :], rollout.mask_BT[:, first:]
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(tokens_BC, mask_BC)]


def held_out(dataset: data.Dataset, n_problems: int) -> dict[str, tuple[Record, ...]]:
    """The first n_problems of each task. ValueError where a task has fewer."""
    if few := {task: len(r) for task, r in dataset.records.items() if len(r) < n_problems}:
        raise ValueError(
            f"evaluation.problems = {n_problems} of each task and {dataset.source} has {few}; ask "
            f"for {min(few.values())} or add problems"
        )
    return {task: records[:n_problems] for task, records in dataset.records.items()}


def pass_at(solved: np.ndarray, k: int) -> float:
    """pass@k: the chance that one of k samples of a problem solves it, in the mean over problems.

    solved: bool [problems, n], n >= k. Without bias from n samples: 1 - C(n - c, k) / C(n, k) of a
    problem that c of them solve (Chen et al., arXiv 2107.03374, equation 1).
    """
    n = solved.shape[1]
    missed = [math.comb(n - int(c), k) / math.comb(n, k) for c in solved.sum(1)]
    return 1 - float(np.mean(missed))


def _doubled(n: int) -> list[int]:
    """1, 2, 4, .. and n."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def rows_at_once(c) -> int:
    """Completions that an evaluation under this Config samples at one time."""
    rows = c.batch.prompts * c.batch.rollouts
    return min(rows, c.evaluation.rows or rows)


def evaluate(
    sample: Callable,
    params,
    dataset: data.Dataset,
    reader: Reader,
    *,
    mesh,
    n_problems: int,
    n_samples: int,
    n_rows: int,
    seed: int,
    step: int,
    model: str,
    bar: Callable[[Iterable, str], Iterator] = lambda work, _: iter(work),
) -> Result:
    """avg@n_samples over the first n_problems of each task of `dataset`, at the run's temperature.

    sample: jitted (params, prompts, key) -> Rollout, called with batches of n_rows. stderr is that
    of the mean over problems, each problem's score being its mean over samples, so that it counts
    the choice of problems too. pass@k, for k = 1, 2, 4, .. n_samples, counts scores of 1 alone. A
    task with fewer problems than asked for is a ValueError.
    """
    held = held_out(dataset, n_problems)
    problems = [(task, record) for task, records in held.items() for record in records]
    jobs = [
        (i, task, record) for i, (task, record) in enumerate(problems) for _ in range(n_samples)
    ]
    process, n_processes = sharding.process_share(mesh, n_rows)
    share = n_rows // n_processes
    key = jax.random.key(seed)
    texts, lengths, ended = [], [], []
    for start in bar(range(0, len(jobs), n_rows), f"evaluating {model}"):
        # The last batch is filled up with its last problem; those rows are dropped below.
        index = np.minimum(np.arange(start, start + n_rows), len(jobs) - 1)
        mine = index[process * share : (process + 1) * share]
        prompts = data.of_records([jobs[i][2] for i in mine], reader)
        prompts = prompts.replace(
            row_B=np.arange(start, start + n_rows, dtype=np.int32)[
                process * share : (process + 1) * share
            ],
            records=(),
        )
        rollout = sample(params, processes.to_global(mesh, prompts), key)
        rollout = processes.gather(rollout)
        n_real = min(n_rows, len(jobs) - start)
        texts += completions(reader.tokenizer, rollout)[:n_real]
        lengths += rollout.mask_BT.sum(1)[:n_real].tolist()
        ended += rollout.ended_B[:n_real].tolist()
    verdicts = verify(texts, [record for _, _, record in jobs])
    score = np.array([verdict.score for verdict in verdicts]).reshape(-1, n_samples)
    length = np.array(lengths, np.float64).reshape(-1, n_samples)
    cut = ~np.array(ended).reshape(-1, n_samples)
    rows, shown = [], []
    for i, task in enumerate(dataset.tasks):
        of_task = slice(i * n_problems, (i + 1) * n_problems)
        means = score[of_task].mean(1)
        stderr = means.std(ddof=1) / np.sqrt(n_problems) if n_problems > 1 else float("nan")
        rows.append(
            {
                "step": step,
                "model": model,
                "task": task,
                "accuracy": float(means.mean()),
                "stderr": float(stderr),
                "length": float(length[of_task].mean()),
                "truncated": float(cut[of_task].mean()),
                "pass_at": {str(k): pass_at(score[of_task] >= 1, k) for k in _doubled(n_samples)},
                "problems": n_problems,
                "samples": n_samples,
            }
        )
        for j in range(i * n_problems, i * n_problems + min(N_SHOWN, n_problems)):
            row, record = j * n_samples, problems[j][1]
            shown.append(
                {
                    "step": step,
                    "model": model,
                    "task": task,
                    "prompt": record.messages[-1]["content"],
                    "completion": texts[row],
                    "score": verdicts[row].score,
                    "reason": verdicts[row].reason,
                }
            )
    return Result(rows=rows, samples=shown)
