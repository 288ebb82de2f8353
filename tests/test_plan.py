"""The plan of a run: its shapes against the real ones, its bytes against the compiler's."""

import dataclasses
import json
import operator

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import advance, plan, processes, setup
from gopd_jax.config import Critic, Lora, Mesh, Model
from gopd_jax.models import decoder as lm
from gopd_jax.models import hf, quantized
from gopd_jax.models import params as lm_params
from gopd_jax.planning import abstract, changes, phases, reads
from gopd_jax.planning.chips import Chip, Topology
from gopd_jax.planning.flops import Work
from gopd_jax.recipe import init_state

CPU8 = Topology(name="cpu:8", devices=tuple(jax.devices()), chip=None)
CHIP = Chip(flops=1e12, bandwidth=1e9, usable=2**30, source="made up")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """As tiny.build, two of its models in bfloat16, one of them student and reference."""
    root = tmp_path_factory.mktemp("plan")
    tiny.build(root)
    for name in ("base", "teacher_math"):
        params = lm_params.init(tiny.CFG, jax.random.key(0))
        options = {"dtype": "bfloat16", "tokenizer_dir": root / "tokenizer"}
        hf.save(root / name, tiny.CFG, params, **options)
    return root


def told(tree):
    """Shape, dtype, sharding and memory of each array, by its path."""
    found = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        where = x.sharding.shard_shape(x.shape), x.sharding.memory_kind
        found[jax.tree_util.keystr(path)] = x.shape, str(x.dtype), *where
    return found


def both(root, names, **options):
    """Teachers of both tasks with these options."""
    return {t: Model(path=str(root / names.format(t)), **options) for t in ("math", "code")}


CASES = {
    "as it is": lambda root: {},
    "a mesh of all axes": lambda root: {"mesh": Mesh(data=2, fsdp=2, tensor=2)},
    "adapters": lambda root: {"lora": Lora(rank=2)},
    "a teacher that follows": lambda root: {"teachers": both(root, "base", follows=0.9)},
    "a teacher on the host": lambda root: {"teachers": both(root, "teacher_{}", placement="host")},
    "a critic": lambda root: {"critic": Critic(), "objective": {"credit": "gae(lam=0.9)"}},
    "a lambda by task": lambda root: {"objective": {"task_lam": {"math": 1.5}}},
    "a narrow state": lambda root: {
        "optimizer": dict.fromkeys(("moment_dtype", "weights_dtype"), "bfloat16")
    },
    "one teacher for both": lambda root: {"routes": {"code": "math"}},
}


@pytest.mark.parametrize("name", CASES)
def test_the_abstract_run_has_the_shapes_and_shardings_of_the_real_one(root, name):
    require_same(tiny.config(root, **CASES[name](root)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "opsd"])  # completions of the data; a teacher's context
def test_so_has_that_of_a_preset_whose_prompts_hold_more(name):
    require_same(preset(name))


@pytest.mark.parametrize("options", [{}, {"lora": Lora(rank=2)}], ids=["whole", "adapters"])
def test_what_is_frozen_lies_as_it_is_stored_and_what_is_trained_in_float32(root, options):
    real = setup.prepare(tiny.config(root, **options))
    state, frozen = init_state(real.recipe, real.student.params), real.frozen
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
    assert {str(x.dtype) for x in jax.tree.leaves(frozen.reference)} == {"bfloat16"}
    assert [str(x["final_norm"].dtype) for x in frozen.teachers] == ["bfloat16", "float32"]
    reads = frozen.base if options else real.student.params
    assert all(map(operator.is_, jax.tree.leaves(reads), jax.tree.leaves(frozen.reference)))
    if not options:
        jax.tree.map(np.testing.assert_array_equal, state.params, frozen.reference)


def preset(name, argument="tiny"):
    names: dict = {}
    exec((tiny.REPOSITORY / f"configs/{name}.py").read_text(), names)
    return names["get_config"](argument)


def require_same(config):
    real, planned = setup.prepare(config), abstract.prepare(config, jax.devices())
    assert told(planned.frozen) == told(real.frozen)
    state = init_state(real.recipe, real.student.params)
    assert told(abstract.state(planned)) == told(state)
    rows = processes.to_global(real.mesh, advance.prompts_of(real)(0).replace(records=()))
    assert told(planned.prompts) == told(rows)
    static = "routes mixture source group_rows completion_length microbatches head_chunk ema_decay"
    static += " updates epochs lag critic student teachers reference temperature"
    for field in static.split():
        assert getattr(planned.recipe, field) == getattr(real.recipe, field), field


@pytest.fixture(scope="module")
def exopd():
    """The plan of configs/exopd.py:tiny on eight emulated devices."""
    said = []
    this = plan.plan(preset("exopd"), CPU8, names=("fused",), say=said.append)
    return this, said


