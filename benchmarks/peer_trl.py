"""A peer of the speed benchmark: TRL's IWOPDTrainer, everything of a step its own.

    PYTHON benchmarks/peer_trl.py WORKLOAD

PYTHON has trl 1.16.0, transformers 5.23.0, accelerate 1.15.0, datasets 5.2.0 and torch; WORKLOAD is
JSON (contender.workload). The objective is the others': the sampled tokens' policy gradient on
log p(teacher) - log p(student), which is IW-OPD's with its weights turned off (gamma 0). TRL
divides its sum by the tokens of the data set's answers (by 0 where rows have none), so these are as
long as what is sampled. It sends every position through both heads. Activations are not recomputed,
which TRL's default is and which would turn off the cache of generate.
"""

import contextlib
import importlib.metadata
import os
import queue
import sys
import tempfile
import threading
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import contender
import numpy as np
import torch
from datasets import Dataset
from peer_torch import LEARNING_RATE, causal_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

EPOCH = 64  # batches of other prompts, before the first ones come again


def id_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Text is ids with blanks between; end and padding lie past what a model can draw."""
    words = {str(i): i for i in range(vocab)} | {"[end]": vocab, "[pad]": vocab + 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[pad]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="[end]", pad_token="[pad]", padding_side="left"
    )
    made.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return made


def saved(folder: Path, size: dict, vocab: int, positions: int, tokenizer, seed: int) -> str:
    """The path of a Qwen3 with random float32 weights: the trainer reads tokenizers from paths."""
    causal_lm(size, vocab, positions, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Turns(TrainerCallback):
    """Holds the trainer between its steps, until the next one is asked for."""

    def __init__(self):
        self.asked, self.done = queue.Queue(), queue.Queue()

    def on_train_begin(self, args, state, control, **_):
        self.asked.get()

    def on_step_end(self, args, state, control, **_):
        self.done.put(None)
        self.asked.get()


class Loop:
    """The trainer in a thread of its own; a call lets it make one step."""

    def __init__(self, work: dict, folder: Path):
        self.rows, self.length = work["rows"], work["prompt"] + work["new"]
        vocab, tokenizer = work["vocab"], id_tokenizer(work["vocab"])
        paths = [
            saved(folder / role, work[role], vocab, self.length, tokenizer, seed)
            for seed, role in enumerate(("student", "teacher"))
        ]
        draw = np.random.default_rng(0)

        def text(n):
            return " ".join(map(str, draw.integers(8, vocab, n)))

        def conversation():
            user = {"role": "user", "content": text(work["prompt"])}
            return [user, {"role": "assistant", "content": text(work["new"])}]

        rows = [conversation() for _ in range(EPOCH * self.rows)]
        config = IWOPDConfig(
            output_dir=str(folder / "out"),
            iw_opd_gamma=0.0,
            lmbda=1.0,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_length=self.length,
            max_prompt_length=work["prompt"],
            max_completion_length=work["new"],
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=1,
            max_steps=10**6,
            learning_rate=LEARNING_RATE,
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        self.turns = Turns()
        self.trainer = IWOPDTrainer(
            model=paths[0],
            teacher_model=paths[1],
            args=config,
            train_dataset=Dataset.from_dict({"messages": rows}),
            processing_class=tokenizer,
            callbacks=[self.turns],
        )
        self.student, self.teacher = self.trainer.model, self.trainer.teacher_model
        assert self.student.dtype == self.teacher.dtype == torch.float32
        self.watch, self.shapes = contender.Watch(), []
        self._lapped(self.student, "generate", "generate")
        self._lapped(self.teacher, "forward", "score")
        self.thread = threading.Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self):
        try:
            self.trainer.train()
        except BaseException as error:
            self.turns.done.put(error)

    def _lapped(self, model, method: str, phase: str) -> None:
        """The method's seconds are the phase's, what is before it the update's."""
        inner = getattr(model, method)

        def timed(*args, **kwargs):
            self.watch.lap("update")
            out = inner(*args, **kwargs)
            self.watch.lap(phase)
            if phase == "generate":
                self.shapes.append(tuple(out.sequences.shape))
            return out

        setattr(model, method, timed)

    def __call__(self) -> dict[str, float]:
        """{phase: seconds} of one step on freshly sampled completions."""
        self.watch, self.shapes = contender.Watch(), []
        self.turns.asked.put(None)
        if (error := self.turns.done.get()) is not None:
            raise error
        self.watch.lap("update")
        assert self.shapes == [(self.rows, self.length)], self.shapes
        return self.watch.all()


def warm(loop: Loop) -> None:
    """One step, which must have moved the student by what AdamW's first step moves a weight."""
    before = [p.detach().clone() for p in loop.student.parameters()]
    loop()
    after = loop.student.parameters()
    moved = max((new.detach() - old).abs().max().item() for old, new in zip(before, after))
    assert 0.5 * LEARNING_RATE < moved < 2 * LEARNING_RATE, moved


def main():
    torch.set_num_threads(os.cpu_count())
    answers = sys.stdout
    # Standard output belongs to the answers; the trainer, in its thread, logs there.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        loop = Loop(contender.workload(), Path(folder))
        warm(loop)
        packages = ("trl", "torch", "transformers", "accelerate")
        versions = {name: importlib.metadata.version(name) for name in packages}
        contender.serve(loop, {"name": "trl", "versions": versions}, warmup=1, to=answers)


if __name__ == "__main__":
    main()
