"""What a step cannot do without, against sums by hand and against what compilers make of it."""

import dataclasses
import json

import jax
import pytest
import tiny

from gopd_jax import plan
from gopd_jax.config import Lora, Mesh, Model
from gopd_jax.models import lora
from gopd_jax.models.published import PUBLISHED
from gopd_jax.planning import abstract, chips, least, phases, reads
from gopd_jax.planning.chips import Topology
from gopd_jax.planning.traffic import Loop

CPU8 = Topology(name="cpu:8", devices=tuple(jax.devices()), chip=None)


def prepared(root, **changes):
    return abstract.prepare(tiny.config(root, **changes), jax.devices())


def weights(cfg=tiny.CFG):
    """Of the tiny model: what a forward pass reads, tied heads once."""
    d, mlp = cfg.hidden_size, cfg.intermediate_size
    heads, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
    layer = d * (heads + 2 * kv) + heads * d + 3 * d * mlp + 2 * d + 2 * cfg.head_dim
    return cfg.num_hidden_layers * layer + cfg.vocab_size * d + d


def test_weights_come_in_once_for_a_rollout_a_microbatch_scored_and_twice_learnt_from(root):
    # 16 rows, one on a device at a time: two microbatches, and one of each of two teachers.
    batch = {"prompts": 16, "microbatches": 2, "head_chunk": 6}
    run = prepared(root, mesh=Mesh(fsdp=4, tensor=1, data=2), batch=batch)
    size = 4 * weights()
    assert least.sent(run, "generate") == size
    assert least.sent(run, "score") == (1 + 1 + 2) * size
    norms = 4 * 2 * 2 * tiny.CFG.head_dim  # of the heads, whole on each device
    replicas = (size - norms) / 4 + norms  # a device's share of the gradient, once an update
    assert least.sent(run, "update") == pytest.approx(2 * (2 + 1) * size + replicas, rel=1e-12)
    stages = [least.sent(run, name) for name in phases.STEP]
    assert sum(stages[:3]) == stages[3]
    twice = prepared(root, mesh=Mesh(fsdp=4, data=2), batch=batch | {"prompts": 32, "updates": 2})
    # The student scores the batch beforehand, and each of twice as many pieces comes in anew.
    expected = 4 * (2 + 1) * size + 4 * size + 2 * replicas
    assert least.sent(twice, "update") == pytest.approx(expected, rel=1e-12)


def test_a_mesh_of_replicas_asks_for_the_gradient_alone(root):
    run = prepared(root, mesh=Mesh(data=8, fsdp=1, tensor=1))
    assert least.sent(run, "generate") == least.sent(run, "score") == 0
    assert least.sent(run, "update") == 4 * weights()


def test_states_are_summed_over_the_axis_of_the_heads(root):
    run = prepared(root, mesh=Mesh(data=1, fsdp=2, tensor=4), batch={"prompts": 8})
    rows, state = 8 / 2, 4 * tiny.CFG.hidden_size
    forward = (2 * tiny.CFG.num_hidden_layers + 1) * rows * state
    (decoder, *_) = reads.writers(run)[0]
    gathered = reads.weights_read(run.recipe.mesh, decoder)
    assert gathered < 4 * weights() / 2
    assert least.sent(run, "generate") == gathered + forward * (48 + 6 - 1)
    assert least.sent(run, "update") == 3 * gathered + 2 * forward * (48 + 6)


def test_a_share_of_the_positions_is_summed_where_they_lie_over_an_axis_of_their_own(root):
    options = {"batch": {"prompts": 8}}
    run = prepared(root, mesh=Mesh(fsdp=2, sequence=2, tensor=2), **options)
    tokens, state = 8 / (2 * 2), 4 * tiny.CFG.hidden_size
    forward = (2 * tiny.CFG.num_hidden_layers + 1) * tokens * state
    (decoder, *_) = reads.writers(run)[0]
    gathered = reads.weights_read(run.recipe.mesh, decoder)
    assert least.sent(run, "update") == 3 * gathered + 2 * forward * (48 + 6)
    # Decoding, a device has whole rows, as many as on a mesh of twice the row shards.
    assert least.sent(run, "generate") == gathered + forward * (48 + 6 - 1)
    by_rows = prepared(root, mesh=Mesh(fsdp=4, tensor=2), **options)
    assert least.sent(run, "generate") == least.sent(by_rows, "generate")


def test_a_rollout_of_8_bits_gathers_its_matrices_in_a_quarter_of_the_bytes(root):
    mesh = Mesh(data=1, fsdp=8, tensor=1)
    objective = {"importance": "token"}
    full, narrow = (
        prepared(root, mesh=mesh, objective=objective, sampling={"weights_dtype": dtype})
        for dtype in (None, "int8")
    )
    told = narrow.recipe.mesh, narrow.recipe.student
    assert least.sent(full, "generate") == 4 * weights()
    assert least.sent(narrow, "generate") == reads.weights_read(*told, "int8") < 2 * weights()
    for name in ("score", "update"):  # which have the masters
        assert least.sent(narrow, name) == least.sent(full, name)


