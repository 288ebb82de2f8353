"""What an evaluation samples from that no step does: models, their prompts, what they take.

Evaluation takes `evaluation.rows` at one time, or as many as a step has, beside the state and all
that is loaded, with the model's own numbers: no 8 bits, which nothing corrects there.
"""

from __future__ import annotations

import dataclasses

import jax

from gopd_jax import method
from gopd_jax.evaluate import rows_at_once
from gopd_jax.models.decoder import Decoder
from gopd_jax.planning import abstract, reads, streamed
from gopd_jax.types import Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """A model that is evaluated. n_prompt: width of its prompts; n_rows: of a batch; at_once: how
    many of those are decoded at one time.

    cache, copied: bytes of a device, of keys and values, and of the weights as decoding has them,
    with those that come in from the host before.
    """

    name: str
    decoder: Decoder
    n_prompt: int
    n_rows: int
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
    n_rows = rows_at_once(run.config)
    at_once = min(n_rows, made.slots or n_rows)
    length = n_prompt + made.completion_length
    brought = streamed.there(role.params)
    return Sampled(
        name=name,
        decoder=role.decoder,
        n_prompt=n_prompt,
        n_rows=n_rows,
        at_once=at_once,
        cache=reads.cache_bytes(made.mesh, role.decoder, at_once, length),
        copied=reads.weights_read(made.mesh, role.decoder) + brought,
    )


def _n_prompt(run: abstract.Run, name: str) -> int:
    """Tokens of a prompt. All teachers' are padded to the longest of theirs, as `setup` has it."""
    kind, c = name.partition(":")[0], run.config
    alike = [model for role, model in method.roles(c).items() if role.startswith(kind)]
    return max(model.prompt_length or c.data.prompt_length for model in alike)


def prompts(run: abstract.Run, one: Sampled) -> Prompts:
    """A batch as `data.of_records` makes it: of this model's own prompts, and nothing else."""
    whole = run.prompts

    def like(x, *shape):
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=x.sharding)

    return Prompts(
        tokens_BP=like(whole.tokens_BP, one.n_rows, one.n_prompt),
        valid_BP=like(whole.valid_BP, one.n_rows, one.n_prompt),
        task_B=like(whole.task_B, one.n_rows),
        group_B=like(whole.group_B, one.n_rows),
        row_B=like(whole.row_B, one.n_rows),
    )
