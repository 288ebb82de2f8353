"""ExOPD at the paper's size: Qwen3-4B and two teachers of its family on a slice of 64 TPU v5p.

A = lambda (log T - log R) - (log S - log R), lambda = 1.25, R the student's initial weights, with
the settings of arXiv 2602.12125: 1024 prompts a step with one completion each, prompts up to 2048
and completions up to 16384 tokens, AdamW at a constant 1e-5, weight decay 0.01, gradient clip 1,
the mean over sequences of the mean over tokens, 50 steps.

The paths under /models and /data are placeholders, and a run names those that do not exist. On
every host of the slice:

    hf download Qwen/Qwen3-4B --local-dir /models/Qwen3-4B
    python -m gopd_jax.main --config=configs/qwen3.py --distributed \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.parquet --config.data.test=test.parquet \\
        --config.workdir=DIR_ON_A_SHARED_FILE_SYSTEM
    python -m gopd_jax.main --config=configs/qwen3.py:tiny     # the microworld's models, two steps

Whether it fits, from any CPU: python -m gopd_jax.plan --config=configs/qwen3.py
--topology=v5p:4x4x4 and the same flags; a name such as Qwen/Qwen3-4B will do for a path there.

Expected: not measured; no run of this size has been made with this code.

Student and reference are one directory, given twice; another student takes --config.student.path
and --config.reference.path. On another number of chips set --config.mesh.fsdp (rows and weights),
--config.mesh.tensor (a divisor of the 8 key/value heads) and --config.batch.microbatches.
"""

from gopd_jax.config import (
    Batch,
    Checkpoints,
    Config,
    Data,
    Evaluation,
    Mesh,
    Model,
    Objective,
    Optimizer,
    Sampling,
)
from gopd_jax.microworld import preset


def get_config(arg: str | None = None) -> Config:
    """arg: None; or "tiny" for these settings on the microworld's models, which are Qwen3 too."""
    words = preset.words(arg)
    c = Config(
        workdir="runs/qwen3",
        student=Model(path="/models/Qwen3-4B", dtype="bfloat16"),
        teachers={
            "math": Model(path="/models/Qwen3-4B-math", dtype="bfloat16"),
            "code": Model(path="/models/Qwen3-4B-code", dtype="bfloat16"),
        },
        reference=Model(path="/models/Qwen3-4B", dtype="bfloat16"),
        steps=50,
        data=Data(train="/data/train.parquet", test="/data/test.parquet", prompt_length=2048),
        sampling=Sampling(completion_length=16384),
        # 16 rows a microbatch, one on each of the mesh's 16 row shards.
        batch=Batch(prompts=1024, microbatches=64, head_chunk=512, remat="layers"),
        objective=Objective(lam=1.25, reduction="sequence_mean"),
        optimizer=Optimizer(learning_rate=1e-5, weight_decay=0.01, clip_norm=1.0),
        mesh=Mesh(fsdp=16, tensor=4),
        checkpoints=Checkpoints(every=10),
        evaluation=Evaluation(problems=30, samples=32, every=25),
    )
    return _tiny(c) if "tiny" in words else c


def _tiny(c: Config) -> Config:
    c.student.path = c.reference.path = preset.path("base")
    for task in c.data.tasks:
        c.teachers[task].path = preset.path(f"teacher_{task}")
    small = preset.two_teachers(c.workdir)
    c.data, c.sampling, c.batch, c.mesh = small.data, small.sampling, small.batch, small.mesh
    return preset.tiny(c)
