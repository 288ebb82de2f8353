"""Routed experts against all experts computed for all tokens; on meshes against one device."""

import contextlib
import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import MOE

from gopd_jax import sharding
from gopd_jax.models import moe
from gopd_jax.planning import collectives

SIZES = {
    "router": (32, 4),
    "expert_gate": (4, 32, 16),
    "expert_up": (4, 32, 16),
    "expert_down": (4, 16, 32),
}


def weights(lean=0.0):
    """Random weights; `lean` draws every token of positive mean to the last expert."""
    draw = np.random.default_rng(0).normal
    weight = {name: draw(0, 0.3, shape).astype(np.float32) for name, shape in SIZES.items()}
    weight["router"][:, -1] += lean
    return jax.tree.map(jnp.asarray, weight)


def tokens(n_rows=3):
    draw = np.random.default_rng(1).normal
    return jnp.asarray(draw(0.5, 1, (n_rows, 5, 32)).astype(np.float32))


def by_all_experts(x_BLD, weight, cfg):
    """The definition: every expert for every token, weighted by 0 where it is not chosen."""
    chance_BLR = jax.nn.softmax(jnp.einsum("bld,dr->blr", x_BLD, weight["router"]))
    least_BL1 = jnp.sort(chance_BLR, -1)[..., -cfg.num_experts_per_tok][..., None]
    share_BLR = jnp.where(chance_BLR >= least_BL1, chance_BLR, 0.0)
    if cfg.norm_topk_prob:
        share_BLR = share_BLR / share_BLR.sum(-1, keepdims=True)
    gate_BLRF = jnp.einsum("bld,rdf->blrf", x_BLD, weight["expert_gate"])
    up_BLRF = jnp.einsum("bld,rdf->blrf", x_BLD, weight["expert_up"])
    hidden_BLRF = nn.silu(gate_BLRF) * up_BLRF
    return jnp.einsum("blrf,rfd,blr->bld", hidden_BLRF, weight["expert_down"], share_BLR)


def value_and_gradients(function, cfg, x_BLD, weight):
    def cubed(x_BLD, weight):
        out_BLD = function(x_BLD, weight, cfg)
        return jnp.mean(out_BLD**3), out_BLD

    gradient, out_BLD = jax.jit(jax.grad(cubed, argnums=(0, 1), has_aux=True))(x_BLD, weight)
    return out_BLD, gradient


@pytest.mark.parametrize(
    "shape",
    [None, (2, 2, 2), (1, 1, 4), (1, 1, 1, 2), (2, 1, 1, 4), (1, 2, 2, 2), (1, 1, 1, 4, 2)],
    ids=str,
)
@pytest.mark.parametrize("lean", [0.0, 2.0], ids=["spread", "all to one expert"])
def test_routed_experts_are_the_weighted_sum_of_those_chosen(shape, lean, make_mesh):
    # One expert for each token where all want the same: the others' groups are empty.
    n_active = 1 if lean else 2
    cfg = dataclasses.replace(MOE, num_experts_per_tok=n_active, norm_topk_prob=not lean)
    x_BLD, weight = tokens(), weights(lean)
    if lean:
        chosen_BL = jnp.einsum("bld,dr->blr", x_BLD, weight["router"]).argmax(-1)
        assert (chosen_BL == 3).all()
    want = value_and_gradients(by_all_experts, cfg, x_BLD, weight)
    if shape is None:
        got = value_and_gradients(moe.routed_mlp, cfg, x_BLD, weight)
    else:  # three rows: no multiple of the four shards of rows
        mesh = make_mesh(shape)
        axes = {name: ("experts", None, None) for name in SIZES} | {"router": (None, None)}
        spread = jax.device_put(weight, sharding.shardings(mesh, axes))
        with sharding.use(mesh):
            got = value_and_gradients(moe.routed_mlp, cfg, x_BLD, spread)
    assert np.abs(want[0]).std() > 0.1
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(1.0, float(np.abs(w).max())))


@pytest.mark.parametrize("shape", [None, (1, 1, 1, 4), (1, 2, 2, 2)], ids=str)
def test_a_bound_on_tokens_at_one_time_changes_nothing(shape, make_mesh, monkeypatch):
    monkeypatch.setattr(moe, "AT_ONCE", 8)  # of 15 tokens, or 20 with the rows that are added
    x_BLD, weight = tokens(), weights()
    want = value_and_gradients(by_all_experts, MOE, x_BLD, weight)
    with contextlib.nullcontext() if shape is None else sharding.use(make_mesh(shape)):
        text = str(jax.make_jaxpr(lambda x, w: moe.routed_mlp(x, w, MOE))(x_BLD, weight))
        got = value_and_gradients(moe.routed_mlp, MOE, x_BLD, weight)
    assert "scan" in text
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(1.0, float(np.abs(w).max())))