def test_the_fused_steps_arguments_are_state_frozen_models_and_prompts(exopd):
    this, said = exopd
    run, (one,) = this.run, this.found
    parts = abstract.state(run), run.frozen, run.prompts, run.key
    assert one.memory.arguments == sum(map(phases.bytes_of, parts))
    weights = sum(x.size for x in jax.tree.leaves(run.frozen.reference))
    # float32: the student, its two moments, two teachers, the reference, which is the first student
    assert one.memory.arguments == pytest.approx(6 * 4 * weights, rel=0.01)
    assert one.memory.beside == 0
    assert one.memory.temporaries > 0
    assert any("compiling fused (1/1)" in text for text in said)


def test_slots_take_less_memory_and_as_many_products():
    found = {}
    for slots in (None, 8):
        config = preset("exopd")
        config.batch.prompts, config.sampling.slots = 32, slots
        this = plan.plan(config, CPU8, names=("generate",))
        found[slots] = (this.found[0], *reads.decode_reads(this.run))
    (all_rows, turns, size), (slotted, more_turns, less) = found.values()
    assert slotted.work == all_rows.work
    assert slotted.memory.temporaries < all_rows.memory.temporaries
    assert less < size
    assert more_turns == 4 * (turns + 1)


@pytest.mark.parametrize(("adapters", "kept"), [(None, 0), (Lora(rank=2), 1)])
def test_the_students_first_weights_are_held_where_they_are_frozen_alone(root, adapters, kept):
    config = tiny.config(root, reference=None, objective={"lam": 1.0}, lora=adapters)
    run = abstract.prepare(config, jax.devices())
    (generate,) = phases.programs(run, ("generate",))
    teachers = [run.roles[f"teacher:{task}"].params for task in ("math", "code")]
    base = phases.bytes_of(run.frozen.base)
    assert (base > 0) == bool(kept)
    parts = abstract.state(run), teachers, run.prompts
    assert phases.bytes_of(generate.held) == phases.bytes_of(parts) + base


def test_a_donated_state_is_counted_once(exopd):
    this, _ = exopd
    memory = this.found[0].memory
    assert memory.aliased == pytest.approx(phases.bytes_of(abstract.state(this.run)), rel=0.01)
    assert memory.peak < memory.arguments + memory.temporaries + memory.output


def test_the_report_names_what_it_assumes_and_gives_no_verdict_without_a_chip(exopd):
    this, _ = exopd
    text = plan.report(this)
    assert "8 rows of 44 + 36 tokens" in text
    assert "fused" in text
    assert "fits" not in text
    assert "says nothing about a chip's memory" in plan.verdict_of(this)
    values = json.loads(json.dumps(plan.to_json(this, "", None)))
    assert values["phases"]["fused"]["memory"]["peak"] == this.found[0].memory.peak
    assert values["phases"]["fused"]["fits"] is None


def test_a_phase_fits_up_to_the_chips_last_byte(exopd):
    this, _ = exopd
    peak = this.found[0].memory.peak
    for usable, large in ((peak, []), (peak - 1, ["fused"])):
        chip = dataclasses.replace(CHIP, usable=usable)
        there = dataclasses.replace(this, topology=dataclasses.replace(CPU8, chip=chip))
        assert [one.name for one in there.too_large] == large
        assert plan.verdict_of(there).startswith("does not fit: fused" if large else "fits: fused")


def test_the_estimate_is_the_slower_of_compute_and_memory(exopd):
    this, _ = exopd
    run, memory = this.run, this.found[0].memory
    topology = dataclasses.replace(CPU8, chip=CHIP)
    rest, looped = Work(narrow=8e12, float32=0.0), Work(narrow=0.0, float32=8e9)
    work = Work(rest.narrow, looped.float32, in_loops=looped)
    found = phases.roofline(run, "fused", work, memory, topology, mfu=0.5)
    weights = sum(x.size for x in jax.tree.leaves(run.frozen.reference))  # tied: all are read
    cache = 2 * 4 * 1 * 2 * (44 + 36) * 32  # layers, rows, heads, slots, width of a device
    assert found == {
        "decode: HBM": pytest.approx(35 * 4 * (weights + cache) / 1e9),
        "rest of the step: compute": pytest.approx(8e12 / (8 * 1e12 * 0.5)),
    }
    found = phases.roofline(run, "score", Work(float32=8e12), memory, topology, mfu=0.5)
    assert found == {"score: compute": pytest.approx(6 * 8e12 / (8 * 1e12 * 0.5))}
    refused = phases.roofline(run, "score", Work(float32=8e12), None, topology, mfu=0.5)
    assert refused == found  # what it computes is known all the same


