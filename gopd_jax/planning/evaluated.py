"""What an evaluation samples from that no step does: models, their prompts, what they take.

Evaluation takes all rows of a batch at once, beside the state and all that is loaded, with the
model's own numbers: no 8 bits, which nothing corrects there.
"""

from __future__ import annotations

import dataclasses

import jax

from gopd_jax import method
from gopd_jax.models.decoder import Decoder
from gopd_jax.planning import abstract, reads, streamed
from gopd_jax.types import Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """A model that is evaluated. n_prompt: tokens of a prompt as it reads it; at_once: rows.

    cache, copied: bytes of a device, of keys and values, and of the weights as decoding has them,
    with those that come in from the host before.
    """

    name: str
    decoder: Decoder
    n_prompt: int
    at_once: int
    cache: int
    copied: int


def names(run: abstract.Run) -> list[str]:
    """Roles whose sampling is not the rollout's own program, in the order of `train`.

    A teacher that follows the student is sampled from as the student is, unless it reads more.
    """
    made, found = run.recipe, []
    for name, role in run.roles.items() if run.config.evaluation.teachers else ():
        if name.startswith("teacher:"):
            longer = _n_prompt(run, name) > _n_prompt(run, "student")
            found += [name] if role.params is not None or longer else []
    if made.source != "student" or made.cache_dtype or made.sampling_dtype:
        found.append("student")
    return found


def largest(run: abstract.Run) -> Sampled | None:
    """The model whose sampling takes most of a device beside what is held; None where none is."""
    return max(
        (_sampled(run, name) for name in names(run)),
        key=lambda one: one.cache + one.copied,
        default=None,
    )


def _sampled(run: abstract.Run, name: str) -> Sampled:
    made, role, n_prompt = run.recipe, run.roles[name], _n_prompt(run, name)
    rows = sum(made.group_rows)
    at_once = min(rows, made.slots or rows)
    length = n_prompt + made.completion_length
    brought = streamed.there(role.params)
    return Sampled(
        name=name,
        decoder=role.decoder,
        n_prompt=n_prompt,
        at_once=at_once,
        cache=reads.cache_bytes(made.mesh, role.decoder, at_once, length),
        copied=reads.weights_read(made.mesh, role.decoder) + brought,
    )


def _n_prompt(run: abstract.Run, name: str) -> int:
    model = method.roles(run.config)[name.replace("teacher:", "teachers.")]
    return model.prompt_length or run.config.data.prompt_length


def prompts(run: abstract.Run, one: Sampled) -> Prompts:
    """A batch as `data.of_records` makes it: of this model's own prompts, and nothing else."""
    whole = run.prompts

    def widened(x):
        shape = x.shape[0], one.n_prompt
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return Prompts(
        tokens_BP=widened(whole.tokens_BP),
        valid_BP=widened(whole.valid_BP),
        task_B=whole.task_B,
        group_B=whole.group_B,
        row_B=whole.row_B,
    )
