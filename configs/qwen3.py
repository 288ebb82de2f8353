"""ExOPD at the paper's size: Qwen3 students and teachers of their family on a slice of TPUs.

A = lambda (log T - log R) - (log S - log R), lambda = 1.25, R the student's initial weights, with
the settings of arXiv 2602.12125: 1024 prompts a step with one completion each, prompts up to 2048
and completions up to 16384 tokens, AdamW at a constant 1e-5, weight decay 0.01, gradient clip 1,
the mean over sequences of the mean over tokens, 50 steps.

Without an argument Qwen3-4B learns from two teachers of its own size, one for each task. With one
it is strong to weak: a single published teacher of both tasks, R again the student's own start:

    "1.7b"    Qwen3-1.7B of Qwen3-4B
    "4b_moe"  Qwen3-4B of Qwen3-30B-A3B, a mixture of 128 experts
    "8b"      Qwen3-8B of Qwen3-32B

Those are names on the hub, which each host downloads into its cache. The paths under /models and
/data are placeholders, and a run names those that do not exist. On every host of the slice:

    hf download Qwen/Qwen3-4B --local-dir /models/Qwen3-4B
    python -m gopd_jax.main --config=configs/qwen3.py --distributed \\
        --config.teachers.math.path=DIR --config.teachers.code.path=DIR \\
        --config.data.train=train.parquet --config.data.test=test.parquet \\
        --config.workdir=DIR_ON_A_SHARED_FILE_SYSTEM
    python -m gopd_jax.main --config=configs/qwen3.py:8b --distributed \\
        --config.data.train=train.parquet --config.data.test=test.parquet \\
        --config.workdir=DIR_ON_A_SHARED_FILE_SYSTEM
    python -m gopd_jax.main --config=configs/qwen3.py:tiny     # the microworld's models, two steps

Mesh and microbatches are for 64 TPU v5p. docs/plans.md has what was compiled for these, 256 v5e and
256 v6e (python -m benchmarks.plans goes on with it). Whether it fits these and others, and what
would, from any CPU, with a name such as Qwen/Qwen3-4B for each path that is a placeholder:

    python -m gopd_jax.plan --config=configs/qwen3.py:1.7b --topology=v5p:4x4x4
    python -m gopd_jax.plan --config=configs/qwen3.py:4b_moe --topology=v5p:4x4x4
    python -m gopd_jax.plan --config=configs/qwen3.py:8b --topology=v6e:16x16 \\
        --config.mesh.fsdp=32 --config.mesh.tensor=8 --config.batch.microbatches=32
    python -m gopd_jax.plan --config=configs/qwen3.py:1.7b --topology=v5e:16x16 --search

Expected: not measured; no run of this size has been made with this code.

Student and reference are one model, given twice; another student takes --config.student.path and
--config.reference.path. On another number of chips set --config.mesh.fsdp (rows and weights),
--config.mesh.tensor (a divisor of the 8 key/value heads, of the 4 that Qwen3-30B-A3B has) and
--config.batch.microbatches; docs/plan.md says when "4b_moe" gains by --config.mesh.expert.

Where completions mostly end long before the limit, --config.sampling.slots=256 fills the places of
rows that ended with other prompts, and --config.batch.buckets=4 scores and learns from short rows
at less than the full width. Both are left off: what they are worth hangs on the lengths. With slots
the cache is soon full and read whole, whatever its widths, and each width of a batch is compiled.
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

# Argument -> (student and reference, teacher of both tasks).
SIZES = {
    "1.7b": ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B"),
    "4b_moe": ("Qwen/Qwen3-4B", "Qwen/Qwen3-30B-A3B"),
    "8b": ("Qwen/Qwen3-8B", "Qwen/Qwen3-32B"),
}


def get_config(arg: str | None = None) -> Config:
    """arg: None or one of SIZES; and "tiny" for these settings on the microworld's models."""
    words = preset.words(arg, *SIZES)
    c = Config(
        workdir="runs/qwen3",
        student=_model("/models/Qwen3-4B"),
        teachers={"math": _model("/models/Qwen3-4B-math"), "code": _model("/models/Qwen3-4B-code")},
        reference=_model("/models/Qwen3-4B"),
        steps=50,
        data=Data(train="/data/train.parquet", test="/data/test.parquet", prompt_length=2048),
        # A token reads an eighth, two eighths, .. of the cache, as much as holds what is there:
        # on 64 v5p this reading is 35 % of the step of the largest student, 59 % of the smallest's.
        sampling=Sampling(completion_length=16384, buckets=8),
        # 16 rows a microbatch, one on each of the mesh's 16 row shards.
        batch=Batch(prompts=1024, microbatches=64, head_chunk=512, remat="layers"),
        objective=Objective(lam=1.25, reduction="sequence_mean"),
        optimizer=Optimizer(learning_rate=1e-5, weight_decay=0.01, clip_norm=1.0),
        # As many ways along the heads as all of the models divide: attention's scores are the
        # largest array of the update, and one row of them has to fit beside the state.
        mesh=Mesh(fsdp=16, tensor=4),
        checkpoints=Checkpoints(every=10),
        # All 1024 rows at one time would be too much of the largest teacher: 98.15 of 95.74 GiB.
        evaluation=Evaluation(problems=30, samples=32, every=25, rows=256),
    )
    for size in words & {*SIZES}:
        student, teacher = SIZES[size]
        c.workdir += "_" + size
        c.student, c.reference = _model(student), _model(student)
        # Frozen weights stay on the devices: 32 G of them in bfloat16 are 1 GiB a chip of 64.
        c.teachers = {"large": _model(teacher)}
        c.routes = {task: "large" for task in c.data.tasks}
    return _tiny(c) if "tiny" in words else c


def _model(path: str) -> Model:
    return Model(path=path, dtype="bfloat16")


def _tiny(c: Config) -> Config:
    c.student.path = c.reference.path = preset.path("base")
    for name, model in c.teachers.items():
        model.path = preset.path("large_teacher" if name == "large" else f"teacher_{name}")
    small = preset.two_teachers(c.workdir)
    c.data, c.sampling, c.batch, c.mesh = small.data, small.sampling, small.batch, small.mesh
    return preset.tiny(c)
