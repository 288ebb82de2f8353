"""A run small enough to be started many times: checkpoints, problems, a config, the command."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from gopd_jax import config as settings
from gopd_jax.microworld import tasks, tokenizer
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params

REPOSITORY = Path(__file__).parents[1]
TIMEOUT = 900  # seconds for any one command, on a machine with much else to do
MODELS = ("base", "teacher_math", "teacher_code")
CFG = lm_params.ModelConfig(
    architecture="qwen3",
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
    eos_token_id=2,
)
PRESET = '''"""A preset as a user writes it."""

from gopd_jax.config import *


def get_config(arg=None):
    def model(name):
        return Model(path={root!r} + "/" + name)

    return Config(
        workdir={root!r} + "/run",
        student=model("base"),
        teachers={{"math": model("teacher_math"), "code": model("teacher_code")}},
        reference=model("base"),
        steps=6,
        objective=Objective(lam=1.25),
        data=Data(train={root!r} + "/train.jsonl", test={root!r} + "/test.jsonl", prompt_length=48),
        sampling=Sampling(completion_length=6),
        batch=Batch(prompts=8, head_chunk=6),
        optimizer=Optimizer(learning_rate=1e-2),
        checkpoints=Checkpoints(every=2),
        evaluation=Evaluation(problems=3, samples=2, every=4, verify_every=2),
        preflight="off",  # random weights
    )
'''


@functools.partial(jax.jit, static_argnums=0)  # one program in place of one a shape
def sizeable(cfg, seed):
    """Random parameters with logits of a size that tells models apart."""
    params = lm_params.init(cfg, jax.random.key(seed))
    return jax.tree.map(lambda x: jnp.where(x.std() > 0, 8, 1) * x, params)


def with_experts(cfg: lm_params.ModelConfig = CFG, **changes) -> lm_params.ModelConfig:
    """A dense model's sizes, with four experts for its MLP."""
    return dataclasses.replace(
        cfg,
        architecture="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        norm_topk_prob=True,
        **changes,
    )


def build(root: Path, cfg: lm_params.ModelConfig = CFG) -> Path:
    """Random checkpoints, train.jsonl, test.jsonl and preset.py under `root`; the preset's path."""
    tokenizer.build(root / "tokenizer", problems=2000)
    # So many ends that random models write completions of several lengths.
    ends = {"eos_token_id": list(range(2, 90))}
    (root / "tokenizer" / "generation_config.json").write_text(json.dumps(ends))
    for seed, name in enumerate(MODELS):
        hf.save(root / name, cfg, sizeable(cfg, seed), tokenizer_dir=root / "tokenizer")
    for split, n in (("train", 12), ("test", 3)):
        rows = [row(task, i, split) for i in range(n) for task in tasks.TASKS]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    preset = root / "preset.py"
    preset.write_text(PRESET.format(root=str(root)))
    return preset


def row(task: str, index: int, split: str = "train") -> dict:
    """A problem of the microworld as a row of a .jsonl file."""
    made = tasks.problem(task, 0, index, split=split)
    return {
        "messages": list(made.messages),
        "task": made.task,
        "answer": made.answer,
        "verifier": made.verifier,
        "completion": made.right,
    }


def config(root: Path, **changes) -> settings.Config:
    """The preset's Config with changes: steps=3, or objective=dict(lam=1.0) within a section."""
    names: dict = {}
    exec((root / "preset.py").read_text(), names)
    made = names["get_config"]()
    for key, value in changes.items():
        section = getattr(made, key)
        if isinstance(value, dict) and dataclasses.is_dataclass(section):
            value = dataclasses.replace(section, **value)
        setattr(made, key, value)
    return made


def command(root: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "gopd_jax.main", f"--config={root / 'preset.py'}"),
        *arguments,
    ]


# Most of the suite's time is compilation, of programs that run for milliseconds: a third of it is
# left without the compiler's optimizations, and with one module of a program in place of 32. For
# processes whose XLA_FLAGS name no level; `XLA_FLAGS=--xla_backend_optimization_level=3 pytest`
# computes what users run.
CHEAP = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def optimized() -> str:
    """XLA_FLAGS of a process whose programs are compiled as a user's."""
    return os.environ["XLA_FLAGS"].replace(CHEAP, "").strip()


def environment(n_devices: int = 2) -> dict[str, str]:
    """Of a process that is started: CPU devices, the suite's cache and its compiler's flags."""
    cache = jax.config.jax_compilation_cache_dir
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(n_devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(REPOSITORY),
    }


def start(root: Path, *arguments: str, n_devices: int = 2, **more: str) -> subprocess.Popen:
    """The command in a session of its own, with its output in pipes; `more` of its environment."""
    return subprocess.Popen(
        command(root, *arguments),
        env=environment(n_devices) | more,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(
    root: Path, *arguments: str, n_devices: int = 2, **more: str
) -> subprocess.CompletedProcess:
    """The command to its end."""
    process = start(root, *arguments, n_devices=n_devices, **more)
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
