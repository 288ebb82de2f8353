"""What the presets of the microworld have in common; each says only what differs.

It lies in the package, so that a preset's file can be given by its path from any directory.
"""

from gopd_jax.config import Batch, Config, Data, Diagnostics, Model, Optimizer, Sampling
from gopd_jax.microworld import path


def words(arg: str | None, *known: str) -> set[str]:
    """The words of a preset's argument "a,b", of which "tiny" is always one.

    ValueError for a word that is not known, and for two of `known`, which exclude each other.
    """
    given = set() if arg is None else {word.strip() for word in arg.split(",")}
    if unknown := sorted(given - {*known, "tiny"}):
        raise ValueError(f"argument {arg!r} has {unknown}; the words are {['tiny', *known]}")
    if len(given & {*known}) > 1:
        raise ValueError(f"argument {arg!r} has {sorted(given & {*known})}; give one of them")
    return given


def model(name: str) -> Model:
    """A shipped checkpoint. Each role takes one of its own: a flag changes it in place."""
    return Model(path=path(name))


def two_teachers(workdir: str) -> Config:
    """The base as the student, an expert of each of the two tasks as its teacher."""
    return Config(
        workdir=workdir,
        student=model("base"),
        steps=40,
        teachers={"math": model("teacher_math"), "code": model("teacher_code")},
        data=Data(prompt_length=44),
        sampling=Sampling(completion_length=36),
        # 16 rows a microbatch: their activations fit a CPU's caches.
        batch=Batch(prompts=128, microbatches=8, head_chunk=9),
        optimizer=Optimizer(learning_rate=2e-4),
        diagnostics=Diagnostics(every=20),
    )


def tiny(c: Config) -> Config:
    """Two steps of the same run in seconds: a few rows, a few problems."""
    c.workdir += "-tiny"
    c.steps = 2
    c.batch.prompts, c.batch.microbatches = 8, 1
    c.batch.rollouts = min(c.batch.rollouts, 2)
    c.evaluation.problems, c.evaluation.samples, c.evaluation.rows = 4, 1, None
    c.diagnostics.every = None
    return c
