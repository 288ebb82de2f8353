"""FLOPs and collectives of a program against products counted by hand."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import MOE
from jax.sharding import PartitionSpec as P

from gopd_jax import sampler, sharding
from gopd_jax.models import decoder as lm
from gopd_jax.models import moe
from gopd_jax.models.params import abstract_params
from gopd_jax.planning import collectives, flops

A, B = jnp.ones((4, 5)), jnp.ones((5, 6))
ONE = 2 * 4 * 5 * 6  # of A @ B


def work(function, *args):
    return flops.count(jax.jit(function).trace(*args).jaxpr)


def test_a_product_is_two_flops_for_each_multiply_add():
    assert work(lambda a, b: a @ b, A, B).total == ONE
    x, y = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))
    assert work(lambda x, y: jnp.einsum("hbd,hdf->bhf", x, y), x, y).total == 2 * 3 * 4 * 5 * 7


def test_float32_operands_are_counted_apart_from_narrow_ones():
    small = A.astype(jnp.bfloat16), B.astype(jnp.bfloat16)
    both = work(lambda a, b, c, d: (a @ b, c @ d), A, B, *small)
    assert (both.float32, both.narrow) == (ONE, ONE)


def test_a_scan_counts_its_length():
    def scanned(a, b):
        return jax.lax.scan(lambda x, _: (x @ b @ b.T, None), a, None, length=7)[0]

    assert work(scanned, A, B).total == 7 * 2 * ONE
    assert work(jax.vmap(scanned, (0, None)), jnp.ones((3, 4, 5)), B).total == 3 * 7 * 2 * ONE
    assert work(scanned, A, B).looped.total == 0


@pytest.mark.parametrize(
    ("start", "more", "step", "turns"),
    [
        (1, lambda i: i < 7, 1, 6),
        (0, lambda i: i <= 7, 1, 8),
        (0, lambda i: i < 7, 3, 3),
        (9, lambda i: i > 2, -2, 4),
        (0, lambda i: jnp.int32(5) > i, 1, 5),
        (8, lambda i: i < 7, 1, 0),
    ],
)
def test_a_while_loop_counts_the_bound_of_its_condition(start, more, step, turns):
    def looped(a, b, flags):
        def body(carry):
            i, x, done = carry
            return i + step, jnp.tanh(x @ b @ b.T), done | (x[:, 0] > 9)

        def goes_on(carry):
            return more(carry[0]) & ~carry[2].all()

        return jax.lax.while_loop(goes_on, body, (jnp.int32(start), a, flags))

    found = work(looped, A, B, jnp.zeros(4, bool))
    assert found.total == found.looped.total == turns * 2 * ONE


def test_a_while_loop_without_a_bound_is_refused():
    def looped(a, b):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ b @ b.T, a)

    with pytest.raises(ValueError, match="no bound"):
        work(looped, A, B)


@pytest.mark.parametrize("joined", [operator.and_, operator.or_])
def test_a_counter_bounds_a_condition_through_and_alone(joined):
    def looped(a, b):
        def more(carry):
            return joined(carry[0] < 3, carry[1].sum() < 9)

        return jax.lax.while_loop(more, lambda c: (c[0] + 1, c[1] @ b @ b.T), (0, a))

    if joined is operator.and_:
        assert work(looped, A, B).total == 3 * 2 * ONE
    else:
        with pytest.raises(ValueError, match="no bound"):  # an `or` goes on beyond 3
            work(looped, A, B)


def test_a_counter_that_is_reset_is_no_bound():
    def looped(a, b):
        def body(carry):
            i, x = carry
            return jnp.where(x.sum() > 0, 0, i + 1), x @ b @ b.T

        return jax.lax.while_loop(lambda c: c[0] < 3, body, (0, a))

    with pytest.raises(ValueError, match="no bound"):
        work(looped, A, B)


def test_a_gradient_is_two_more_products_and_remat_makes_the_forward_pass_again():
    # forward two products, and of each two more: into what it multiplies and into its matrix
    def curved(a, b):
        return jnp.sin(jnp.sin(a @ b) @ b.T).sum()

    plain = work(jax.grad(curved, (0, 1)), A, B).total
    again = work(jax.grad(jax.checkpoint(curved), (0, 1)), A, B).total
    assert (plain, again) == (6 * ONE, 8 * ONE)


def test_of_a_cond_the_dearest_branch_counts():
    def either(flag, a, b):
        return jax.lax.cond(flag, lambda: a, lambda: a @ b @ b.T)

    assert work(either, True, A, B).total == 2 * ONE


def test_ragged_products_count_each_row_once_also_in_the_gradient():
    x_nD, w_RDF, size_R = jnp.ones((8, 3)), jnp.ones((2, 3, 5)), jnp.array([3, 5])

    def loss(x_nD, w_RDF):
        return jnp.sin(jax.lax.ragged_dot(x_nD, w_RDF, size_R)).sum()

    one = 2 * 8 * 3 * 5
    assert work(loss, x_nD, w_RDF).total == one
    assert work(jax.grad(loss, (0, 1)), x_nD, w_RDF).total == 3 * one


def test_a_shard_map_counts_for_every_device(make_mesh):
    mesh = make_mesh((2, 2, 2))
    rows = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    with sharding.use(mesh):
        # tensor and fsdp repeat the same rows: that is done twice over, four times in all
        assert work(rows, A, B).total == 4 * ONE


def test_a_shard_map_over_rows_counts_once_what_the_compiler_divides(make_mesh):
    with sharding.use(make_mesh((2, 2, 2))):
        counted = work(lambda b, a: sharding.over_shards(lambda b, _, a: a @ b, b, (), a), B, A)
    assert counted.total == ONE


@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (2, 1, 1), (1, 1, 4), (2, 2, 2), (1, 1, 1, 4), (2, 1, 2, 2)],
)
def test_experts_count_each_pair_of_a_token_and_its_expert_once_on_any_mesh(make_mesh, shape):
    cfg, mesh = MOE, make_mesh(shape)
    n, d, f = cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size
    names = {"router": (d, n), "expert_gate": (n, d, f), "expert_up": (n, d, f)}
    weight = {k: np.ones(s, np.float32) for k, s in (names | {"expert_down": (n, f, d)}).items()}
    x_BLD = np.ones((4, 5, d), np.float32)

    def loss(x_BLD, weight):
        return jnp.sin(moe.routed_mlp(x_BLD, weight, cfg)).sum()

    pairs = 2 * 20 * cfg.num_experts_per_tok * 3 * d * f
    router = 2 * 20 * d * n * shape[2]  # of all tokens, on each device that shares them
    with sharding.use(mesh):
        assert work(loss, x_BLD, weight).total == pairs + router
        both = work(jax.grad(loss, (0, 1)), x_BLD, weight).total
    assert both == 3 * (pairs + router)


def test_a_decoder_counts_two_flops_a_weight_and_token_and_its_attention(make_model):
    decoder, _ = make_model()
    cfg, shapes = decoder.cfg, abstract_params(decoder.cfg)
    n_rows, length = 3, 7
    tokens = jax.ShapeDtypeStruct((n_rows, length), jnp.int32)
    valid = jax.ShapeDtypeStruct((n_rows, length), bool)
    found = work(lambda p, t, v: lm.hidden(decoder, p, t, v), shapes, tokens, valid)
    matrices = sum(x.size for k, x in shapes["layers"].items() if "norm" not in k)
    width = cfg.num_attention_heads * cfg.head_dim
    attention = cfg.num_hidden_layers * 2 * 2 * n_rows * length * length * width
    assert found.total == 2 * matrices * n_rows * length + attention
    assert found.looped.total == 0


def test_the_rollouts_loop_counts_a_decode_step_for_each_token_but_the_first(
    make_model, make_prompts
):
    decoder, params = make_model()
    cfg, prompts = decoder.cfg, make_prompts(8, 5)
    options = {"completion_length": 6, "temperature": 1.0, "eos_ids": (1,), "n_vocab": 61}
    found = work(
        lambda p, x, k: sampler.generate(decoder, p, x, k, **options),
        params,
        prompts,
        jax.random.key(0),
    )
    matrices = sum(x.size for k, x in params["layers"].items() if "norm" not in k)
    head = cfg.vocab_size * cfg.hidden_size
    width = cfg.num_attention_heads * cfg.head_dim
    attention = cfg.num_hidden_layers * 2 * 2 * (5 + 6 + 1) * width  # the cache, and itself
    assert found.looped.total == (6 - 1) * 8 * (2 * (matrices + head) + attention)


def test_the_largest_arrays_are_found_inside_loops():
    def scanned(a, b):
        return jax.lax.scan(lambda x, _: (jnp.sin(x[:, None] * b[:, 0]).sum(1), None), a, None, 3)[
            0
        ]

    (size, what), *_ = flops.largest(jax.jit(scanned).trace(jnp.ones(40), B).jaxpr)
    assert size == 40 * 5 * 4
    assert "[40, 5]" in what


# --- collectives


def test_collectives_in_a_scan_count_as_often_as_it_turns(make_mesh):
    mesh = make_mesh((2, 1, 1))

    def summed(x):
        def body(carry, _):
            return jnp.tanh(jax.lax.psum(carry, "data")) + x, None

        return jax.lax.scan(body, x, None, length=5)[0]

    x = jax.device_put(np.ones((6, 32), np.float32), sharding.by_rows(mesh))
    mapped = jax.shard_map(
        summed, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    found = collectives.sent(jax.jit(mapped).lower(x).compile().as_text())
    assert found == {"all-reduce": 5 * 3 * 32 * 4}


HLO = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%cond (p: (s32[], bf16[8,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(36)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=1
  %g = bf16[16,4]{1,0:T(8,128)} all-gather(%x), dimensions={0}
  %r = (f32[2]{0}, f32[3]{0}) all-reduce(%a, %b), to_apply=%add
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %w = (s32[], bf16[8,4]{1,0}) while(%t), condition=%cond, body=%body
  %s = (f32[4]{0}, f32[8]{0}) all-gather-start(%y), dimensions={0}
  %d = f32[8]{0} all-gather-done(%s)
}
"""