def estimated(this, parts, computed=1e-9):
    """this on a made-up chip, with these seconds; computed: those of decoding's products alone."""
    topology = dataclasses.replace(CPU8, chip=CHIP)
    looped = Work(narrow=computed * 8 * 1e12 * 0.5)
    work = dataclasses.replace(this.found[0].work, in_loops=looped)
    found = (dataclasses.replace(this.found[0], work=work, estimate=parts),)
    return dataclasses.replace(this, topology=topology, found=found)


def test_what_would_be_faster_is_less_to_read(exopd, monkeypatch):
    this, _ = exopd
    elements = 2 * 4 * 1 * 2 * 80 * 32  # keys and values: layers, rows, heads, slots, width
    weights = sum(x.size for x in jax.tree.leaves(this.run.frozen.reference))
    seconds = 35 * 4 * (weights + elements) / 1e9
    parts = {"decode: HBM": seconds, "rest of the step: compute": seconds}
    there = estimated(this, parts)
    ((flags, least),) = there.faster.items()  # of so small a model the cache is little
    assert flags == "--config.sampling.weights_dtype=int8 --config.objective.importance=token"
    text = plan.report(there).partition("ESTIMATE")[2]
    assert f"\n  {flags}: {1e3 * least:.3g} ms less; another sampler, docs/eight_bits.md\n" in text
    assert plan.to_json(there, "", None)["faster"] == {flags: least}
    monkeypatch.setattr(changes, "WORTH", 0.0)
    buckets, cache, matrices = estimated(this, parts).faster.items()
    unread = sum(80 - -(-n // 10) * 10 for n in range(44, 79))  # slots, in all turns
    byte = 35 / 1e9  # to which a turn's reading is rounded
    less = 4 * elements * unread / 80e9
    assert buckets == ("--config.sampling.buckets=8", pytest.approx(less, rel=0, abs=byte))
    narrow = elements * (1 + 4 / 32)  # and a scale in float32 for each token and head
    assert cache == (
        "--config.sampling.cache_dtype=int8 --config.objective.importance=token",
        pytest.approx(35 * (4 * elements - narrow) / 1e9, rel=0, abs=byte),
    )
    assert matrices == (flags, least)
    writer = this.run.recipe.mesh, this.run.recipe.student
    narrower = reads.weights_read(*writer) - reads.weights_read(*writer, "int8")
    assert least == pytest.approx(35 * narrower / 1e9)


def test_what_is_faster_is_so_down_to_what_the_products_take(exopd):
    this, _ = exopd
    parts = {"decode: HBM": phases.seconds_read(this.run, estimated(this, {}).topology)}
    computed = 0.8 * parts["decode: HBM"]
    (less,) = estimated(this, parts, computed).faster.values()
    assert less == pytest.approx(parts["decode: HBM"] - computed)
    assert not estimated(this, {"decode: compute": 1.0}).faster


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({"sampling.buckets": 2}, 2),
        ({"sampling.cache_dtype": "int8", "objective.importance": "token"}, 2),
        ({"objective.importance": "sequence"}, 1),
        ({"objective.loss": "exact", "objective.importance": "token"}, 1),
        ({"objective.source": "teacher", "objective.advantage": "imitation"}, 1),
    ],
)
def test_a_faster_setting_that_is_set_or_not_corrected_is_not_told(
    exopd, monkeypatch, values, left
):
    this, _ = exopd
    monkeypatch.setattr(changes, "WORTH", 0.0)
    _, config = changes.changed(this.config, values)
    this = dataclasses.replace(this, run=abstract.prepare(config, CPU8.devices))
    seconds = phases.seconds_read(this.run, estimated(this, {}).topology)
    assert len(estimated(this, {"decode: HBM": seconds}).faster) == left


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_a_token_reads_are_the_bytes_of_those_arrays(make_mesh, tied):
    cfg = dataclasses.replace(tiny.CFG, tie_word_embeddings=tied)
    decoder, mesh = lm.Decoder(cfg), make_mesh((1, 1, 1))
    params = lm_params.init(cfg, jax.random.key(0))
    for dtype in (None, "int8"):
        made = params if dtype is None else quantized.matrices(params, cfg, dtype)
        if not tied:
            made = {name: x for name, x in made.items() if name != "embed"}  # looked up in alone
        held = sum(x.nbytes for x in jax.tree.leaves(made))
        assert reads.weights_read(mesh, decoder, dtype) == held


