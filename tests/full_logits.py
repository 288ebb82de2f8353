"""A step so small that all of its logits can be held, and its updates written out by hand.

Three tiny models beside the student, of other architectures, widths and embedding tables, and
sixteen rows that no sampler wrote: of one token, of none, cut off, with the end token first. The
optimizer is plain descent at rate 1, so that a step's parameters are old minus gradient.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gopd_jax import sharding, step
from gopd_jax.models import decoder as lm
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.models.params import ModelConfig
from gopd_jax.objectives import objective
from gopd_jax.recipe import Frozen, Recipe, init_state
from gopd_jax.types import Prompts, Rollout

V, WIDTH, LENGTH, GROUP_ROWS = 61, 4, 6, (6, 10)
EOS = (0, 1, 2)
TASK_B = np.repeat([0, 1], GROUP_ROWS)
N_ROWS = len(TASK_B)
LENGTH_B = np.array([6, 6, 3, 1, 4, 0, 2, 6, 5, 1, 6, 4, 3, 6, 2, 5])
ENDED_B = (LENGTH_B < LENGTH) | (np.arange(N_ROWS) == 1)
GROUP_B = np.arange(N_ROWS) // 2
TEMPERATURE = 0.8
# (seed, architecture, width of hidden states, rows of the embedding)
STUDENT, REFERENCE = (0, "qwen3", 16, 68), (3, "qwen3", 16, 64)
TEACHERS = ((1, "qwen3", 16, 68), (2, "llama", 24, 72), (4, "llama", 16, 68))


@functools.cache
def model(seed, architecture, width, n_ids):
    cfg = ModelConfig(
        architecture=architecture,
        vocab_size=n_ids,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=4,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=architecture == "qwen3",
    )
    params = lm_params.init(cfg, jax.random.key(seed))
    return Decoder(cfg), jax.tree.map(lambda x: 8 * x if x.std() > 0 else x, params)


@functools.cache
def rollout(width=WIDTH, order=None) -> Rollout:
    """The sixteen rows, after prompts of 2 to 4 tokens in `width` positions, in another order."""
    draw = np.random.default_rng(5)
    mask_BC = np.arange(LENGTH) < LENGTH_B[:, None]
    ids_BC = draw.integers(3, V, mask_BC.shape)
    last_BC = np.arange(LENGTH) == LENGTH_B[:, None] - 1
    ids_BC = np.where(last_BC & ENDED_B[:, None], draw.integers(0, 3, mask_BC.shape), ids_BC)
    prompt_BP = draw.integers(0, V, (N_ROWS, WIDTH))
    valid_BP = np.arange(WIDTH) >= WIDTH - 2 - np.arange(N_ROWS)[:, None] % 3
    noise_BC = 0.5 * draw.normal(size=mask_BC.shape)
    wider = ((0, 0), (width - WIDTH, 0))
    before = ((0, 0), (width - 1, 0))
    made = Rollout(
        tokens_BL=np.concatenate(
            [np.pad(np.where(valid_BP, prompt_BP, -1), wider), np.where(mask_BC, ids_BC, 0)], 1
        ).astype(np.int32),
        valid_BL=np.concatenate([np.pad(valid_BP, wider), mask_BC], 1),
        mask_BT=np.pad(mask_BC, before),
        logp_BT=np.pad(np.where(mask_BC, noise_BC, 0), before).astype(np.float32),
        ended_B=ENDED_B,
        group_B=GROUP_B.astype(np.int32),
        task_B=TASK_B.astype(np.int32),
        n_prompt=width,
    )
    # The sampler's log-probs: the student's, but for the noise.
    student_BT = np.asarray(of_tokens(logp_of(STUDENT, made), made))
    made = made.replace(logp_BT=np.where(made.mask_BT, student_BT + made.logp_BT, 0))
    order = np.arange(N_ROWS) if order is None else np.array(order)
    return jax.tree.map(lambda x: jnp.array(x[order]), made)


def prompts() -> Prompts:
    """Those of the rows, for a sampler."""
    rows = rollout()
    return Prompts(
        tokens_BP=rows.tokens_BL[:, :WIDTH],
        valid_BP=rows.valid_BL[:, :WIDTH],
        task_B=rows.task_B,
        group_B=rows.group_B,
        row_B=jnp.arange(N_ROWS, dtype=jnp.int32),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    recipe: Recipe
    params: Any
    frozen: Frozen
    rollout: Rollout

    def laid(self, rows):
        return jax.device_put(rows, sharding.by_rows(self.recipe.mesh))

    @functools.cached_property
    def compiled(self):
        """jit of (state, rollout, reward_B or None, frozen) -> what step.update gives."""
        recipe = self.recipe

        def run(state, rollout, reward_B, frozen):
            scores = step.score(recipe, frozen, rollout).replace(reward_B=reward_B)
            return step.update(recipe, state, rollout, scores, frozen)

        return step.compiled(recipe, run, sharding.replicated(recipe.mesh))

    def update(self, state=None, rollout=None, reward_B=None):
        """(state after one step, metrics as they are read)."""
        state = init_state(self.recipe, self.params) if state is None else state
        rows = self.laid(self.rollout if rollout is None else rollout)
        reward_B = None if reward_B is None else self.laid(jnp.array(reward_B, jnp.float32))
        state, metrics = self.compiled(state, rows, reward_B, self.frozen)
        return jax.device_get(state), read(metrics)

    def descent(self, rollout=None, reward_B=None):
        """(gradient that one step went down, its metrics)."""
        state, metrics = self.update(None, rollout, reward_B)
        return jax.tree.map(lambda a, b: np.asarray(a) - b, self.params, state.params), metrics


def setting(shape=(1, 1, 1), *, teachers=TEACHERS[:2], options=None, **changes) -> Setting:
    """A step on a mesh; options: of objective.build; changes: of the Recipe."""
    n_devices, more = int(np.prod(shape)), dict(zip(("expert", "sequence"), shape[3:]))
    mesh = sharding.make_mesh(*shape[:3], **more, devices=jax.devices()[:n_devices])
    goal = objective.build(**(options or {}))

    def spread(which):
        decoder, params = model(*which)
        layout = sharding.shardings(mesh, lm_params.logical_axes(decoder.cfg))
        return jax.device_put(params, layout)

    recipe = Recipe(
        mesh=mesh,
        student=model(*STUDENT)[0],
        teachers=tuple(model(*which)[0] for which in teachers),
        routes=((0, 1),),
        reference=model(*REFERENCE)[0] if goal.needs_reference else None,
        objective=goal,
        optimizer=optax.sgd(1.0),
        learning_rate=lambda _: 1.0,
        source="student",
        group_rows=GROUP_ROWS,
        completion_length=LENGTH,
        temperature=TEMPERATURE,
        eos_ids=EOS,
        n_vocab=V,
        microbatches=2,
        head_chunk=2,
    )
    return Setting(
        recipe=dataclasses.replace(recipe, **changes),
        params=spread(STUDENT),
        frozen=Frozen(
            teachers=tuple(map(spread, teachers)),
            reference=spread(REFERENCE) if goal.needs_reference else None,
        ),
        rollout=rollout(),
    )


def read(metrics) -> dict:
    """Metrics as they are read: means, or one mean a task."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {k: np.asarray(m.total) / np.asarray(m.count) for k, m in metrics.items()}