def test_adapters_send_no_gradient_of_what_is_frozen(root):
    mesh = Mesh(data=1, fsdp=8, tensor=1)
    whole, some = (prepared(root, mesh=mesh, lora=one) for one in (None, Lora(rank=2)))
    size = 4 * weights()
    assert least.sent(whole, "update") == 3 * size
    adapters = 4 * sum(x.size for x in jax.tree.leaves(abstract.state(some).params))
    assert least.sent(some, "update") == 2 * size + adapters
    assert adapters < size / 2
    assert lora.base_config(some.recipe.student.cfg) == whole.recipe.student.cfg


def test_no_phase_that_was_compiled_receives_less_than_the_least(root):
    config = tiny.config(root, mesh=Mesh(data=1, fsdp=8, tensor=1), batch={"prompts": 8})
    this = plan.plan(config, CPU8, names=("generate", "score", "update"))
    for one in this.found:
        ratio = sum(one.sent.values()) / least.sent(this.run, one.name)
        # Norms, statistics and, of so small a model, activations come on top.
        assert 0.99 <= ratio < 3, one.name
    (it,) = [least.decode(this.run, one.loops) for one in this.found if one.loops]
    assert it.turns == 6 - 1
    assert it.weights == 4 * weights()
    assert it.cache == 2 * 4 * 2 * 1 * 4 * (48 + 6) * 8  # a row on a device
    assert it.live == pytest.approx(it.cache * 50 / (48 + 6))  # of 48 to 52
    assert it.of_all < it.of_live


def loop(turns, moved):
    return Loop(turns=turns, read=moved, written=0, least=moved // 2, parts=())


def test_loops_that_follow_one_another_count_by_the_turns_of_each(root):
    run = prepared(root)
    assert least.decode(run, ()) is None
    assert least.decode(run, (loop(5, 100),)).moved == 100
    it = least.decode(run, (loop(2, 100), loop(5, 400)))
    assert (it.moved, it.least) == ((2 * 100 + 3 * 400) / 5, (2 * 50 + 3 * 200) / 5)


# --- with the TPU's compiler


@pytest.fixture(scope="module")
def small_qwen3(tmp_path_factory):
    """A Qwen3 of 134 M parameters, more than a v5e's VMEM: its config.json alone."""
    directory = tmp_path_factory.mktemp("small") / "qwen3"
    directory.mkdir()
    shape = {"num_hidden_layers": 8, "hidden_size": 1024, "intermediate_size": 3072}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32768}
    config = PUBLISHED["Qwen/Qwen3-1.7B"] | shape | {"eos_token_id": 2, "bos_token_id": 1}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


@pytest.fixture(scope="module")
def on_a_v5e(root, small_qwen3):
    """The plan of one of its phases: bfloat16, 32 rows of 256 + 768, four of them at a time."""
    pytest.importorskip("libtpu", reason='the TPU compiler: pip install "jax[tpu]"')
    model = Model(path=small_qwen3, dtype="bfloat16")
    config = tiny.config(
        root,
        student=model,
        reference=dataclasses.replace(model),
        teachers={task: dataclasses.replace(model) for task in ("math", "code")},
        mesh=Mesh(data=1, fsdp=4, tensor=1),
        batch={"prompts": 32, "microbatches": 8, "head_chunk": 256, "remat": "layers"},
        data={"prompt_length": 256},
        sampling={"completion_length": 768},
    )
    return lambda name: plan.plan(config, chips.topology("v5e:2x2"), names=(name,))


@pytest.mark.tpu
def test_a_turn_of_decoding_moves_little_more_than_weights_and_cache(on_a_v5e):
    this = on_a_v5e("generate")
    (one,) = this.found
    it = least.decode(this.run, one.loops)
    assert it.turns == 767
    vmem = 2**27  # of a v5e: weights that stay there are read from HBM once for all turns
    assert it.weights + it.cache - vmem < it.moved < 1.1 * (it.weights + it.cache)
    assert it.of_live < 1.3
    told = plan.report(this)
    assert f"{it.of_all:.2f} times that; {it.of_live:.2f} times weights and what the cache" in told


@pytest.mark.tpu
def test_the_whole_step_sends_little_more_than_the_sharding_asks_for(on_a_v5e):
    this = on_a_v5e("fused")
    (one,) = this.found
    ratio = sum(one.sent.values()) / least.sent(this.run, "fused")
    assert 0.95 < ratio < 1.5
    assert f"{ratio:.2f} times the" in plan.report(this)
