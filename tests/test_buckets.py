"""Pieces of the batch sorted by length and cut to it: the same step, whatever the widths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax import batching
from gopd_jax.critic import Critic
from gopd_jax.models import cache
from tests import full_logits as full

pytestmark = pytest.mark.slow

HEAD = Critic(learning_rate=0.02, width=8, closed_form=True, warmup_steps=0, value_clip=None)
ALIKE = {"routes": ((0, 0),)}  # one teacher for both tasks
CASES = {
    "sampled": ({"lam": 1.25}, {}),
    "several updates": ({"lam": 1.25, "importance": "token"}, {"updates": 2, "microbatches": 4}),
    "exact": ({"lam": 1.25, "loss": "exact"}, ALIKE),
    "gae": (
        {"credit": "gae(lam=0.9)", "lam": 1.25},
        {"critic": HEAD, **ALIKE},
    ),
    "reward": ({"advantage": "grpo"}, {}),
}


def step_of(name, shape, **changes):
    options, fixed = CASES[name]
    made = full.setting(shape, options=options, **{"microbatches": 4} | fixed | changes)
    reward_B = np.linspace(0, 1, full.N_ROWS) if name == "reward" else None
    return made.update(reward_B=reward_B)


@functools.cache
def step_on_one_device(name):
    return step_of(name, (1, 1, 1))


# Of several updates, 8 pieces of 16 rows do not divide over 4 shards.
PLACES = [
    *((name, (1, 1, 1)) for name in CASES),
    ("sampled", (2, 2, 1)),
    *(pytest.param(name, (2, 2, 1), marks=pytest.mark.slow) for name in ("exact", "gae", "reward")),
]


@pytest.mark.parametrize(("name", "shape"), PLACES, ids=str)
def test_widths_change_no_step(name, shape):
    want_state, want = step_on_one_device(name)
    state, got = step_of(name, shape, buckets=3)
    full.same(state.params, want_state.params)
    for key in want:
        np.testing.assert_allclose(got[key], want[key], atol=5e-5, rtol=5e-5, err_msg=key)


def test_widths_end_with_the_longest_completion():
    assert cache.widths(16384, 4) == (4096, 8192, 12288, 16384)
    assert cache.widths(6, 4) == (2, 3, 5, 6)
    assert cache.widths(2, 4) == (1, 2)
    assert cache.widths(7, 1) == (7,)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1)], ids=str)
def test_pieces_are_sorted_by_length_and_results_come_back_in_order(make_mesh, shape):
    length_B = np.random.default_rng(0).integers(0, 9, 16)
    mask_BT = jnp.array(np.arange(9) < length_B[:, None])
    mesh, rows = make_mesh(shape), {"row_B": jnp.arange(16)}

    @jax.jit
    def run(rows, mask_BT):
        ordered, back = batching.sorted_by_length(
            mesh, rows | {"mask": mask_BT}, mask_BT, 4, (4, 8)
        )
        return batching.split(ordered, 4), back(ordered)

    with jax.set_mesh(mesh):
        pieces, back = run(rows, mask_BT)
    np.testing.assert_array_equal(back["row_B"], rows["row_B"])
    length_pb = np.asarray(pieces["mask"].sum(2))
    # Of each shard, a piece's rows are no longer than the next one's.
    apart = length_pb.reshape(4, shape[0] * shape[1], -1)
    assert (apart.max(2)[:-1] <= apart.min(2)[1:]).all()
    longest = [length_B[np.asarray(p)].max() for p in pieces["row_B"]]
    assert sorted(longest) == longest


def test_the_narrowest_width_that_holds_the_rows_is_computed():
    seen = []

    def function(rows):
        jax.debug.callback(lambda n: seen.append(int(n)), rows["mask_BT"].shape[1])
        return rows["tokens_BL"].sum(), {"mask_BT": rows["mask_BT"], "end": rows["mask_BT"][:, -1]}

    before, length = 3, 8
    for n in (0, 1, 2, 3, 4, 5, 8):
        mask_BT = jnp.arange(before + length) - before < n
        mask_BT = mask_BT & (jnp.arange(before + length) >= before)
        rows = {"mask_BT": mask_BT[None], "tokens_BL": jnp.ones((1, before + 1 + length))}
        total, found = jax.jit(
            lambda rows: batching.at_width(function, rows, rows["mask_BT"], (2, 4, 8))
        )(rows)
        jax.effects_barrier()
        size = next(w for w in (2, 4, 8) if w >= n)
        assert seen.pop() == before + size
        assert total == before + 1 + size
        np.testing.assert_array_equal(found["mask_BT"], rows["mask_BT"])
        assert found["end"].shape == (1,)
