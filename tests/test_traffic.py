"""Bytes that a turn of a compiled loop moves, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest

from gopd_jax.planning import hlo, traffic

# A loop that ends when the data say so, with a loop over three layers in it.
HLO = """HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%bitcasts (w: bf16[64,128]) -> bf16[128,64] {
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %b = bf16[128,64]{0,1:T(8,128)(2,1)} bitcast(%w)
}

%one_layer (w: bf16[3,16,128], i: s32[]) -> bf16[16,128] {
  %w = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %cut = bf16[1,16,128]{2,1,0:T(8,128)(2,1)} dynamic-slice(%w, %i, %zero, %zero)
  ROOT %b = bf16[16,128]{1,0:T(8,128)(2,1)} bitcast(%cut)
}

%dot (x: bf16[8,16], w: bf16[3,16,128], i: s32[]) -> (bf16[8,128], f32[8]) {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %w = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %mine = bf16[16,128]{1,0:T(8,128)(2,1)} fusion(%w, %i), kind=kLoop, calls=%one_layer
  %y = bf16[8,128]{1,0:T(8,128)(2,1)} convolution(%x, %mine), dim_labels=bf_io->bf
  %r = f32[8]{0:T(128)S(1)} reduce(%y), dimensions={1}, to_apply=%add
  ROOT %both = (bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)S(1)}) tuple(%y, %r)
}