def test_the_planned_cache_is_the_samplers(make_model, make_mesh):
    decoder, _ = make_model()
    tokens = jax.ShapeDtypeStruct((8, 5), np.int32), jax.ShapeDtypeStruct((8, 5), bool)
    shapes = lm_params.abstract_params(decoder.cfg)
    _, cache = jax.eval_shape(
        lambda p, t, v: lm.prefill(decoder, p, t, v, length=11), shapes, *tokens
    )
    whole = sum(x.size * x.dtype.itemsize for x in (cache.k_NBKLE, cache.v_NBKLE))
    assert reads.cache_bytes(make_mesh((1, 1, 1)), decoder, 8, 11) == whole
    assert reads.cache_bytes(make_mesh((2, 2, 2)), decoder, 8, 11) == whole // 8
    assert reads.cache_bytes(make_mesh((4, 2, 1)), decoder, 3, 11) == whole // 8  # filled up to 8


def test_the_changes_that_are_tried_are_single_and_the_first_that_fits_is_named(exopd, monkeypatch):
    this, _ = exopd
    chip = dataclasses.replace(CHIP, usable=this.found[0].memory.peak - 1)
    this = dataclasses.replace(this, topology=dataclasses.replace(CPU8, chip=chip))
    asked = []

    def planned(config, topology, *, names, mfu, say):
        asked.append((names, config.batch.microbatches, config.batch.head_chunk, config.mesh.fsdp))
        fits = config.mesh.fsdp == 2
        usable = dataclasses.replace(chip, usable=2**40 if fits else chip.usable)
        return dataclasses.replace(this, topology=dataclasses.replace(CPU8, chip=usable))

    monkeypatch.setattr(plan, "plan", planned)
    # Eight rows on eight devices are not divided further, and 9 is not even.
    assert plan.first_that_fits(this, say=print) == (
        "--config.mesh.data=4 --config.mesh.fsdp=2",
        ["--config.batch.remat=products", "--config.batch.remat=layers"],
    )
    assert asked == [(("fused",), 1, 9, 1), (("fused",), 1, 9, 1), (("fused",), 1, 9, 2)]
    more = ["--config.batch.microbatches=2", "--config.batch.microbatches=4"]
    smaller = ["--config.batch.head_chunk=16", "--config.batch.head_chunk=8"]
    # Logits of 8 positions are hardly any of the memory, and then fewer are no help.
    for chunk, others in ((32, smaller), (8, [])):
        wide = dataclasses.replace(this.config.batch, prompts=32, head_chunk=chunk, remat="layers")
        config = dataclasses.replace(this.config, batch=wide)
        run = abstract.prepare(config, CPU8.devices)
        there = dataclasses.replace(this, config=config, run=run)
        found, tried = plan.first_that_fits(there, say=print)
        assert found == "--config.mesh.data=4 --config.mesh.fsdp=2"
        assert tried == more + others


def test_the_changes_keep_the_rows_of_a_device_and_end_with_fewer_tokens(exopd):
    this, _ = exopd
    batch = dataclasses.replace(this.config.batch, prompts=64, microbatches=8, remat="layers")
    config = dataclasses.replace(this.config, batch=batch, mesh=Mesh(fsdp=8))
    told = [
        told
        for told, _ in changes.smaller(config, abstract.prepare(config, CPU8.devices).recipe.mesh)
    ]
    # One row of a microbatch on each device: twice the tensor axis is half as many row shards.
    assert "--config.mesh.fsdp=4 --config.mesh.tensor=2 --config.batch.microbatches=16" in told
    assert "--config.batch.prompts=32 --config.batch.microbatches=4" in told
    assert told[-2:] == [
        "--config.sampling.completion_length=18",
        "--config.sampling.completion_length=9",
    ]


def refusal(text):
    """What phases makes of a message of the compiler, for a program of one large product."""
    traced = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c @ c, c), x, None, 3)).trace(
        np.ones((8, 8))
    )
    return phases._refused(phases.Program(name="update", traced=traced, held=()), Work(), 1.0, text)


def test_a_refusal_tells_what_was_needed_and_the_largest_buffers():
    short = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (94.20G) exceeds available HBM (15.75G)."
    )
    found = refusal(short)
    assert found.needed == pytest.approx(94.2 * 2**30, rel=1e-6)
    assert "float32[3, 8, 8] of scan" in found.buffers[0]  # all turns' results: not one turn's
    listed = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.\n\n"
        "  Largest program allocations in hbm:\n\n  1. Size: 9.00G\n"
        '     Operator: op_name="jit(f)/while/body/dot_general" source_file="x.py"\n'
        "     Shape: f32[28,1,8]{2,1,0:T(8,128)}\n     Unpadded size: 9.00G\n"
    )
    found = refusal(listed)
    assert found.needed == pytest.approx(20.5 * 2**30, rel=1e-6)
    assert found.buffers[0].startswith("9.00G f32[28,1,8]{2,1,0:T(8,128)} ")
    assert "dot_general" in found.buffers[0]
