"""Frozen models by layer: their setting, what a plan says of them, and the TPU's compiler."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from test_by_layer import transfers

from gopd_jax import batching, plan, preflight, sharding, train
from gopd_jax.config import Model
from gopd_jax.models import decoder as lm
from gopd_jax.models import params as lm_params
from gopd_jax.models.decoder import Decoder
from gopd_jax.planning import abstract, changes, chips, collectives, phases, streamed
from gopd_jax.planning.chips import HOST_LINK, Chip, Topology
from gopd_jax.planning.flops import Work


def planned(root, placement, n=1, **changes):
    """The abstract run of tiny's preset with its teachers there; loss: of the objective."""
    teachers = {
        t: Model(path=str(root / f"teacher_{t}"), placement=placement) for t in ("math", "code")
    }
    if (loss := changes.pop("loss", None)) is not None:
        changes["objective"] = {"loss": loss}
    changes.setdefault("evaluation", {"teachers": False})
    config = tiny.config(root, teachers=teachers, **changes)
    return abstract.prepare(config, jax.devices()[:n])


@pytest.mark.parametrize("placement", ["host", "host_layers"])
@pytest.mark.parametrize("loss", ["policy_gradient", "exact"])
def test_the_planned_bytes_on_the_way_are_those_of_the_programs(root, placement, loss):
    run = planned(root, placement, loss=loss, batch={"prompts": 8, "microbatches": 2})
    for program in phases.programs(run, ("score", "update")):
        n = {True: 0, False: 0}
        for shape, turns, loops, _ in transfers(program.traced.jaxpr.jaxpr):
            n[loops > 0] += 4 * turns * math.prod(shape)
        assert (n[False], n[True]) == streamed.brought(run, program.name), program.name
    assert all(streamed.brought(run, "score")) == (placement == "host_layers")
    assert bool(sum(streamed.brought(run, "update"))) == (loss == "exact")


def test_a_run_takes_the_settings_word_for_it(root):
    run = planned(root, "host_layers")
    assert all(decoder.by_layer for decoder in run.recipe.teachers)
    assert not run.recipe.student.by_layer
    assert not run.recipe.reference.by_layer
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(run.frozen.teachers)}
    assert kinds == {"pinned_host"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"evaluation": {"teachers": True}}, "--config.evaluation.teachers=False, or give them"),
        (
            {
                "objective": {"source": "teacher", "advantage": "imitation", "lam": 1.0},
                "reference": None,
            },
            "give them placement = 'host', or use source = 'student'",
        ),
    ],
)
def test_teachers_by_layer_do_not_write(root, changes, says):
    with pytest.raises(ValueError, match=says):
        planned(root, "host_layers", **changes)
    planned(root, "host", **changes)


@pytest.mark.slow
def test_preflight_passes_a_teacher_by_layer_as_one_on_the_device(root, tmp_path):
    def verdicts(placement):
        config = tiny.config(root, evaluation={"teachers": False}, workdir=str(tmp_path))
        config.teachers["math"].placement = placement
        report = preflight.run(train.begin(config).this)
        return [(check.role, check.name, check.value, check.verdict) for check in report.checks]

    assert verdicts("host_layers") == verdicts("device")