def test_a_loop_of_a_tpus_hlo_turns_as_often_as_its_condition_says():
    assert collectives.sent(HLO) == {
        "all-gather": 36 * 16 * 4 * 2 + 8 * 4,
        "all-reduce": 36 * (2 + 3) * 4,
    }
    told = HLO.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert collectives.sent(told)["all-reduce"] == 3 * (2 + 3) * 4


# A loop over shards, unrolled once: two turns in each, and the counter goes up by as many.
UNROLLED = """HloModule jit_f

%cond (p: (bf16[8,4], u32[])) -> pred[] {
  %n = u32[]{:T(128)} constant(9)
  %p = (bf16[8,4], u32[]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (bf16[8,4], u32[])) -> (bf16[8,4], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %p = (bf16[8,4], u32[]) parameter(0)
  %x = bf16[8,4]{1,0} get-tuple-element(%p), index=0
  %i = u32[] get-tuple-element(%p), index=1
  %y = bf16[8,4]{1,0} collective-permute(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %more = u32[] add(%i, %two)
  ROOT %t = (bf16[8,4], u32[]) tuple(%y, %more)
}

%starts (x: bf16[8,4]) -> bf16[16,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[16,4]{1,0} all-gather(%x), channel_id=7, frontend_attributes={chain_id="0"}
}

%goes_on (x: bf16[8,4]) -> bf16[16,4] {
  %x = bf16[8,4]{1,0} parameter(0)
  ROOT %g = bf16[16,4]{1,0} all-gather(%x), channel_id=7, frontend_attributes={chain_id="0"}
}

ENTRY %main (x: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[16,4]{1,0} fusion(%x), kind=kCustom, calls=%starts
  %w = (bf16[8,4]{1,0}, u32[]) while(%t), condition=%cond, body=%body
  ROOT %b = bf16[16,4]{1,0} fusion(%a), kind=kCustom, calls=%goes_on
}
"""


