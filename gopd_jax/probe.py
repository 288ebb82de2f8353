"""Questions to the models of a run: a few rows sampled, judged, and written greedily.

preflight.py holds the answers against limits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math

import jax
import numpy as np

from gopd_jax import batching, data, processes, sampler, scoring, sharding, step
from gopd_jax.method import teachers_of
from gopd_jax.reader import padded, require_fit
from gopd_jax.setup import Role, Run
from gopd_jax.types import Rollout, View

ROWS = 8  # of each task
TEXT = "The sum of 17 and 25 is 42. def double(x): return 2 * x"  # of which a fingerprint is made
LENGTH = 64  # tokens of a probe's completion at most


def mean(values_BT, mask_BT) -> float:
    """Of the values where the mask is; NaN where it is nowhere."""
    return float(np.asarray(values_BT)[mask_BT].mean()) if mask_BT.any() else math.nan


class Probe:
    """The probe's rows under the student, and how another model is asked about them."""

    def __init__(self, this: Run):
        c = this.config
        self.run, self.student = this, this.student
        shards = sharding.n_decode_shards(this.mesh)
        per_task = -(-ROWS // shards) * shards
        n_tasks = len(this.train.tasks)
        self.recipe = dataclasses.replace(
            this.recipe,
            group_rows=(per_task,) * n_tasks,
            completion_length=min(LENGTH, c.sampling.completion_length),
            microbatches=1,
        )
        process, n_processes = sharding.process_share(this.mesh, per_task * n_tasks)
        self.prompts = data.prompts(
            this.train,
            self.student.reader,
            0,
            seed=c.seed,
            n_prompts=per_task * n_tasks,
            rollouts=1,
            process=process,
            n_processes=n_processes,
        )
        self.task_B = np.repeat(np.arange(n_tasks), per_task)
        self.key = jax.random.key(c.seed)
        self.jits: dict = {}
        self.texts: dict = {}
        self.ln_v = math.log(self.recipe.n_vocab)
        sample = self.compiled(step.sampling, self.student.decoder)
        self.rollout = sample(self.params(self.student), self.put(self.prompts), self.key)
        self.mask_BT = processes.gather(self.rollout.mask_BT)
        self.logp_BT, _ = self.judge(self.student, self.rollout)

    def compiled(self, make, decoder, **options):
        """One compiled function for all roles of one architecture."""
        key = make, decoder, tuple(options.items())
        if key not in self.jits:
            self.jits[key] = make(self.recipe, decoder, **options)
        return self.jits[key]

    def params(self, role: Role):
        """Of a teacher that follows the student: the student's."""
        return self.student.params if role.params is None else role.params

    def put(self, rows):
        """This process's rows as global arrays."""
        if hasattr(rows, "records"):
            rows = rows.replace(records=())
        return processes.to_global(self.run.mesh, rows)

    def mine(self, name: str) -> np.ndarray:
        """mine_B: rows that the role is asked about in training, a teacher its own tasks' alone."""
        if not name.startswith("teacher:"):
            return np.ones(len(self.task_B), bool)
        c = self.run.config
        own = [
            name.removeprefix("teacher:") in teachers_of(c, task) for task in self.run.train.tasks
        ]
        return np.array(own)[self.task_B]

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens_BP, valid_BP) of this process's rows as the role reads them.

        Rows that are not its own, which may have nothing to show it, stand as the student's.
        """
        reader, ours = self.run.roles[name].reader, self.student.reader
        records, width = self.prompts.records, reader.width or reader.length
        mine = self.mine(name)[self.prompts.row_B]
        ids = [reader.ids(r) if own else ours.ids(r)[-width:] for r, own in zip(records, mine)]
        own = [(row, r) for row, r, is_own in zip(ids, records, mine) if is_own]
        if own:
            require_fit(*zip(*own), reader.length, "prompts", reader.setting)
        return padded(ids, width, reader.tokenizer.pad_id, left=True)

    def view(self, name: str) -> View | None:
        """The rows as the role reads them; None where that is as the student does."""
        if self.run.roles[name].reader.reads_as(self.student.reader):
            return None
        return self.put(View(*self.read(name)))

    def judge(self, role: Role, rollout: Rollout, view: View | None = None):
        """(logp_BT, entropy_BT) of the role, all rows, on the host."""
        judged = self.compiled(step.judging, role.decoder)(self.params(role), rollout, view)
        return processes.gather(judged)

    def text(self, name: str, mine_B: np.ndarray) -> tuple[float | None, str]:
        """(mean log-prob of the data's completions, or of its prompts' words, what it is).

        None where there is no token that follows another.
        """
        if name not in self.texts:
            self.texts[name] = self._text(name)
        logp_BT, mask_BT, what = self.texts[name]
        mask_BT = mask_BT & mine_B[:, None]
        return mean(logp_BT, mask_BT) if mask_BT.any() else None, what

    def _text(self, name: str) -> tuple[np.ndarray, np.ndarray, str]:
        records, role = self.prompts.records, self.run.roles[name]
        chat, length = role.tokenizer, self.recipe.completion_length
        every = (record for of_task in self.run.train.records.values() for record in of_task)
        if all(record.completion is not None for record in every):  # on each process alike
            what = "the data"
            ids = [chat.encode(record.completion) for record in records]
            first = self.read(name)
        else:
            what = "prompts"
            words = [chat.encode(record.messages[-1]["content"]) for record in records]
            ids = [row[1:] for row in words]
            first = padded([row[:1] for row in words], 1, chat.pad_id, left=True)
        logp_BT, mask_BT = self._said(role, first, [row[:length] for row in ids], length)
        return logp_BT, mask_BT, what

    def fingerprint(self, name: str) -> str:
        """Twelve digits of the log-probs of TEXT's tokens, in hundredths of a nat.

        Equal models have equal ones on equal devices; elsewhere rounding may tip a hundredth over.
        """
        role, n_rows = self.run.roles[name], len(self.prompts.records)
        ids = role.tokenizer.encode(TEXT)
        first = padded([ids[:1]] * n_rows, 1, role.tokenizer.pad_id, left=True)
        logp_BT, mask_BT = self._said(role, first, [ids[1:]] * n_rows, len(ids) - 1)
        logp = logp_BT[0][mask_BT[0]]
        if not np.isfinite(logp).all():
            return "nan"
        hundredths = np.rint(100 * logp).astype(np.int64)
        return hashlib.sha256(hundredths.tobytes()).hexdigest()[:12]

    def _said(self, role: Role, first, ids: list[list[int]], length: int):
        """(logp_BT, mask_BT) of these completions after first = (tokens_BP, valid_BP)."""
        prompts = self.prompts.replace(tokens_BP=first[0], valid_BP=first[1])
        tokens_BC, mask_BC = padded(ids, length, role.tokenizer.pad_id, left=False)
        rows = sampler.assemble(
            self.put(prompts),
            *self.put((tokens_BC, mask_BC, np.zeros(mask_BC.shape, np.float32))),
            self.put(np.ones(len(ids), bool)),
        )
        logp_BT, _ = self.judge(role, rows)
        return logp_BT, processes.gather(rows.mask_BT)

    def own(self, name: str, mine_B: np.ndarray) -> float:
        """Mean log-prob, under the model, of its own greedy completions."""
        role, (tokens_BP, valid_BP) = self.run.roles[name], self.read(name)
        prompts = self.prompts.replace(tokens_BP=tokens_BP, valid_BP=valid_BP)
        sample = self.compiled(step.sampling, role.decoder, greedy=True)
        rollout = sample(self.params(role), self.put(prompts), self.key)
        rollout = processes.gather(rollout)
        return mean(rollout.logp_BT, rollout.mask_BT & mine_B[:, None])

    def mass_on_other_ends(self, role: Role, view: View | None) -> tuple[np.ndarray, list[str]]:
        """(mass_B on the role's ends that stop no completion, these ends).

        The mass is the largest of a row's positions: there the role would have ended.
        """
        others = tuple(sorted(set(role.tokenizer.eos_ids) - set(self.recipe.eos_ids)))
        options = {
            "temperature": self.recipe.temperature,
            "n_vocab": role.tokenizer.vocab_size,
            "chunk": self.recipe.head_chunk,
        }

        def largest(params, rollout, view):
            params = batching.resident(role.decoder, params)
            mass_BT = scoring.mass(role.decoder, params, rollout, others, view=view, **options)
            return mass_BT.max(1)

        with sharding.use(self.run.mesh):
            mass_B = jax.jit(largest)(self.params(role), self.rollout, view)
        return processes.gather(mass_B), [role.tokenizer.contents[i] for i in others]

    def example(self) -> tuple[tuple[str, bool], ...]:
        """The first row's tokens as text, with whether each is learnt from."""
        rows = processes.gather(self.rollout)
        chat, valid_L = self.student.tokenizer, rows.valid_BL[0]
        learnt_L = np.concatenate([[False], rows.mask_BT[0]])
        decode = chat.backend.decode
        return tuple(
            (decode([int(i)], skip_special_tokens=False), bool(learnt))
            for i, learnt in zip(rows.tokens_BL[0][valid_L], learnt_L[valid_L])
        )
