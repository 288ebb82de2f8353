"""The recipe of the shipped checkpoints: `python -m gopd_jax.microworld.make --out=DIR`.

1. A byte-level tokenizer of 512 ids.
2. A base model, supervised on problems of both tasks; half of their answers follow the right
   strategy and half the wrong one, so that the base knows both and chooses at random.
3. Teachers: GRPO from that base on the problems of one task, which teaches the choice in that task
   and leaves the other as it was. The large teacher is trained on both.
4. An open-book model: the base, taught to follow a solution that its prompt shows, and to answer as
   before where there is none.
Every number is seeded; each finished checkpoint is kept, so a killed run goes on with the next.
"""

import argparse
import dataclasses
import hashlib
import json
import time
from pathlib import Path

import jax
import numpy as np

from gopd_jax import data, processes, sharding, step
from gopd_jax.evaluate import completions, evaluate
from gopd_jax.microworld import tasks, tokenizer
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.models.decoder import Decoder
from gopd_jax.objectives import objective
from gopd_jax.optimizer import make_optimizer
from gopd_jax.progress import bar
from gopd_jax.reader import Reader, solution
from gopd_jax.recipe import Frozen, Recipe, init_state
from gopd_jax.verifiers import verify

PROMPT, COMPLETION = 44, 36  # tokens; the longest problem and answer fit
OPEN_BOOK_PROMPT = 96  # with a solution behind the problem

SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
LARGE = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One training: what it starts from, what it optimises, for how long."""

    name: str
    size: dict
    start: str | None  # an earlier stage's checkpoint; None: random weights
    tasks: tuple[str, ...] = tasks.TASKS
    steps: int = 1500
    learning_rate: float = 2e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    prompts: int = 64
    rollouts: int = 1
    # Rows whose activations fit a CPU's caches: several times faster than all rows at once.
    microbatch: int = 16
    advantage: str = "imitation"
    shown: bool = False  # half of the prompts hold the answer to imitate, as a context shows it
    dtype: str = "float32"  # of the stored weights


STAGES = (
    Stage(
        name="base",
        size=SMALL,
        start=None,
        schedule="cosine",
        warmup_steps=50,
        microbatch=32,  # of the shipped weights: another split rounds otherwise
    ),
    Stage(
        name="teacher_math",
        size=SMALL,
        start="base",
        tasks=("math",),
        steps=8,
        learning_rate=1e-4,
        prompts=32,
        rollouts=8,
        advantage="grpo",
    ),
    Stage(
        name="teacher_code",
        size=SMALL,
        start="base",
        tasks=("code",),
        steps=7,
        learning_rate=1e-4,
        prompts=32,
        rollouts=8,
        advantage="grpo",
    ),
    Stage(
        name="large_base",
        size=LARGE,
        start=None,
        steps=1200,
        schedule="cosine",
        warmup_steps=50,
        dtype="bfloat16",
    ),
    Stage(
        name="large_teacher",
        size=LARGE,
        start="large_base",
        steps=16,
        learning_rate=1e-4,
        prompts=32,
        rollouts=8,
        advantage="grpo",
        dtype="bfloat16",
    ),
    Stage(
        name="open_book",
        size=SMALL,
        start="base",
        steps=400,
        learning_rate=1e-3,
        schedule="cosine",
        shown=True,
        dtype="bfloat16",
    ),
)


def model_config(size: dict) -> lm_params.ModelConfig:
    """A Qwen3 of this size over the microworld's vocabulary."""
    return lm_params.from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 512,
            "num_attention_heads": size["hidden_size"] // 32,
            "num_key_value_heads": size["hidden_size"] // 64,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            **size,
        }
    )


def both_strategies(task_names, n_problems: int, seed: int, shown: bool = False) -> data.Dataset:
    """n_problems of each task, each with its right and with its wrong answer to imitate.

    shown: each once as it is, and once with that answer behind the prompt.
    """
    records = {task: [] for task in task_names}
    for task in task_names:
        for i in range(n_problems):
            problem = tasks.problem(task, seed, i, split="train")
            for answer in (problem.right, problem.wrong):
                record = tasks.record(problem, completion=answer)
                records[task].append(record)
                if shown:
                    records[task].append(dataclasses.replace(record, messages=solution(record)))
    records = {task: tuple(rows) for task, rows in records.items()}
    return data.Dataset(records=records, identity=f"microworld seed {seed}", source="microworld")


def problems(task_names, n_problems: int, seed: int, split: str) -> data.Dataset:
    """n_problems of each task, without answers."""
    records = {
        task: tuple(
            tasks.record(tasks.problem(task, seed, i, split=split)) for i in range(n_problems)
        )
        for task in task_names
    }
    return data.Dataset(records=records, identity=f"microworld seed {seed}", source="microworld")


