"""What the study's cells share: models loaded once, each method compiled once for all seeds.

A cell is what `train.run` would do at its seed, without checkpoints, exports and reports: the seed
enters through the prompts, the sampling key and the critic's first weights, none of which is
compiled in.
"""

import copy
import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from gopd_jax import diagnose, drawing, heads, method, metrics, setup, sharding, step
from gopd_jax.advance import ROLLOUT_STREAM, Stepper, prompts_of
from gopd_jax.assembly import frozen_of, recipe_of
from gopd_jax.config import Config
from gopd_jax.evaluate import evaluate
from gopd_jax.microworld.compare import EVALUATION_ROWS, held_out
from gopd_jax.objectives import objective
from gopd_jax.objectives.entries import fed
from gopd_jax.objectives.supports import supported
from gopd_jax.recipe import init_state
from gopd_jax.setup import Run
from gopd_jax.types import TrainState
from gopd_jax.update import gradient

PROBE_ROWS = 32
PROBE_STEP = 10_000  # of the stream of prompts: no training comes to it
KEPT = ("probe/kl_teacher", "probe/kl_target", "probe/overlap", "probe/tail_mass")


class Bench:
    """Models and problems, and what is compiled for all methods."""

    def __init__(self, full: Config):
        """full: settings under which every role is loaded."""
        self.run = setup.prepare(full)
        self.sample = step.sampling(self.run.recipe, self.run.student.decoder)
        self.probes: dict[float, tuple] = {}

    def of(self, config: Config) -> Run:
        """The config's run on the models that are loaded. ValueError for a config with problems."""
        if problems := config.problems():
            raise ValueError("\n".join(f"- {problem}" for problem in problems))
        run, goal = self.run, objective.build(**method.settings(config))
        names = tuple(config.teachers)
        recipe = recipe_of(config, run.mesh, goal, run.roles, names, run.recipe.eos_ids)
        frozen = frozen_of(run.roles, goal, names)
        return dataclasses.replace(run, config=config, recipe=recipe, frozen=frozen)

    def judge(self, params, seed: int, n_problems: int, n_samples: int) -> dict:
        """{accuracy, stderr, length, truncated} by task, on the problems of the seed."""
        rows = evaluate(
            self.sample,
            params,
            held_out(self.run.test, n_problems, seed),
            self.run.student.reader,
            mesh=self.run.mesh,
            n_problems=n_problems,
            n_samples=n_samples,
            n_rows=min(EVALUATION_ROWS, 2 * n_problems * n_samples),
            seed=seed,
            step=0,
            model="student",
        ).rows
        keys = ("accuracy", "stderr", "length", "truncated")
        return {key: {row["task"]: row[key] for row in rows} for key in keys}

    def probe(self, this: Run, state: TrainState) -> dict[str, float]:
        """Exact figures of the student on prompts that it was not trained on."""
        lam = this.config.objective.lam
        if lam not in self.probes:
            self.probes[lam] = self._probing(this.config)
        alike, probe = self.probes[lam]
        rows, key = draw(alike, this.config.seed, PROBE_STEP)
        state = state.replace(critic=None, pending=None)
        rollout = probe.sample(state, alike.frozen, rows, key)
        row = metrics.to_row(jax.device_get(probe.look(state, alike.frozen, rollout, None)))
        return {key.removeprefix("probe/"): row[key] for key in KEPT}

    def _probing(self, config: Config):
        """(the run of plain distillation at the config's lambda, its Probe)."""
        c = copy.deepcopy(config)
        blank = type(c.objective)(lam=c.objective.lam)
        c = dataclasses.replace(c, objective=blank, critic=None, sampling=copy.copy(c.sampling))
        c.sampling.lag = 0
        alike = self.of(c)
        options = {"n_rows": PROBE_ROWS, "rollouts": 1, "top_k": 16}
        return alike, diagnose.probing(alike.recipe, options=method.settings(c), **options)


