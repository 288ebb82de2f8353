"""The microworld's tokenizer: byte-level BPE of 512 tokens in Hugging Face files."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gopd_jax.microworld import tasks

VOCABULARY = 512
PAD, START, END = SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A LaTeX command with its brace; letters with at most one character before them; one digit;
# punctuation with the line's end; white space.
PIECES = (
    r"\\\p{L}+\{|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def build(path: str | Path, *, problems: int = 3000) -> None:
    """Trains the tokenizer on `problems` of each task and writes its files into directory `path`.

    Bytes are the alphabet, so any text makes the round trip; every digit is a token of its own.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(problems), trainer)
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(
            f"{problems} problems of each task give {tokenizer.get_vocab_size()} tokens, not "
            f"{VOCABULARY}; train on more"
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    named = {"eos_token": END, "pad_token": PAD}
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL}
    _write(directory / "special_tokens_map.json", named)
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            "additional_special_tokens": [START],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 128,
        },
    )
    _write(
        directory / "generation_config.json",
        {"eos_token_id": ids[END], "pad_token_id": ids[PAD], "do_sample": True, "temperature": 1.0},
    )


def _texts(problems: int):
    """Prompts and answers by both strategies, and the template's own words."""
    for index in range(problems):
        for task in tasks.TASKS:
            made = tasks.problem(task, 0, index, split="train")
            yield from (
                "user\n",
                made.messages[0]["content"],
                "assistant\n",
                made.right,
                made.wrong,
            )


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