def test_two_layers_are_guessed_to_be_on_the_device_at_a_time(root):
    run = planned(root, "host_layers", n=4, mesh=tiny.settings.Mesh(fsdp=4))
    decoder, params = run.recipe.teachers[0], run.frozen.teachers[0]
    of_layers = sum(x.size for x in jax.tree.leaves(params["layers"]) if x.ndim > 2)
    others = sum(
        math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(params) if x.ndim <= 2
    )
    n = decoder.cfg.num_hidden_layers
    # Every matrix is divided along its one axis of `embed`.
    assert streamed.at_once(decoder, params) == 4 * (others + 2 * of_layers // n // 4)
    whole = planned(root, "host", n=4, mesh=tiny.settings.Mesh(fsdp=4))
    assert streamed.at_once(whole.recipe.teachers[0], params) == streamed.there(params)
    assert phases.bytes_of(params) == 0


def test_the_estimate_waits_for_whole_models_and_lets_layers_come_in_beside_the_work(root):
    chip = Chip(flops=1e12, bandwidth=1e12, usable=2**30, source="made up")
    topology = Topology(name="made up", devices=(None,), chip=chip)
    slow, fast = Work(narrow=5e12), Work(narrow=1.0)

    def estimate(placement, work):
        run = planned(root, placement)
        return run, phases.roofline(run, "score", work, None, topology, mfu=0.5)

    run, found = estimate("host", slow)
    both = 4 * sum(x.size for x in jax.tree.leaves(run.frozen.teachers))
    host_link = both / HOST_LINK
    want = {"score: compute": 10.0, "score: host link": host_link}
    assert found == pytest.approx(want)
    run, found = estimate("host_layers", slow)
    before, beside = streamed.brought(run, "score")
    assert before + beside == both  # one microbatch
    assert found == pytest.approx({"score: compute": 10.0, "score: host link": before / HOST_LINK})
    _, found = estimate("host_layers", fast)
    assert found == pytest.approx({"score: host link": host_link})
    assert phases.assumed(run)[-1] == phases.ASSUMED_OF_HOST
    assert phases.ASSUMED_OF_HOST not in phases.assumed(planned(root, "device"))


def test_the_host_is_tried_before_fewer_rows_and_layers_after_whole_models(root):
    config = tiny.config(root)
    mesh = planned(root, "device").recipe.mesh
    told = [told for told, _ in changes.smaller(config, mesh)]
    roles = ("reference", "teachers.math", "teachers.code")
    host, layers = (
        " ".join(f"--config.{role}.placement={where}" for role in roles)
        for where in ("host", "host_layers")
    )
    layers += " --config.evaluation.teachers=False"
    at = told.index(host)
    assert told[at + 1] == layers
    assert "--config.batch.prompts=4" in told[at + 2]
    _, changed = [*changes.smaller(config, mesh)][at + 1]
    assert changed.problems() == []
    assert {m.placement for m in changed.teachers.values()} == {"host_layers"}
    assert not any("placement" in told for told, _ in changes.smaller(changed, mesh))


def test_a_teacher_with_a_dot_in_its_name_is_moved_by_the_preset_which_no_flag_does(root):
    teachers = {name: Model(path=str(root / "teacher_code")) for name in ("qwen2.5-math", "code")}
    options = {"teachers": teachers, "routes": {"math": "qwen2.5-math"}}
    config = tiny.config(root, reference=None, objective={"lam": 1.0}, **options)
    assert config.problems() == []
    found = changes.smaller(config, planned(root, "device").recipe.mesh)
    told, moved = next((told, one) for told, one in found if "placement" in told)
    assert told == (
        "c.teachers['qwen2.5-math'].placement = 'host' in the preset, "
        "--config.teachers.code.placement=host"
    )
    assert {model.placement for model in moved.teachers.values()} == {"host"}
    assert moved.problems() == []


def test_a_plan_lists_what_is_in_host_memory(root):
    run = planned(root, "host_layers")
    topology = Topology(name="cpu:1", devices=tuple(jax.devices()[:1]), chip=None)
    this = plan.plan(run.config, topology, names=("score",))
    both = 4 * sum(x.size for x in jax.tree.leaves(run.frozen.teachers))
    assert this.found[0].memory.host == both
    assert f"in host memory{both / 2**30:12.3f}" in plan.report(this)
    told = json.loads(json.dumps(plan.to_json(this, "", None)))
    assert told["phases"]["score"]["memory"]["host"] == both
    assert phases.ASSUMED_OF_HOST in told["assumed"]


# --- the TPU's compiler

SLICES = (" dynamic-slice-start(", " dynamic-slice-done(")


def products_between(lines):
    """Products of a computation after the last start of a copy off the host, before its end."""
    named = {x: [i for i, line in enumerate(lines) if x in line] for x in (" fusion(", *SLICES)}
    starts, ends = (named[x] for x in SLICES)
    starts = [i for i in starts if "S(5)" in lines[i]]
    if not starts or not ends:
        return 0
    products = (i for i in named[" fusion("] if "kind=kOutput" in lines[i])
    return sum(starts[-1] < i < ends[0] for i in products)


@pytest.mark.tpu
def test_a_tpu_holds_two_layers_and_copies_the_next_beside_the_work_of_one():
    pytest.importorskip("libtpu", reason='the TPU compiler: pip install "jax[tpu]"')
    mesh = sharding.make_mesh(1, 2, 2, devices=chips.topology("v5e:2x2").devices)
    cfg = lm_params.ModelConfig(
        architecture="qwen3",
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=True,
    )
    decoder = Decoder(cfg, dtype="bfloat16", by_layer=True)
    where = sharding.on_host(sharding.shardings(mesh, lm_params.logical_axes(cfg)))
    params = jax.tree.map(
        lambda x, w: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=w),
        lm_params.abstract_params(cfg),
        where,
    )
    rows = sharding.by_rows(mesh)
    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32, sharding=rows)
    valid = jax.ShapeDtypeStruct((8, 256), bool, sharding=rows)

    def hidden(decoder, params, tokens, valid):
        return lm.hidden(decoder, batching.resident(decoder, params), tokens, valid)

    def compiled(decoder):
        with sharding.use(mesh):
            traced = jax.jit(hidden, static_argnums=0).trace(decoder, params, tokens, valid)
            return traced.lower().compile()

    made, whole = compiled(decoder), compiled(dataclasses.replace(decoder, by_layer=False))
    for one in (made, whole):
        told = one.memory_analysis()
        assert told.host_argument_size_in_bytes == pytest.approx(streamed.there(params), rel=0.01)
        assert "host-call" not in one.as_text()  # nothing is gathered on the hosts
    saved = streamed.there(params) - streamed.at_once(decoder, params)
    fallen = whole.memory_analysis().temp_size_in_bytes - made.memory_analysis().temp_size_in_bytes
    assert fallen > 0.9 * saved
    beside = [
        products_between(lines) for lines in collectives.computations(made.as_text()).values()
    ]
    assert max(beside) >= 7
