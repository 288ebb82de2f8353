"""One step of a run on the host: prompts in, verdicts where they are asked for, metrics out.

`Stepper.dispatch` hands the step's programs to the devices and does not wait for them; `row` waits.
A caller that dispatches step n + 1 before it asks for the row of step n never lets them stand idle.
"""

import dataclasses

import jax
import numpy as np

from gopd_jax import data, diagnose, method, metrics, processes, recipe, sharding, step
from gopd_jax.assembly import views
from gopd_jax.evaluate import completions
from gopd_jax.recipe import following
from gopd_jax.setup import Run
from gopd_jax.types import Mean, Prompts, Record, Rollout, TrainState
from gopd_jax.verifiers import verify

ROLLOUT_STREAM = 0  # randomness is named by what it is for; evaluation has another number


def prompts_of(this: Run):
    """step -> this process's prompts."""
    c = this.config
    process, n_processes = sharding.process_share(this.mesh, c.batch.prompts * c.batch.rollouts)
    other = views(c, this.roles)
    imitates = c.objective.source == "data"
    by_row = this.recipe.objective.lam_by_row
    lam = {task: c.objective.task_lam.get(task, c.objective.lam) for task in c.data.tasks}

    def make(i: int) -> Prompts:
        return data.prompts(
            this.train,
            this.student.reader,
            i,
            seed=c.seed,
            n_prompts=c.batch.prompts,
            rollouts=c.batch.rollouts,
            process=process,
            n_processes=n_processes,
            completion_length=c.sampling.completion_length if imitates else None,
            lam=lam if by_row else None,
            **other,
        )

    return make