@pytest.mark.parametrize("at_once", [8, 8192])
def test_positions_may_lie_on_an_axis_too(at_once, make_mesh, monkeypatch):
    """Five positions over two devices, three rows over two."""
    monkeypatch.setattr(moe, "AT_ONCE", at_once)
    x_BLD, weight = tokens(), weights()
    want = value_and_gradients(by_all_experts, MOE, x_BLD, weight)
    rules = (*sharding.TRAIN, ("length", "sequence"))
    with sharding.use(make_mesh((1, 1, 2, 2, 2)), rules):
        got = value_and_gradients(moe.routed_mlp, MOE, x_BLD, weight)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, w, atol=1e-5 * max(1.0, float(np.abs(w).max())))


def test_memory_does_not_grow_with_the_pairs_of_all_tokens(monkeypatch):
    """Of 2048 tokens: pairs of 128 at one time take little beside the tokens, also backwards."""
    x_BLD, cfg = tokens(2048 // 5), dataclasses.replace(MOE, num_experts_per_tok=4)

    def temporaries(at_once):
        monkeypatch.setattr(moe, "AT_ONCE", at_once)

        def loss(x_BLD, weight):
            return jnp.sin(moe.routed_mlp(x_BLD, weight, cfg)).sum()

        made = jax.jit(jax.grad(loss, (0, 1))).lower(x_BLD, weights()).compile()
        return made.memory_analysis().temp_size_in_bytes

    assert temporaries(128) < temporaries(4096) / 4


def test_a_gradient_is_added_up_over_chunks_in_float32(monkeypatch):
    x_BLD = tokens(103).astype(jnp.bfloat16)  # 515 tokens, 8 at one time

    def gradient(at_once):
        monkeypatch.setattr(moe, "AT_ONCE", at_once)

        def loss(weight):
            return (moe.routed_mlp(x_BLD, weight, MOE).astype(jnp.float32) ** 3).sum()

        return np.asarray(jax.jit(jax.grad(loss))(weights())["expert_down"])

    want, got = gradient(1024), gradient(8)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 0 < error < 2**-8  # added up in bfloat16 it is 0.01


def test_tokens_meet_in_one_gather_and_their_sums_are_scattered(make_mesh):
    """Bytes of the compiled program's collectives, counted by hand."""
    mesh, x_BLD = make_mesh((1, 1, 1, 4)), tokens(4)
    placed = jax.device_put(x_BLD, sharding.by_rows(mesh))
    axes = {name: ("experts", None, None) for name in SIZES} | {"router": (None, None)}
    weight = jax.device_put(weights(), sharding.shardings(mesh, axes))
    with sharding.use(mesh):
        made = jax.jit(lambda x, w: moe.routed_mlp(x, w, MOE)).lower(placed, weight).compile()
    routes = 20 * MOE.num_experts_per_tok * (4 + 4)  # a chance and a choice for each pair
    assert collectives.sent(made.as_text()) == {
        "all-gather": 20 * 32 * 4 + routes,
        "reduce-scatter": 5 * 32 * 4,
    }


def test_gradients_are_added_over_rows_once_and_not_in_each_chunk(make_mesh, monkeypatch):
    mesh, x_BLD = make_mesh((2, 2, 1)), tokens(4)

    def reduced(at_once):
        monkeypatch.setattr(moe, "AT_ONCE", at_once)

        def loss(weight):
            return jnp.sin(moe.routed_mlp(x_BLD, weight, MOE)).sum()

        made = jax.jit(jax.grad(loss)).lower(weights()).compile()
        return collectives.sent(made.as_text())["all-reduce"]

    with sharding.use(mesh):
        assert reduced(1) == reduced(100) >= 4 * sum(np.prod(shape) for shape in SIZES.values())


def test_the_router_works_in_float32_whatever_the_dtype():
    x_BLD, weight = tokens().astype(jnp.bfloat16), weights()
    # Two experts that bfloat16 cannot tell apart, and float32 can.
    weight["router"] = jnp.zeros((32, 4)).at[:, 0].set(1.0).at[:, 1].set(1.0 + 1e-4)
    cfg = dataclasses.replace(MOE, num_experts_per_tok=1)
    got_BLD = moe.routed_mlp(x_BLD, weight, cfg)
    assert got_BLD.dtype == jnp.bfloat16
    one = {name: w.astype(jnp.bfloat16)[1] for name, w in weight.items() if name != "router"}
    positive_BL = np.asarray(x_BLD.astype(jnp.float32).sum(-1) > 0)
    want_BLD = (nn.silu(x_BLD @ one["expert_gate"]) * (x_BLD @ one["expert_up"])) @ one[
        "expert_down"
    ]
    error_BLD = np.abs(np.asarray(got_BLD - want_BLD, np.float32))[positive_BL]
    assert positive_BL.any()
    assert error_BLD.max() < 0.02 * np.abs(np.asarray(want_BLD, np.float32)).max()


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "HIGHEST"), ("bfloat16", "None")])
def test_products_ask_for_more_than_one_pass_of_float32_alone(dtype, precision):
    # The TPU's kernel fails on bfloat16 at precision "highest".
    text = str(
        jax.make_jaxpr(lambda x, w: moe.routed_mlp(x, w, MOE))(tokens().astype(dtype), weights())
    )
    asked = re.findall(r"ragged_dot\w*\[.*?\bprecision=(\S+)", text, re.DOTALL)
    assert len(asked) == 3
    assert all(precision in one for one in asked)