def test_an_unrolled_loop_turns_as_often_as_its_counter_takes_to_the_bound():
    assert collectives.sent(UNROLLED)["collective-permute"] == 5 * 8 * 4 * 2  # 0, 2, 4, 6, 8 < 9
    one = UNROLLED.replace("constant(2)", "constant(1)")
    assert collectives.sent(one)["collective-permute"] == 9 * 8 * 4 * 2


def test_a_gather_that_goes_on_inside_other_fusions_counts_once_where_it_starts():
    assert collectives.sent(UNROLLED)["all-gather"] == 16 * 4 * 2
    inside = UNROLLED.replace(
        "  %more = u32[]", "  %b = bf16[16,4] fusion(%y), calls=%goes_on\n  %more = u32[]"
    )
    assert collectives.sent(inside)["all-gather"] == 16 * 4 * 2
    apart = UNROLLED.replace(', frontend_attributes={chain_id="0"}', "")
    assert collectives.sent(apart)["all-gather"] == 2 * 16 * 4 * 2


def test_the_largest_arrays_are_of_one_device_and_not_those_inside_a_fusion():
    text = """HloModule jit_f

%fused (p: f32[64,64]) -> f32[8] {
  %p = f32[64,64]{1,0} parameter(0)
  %inside = f32[64,64,64]{2,1,0} broadcast(%p), dimensions={0,1}
  ROOT %r = f32[8]{0} reduce(%inside)
}

ENTRY %main (x: f32[1024]) -> f32[8] {
  %x = f32[1024]{0} parameter(0)
  %both = (bf16[16,8]{1,0:T(8,128)(2,1)}, f32[16]{0}) fusion(%x), metadata={op_name="f/dot"}
  %again = bf16[16,8]{1,0} copy(%both)
  ROOT %y = f32[8]{0} fusion(%both), kind=kLoop, calls=%fused
}
"""
    assert collectives.largest(text) == [
        (256, "bf16[16,8] of dot"),
        (64, "f32[16] of dot"),
        (32, "f32[8] of fusion"),
    ]
    f = jax.jit(lambda x: jnp.sin(x[:, None] * x[None]) @ x)
    text = f.lower(jnp.ones(32)).compile().as_text()
    assert collectives.largest(text, 1)[0][0] == 4 * 32 * 32
