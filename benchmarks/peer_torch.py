"""A peer of the speed benchmark: a loop written by hand in transformers and torch.

    PYTHON benchmarks/peer_torch.py WORKLOAD

PYTHON has torch and transformers; no JAX is imported. WORKLOAD is JSON (contender.workload). Eager
mode, transformers' own defaults (its dynamic cache, scaled_dot_product_attention), every core.
"""

import contextlib
import importlib.metadata
import os
import sys

import contender
import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

LEARNING_RATE = 1e-5


def causal_lm(size: dict, vocab: int, positions: int, seed: int) -> Qwen3ForCausalLM:
    """Qwen3 of a size with random float32 weights, for up to `positions` positions."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=size["hidden"],
        intermediate_size=size["intermediate"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        head_dim=size["head_dim"],
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    return Qwen3ForCausalLM(config)


def log_probs(model, tokens_BL, n_new: int):
    """[B, n_new] nats of the last n_new tokens: no other position goes through the head."""
    out = model(input_ids=tokens_BL[:, :-1], use_cache=False, logits_to_keep=n_new)
    wanted = tokens_BL[:, -n_new:]
    nll = F.cross_entropy(out.logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return -nll.view(wanted.shape)


class Loop:
    """Models, optimizer and prompts of a workload; a call makes one step of them."""

    def __init__(self, work: dict):
        self.rows, self.prompt, self.new = work["rows"], work["prompt"], work["new"]
        self.vocab = work["vocab"]
        positions = self.prompt + self.new
        self.student = causal_lm(work["student"], self.vocab, positions, seed=0)
        self.teacher = causal_lm(work["teacher"], self.vocab, positions, seed=1)
        self.teacher.eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=LEARNING_RATE, weight_decay=0.01
        )
        draw = np.random.default_rng(0)
        self.prompts_BP = torch.from_numpy(draw.integers(8, self.vocab, (self.rows, self.prompt)))

    def __call__(self) -> dict[str, float]:
        """{phase: seconds} of one step on freshly sampled completions."""
        # standard output belongs to the answers
        with contextlib.redirect_stdout(sys.stderr):
            watch = contender.Watch()
            tokens_BL = self.generate()
            watch.lap("generate")
            with torch.no_grad():
                teacher_BT = log_probs(self.teacher, tokens_BL, self.new)
            watch.lap("score")
            self.update(tokens_BL, teacher_BT)
            watch.lap("update")
            return watch.all()

    def generate(self):
        """[rows, prompt + new] tokens: the prompts and what the student made of them."""
        tokens_BL = self.student.generate(
            self.prompts_BP,
            attention_mask=torch.ones_like(self.prompts_BP),
            max_new_tokens=self.new,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.vocab,  # one past what can be drawn: no row ends early
            pad_token_id=0,
        )
        assert tokens_BL.shape == (self.rows, self.prompt + self.new), tokens_BL.shape
        return tokens_BL

    def update(self, tokens_BL, teacher_BT) -> None:
        student_BT = log_probs(self.student, tokens_BL, self.new)
        reward_BT = (teacher_BT - student_BT).detach()
        loss = -(reward_BT * student_BT).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()


def warm(loop: Loop) -> None:
    """One step, which must have moved the student by what AdamW's first step moves a weight."""
    before = [p.detach().clone() for p in loop.student.parameters()]
    loop()
    after = loop.student.parameters()
    moved = max((new.detach() - old).abs().max().item() for old, new in zip(before, after))
    assert 0.5 * LEARNING_RATE < moved < 2 * LEARNING_RATE, moved


def main():
    torch.set_num_threads(os.cpu_count())
    loop = Loop(contender.workload())
    warm(loop)
    packages = ("torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    contender.serve(loop, {"name": "torch loop", "versions": versions}, warmup=1)


if __name__ == "__main__":
    main()
