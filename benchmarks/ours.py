"""This project as a contender of `benchmarks.speed`: the fused step, then its stages apart.

The workload's JSON may also hold: loss, lam, remat, n_teachers, microbatches, head_chunk, RECIPE,
devices (emulated, one mesh axis "data"), and mean_length: completions then end at random,
geometrically, at that mean, as an untrained model's do where that share of the ids ends a
completion. only: "generate", where a step is to be the rollout alone. memory: true, where nothing
is to be compiled or held but what a run's fused step needs; cache: a directory for what is
compiled, as a run has it.
"""

import dataclasses
import os
import time

import contender

told = contender.workload()
os.environ.setdefault("JAX_PLATFORMS", "cpu" if told.get("cpu", True) else "")
os.environ["JAX_NUM_CPU_DEVICES"] = str(told.get("devices", 1))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

if "cache" in told:
    jax.config.update("jax_compilation_cache_dir", told["cache"])

from benchmarks import workloads  # noqa: E402
from gopd_jax import memory, sharding, step  # noqa: E402
from gopd_jax.planning import flops  # noqa: E402

# Of the recipe as they are.
RECIPE = ("slots", "buckets", "sampling_buckets", "cache_dtype", "sampling_dtype")


def made():
    sizes = {role: workloads.Size(**told[role]) for role in ("student", "teacher")}
    names = ("vocab", "rows", "prompt", "new", "n_teachers", "microbatches", "head_chunk")
    work = workloads.Workload(**sizes, **{name: told[name] for name in names if name in told})
    changes = {name: told[name] for name in RECIPE if name in told}
    if (mean := told.get("mean_length")) is not None:
        ends = round(work.vocab / mean)
        changes["eos_ids"] = tuple(range(work.vocab - ends, work.vocab))
    options = {name: told[name] for name in ("loss", "lam", "dtype", "remat") if name in told}
    mesh = sharding.make_mesh(None, 1, 1)
    return workloads.make(work, mesh=mesh, **options, **changes)


def best(function, *args, n=15) -> float:
    """Least seconds of n calls."""
    seconds = []
    jax.block_until_ready(function(*args))
    for _ in range(n):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> dict[str, float]:
    """{peak_gflops of a float32 matrix product, gbytes a second of a copy, read and written}."""
    square, long = jnp.ones((2048, 2048)), jnp.ones(2**26)
    product, copy = jax.jit(jnp.dot), jax.jit(lambda x: x + 1)
    return {
        "peak_gflops": 2 * 2048**3 / best(product, square, square) / 1e9,
        "gbytes": 2 * long.nbytes / best(copy, long) / 1e9,
    }


class Run:
    """The programs of a workload and the state that the steps advance."""

    def __init__(self):
        self.made = made()
        recipe = self.made.recipe
        self.fused, self.stages = step.fused(recipe), step.staged(recipe)
        self.rollouts_only = told.get("only") == "generate"
        self.state, self.i = self.made.state(), 0
        # As in a run: once there is a state, the first weights are given up.
        self.made = dataclasses.replace(self.made, params=None)
        start = time.perf_counter()
        self.step()
        self.first = time.perf_counter() - start

    def step(self):
        """A fused step on the same prompts with another key, or its rollout alone."""
        self.i += 1
        key = jax.random.fold_in(self.made.key, self.i)
        if self.rollouts_only:
            args = self.state.params, self.made.frozen, self.made.prompts, key
            return jax.block_until_ready(self.stages[0](*args)), key
        args = self.state, self.made.frozen, self.made.prompts, key
        self.state, rollout, _ = jax.block_until_ready(self.fused(*args))
        return rollout, key

    def __call__(self) -> dict[str, float]:
        watch, cpu = contender.Watch(), time.process_time()
        rollout, key = self.step()
        found = watch.all() | {"cpu": time.process_time() - cpu}
        found["tokens"] = int(rollout.mask_BT.sum())
        if self.rollouts_only or told.get("memory"):
            return found
        generate, score, update = self.stages
        frozen, watch = self.made.frozen, contender.Watch()
        rollout = generate(self.state.params, frozen, self.made.prompts, key)
        jax.block_until_ready(rollout)
        watch.lap("generate")
        scores = jax.block_until_ready(score(frozen, rollout))
        watch.lap("score")
        self.state, _ = jax.block_until_ready(update(self.state, rollout, scores, frozen))
        watch.lap("update")
        return found | watch.seconds

    def work(self) -> dict[str, float]:
        """{phase: GFLOP of its matrix products}, as flops.count reads them off the trace.

        Where lengths decide how often a loop turns and which width is taken, a trace has bounds.
        """
        if self.rollouts_only or told.get("mean_length"):
            return {}
        generate, score, update = self.stages
        frozen, prompts = self.made.frozen, self.made.prompts
        args = self.state.params, frozen, prompts, self.made.key
        rollout = generate(*args)
        scores = score(frozen, rollout)
        traced = {
            "generate": generate.trace(*args),
            "score": score.trace(frozen, rollout),
            "update": update.trace(self.state, rollout, scores, frozen),
        }
        return {name: flops.count(one.jaxpr).total / 1e9 for name, one in traced.items()}


if __name__ == "__main__":
    memory.give_back_after_compiling()  # as main does
    run = Run()
    line = {"name": "gopd_jax", "versions": {"jax": jax.__version__}, "first_step": run.first}
    if not told.get("memory"):
        line |= {"gflop": run.work()} | machine()
    contender.serve(run, line)
