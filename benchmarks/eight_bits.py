"""How far a sampler that reads 8 bits is from the student that learns: the importance weights.

    python -m benchmarks.eight_bits > docs/eight_bits.md

Completions of the built-in base model on its own problems, sampled with keys and values, matrices,
or both in 8 bits, and their log-probs under the student as it is. w is their ratio. Sampling at
full width stands beside them, in float32 and in bfloat16: what rounding alone comes to.
"""

import argparse
import dataclasses
import math

import jax
import numpy as np
from tqdm import tqdm

from gopd_jax import data, metrics, processes, setup, step
from gopd_jax.config import Config
from gopd_jax.microworld import preset
from gopd_jax.objectives import importance

HEAD = """# Sampling in 8 bits: the size of the importance weights

{rows} completions of the built-in base model ({params:.2f} M parameters) a line, temperature 1.
*KL* and χ² are between the sampler and the student, over the tokens that the sampler drew;
*of tokens* is their effective share, (Σw)² / (n Σw²), *of rows* that of completions, with the
product of a completion's weights as its own; *largest* is the largest |log w| of a token. Made by
`python -m benchmarks.eight_bits > docs/eight_bits.md`.

| student | keys, values | matrices | KL, nats a token | χ² | of tokens | of rows | largest |
|---|---|---|---|---|---|---|---|
"""
READ = """
int8, with a scale for each token's key and value of a head and for each output of a matrix, is as
far from the student as bfloat16's rounding alone; float8, with three bits of mantissa, twenty to
forty times as far in χ². Either way a token's weight is near enough to 1 that
`objective.importance="token"` costs next to none of the sample; what is left is a bias of its
cap, which no token here reaches. The model is small: how a larger one takes 8 bits has to be read
from its own run, whose rows have `sampler_kl` and `log_ess` at every step.
"""
NARROW = (None, "int8", "float8_e4m3fn")
CASES = [("float32", cache, weights) for cache in NARROW for weights in NARROW]
CASES = [case for case in CASES if case[1] in (None, case[2]) or case[2] is None]
CASES.append(("bfloat16", None, None))


def line(config: Config, case) -> tuple[str, float]:
    """(a row of the table, millions of parameters)."""
    dtype, cache, weights = case
    config.student.dtype = dtype
    this = setup.prepare(config)
    recipe = dataclasses.replace(this.recipe, cache_dtype=cache, sampling_dtype=weights)
    rows = data.prompts(
        this.train,
        this.student.reader,
        0,
        seed=0,
        n_prompts=config.batch.prompts,
        rollouts=1,
        process=0,
        n_processes=1,
    )
    prompts = processes.to_global(this.mesh, rows.replace(records=()))
    params = this.student.params
    rollout = step.staged(recipe)[0](params, this.frozen, prompts, jax.random.key(1))
    logp_BT, _ = step.judging(recipe, recipe.student)(params, rollout, None)
    given = logp_BT, rollout.logp_BT, rollout.mask_BT
    found = metrics.to_row(jax.device_get(importance.statistics(*given)))
    log_w_BT = np.where(rollout.mask_BT, np.asarray(logp_BT - rollout.logp_BT, np.float64), 0.0)
    w_B = np.exp(log_w_BT.sum(1))
    share = w_B.sum() ** 2 / (len(w_B) * (w_B**2).sum())
    cells = [dtype, cache or "", weights or "", f"{found['sampler_kl']:.1e}"]
    cells += [f"{found['sampler_chi2']:.1e}", f"{100 * math.exp(found['log_ess']):.3f} %"]
    cells += [f"{100 * share:.2f} %", f"{np.abs(log_w_BT).max():.3f}"]
    size = sum(x.size for x in jax.tree.leaves(params)) / 1e6
    return "| " + " | ".join(cells) + " |", size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1024, help="completions a line")
    rows, lines, size = parser.parse_args().rows, [], 0.0
    for case in tqdm(CASES, unit="case"):
        config = preset.two_teachers("unused")
        config.batch.prompts = rows
        text, size = line(config, case)
        lines.append(text)
    print(HEAD.format(rows=rows, params=size) + "\n".join(lines) + "\n" + READ, end="")


if __name__ == "__main__":
    main()
