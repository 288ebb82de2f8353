"""The few types that travel between modules, and the legend of shape letters.

Shape letters, in the order in which they appear in a name's suffix:
    B rows (always axis 0)      L positions of a row        T = L - 1 predictions
    P prompt positions          C completion positions      V vocabulary
    S entries of a support      D model width               F MLP width
    N layers                    H query heads               K key/value heads
    E one head's width          G groups of rows            M microbatches

Position t of a `_BT` array speaks of the prediction of `tokens_BL[:, t + 1]` from the positions
up to and including t. Log-probs are float32 nats.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One problem of a dataset, whatever file it came from."""

    messages: tuple[dict[str, str], ...]  # chat turns, {"role": ..., "content": ...}
    task: str  # names the teacher that scores it
    answer: str  # ground truth: a value for "math", JSON tests for "code", text for "text"
    verifier: str  # a name in gopd_jax.verifiers.VERIFIERS
    source: str  # "file:line" or "dataset[index]", for messages
    completion: str | None = None  # a worked answer to imitate, where the dataset has one
    lam: float | None = None  # the row's own lambda of the objective
    context: str | None = None  # what only a teacher may be shown: a critique, a hint, a document


@struct.dataclass
class View:
    """The rows' prompts as another role than the student reads them: its template, its context.

    tokens_BP int32 left-padded to a width of its own; valid_BP bool.
    """

    tokens_BP: Any
    valid_BP: Any


@struct.dataclass
class Prompts:
    """One step's prompts: on the host this process's rows, in a jit the global batch.

    tokens_BP int32 left-padded to the prompt limit; valid_BP bool; task_B int32, index of the
    row's task; group_B int32, rows of one prompt share it; row_B int32, the row's index in the
    global batch, which names its randomness. completion_BC / completion_mask_BC hold the dataset's
    own completion, end token included, where the objective imitates it, and are None otherwise.
    teacher, reference are the rows as each one's own teacher and as the reference reads them, None
    where that is as the student does. lam_B float32: each row's lambda, None where all rows have
    the objective's. records are the rows' problems; they stay on the host (static: empty inside a
    jit).
    """

    tokens_BP: Any
    valid_BP: Any
    task_B: Any
    group_B: Any
    row_B: Any
    records: tuple[Record, ...] = struct.field(pytree_node=False, default=())
    completion_BC: Any = None
    completion_mask_BC: Any = None
    teacher: View | None = None
    reference: View | None = None
    lam_B: Any = None


@struct.dataclass
class Rollout:
    """Prompts with their completions: left-padded prompt, completion, right padding.

    tokens_BL int32; valid_BL bool, False on both paddings; mask_BT bool, True where
    tokens_BL[:, t + 1] was sampled, end token included; logp_BT float32 nats under the sampler,
    0 off the mask; ended_B bool, False where the completion was cut at the length limit;
    group_B, task_B int32, teacher, reference, lam_B as in Prompts. n_prompt is the static prompt
    width P, so that the completion fills tokens_BL[:, P:] and predictions [:, P - 1:].
    """

    tokens_BL: Array
    valid_BL: Array
    mask_BT: Array
    logp_BT: Array
    ended_B: Array
    group_B: Array
    task_B: Array
    n_prompt: int = struct.field(pytree_node=False)
    teacher: View | None = None
    reference: View | None = None
    lam_B: Array | None = None


@struct.dataclass
class Scores:
    """What the frozen models and verifiers say of a Rollout. No gradient flows through any of it.

    teacher_BT (the row's own teacher, or mixture of teachers), ref_BT: log-probs of the sampled
    tokens, float32 nats, 0 off the mask; teacher_entropy_BT nats; reward_B float32, the verifier's.
    An objective over the vocabulary takes teacher_hidden (an array [B, C + 1, D] for each teacher
    of a row; D is the widest teacher's, others are padded) and ref_hidden in their place: hidden
    states of the completion's positions and of the one after it. None where the objective has no
    use for the entry: it is then not computed.
    """

    teacher_BT: Array | None = None
    teacher_entropy_BT: Array | None = None
    ref_BT: Array | None = None
    reward_B: Array | None = None
    teacher_hidden: tuple[Array, ...] | None = None
    ref_hidden: Array | None = None


@struct.dataclass
class TrainState:
    """What a checkpoint holds of the training.

    step int32 scalar; params, those that are trained; optax state; ema, their exponential moving
    average, where a teacher follows the student; critic, the value head's parameters and optax
    state, where the objective has one; pending, the rollouts of the next steps, oldest first, where
    the sampler lags. None where there is no such thing.
    """

    step: Array
    params: Params
    opt_state: Any
    ema: Params | None = None
    critic: Any = None
    pending: tuple[Rollout, ...] | None = None


@struct.dataclass
class Mean:
    """A mean kept as its (total, count) until it is written: exact under any split of a batch."""

    total: Array
    count: Array

    @classmethod
    def of(cls, values, mask=None):
        """Mean of `values` (any shape) where `mask` (same shape; None: everywhere) is True."""
        values = jnp.asarray(values, jnp.float32)
        if mask is None:
            return cls(values.sum(), jnp.float32(values.size))
        return cls(jnp.where(mask, values, 0.0).sum(), mask.sum().astype(jnp.float32))

    @classmethod
    def one(cls, value):
        """A number that is no mean, in the same clothes."""
        return cls(jnp.float32(value), jnp.float32(1.0))

    def value(self) -> float:
        """total / count on the host; NaN for an empty mean."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")