def abstract_state(this: Run) -> TrainState:
    """Shapes, dtypes and shardings of the run's TrainState."""
    if not this.recipe.lag:
        return recipe.abstract_state(this.recipe)
    generate, _, _ = step.staged(this.recipe)
    rows = processes.to_global(this.mesh, prompts_of(this)(0).replace(records=()))
    params = recipe.abstract_state(this.recipe).params
    args = params, this.frozen, rows, jax.random.key(0)
    return recipe.abstract_state(this.recipe, generate.lower(*args).out_info)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What is to be told of a step that was dispatched; its arrays may still be under way.

    rollout: what the step learnt from, where verdicts on it are for the row alone and wait until
    the row is asked for; records: its problems.
    """

    metrics: dict[str, Mean]
    rollout: Rollout | None
    records: tuple[Record, ...]


class Stepper:
    """Compiled functions of a run: (state, prompts on the host, step) -> (state, metrics row)."""

    def __init__(self, this: Run):
        self.run, self.make = this, prompts_of(this)
        batch = this.config.batch
        self.share = sharding.process_share(this.mesh, batch.prompts * batch.rollouts)
        self.key = jax.random.fold_in(jax.random.key(this.config.seed), ROLLOUT_STREAM)
        objective = this.recipe.objective
        self.fused = None if objective.needs_reward else step.fused(this.recipe)
        self.generate, self.score, self.update = step.staged(this.recipe)
        self.rewarded = step.compiled(
            this.recipe, self._of_rewards, sharding.replicated(this.recipe.mesh)
        )
        self.asked = {}  # step -> problems of its completions, where these are not yet learnt from
        self.probe = None
        d = this.config.diagnostics
        if (
            d.every is not None
            and objective.needs_teacher
            and this.config.objective.source == "student"
        ):
            self.probe = diagnose.probing(
                this.recipe,
                n_rows=d.rows,
                rollouts=this.config.batch.rollouts,
                top_k=d.top_k,
                options=method.settings(this.config),
            )

    def begin(self, state: TrainState) -> TrainState:
        """The state with the first rollouts of a sampler that lags, where it has none yet."""
        self.asked = {}  # of this run: a copy of the stepper may serve another seed
        if not self.run.recipe.lag or state.pending is not None:
            return state
        frozen = following(self.run.frozen, state)
        pending = (
            processes.in_turn(
                self.generate(state.params, frozen, self._rows(self.make(i)), self._key(i))
            )
            for i in range(self.run.recipe.lag)
        )
        return state.replace(pending=tuple(pending))

    def __call__(self, state: TrainState, prompts: Prompts, i: int):
        """One step, waited for: (state, metrics row)."""
        state, seen = self.dispatch(state, prompts, i)
        return state, self.row(seen)

    def dispatch(self, state: TrainState, prompts: Prompts, i: int) -> tuple[TrainState, Seen]:
        """Step i on its way. prompts: of step i + lag, whose completions are written now.

        The host waits for the device in two cases: for the probe's rollout on the steps on which it
        looks, and for the rollout that a verifier's reward is of, which only a sampler that lags
        has finished long before.
        """
        this, lag = self.run, self.run.recipe.lag
        rows, key = self._rows(prompts), self._key(i + lag)
        self.asked[i + lag] = prompts.records
        # Of the completions that a continued run finds waiting nobody has made the prompts yet.
        records = self.asked.pop(i, None) or self.make(i).records
        found = self._look(state, rows, key, records) if self.looks(i) else {}
        every = this.config.evaluation.verify_every
        watched = every and i % every == 0 and this.config.objective.source == "student"
        if self.fused is None:
            state, rollout, seen, watched = *self._in_stages(state, rows, key, records), False
        else:
            state, rollout, seen = self.fused(state, this.frozen, rows, key)
        found |= processes.in_turn(seen)
        return state, Seen(metrics=found, rollout=rollout if watched else None, records=records)

    def row(self, seen: Seen) -> dict[str, float]:
        """The row of a step that was dispatched, when it is done; every process has to ask.

        Verdicts for the row alone are sought here, while the device is at what was dispatched
        since. Several processes add them up on the devices, behind that: such a row comes later.
        """
        with jax.profiler.TraceAnnotation("wait for metrics"):
            found = jax.device_get(seen.metrics)
        if seen.rollout is not None:
            found |= jax.device_get(self._told(self._rewards(seen.rollout, seen.records)))
        if (by_task := found.pop("kl_teacher_task", None)) is not None:
            for task, total, count in zip(self.run.train.tasks, by_task.total, by_task.count):
                found[f"kl_teacher/{task}"] = Mean(total, count)
        return metrics.to_row(found)

    def looks(self, i: int) -> bool:
        """Whether the probe looks at step i."""
        return self.probe is not None and i % self.run.config.diagnostics.every == 0

    def _key(self, i: int):
        return jax.random.fold_in(self.key, i)

    def _rows(self, prompts: Prompts):
        return processes.to_global(self.run.mesh, prompts.replace(records=()))

    def _rewards(self, rollout, records):
        """reward_B of the verifiers, float32, of this process's rows on the host."""
        with jax.profiler.TraceAnnotation("wait for rollout"):
            rollout = processes.to_host(rollout)
        with jax.profiler.TraceAnnotation("verify"):
            verdicts = verify(completions(self.run.student.tokenizer, rollout), records)
        scores = np.array([verdict.score for verdict in verdicts], np.float32)
        return processes.agreed(scores, self.share)

    def _in_stages(self, state, rows, key, records):
        """The stages around the verifiers' work on the host.

        Whatever does not need the verdicts is dispatched before they are sought, so that the device
        has work meanwhile: the frozen models' scores, and, where the sampler lags, the completions
        of a later step. Those that are verified were then written a step ago or earlier.
        """
        frozen = following(self.run.frozen, state)
        rollout = processes.in_turn(self.generate(state.params, frozen, rows, key))
        if self.run.recipe.lag:
            rollout, state = step.turn(state, rollout)
        scores = processes.in_turn(self.score(frozen, rollout))
        reward_B = self._rewards(rollout, records)
        scores = scores.replace(reward_B=processes.to_global(self.run.mesh, reward_B))
        state, seen = processes.in_turn(self.update(state, rollout, scores, frozen))
        return state, rollout, seen | self._told(reward_B)

    def _told(self, reward_B) -> dict[str, Mean]:
        """The row's means of rewards, reward_B those of this process's rows.

        Alone it takes them on the host: a program for it would wait behind the step under way.
        """
        if jax.process_count() == 1:
            return self._of_rewards(reward_B)
        return self.rewarded(processes.to_global(self.run.mesh, reward_B))

    def _of_rewards(self, reward_B) -> dict[str, Mean]:
        """Of all rows, as NumPy's or as traced."""
        found, start = {"reward": reward_B}, 0
        for task, n in zip(self.run.train.tasks, self.run.recipe.group_rows):
            found[f"reward/{task}"] = reward_B[start : start + n]
            start += n
        return {key: Mean(r.sum(), np.float32(r.size)) for key, r in found.items()}

    def _look(self, state, rows, key, records) -> dict[str, Mean]:
        rollout = self.probe.sample(state, self.run.frozen, rows, key)
        reward_B = None
        if jax.process_count() == 1:  # several hold records of their own rows alone
            reward_B = self._rewards(rollout, tuple(records[row] for row in self.probe.rows))
            reward_B = processes.to_global(self.run.mesh, reward_B)
        return jax.device_get(self.probe.look(state, self.run.frozen, rollout, reward_B))