class Trainer:
    """One method, compiled once."""

    def __init__(self, this: Run):
        self.run, self.stepper = this, Stepper(this)
        self.start = init_state(this.recipe, this.student.params)

    def begin(self, seed: int) -> tuple[Stepper, TrainState]:
        """The compiled functions on the seed's prompts and key, and the state before step 0."""
        stepper = copy.copy(self.stepper)
        stepper.run = dataclasses.replace(
            self.run, config=dataclasses.replace(self.run.config, seed=seed)
        )
        stepper.make = prompts_of(stepper.run)
        stepper.key = jax.random.fold_in(jax.random.key(seed), ROLLOUT_STREAM)
        recipe = self.run.recipe
        if recipe.critic is None:
            state = jax.tree.map(jnp.copy, self.start)  # the first step takes it
        else:  # whose first weights are of the seed
            state = init_state(recipe, self.run.student.params, seed=seed)
        return stepper, stepper.begin(state)

    def train(self, seed: int) -> tuple[Stepper, TrainState, dict]:
        """(the stepper, the trained state, {last metrics, seconds of a step})."""
        stepper, state = self.begin(seed)
        seconds, rows = [], []
        for i in range(self.run.config.steps):
            start = time.monotonic()
            state, row = stepper(state, stepper.make(i + self.run.recipe.lag), i)
            rows.append(row)
            seconds.append(time.monotonic() - start)
        return stepper, state, {"step_seconds": float(np.median(seconds)), "train": _summary(rows)}


