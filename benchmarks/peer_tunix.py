"""A peer of the speed benchmark: google-tunix, its Sampler and its DistillationTrainer.

    PYTHON benchmarks/peer_tunix.py WORKLOAD

PYTHON has google-tunix 0.1.7; WORKLOAD is JSON (contender.workload). Tunix has no on-policy
distillation, so the loop between its two halves and the strategy (the objective) are ours. Its
models send every position through the head, the prompt's too.
"""

import contextlib
import importlib.metadata
import sys
import types

import contender
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation import distillation_trainer as distillation
from tunix.distillation.strategies.base_strategy import BaseStrategy
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig, Qwen3

LEARNING_RATE = 1e-5


def id_tokenizer(vocab: int) -> types.SimpleNamespace:
    """Text is ids with blanks between; end and padding lie past the vocabulary."""
    return types.SimpleNamespace(
        encode=lambda text: [int(word) for word in text.split()],
        decode=lambda ids: " ".join(str(i) for i in ids),
        bos_id=lambda: None,  # the sampler then puts nothing before a prompt
        eos_id=lambda: vocab,  # cannot be drawn: no row ends early
        pad_id=lambda: vocab + 1,
    )


class SampledToken(BaseStrategy):
    """Policy gradient on log p(teacher) - log p(student) of the sampled tokens.

    The models' outputs are those log-probs, [B, T] nats, so there is no use for labels.
    """

    def __init__(self, prompt: int):
        def log_probs(model, input_tokens, input_mask):
            rows, length = input_tokens.shape[0], input_tokens.shape[1] - 1
            where = jnp.broadcast_to(jnp.arange(length), (rows, length))
            causal = jnp.broadcast_to(jnp.tri(length, dtype=bool), (rows, length, length))
            logits_BLV, _ = model(input_tokens[:, :-1], where, None, causal)
            logits_BTV = logits_BLV[:, prompt - 1 :]
            sampled_BT1 = input_tokens[:, prompt:, None]
            logit_BT = jnp.take_along_axis(logits_BTV, sampled_BT1, -1)[..., 0]
            return logit_BT - jax.nn.logsumexp(logits_BTV, -1)

        super().__init__(log_probs, log_probs, lambda **inputs: None)
        self.watch = contender.Watch()

    def get_teacher_outputs(self, teacher_model, inputs):
        # The trainer would go on while the teacher computes: waiting keeps the phases apart.
        teacher_BT = jax.block_until_ready(super().get_teacher_outputs(teacher_model, inputs))
        self.watch.lap("score")
        return teacher_BT

    def compute_loss(self, student_output, teacher_output, labels):
        reward_BT = jax.lax.stop_gradient(teacher_output - student_output)
        return -jnp.mean(reward_BT * student_output)

    def compute_eval_loss(self, student_output, labels):
        raise NotImplementedError("nothing is evaluated here")


def qwen3(size: dict, vocab: int, seed: int) -> Qwen3:
    """Qwen3 of a size in float32; all its matrices are random."""
    config = ModelConfig(
        num_layers=size["layers"],
        vocab_size=vocab,
        embed_dim=size["hidden"],
        hidden_dim=size["intermediate"],
        num_heads=size["heads"],
        head_dim=size["head_dim"],
        num_kv_heads=size["kv_heads"],
        rope_theta=1_000_000,
        norm_eps=1e-6,
        use_tied_embedding=True,
    )
    model = Qwen3(config, rngs=nnx.Rngs(seed))
    # Tunix starts its MLPs at zero, for a checkpoint to fill.
    draw = np.random.default_rng(seed)

    def fill(w):
        return w if w.ndim < 2 else jnp.asarray(0.02 * draw.standard_normal(w.shape), w.dtype)

    nnx.update(model, jax.tree.map(fill, nnx.state(model, nnx.Param)))
    return model


class Loop:
    """Models, sampler, trainer and prompts of a workload; a call makes one step of them."""

    def __init__(self, work: dict):
        self.rows, self.prompt, self.new = work["rows"], work["prompt"], work["new"]
        size, vocab = work["student"], work["vocab"]
        self.student = qwen3(size, vocab, seed=0)
        # Qwen3 makes its own cache, of its own sizes: only the length is read from here.
        length = self.prompt + self.new
        cache = CacheConfig(length, size["layers"], size["kv_heads"], size["head_dim"])
        self.sampler = Sampler(self.student, id_tokenizer(vocab), cache)
        self.strategy = SampledToken(self.prompt)
        adamw = optax.adamw(LEARNING_RATE, weight_decay=0.01)
        chain = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        teacher = qwen3(work["teacher"], vocab, seed=1)
        every = distillation.TrainingConfig(eval_every_n_steps=1)  # required; nothing is evaluated
        self.trainer = distillation.DistillationTrainer(
            self.student, teacher, self.strategy, chain, every
        )
        # train() runs through the batches it is given, then closes the trainer; one that is managed
        # from outside stays open, as tunix's own RL loop has it. So a request is a train() of one
        # batch, and a step is a function: no generator that waits for input, no thread.
        self.trainer.is_managed_externally = True
        draw = np.random.default_rng(0)
        prompts_BP = draw.integers(8, vocab, (self.rows, self.prompt))
        self.prompts = [" ".join(map(str, row)) for row in prompts_BP]

    def __call__(self) -> dict[str, float]:
        """{phase: seconds} of one step on freshly sampled completions."""
        # standard output belongs to the answers
        with contextlib.redirect_stdout(sys.stderr):
            watch = self.strategy.watch = contender.Watch()
            tokens_BL = self.generate()
            watch.lap("generate")
            mask_BL = np.ones_like(tokens_BL, bool)
            batch = distillation.TrainingInput(input_tokens=tokens_BL, input_mask=mask_BL)
            self.trainer.train([batch])  # the strategy laps "score"
            jax.block_until_ready(nnx.state(self.student))
            watch.lap("update")
            return watch.all()

    def generate(self) -> np.ndarray:
        """[rows, prompt + new] tokens: the prompts and what the student made of them."""
        self.sampler.transformer_state = nnx.variables(self.student)
        out = self.sampler(
            self.prompts,
            max_generation_steps=self.new,
            max_prompt_length=self.prompt,
            temperature=1.0,
            top_p=1.0,  # None would be greedy
            seed=self.trainer.train_steps,
        )
        new_BT = np.stack(out.tokens)
        assert new_BT.shape == (self.rows, self.new), new_BT.shape
        return np.concatenate([out.padded_prompt_tokens, new_BT], axis=1).astype(np.int32)


def warm(loop: Loop) -> None:
    """One step, which must have moved the student by what AdamW's first step moves a weight."""
    before = [np.array(w) for w in jax.tree.leaves(nnx.state(loop.student, nnx.Param))]
    loop()
    after = jax.tree.leaves(nnx.state(loop.student, nnx.Param))
    moved = max(np.abs(np.asarray(new) - old).max() for old, new in zip(before, after))
    assert 0.5 * LEARNING_RATE < moved < 2 * LEARNING_RATE, moved


def main():
    loop = Loop(contender.workload())
    warm(loop)
    packages = ("google-tunix", "jax", "jaxlib", "flax", "optax")
    versions = {name: importlib.metadata.version(name) for name in packages}
    contender.serve(loop, {"name": "tunix", "versions": versions}, warmup=1)


if __name__ == "__main__":
    main()