%append (c: bf16[3,24,128], x: bf16[3,1,128], i: s32[]) -> bf16[3,24,128] {
  %c = bf16[3,24,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %x = bf16[3,1,128]{2,1,0:T(1,128)(2,1)S(1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %put = bf16[3,24,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%c, %x, %zero, %i, %zero)
}

%head (x: bf16[8,128], w: bf16[64,128]) -> f32[8,64] {
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(1)
  %t = bf16[128,64]{0,1:T(8,128)(2,1)} fusion(%w), kind=kLoop, calls=%bitcasts
  ROOT %y = f32[8,64]{1,0:T(8,128)S(1)} convolution(%x, %t), dim_labels=bf_io->bf
}

%layers (p: (s32[], bf16[8,16], bf16[3,16,128])) -> (s32[], bf16[8,16], bf16[3,16,128]) {
  %one = s32[]{:T(128)} constant(1)
  %p = STATE parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %w = bf16[3,16,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=2
  %dot.1 = RESULTS fusion(%x, %w, %i), calls=%dot, metadata={NAME}
  %more = s32[]{:T(128)S(6)} add(%i, %one)
  ROOT %t = STATE tuple(%more, %x, %w)
}

%three (p: (s32[], bf16[8,16], bf16[3,16,128])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %p = STATE parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%small (b: f32[1024]) -> f32[1024] {
  %b = f32[1024]{0:T(1024)} parameter(0)
  ROOT %same = f32[1024]{0:T(1024)} bitcast(%b)
}

%large (b: f32[1024]) -> f32[1024] {
  %b = f32[1024]{0:T(1024)} parameter(0)
  ROOT %n = f32[1024]{0:T(1024)} negate(%b)
}

%turn (p: (s32[])) -> (s32[]) {
  %p = STATE parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %state = STATE tuple(%i)
  %inner = STATE while(%state), condition=%three, body=%layers
  %c = bf16[3,24,128]{2,1,0:T(8,128)(2,1)} get-tuple-element(%p), index=3
  %x = bf16[3,1,128]{2,1,0:T(1,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %space = f32[2048]{0:T(1024)} custom-call(), custom_call_target="AllocateBuffer"
  %new = bf16[3,24,128]{2,1,0:T(8,128)(2,1)} fusion(%c, %x, %i), kind=kLoop, calls=%append
  %h = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=4
  %w = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=5
  %logits = f32[8,64]{1,0:T(8,128)S(1)} fusion(%h, %w), kind=kOutput, calls=%head
  %b = f32[1024]{0:T(1024)} get-tuple-element(%p), index=6
  %start = (f32[1024]{0:T(1024)S(1)}, f32[1024]{0:T(1024)}, u32[]{:S(2)}) copy-start(%b)
  %done = f32[1024]{0:T(1024)S(1)} copy-done(%start)
  %seldom = f32[1024]{0:T(1024)} conditional(%i, %b, %b), branch_computations={%small, %large}
  ROOT %t = (s32[]{:T(128)S(6)}) tuple(%i)
}

%unfinished (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(99)
  %p = (s32[]{:T(128)S(6)}, pred[8]{0:T(512)(128)(4,1)S(6)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%p), index=0
  %d = pred[]{:T(512)S(6)} get-tuple-element(%p), index=1
  %lt = pred[]{:T(512)S(6)} compare(%i, %n), direction=LT
  %not = pred[]{:T(512)S(6)} not(%d)
  ROOT %and = pred[]{:T(512)S(6)} and(%lt, %not)
}

ENTRY %main (p: (s32[])) -> (s32[]) {
  %p = (s32[]{:T(128)}) parameter(0)
  %before = STATE while(%p), condition=%three, body=%layers
  ROOT %w = (s32[]{:T(128)}) while(%p), condition=%unfinished, body=%turn
}
"""
ARRAYS = "bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, bf16[3,16,128]{2,1,0:T(8,128)(2,1)}"
HLO = HLO.replace("STATE", f"(s32[]{{:T(128)S(6)}}, {ARRAYS})")
HLO = HLO.replace("RESULTS", "(bf16[8,128]{1,0:T(8,128)(2,1)}, f32[8]{0:T(128)S(1)})")
HLO = HLO.replace("NAME", 'op_name="jit(f)/while/body/layers/dot_general"')


def test_a_turn_moves_what_its_instructions_read_and_write_in_hbm():
    (loop,) = traffic.loops(HLO)
    layer = 2 * 16 * 128  # sliced out of three; x and the sums are in VMEM
    activation = 2 * 8 * 128
    appended = 3 * 2 * 8 * 128  # one slot of 24, which is a tile of 8 in each of three layers
    head = 2 * 64 * 128
    assert loop.turns == 99
    assert loop.read == 3 * layer + (activation + head) + 4 * 1024 + 4 * 1024
    assert loop.written == 3 * activation + appended + 4 * 1024
    assert loop.least == loop.read + loop.written - 2 * 4 * 1024  # the other branch does nothing
    assert (3 * (layer + activation), "bf16[3,16,128] of layers/dot_general") in loop.parts
    assert [*loop.parts] == sorted(loop.parts, reverse=True)
    assert sum(size for size, _ in loop.parts) == loop.moved


def test_a_loop_of_known_length_is_none_whose_end_depends_on_data():
    text = HLO.replace("condition=%unfinished", "condition=%three")
    assert traffic.loops(text) == []
    assert len(traffic.loops(HLO.replace("condition=%three", "condition=%unfinished"))) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("bf16[8,1,2048]{2,0,1:T(8,128)(2,1)}", 2 * 8 * 2048),  # 1 is outermost
        ("bf16[8,1,2048]{2,1,0:T(8,128)(2,1)}", 2 * 8 * 8 * 2048),  # a tile for each row
        ("f32[28,64]{1,0:T(8,128)}", 4 * 32 * 128),
        ("s8[5,5]{1,0:T(8,128)(4,1)S(0)}", 8 * 128),
        ("f32[28,64]{1,0:T(8,128)S(1)}", 0),
        ("pred[]{:T(512)}", 0),
        ("s4[16]{0}", 8),
        ("f32[28,64]", 4 * 28 * 64),
    ],
)
def test_an_array_takes_whole_tiles_of_hbm(text, size):
    (array,) = hlo.arrays(text)
    assert array.hbm == size


def test_a_sliced_operand_that_is_read_whole_too_counts_whole():
    text = HLO.replace("ROOT %both =", "%again = f32[] reduce(%w), to_apply=%add\n  ROOT %both =")
    (more,), (less,) = traffic.loops(text), traffic.loops(HLO)
    assert more.read - less.read == 3 * (2 * 2 * 16 * 128)  # the two other layers, in each of 3


def test_what_is_no_update_in_place_counts_whole():
    text = HLO.replace(
        "ROOT %put = bf16[3,24,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%c,",
        "%old = bf16[3,24,128]{2,1,0:T(8,128)(2,1)} negate(%c)\n"
        "  ROOT %put = bf16[3,24,128]{2,1,0:T(8,128)(2,1)} dynamic-update-slice(%old,",
    )
    (more,), (less,) = traffic.loops(text), traffic.loops(HLO)
    whole = 2 * 3 * 24 * 128
    assert more.read - less.read == whole
    assert more.written - less.written == whole - 3 * 2 * 8 * 128


def test_a_loop_that_jax_compiled_reads_its_weights_once_a_turn():
    w = jnp.ones((5, 64, 64))

    def f(w, x):
        def turn(state):
            i, x, _ = state
            x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)
            return i + 1, x, x.sum() > 1e6

        state = jnp.int32(0), x, jnp.bool_(False)
        return jax.lax.while_loop(lambda s: (s[0] < 40) & ~s[2], turn, state)

    text = jax.jit(f).lower(w, jnp.ones((2, 64))).compile().as_text()
    (loop,) = traffic.loops(text)
    assert loop.turns == 40
    weights = 5 * 64 * 64 * 4
    # On a CPU a slice is an array of its own: read, written, and read by the product.
    assert weights <= loop.moved <= 3.5 * weights
