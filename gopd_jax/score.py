"""Log-probs of given completions under a model, token by token.

    python -m gopd_jax.score --model=DIR --data=FILE.jsonl --out=OUT.jsonl

A row of the data is {"prompt": ..., "completion": ...}, {"messages": [...], "completion": ...} or
{"prompt_ids": [...], "completion_ids": [...]}, in any combination; "token_ids" is read as
"completion_ids", so rows that generate or score wrote can be scored by another model. A "prompt" is
a user's message: it is rendered through the model's own chat template, ready for the assistant's
turn, as "messages" are, unless --raw_prompt. The completion's text is tokenised alone and nothing
is added to it, unless --append_eos.

A row of the output, in the order of the data: index (from 0), id (the row's own, or null),
prompt_form (chat, raw or ids: how the prompt was made), prompt_ids, token_ids (the completion's),
logprobs (natural log, one for each of token_ids) and their sum. Started again, the command goes on
after the last whole row; what made the file is recorded in OUT.jsonl.identity.json.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import flags

from gopd_jax import command, processes, rows, scoring, sharding
from gopd_jax.reader import padded
from gopd_jax.types import Rollout


def score_rows(
    model,
    data,
    *,
    temperature: float = 1.0,
    raw_prompt: bool = False,
    append_eos: bool = False,
    batch: int = 16,
    head_chunk: int = 64,
) -> list[dict]:
    """The rows that the command writes, of `data`: a list of rows, or a source's name.

    model: a directory, or command.open_model's, which is loaded once for many calls. batch rows
    run at a time and head_chunk positions of each have logits at one time; neither changes the
    results beyond rounding. ValueError lists what is wrong with the rows.
    """
    model = model if isinstance(model, command.Model) else command.open_model(model)
    _check(model, temperature, batch, head_chunk)
    found, _ = _read(model, data, raw_prompt, append_eos)
    done = _scored(model, found, 0, temperature, batch, head_chunk)
    return [row for some, _, _ in done for row in some]


def write(
    model: command.Model,
    data: str,
    out: str,
    *,
    temperature: float,
    raw_prompt: bool,
    append_eos: bool,
    batch: int,
    head_chunk: int,
) -> int:
    """`score_rows` into a file that can be continued; its number of rows."""
    _check(model, temperature, batch, head_chunk)
    found, digest = _read(model, data, raw_prompt, append_eos)
    identity = {
        "command": "score",
        **model.identity(),
        "data": digest,
        "temperature": str(float(temperature)),
        "raw_prompt": str(raw_prompt),
        "append_eos": str(append_eos),
    }
    output = command.Output(out, identity, [{"index": i} for i in range(len(found))])
    output.write(_scored(model, found, output.done, temperature, batch, head_chunk))
    return len(found)


def _check(model, temperature, batch, head_chunk) -> None:
    command.check_batch(batch, model.mesh)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}; it divides logits, give one above 0")
    if head_chunk < 1:
        raise ValueError(f"head_chunk is {head_chunk}; give at least one position")


def _read(model, data, raw_prompt, append_eos) -> tuple[list[rows.Row], str]:
    command.require_same_tokenizer(data, model.tokenizer)
    return rows.read(
        command.source(data),
        model.tokenizer,
        name=str(data) if isinstance(data, str) else "data",
        scored=True,
        raw_prompt=raw_prompt,
        append_eos=append_eos,
        n_context=model.decoder.cfg.max_position_embeddings,
    )


def _scored(
    model: command.Model, found: Sequence[rows.Row], start, temperature, batch, head_chunk
) -> Iterator[tuple[list[dict], int, int]]:
    """As rows.in_order gives them, from number `start` on, and the tokens of each batch."""
    shards = sharding.n_row_shards(model.mesh)
    planned = rows.batches(
        [row.length for row in found],
        [len(row.prompt_ids) for row in found],
        n_rows=batch,
        multiple=shards,
    )
    logps = _program(model, temperature, head_chunk)
    n_tokens = 0

    def run(bucket: rows.Bucket, numbers: list[int]) -> list[dict]:
        nonlocal n_tokens
        n_tokens = sum(found[i].length for i in numbers)
        filled = [found[i] for i in rows.filled(numbers, bucket.n_rows)]
        logp_BT = logps(processes.to_global(model.mesh, _rollout(filled, bucket)))
        return [_result(i, found[i], logp_T) for i, logp_T in zip(numbers, logp_BT)]

    for some, n_made in rows.in_order(planned, run, start):
        yield some, n_made, n_tokens


def _program(model: command.Model, temperature: float, head_chunk: int) -> Callable:
    """rollout -> logp_BT on the host."""

    @jax.jit
    def compiled(params, rollout):
        logp_BT, _ = scoring.score(
            model.decoder,
            params,
            rollout,
            temperature=temperature,
            n_vocab=model.tokenizer.vocab_size,
            chunk=head_chunk,
        )
        return sharding.constrain_rows(logp_BT)

    def run(rollout):
        with sharding.use(model.mesh):
            return processes.gather(compiled(model.params, rollout))

    return run


def _rollout(some: Sequence[rows.Row], bucket: rows.Bucket) -> Rollout:
    """Whole rows, padded on their right; the head skips what is prompt in all of the bucket."""
    ids = [[*row.prompt_ids, *row.completion_ids] for row in some]
    tokens_BL, valid_BL = padded(ids, bucket.width, 0, left=False)
    first_B1 = np.array([[len(row.prompt_ids)] for row in some])
    mask_BT = valid_BL[:, 1:] & (np.arange(1, bucket.width) >= first_B1)
    nothing_B = np.zeros(len(ids), np.int32)
    return Rollout(
        tokens_BL=tokens_BL,
        valid_BL=valid_BL,
        mask_BT=mask_BT,
        logp_BT=np.zeros(mask_BT.shape, np.float32),
        ended_B=nothing_B.astype(bool),
        group_B=nothing_B,
        task_B=nothing_B,
        n_prompt=min(bucket.shortest, bucket.width - 1),
    )


def _result(index: int, row: rows.Row, logp_T: np.ndarray) -> dict:
    n_prompt = len(row.prompt_ids)
    logps = command.finite(logp_T[n_prompt - 1 : row.length - 1], row.where)
    return {
        "index": index,
        "id": row.id,
        "prompt_form": row.form,
        "prompt_ids": row.prompt_ids,
        "token_ids": row.completion_ids,
        "logprobs": logps,
        "sum": math.fsum(logps),
    }


def define_flags() -> flags.FlagValues:
    values = command.define(temperature="Divides the logits before the softmax; above 0.")
    command.add(
        values,
        "append_eos",
        False,
        "Add the model's end token to completions that are text; ids are taken as they are.",
    )
    command.add(values, "head_chunk", 64, "Positions whose logits exist at one time.")
    return values


def main(argv: Sequence[str] | None = None) -> None:
    command.run(define_flags(), __doc__, write, list(sys.argv if argv is None else argv))


if __name__ == "__main__":
    main()