def _summary(rows: list[dict]) -> dict[str, float]:
    """Means over the second half of the training, of what the tables and their readers ask."""
    wanted = ("kl_teacher", "grad_norm", "loss", "skipped", "log_ess", "sampler_kl", "staleness")
    wanted += ("explained_variance", "value_loss", "advantage_absmax", "advantage_snr", "entropy")
    late = rows[len(rows) // 2 :]
    found = {key: [row[key] for row in late if row.get(key) is not None] for key in wanted}
    return {key: float(np.mean(values)) for key, values in found.items() if values}


def draw(this: Run, seed: int, i: int):
    """(prompts of the seed's step i on the devices, their key), as a training draws them."""
    c = dataclasses.replace(this.config, seed=seed)
    prompts = prompts_of(dataclasses.replace(this, config=c))(i).replace(records=())
    key = jax.random.fold_in(jax.random.key(seed), ROLLOUT_STREAM)
    return prompts, jax.random.fold_in(key, i)


def step_seconds(trainers: dict[str, Trainer], n_steps: int) -> dict[str, float]:
    """Median seconds of a step of each, a step in turn, so that a busy machine slows all alike."""
    running = {name: trainer.begin(0) for name, trainer in trainers.items()}
    taken = {name: [] for name in trainers}
    for i in range(n_steps + 1):
        for name, (stepper, state) in running.items():
            start = time.monotonic()
            state, _ = stepper(state, stepper.make(i + stepper.run.recipe.lag), i)
            running[name] = stepper, state
            if i:  # the first one is compiled
                taken[name].append(time.monotonic() - start)
    return {name: float(np.median(seconds)) for name, seconds in taken.items()}


class Gradients:
    """Gradients at the initial student, of the same batches for every method."""

    def __init__(self, bench: Bench, n_batches: int):
        self.bench, self.n_batches = bench, n_batches
        self.rollouts: list = []
        self.wanted: dict[tuple, np.ndarray] = {}

    def of(self, this: Run, seed: int) -> dict[str, float]:
        """{variance, cosine, cosine_mean} of the method's gradient over the batches.

        variance: trace of the covariance of a batch's gradient over the squared norm of the mean
        gradient, whose own share of the noise is taken off; null where nothing of it is left.
        cosine: with the exact gradient of the method's divergence and lambda on the same batch, the
        mean over batches; cosine_mean: of the two mean gradients.
        """
        start = init_state(this.recipe, this.student.params)
        if not self.rollouts:
            generate, _, _ = step.staged(this.recipe)
            for i in range(self.n_batches):
                self.rollouts.append(generate(start.params, this.frozen, *draw(this, seed, i)))
        got, want = self._all(this, start), self._exact(this)
        mean, wanted = got.mean(0), want.mean(0)
        trace = float(((got - mean) ** 2).sum() / (len(got) - 1))
        signal = float((mean**2).sum()) - trace / len(got)
        return {
            "variance": trace / signal if signal > 0 else None,
            "cosine": float(np.mean([_cosine(a, b) for a, b in zip(got, want)])),
            "cosine_mean": _cosine(mean, wanted),
        }

    def _exact(self, this: Run) -> np.ndarray:
        o = this.config.objective
        if (key := (o.divergence, o.lam)) not in self.wanted:
            c = copy.deepcopy(this.config)
            c.objective = type(o)(lam=o.lam, divergence=o.divergence, loss="exact")
            c.critic = None
            run = self.bench.of(c)
            self.wanted[key] = self._all(run, init_state(run.recipe, run.student.params))
        return self.wanted[key]

    def _all(self, this: Run, start: TrainState) -> np.ndarray:
        """[batches, parameters] float64."""

        def of_batch(state, frozen, rollout):
            scores = step.score(this.recipe, frozen, rollout)
            return gradient(this.recipe, state, rollout, scores, frozen)[0]

        one, found = step.compiled(this.recipe, of_batch, sharding.replicated(this.mesh)), []
        for rollout in self.rollouts:
            leaves = jax.tree.leaves(jax.device_get(one(start, this.frozen, rollout)))
            found.append(np.concatenate([x.ravel() for x in leaves]).astype(np.float64))
        return np.stack(found)

    def freed(self, this: Run, losses: dict) -> dict[str, float]:
        """Loss -> share of the probability that negatives gain which goes to tokens with T > S.

        To first order in a step along the direction that the loss gives the logits of a state, of
        the states whose sampled token the target likes less than the student does; of what the
        step adds, summed over these states. The first batch; losses: name -> entry of LOSSES.
        """
        exact = copy.deepcopy(this.config)
        exact.objective = type(exact.objective)(lam=exact.objective.lam, loss="exact")
        run = self.bench.of(exact)
        look = functools.partial(flows, losses=losses)

        def read(params, frozen, rollout):
            scores = step.score(run.recipe, frozen, rollout)
            of_heads = heads.frozen_heads(run.recipe, frozen)
            lam = run.recipe.objective.lam
            return heads.read(run.recipe, params, of_heads, rollout, scores, lam, look=look)

        rollout = self.rollouts[0]
        read = step.compiled(run.recipe, read, sharding.replicated(run.mesh))
        found = read(this.student.params, run.frozen, rollout)
        mask_BT = np.asarray(rollout.mask_BT)
        total = {n: float(np.asarray(x)[mask_BT].sum()) for n, x in found.items() if "/" in n}
        return {name: total[f"{name}/right_BT"] / total[f"{name}/all_BT"] for name in losses}


def flows(*, ids_x, student_xV, target_xV, teacher_xV, ref_xV, real_xV, losses):
    """{"name/right", "name/all"}: probability that a small step gives to tokens with T > S, to all.

    0 at a state whose sampled token is no negative. ref_xV, teacher_xV are not used.
    """
    full = objective.build(loss="exact").support
    advantage_x = drawing.pick(target_xV, ids_x) - drawing.pick(student_xV, ids_x)
    negative_x = advantage_x < 0
    better_xV = jnp.where(real_xV, target_xV, 0.0) > jnp.where(real_xV, student_xV, 0.0)
    finite_xV = jnp.where(real_xV, student_xV, 0.0)
    found = {}
    for name, loss in losses.items():

        def total(logits_xV, loss=loss):
            logp_xV = jax.nn.log_softmax(jnp.where(real_xV, logits_xV, -jnp.inf))
            on = supported(full, None, logp_xV, target_xV, real_xV)
            known = dict(zip(("student_xS", "target_xS", "valid_xS"), on))
            known |= {"student_xV": logp_xV, "target_xV": target_xV, "real_xV": real_xV}
            logp_x = drawing.pick(jnp.where(real_xV, logp_xV, 0.0), ids_x)
            known |= {"logp_x": logp_x, "ids_x": ids_x, "advantage_x": advantage_x}
            return fed(loss, known).sum()

        direction_xV = -jax.grad(total)(finite_xV)
        share_xV = jnp.where(real_xV, jnp.exp(finite_xV), 0.0)
        pull_x1 = (share_xV * direction_xV).sum(-1, keepdims=True)
        gain_xV = jnp.maximum(share_xV * (direction_xV - pull_x1), 0.0)
        gain_xV = jnp.where(negative_x[..., None], gain_xV, 0.0)
        found[f"{name}/all"] = gain_xV.sum(-1)
        found[f"{name}/right"] = jnp.where(better_xV, gain_xV, 0.0).sum(-1)
    return found


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
