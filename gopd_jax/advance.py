"""One step of a run on the host: prompts in, verdicts where they are asked for, metrics out."""

import jax
import numpy as np

from gopd_jax import data, diagnose, method, metrics, recipe, sharding, step
from gopd_jax.evaluate import completions
from gopd_jax.recipe import following
from gopd_jax.setup import Run, views
from gopd_jax.types import Mean, Prompts, TrainState
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
    rows = sharding.to_global(this.mesh, prompts_of(this)(0).replace(records=()))
    params = recipe.abstract_state(this.recipe).params
    args = params, this.frozen, rows, jax.random.key(0)
    return recipe.abstract_state(this.recipe, generate.lower(*args).out_info)


class Stepper:
    """Compiled functions of a run: (state, prompts on the host, step) -> (state, metrics row)."""

    def __init__(self, this: Run):
        self.run, self.make = this, prompts_of(this)
        self.key = jax.random.fold_in(jax.random.key(this.config.seed), ROLLOUT_STREAM)
        objective = this.recipe.objective
        self.fused = None if objective.reward else step.fused(this.recipe)
        self.generate, self.score, self.update = step.staged(this.recipe)
        self.probe = None
        d = this.config.diagnostics
        if d.every is not None and objective.teacher and this.config.objective.source == "student":
            self.probe = diagnose.probing(
                this.recipe,
                n_rows=d.rows,
                rollouts=this.config.batch.rollouts,
                top_k=d.top_k,
                options=method.settings(this.config),
            )

    def begin(self, state: TrainState) -> TrainState:
        """The state with the first rollouts of a sampler that lags, where it has none yet."""
        if not self.run.recipe.lag or state.pending is not None:
            return state
        frozen = following(self.run.frozen, state)
        pending = (
            self.generate(state.params, frozen, self._rows(self.make(i)), self._key(i))
            for i in range(self.run.recipe.lag)
        )
        return state.replace(pending=tuple(pending))

    def __call__(self, state: TrainState, prompts: Prompts, i: int):
        """prompts: of step i + lag, whose completions are written now."""
        this, lag = self.run, self.run.recipe.lag
        rows, key = self._rows(prompts), self._key(i + lag)
        asked = self.make(i) if lag else prompts  # the problems of what is learnt from
        found = self._look(state, rows, key, asked) if self._looks(i) else {}
        if self.fused is None:
            state, rollout, seen, reward_B = self._in_stages(state, rows, key, asked)
        else:
            state, rollout, seen = self.fused(state, this.frozen, rows, key)
            every = this.config.evaluation.verify_every
            verified = every and i % every == 0 and this.config.objective.source == "student"
            reward_B = self._rewards(rollout, asked.records) if verified else None
        found |= jax.device_get(seen)
        if reward_B is not None:
            found |= self._of_rewards(reward_B)
        if (by_task := found.pop("kl_teacher_task", None)) is not None:
            for task, total, count in zip(this.train.tasks, by_task.total, by_task.count):
                found[f"kl_teacher/{task}"] = Mean(total, count)
        return state, metrics.to_row(found)

    def _key(self, i: int):
        return jax.random.fold_in(self.key, i)

    def _rows(self, prompts: Prompts):
        return sharding.to_global(self.run.mesh, prompts.replace(records=()))

    def _rewards(self, rollout, records):
        """reward_B of the verifiers, as a global array."""
        texts = completions(self.run.student.tokenizer, sharding.to_host(rollout))
        verdicts = verify(texts, records)
        reward_B = np.array([verdict.score for verdict in verdicts], np.float32)
        return sharding.to_global(self.run.mesh, reward_B)

    def _in_stages(self, state, rows, key, asked):
        frozen = following(self.run.frozen, state)
        rollout = self.generate(state.params, frozen, rows, key)
        if self.run.recipe.lag:
            rollout, state = step.turn(state, rollout)
        reward_B = self._rewards(rollout, asked.records)
        scores = self.score(frozen, rollout).replace(reward_B=reward_B)
        state, seen = self.update(state, rollout, scores, frozen)
        return state, rollout, seen, reward_B

    def _of_rewards(self, reward_B) -> dict[str, Mean]:
        reward_B = sharding.gather(reward_B)
        per_task = np.split(reward_B, np.cumsum(self.run.recipe.group_rows)[:-1])
        found = {f"reward/{t}": Mean.of(r) for t, r in zip(self.run.train.tasks, per_task)}
        return found | {"reward": Mean.of(reward_B)}

    def _looks(self, i: int) -> bool:
        return self.probe is not None and i % self.run.config.diagnostics.every == 0

    def _look(self, state, rows, key, asked) -> dict[str, Mean]:
        rollout = self.probe.sample(state, self.run.frozen, rows, key)
        reward_B = None
        if jax.process_count() == 1:  # several hold records of their own rows alone
            records = tuple(asked.records[row] for row in self.probe.rows)
            reward_B = self._rewards(rollout, records)
        return jax.device_get(self.probe.look(state, self.run.frozen, rollout, reward_B))