def recipe_of(stage: Stage, chat, mesh) -> Recipe:
    optimizer, rate = make_optimizer(
        learning_rate=stage.learning_rate,
        schedule=stage.schedule,
        warmup_steps=stage.warmup_steps,
        steps=stage.steps,
        b1=0.9,
        b2=0.999,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    return Recipe(
        mesh=mesh,
        student=Decoder(model_config(stage.size)),
        teachers=(),
        routes=(),
        reference=None,
        objective=objective.build(
            advantage=stage.advantage, lam=1.0, loss="policy_gradient", reduction="token_mean"
        ),
        optimizer=optimizer,
        learning_rate=rate,
        source="data" if stage.advantage == "imitation" else "student",
        group_rows=data.group_sizes(stage.prompts, stage.rollouts, stage.tasks),
        completion_length=COMPLETION,
        temperature=1.0,
        eos_ids=chat.eos_ids,
        n_vocab=chat.vocab_size,
        microbatches=stage.prompts * stage.rollouts // stage.microbatch,
        head_chunk=8,
    )


def train(stage: Stage, params, chat, mesh, seed: int, log):
    """The stage's final parameters; a line to `log` for each hundredth step, or each of GRPO's."""
    recipe = recipe_of(stage, chat, mesh)
    state = init_state(recipe, params)
    frozen = Frozen(teachers=(), reference=None)
    imitates = stage.advantage == "imitation"
    pool = both_strategies(stage.tasks, 24_000, seed, stage.shown) if imitates else None
    pool = pool or problems(stage.tasks, 4_000, seed + 1, "train")

    def make(i):
        return data.prompts(
            pool,
            Reader(tokenizer=chat, length=OPEN_BOOK_PROMPT if stage.shown else PROMPT),
            i,
            seed=seed,
            n_prompts=stage.prompts,
            rollouts=stage.rollouts,
            completion_length=COMPLETION if imitates else None,
        )

    fused = step.fused(recipe)
    generate, _, update = step.staged(recipe)
    batches = data.prefetch(make, 0)
    for i in bar(stage.steps, stage.name):
        prompts = next(batches)
        rows = processes.to_global(mesh, prompts.replace(records=()))
        key = jax.random.fold_in(jax.random.key(seed), i)
        if imitates:
            state, _, metrics = fused(state, frozen, rows, key)
        else:
            rollout = generate(state.params, frozen, rows, key)
            verdicts = verify(completions(chat, processes.gather(rollout)), prompts.records)
            reward_B = np.array([verdict.score for verdict in verdicts], np.float32)
            scores = step.Scores(reward_B=processes.to_global(mesh, reward_B))
            state, metrics = update(state, rollout, scores)
            metrics["reward"] = step.Mean.of(reward_B)
        if i % 100 == 0 or i == stage.steps - 1 or not imitates:
            names = ("loss", "reward", "entropy", "length", "grad_norm")
            shown = {k: round(metrics[k].value(), 4) for k in names if k in metrics}
            log({"stage": stage.name, "step": i + 1, **shown})
    batches.close()
    return state.params


def accuracy(stage: Stage, params, chat, mesh, n_problems: int, step_: int) -> list[dict]:
    """avg@4 on test problems of both tasks."""
    recipe = recipe_of(dataclasses.replace(stage, tasks=tasks.TASKS), chat, mesh)
    return evaluate(
        step.sampling(recipe, recipe.student),
        params,
        problems(tasks.TASKS, n_problems, 0, "test"),
        Reader(tokenizer=chat, length=PROMPT),
        mesh=mesh,
        n_problems=n_problems,
        n_samples=4,
        n_rows=256,
        seed=0,
        step=step_,
        model=stage.name,
        bar=bar,
    ).rows


def manifest(out: Path) -> dict[str, str]:
    """sha256 of every shipped file, by its path below `out`."""
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*"))
        if file.is_file() and file.name != "manifest.json"
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of stages; all of them without this")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.build(args.out / "tokenizer")
    chat = tokenizers.load(args.out / "tokenizer")
    mesh = sharding.make_mesh(None, 1, 1)
    started = time.monotonic()

    def log(row):
        line = json.dumps({"seconds": round(time.monotonic() - started), **row})
        print(line, flush=True)
        with (args.out / "make.log.jsonl").open("a") as file:
            file.write(line + "\n")

    for stage in STAGES:
        directory = args.out / stage.name
        if (args.only and stage.name not in args.only) or directory.exists():
            continue
        cfg = model_config(stage.size)
        if stage.start:
            params = hf.load_params(args.out / stage.start, cfg)
        else:
            params = lm_params.init(cfg, jax.random.key(args.seed))
        log({"stage": stage.name, **dataclasses.asdict(stage)})
        params = train(stage, params, chat, mesh, args.seed, log)
        hf.save(directory, cfg, params, dtype=stage.dtype, tokenizer_dir=args.out / "tokenizer")
        # The stored weights are judged, rounded as they are.
        for row in accuracy(stage, hf.load_params(directory, cfg), chat, mesh, 500, stage.steps):
            log({"stage": stage.name, **row})
    (args.out / "manifest.json").write_text(json.dumps(manifest(args.out), indent=1) + "\n")


if __name__ == "__main__":
    main()
