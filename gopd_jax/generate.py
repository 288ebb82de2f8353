"""Completions of prompts by a model, with the log-prob of each token.

    python -m gopd_jax.generate --model=DIR --data=FILE.jsonl --out=OUT.jsonl

A row of the data is {"prompt": ...}, {"messages": [...]} or {"prompt_ids": [...]}; other fields are
left alone. A "prompt" is a user's message: it is rendered through the model's own chat template,
ready for the assistant's turn, as "messages" are, unless --raw_prompt. A completion ends with the
first of the model's end tokens (generation_config.json, then the tokenizer's), which is its last
token, or after --max_tokens. --temperature=0 takes the likeliest token each time.

A row of the output is one completion, in the order of the data and of its --n samples: index of the
prompt (from 0), sample (from 0), id (the row's own, or null), prompt_form (chat, raw or ids: how
the prompt was made), prompt_ids, token_ids, logprobs (natural log, one for each of token_ids),
their sum, finish_reason (stop or length) and text, without special tokens. Log-probs are those of
the model's whole distribution at --temperature, before --top_p cuts it, and at temperature 1 where
--temperature=0: what score says of the same tokens. A completion is a function of the row's index,
the sample, --n and --seed, not of --batch or of the other rows. Started again, the command goes on
after the last whole row; what made the file is recorded in OUT.jsonl.identity.json.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import flags

from gopd_jax import batching, command, processes, rows, sampler, sharding
from gopd_jax.reader import padded
from gopd_jax.types import Prompts


def generate_rows(
    model,
    data,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 256,
    seed: int = 0,
    n: int = 1,
    raw_prompt: bool = False,
    batch: int = 16,
) -> list[dict]:
    """The rows that the command writes, of `data`: a list of rows, or a source's name.

    model: a directory, or command.open_model's, which is loaded once for many calls. ValueError
    lists what is wrong with the rows.
    """
    model = model if isinstance(model, command.Model) else command.open_model(model)
    options = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    _check(model, **options, n=n, batch=batch)
    found, _ = _read(model, data, raw_prompt, max_tokens)
    done = _generated(model, found, 0, **options, n=n, batch=batch)
    return [row for some, _, _ in done for row in some]


def write(
    model: command.Model, data: str, out: str, *, raw_prompt: bool, batch: int, **options
) -> int:
    """`generate_rows` into a file that can be continued; its number of rows."""
    _check(model, **options, batch=batch)
    found, digest = _read(model, data, raw_prompt, options["max_tokens"])
    identity = {
        "command": "generate",
        **model.identity(),
        "data": digest,
        "raw_prompt": str(raw_prompt),
        **{key: str(value) for key, value in options.items()},
    }
    n = options["n"]
    names = [{"index": i // n, "sample": i % n} for i in range(len(found) * n)]
    output = command.Output(out, identity, names)
    output.write(_generated(model, found, output.done, **options, batch=batch))
    return len(names)


def _check(model, *, temperature, top_p, max_tokens, seed, n, batch) -> None:
    command.check_batch(batch, model.mesh)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; give 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is above 0 and at most 1, which cuts nothing")
    if max_tokens < 1 or n < 1:
        raise ValueError(f"max_tokens is {max_tokens} and n is {n}; both are at least 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; it is from 0 to {2**32 - 1}")
    if n > 1 and temperature == 0:
        raise ValueError(
            f"n is {n} and temperature 0, which makes {n} equal completions; give n = 1"
        )


def _read(model, data, raw_prompt, max_tokens) -> tuple[list[rows.Row], str]:
    command.require_same_tokenizer(data, model.tokenizer)
    return rows.read(
        command.source(data),
        model.tokenizer,
        name=str(data) if isinstance(data, str) else "data",
        scored=False,
        raw_prompt=raw_prompt,
        n_context=model.decoder.cfg.max_position_embeddings,
        n_new=max_tokens,
    )


def _generated(
    model: command.Model,
    found: Sequence[rows.Row],
    start: int,
    *,
    temperature: float,
    top_p: float,
    max_tokens: int,
    seed: int,
    n: int,
    batch: int,
) -> Iterator[tuple[list[dict], int, int]]:
    """As rows.in_order gives them, from number `start` on, and the tokens sampled in each."""
    lengths = [len(row.prompt_ids) for row in found for _ in range(n)]
    shards = sharding.n_decode_shards(model.mesh)
    planned = rows.batches(lengths, lengths, n_rows=batch, multiple=shards)
    sample = _program(model, temperature, top_p, max_tokens, seed)
    n_tokens = 0

    def run(bucket: rows.Bucket, numbers: list[int]) -> list[dict]:
        nonlocal n_tokens
        row_B = rows.filled(numbers, bucket.n_rows).astype(np.int32)
        prompts = _prompts([found[i // n].prompt_ids for i in row_B], bucket.width, row_B)
        rollout = sample(processes.to_global(model.mesh, prompts))
        first = rollout.n_prompt
        results = []
        for b, i in enumerate(numbers):
            mask_C = rollout.mask_BT[b, first - 1 :]
            row, ids = found[i // n], rollout.tokens_BL[b, first:][mask_C].tolist()
            logps = command.finite(rollout.logp_BT[b, first - 1 :][mask_C], row.where)
            results.append(
                {
                    "index": i // n,
                    "sample": i % n,
                    "id": row.id,
                    "prompt_form": row.form,
                    "prompt_ids": row.prompt_ids,
                    "token_ids": ids,
                    "logprobs": logps,
                    "sum": math.fsum(logps),
                    "finish_reason": "stop" if rollout.ended_B[b] else "length",
                    "text": model.tokenizer.decode(ids),
                }
            )
        n_tokens = sum(len(result["token_ids"]) for result in results)
        return results

    for some, n_made in rows.in_order(planned, run, start):
        yield some, n_made, n_tokens


def _program(model: command.Model, temperature, top_p, max_tokens, seed) -> Callable:
    """prompts -> rollout on the host."""
    greedy = temperature == 0

    @jax.jit
    def compiled(params, prompts, key):
        rollout = sampler.generate(
            model.decoder,
            batching.decode_copy(model.mesh, model.decoder, params),
            sharding.constrain_decode_rows(model.mesh, prompts),
            key,
            completion_length=max_tokens,
            temperature=1.0 if greedy else temperature,
            eos_ids=model.tokenizer.eos_ids,
            n_vocab=model.tokenizer.vocab_size,
            greedy=greedy,
            top_p=None if top_p == 1 else top_p,
        )
        return sharding.constrain_rows(rollout)

    def run(prompts):
        with sharding.use(model.mesh, sharding.DECODE):
            return processes.gather(compiled(model.params, prompts, jax.random.key(seed)))

    return run


def _prompts(ids, width: int, row_B) -> Prompts:
    tokens_BP, valid_BP = padded(ids, width, 0, left=True)
    nothing_B = np.zeros_like(row_B)
    return Prompts(
        tokens_BP=tokens_BP, valid_BP=valid_BP, task_B=nothing_B, group_B=nothing_B, row_B=row_B
    )


def define_flags() -> flags.FlagValues:
    values = command.define(temperature="Divides the logits; 0 takes the likeliest token.")
    command.add(
        values,
        "top_p",
        1.0,
        "Draw from the fewest likeliest tokens whose probabilities reach it; 1 cuts nothing.",
    )
    command.add(values, "max_tokens", 256, "Of a completion, end token included.")
    command.add(values, "seed", 0, "Of the draws.")
    command.add(values, "n", 1, "Completions of each prompt.")
    return values


def main(argv: Sequence[str] | None = None) -> None:
    command.run(define_flags(), __doc__, write, list(sys.argv if argv is None else argv))


if __name__ == "__main__":
    main()