# --- the oracle


@functools.partial(jax.jit, static_argnums=0)
def _logp(decoder, params, tokens_BL, valid_BL):
    hidden_BLD = lm.hidden(decoder, params, tokens_BL, valid_BL)
    return jax.nn.log_softmax(lm.logits(decoder, params, hidden_BLD)[..., :V] / TEMPERATURE)


@functools.partial(jax.jit, static_argnums=0)
def _pull(decoder, params, tokens_BL, valid_BL, cotangent_BLV):
    return jax.vjp(lambda p: _logp(decoder, p, tokens_BL, valid_BL), params)[1](cotangent_BLV)[0]


def logp_of(which, rows=None, params=None):
    """log-probs [B, L, V] of a model over every id, at every position and behind the last."""
    rows, (decoder, own) = rollout() if rows is None else rows, model(*which)
    return _logp(decoder, own if params is None else params, rows.tokens_BL, rows.valid_BL)


def own_teacher(rows=None, teachers=TEACHERS):
    """[B, L, V] of each row's own teacher."""
    task_B11 = (rollout() if rows is None else rows).task_B[:, None, None]
    return jnp.where(task_B11 == 0, *(logp_of(which, rows) for which in teachers[:2]))


def target(lam, rows=None, teacher_BLV=None, cap=None):
    """log T_lam, normalised over the vocabulary."""
    teacher_BLV = own_teacher(rows) if teacher_BLV is None else teacher_BLV
    gap_BLV = teacher_BLV - logp_of(REFERENCE, rows)
    gap_BLV = gap_BLV if cap is None else jnp.clip(gap_BLV, -cap, cap)
    lam = jnp.reshape(jnp.asarray(lam), (-1, 1, 1))
    return jax.nn.log_softmax(teacher_BLV + (lam - 1) * gap_BLV)


def of_tokens(logp_BLV, rows=None):
    """[B, T] of the sampled tokens."""
    tokens_BL = (rollout() if rows is None else rows).tokens_BL
    return jnp.take_along_axis(logp_BLV[:, :-1], tokens_BL[:, 1:, None], -1)[..., 0]


def gradient(loss_of, rows=None, params=None):
    """(gradient, loss) of loss_of(student's log-probs [B, L, V]) -> a number."""
    rows = rollout() if rows is None else rows
    decoder, own = model(*STUDENT)
    params = own if params is None else params
    loss, cotangent_BLV = jax.value_and_grad(loss_of)(logp_of(STUDENT, rows, params))
    grads = _pull(decoder, params, rows.tokens_BL, rows.valid_BL, cotangent_BLV)
    return jax.device_get(grads), float(loss)


def token_mean(loss_BT, mask_BT):
    return jnp.where(mask_BT, loss_BT, 0.0).sum() / mask_BT.sum()


def sampled(advantage_BT, rows=None):
    """loss_of, for `gradient`, of the policy gradient with fixed advantages."""
    rows = rollout() if rows is None else rows

    def loss_of(student_BLV):
        loss_BT = -jax.lax.stop_gradient(advantage_BT) * of_tokens(student_BLV, rows)
        return token_mean(loss_BT, rows.mask_BT)

    return loss_of


def same(got, want, atol=2e-5, rtol=0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=rtol), got, want)


def norm(tree):
    return float(optax.tree.norm(tree))
