"""What a plan says of evaluation: whom it samples from as no step does, and whether that fits."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from test_plan import CHIP, CPU8, told

from gopd_jax import data, plan, processes, setup
from gopd_jax.config import Mesh, Model
from gopd_jax.models import hf
from gopd_jax.models import params as lm_params
from gopd_jax.planning import abstract, changes, evaluated, least, phases, reads, space

LARGE = dataclasses.replace(tiny.CFG, num_hidden_layers=4, hidden_size=128, head_dim=16)
WITHOUT, ROWS = "--config.evaluation.teachers=False", "--config.evaluation.rows="
NARROW = {"sampling": {"cache_dtype": "int8"}, "objective": {"importance": "token"}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated")
    tiny.build(root)
    params = tiny.sizeable(LARGE, 7)
    hf.save(root / "large", LARGE, params, tokenizer_dir=root / "tokenizer")
    return root


def large(root, **changes):
    """The tiny preset with a larger teacher of code, and rows enough for its cache to count."""
    teachers = {
        "math": Model(path=str(root / "teacher_math")),
        "code": Model(path=str(root / "large")),
    }
    batch = {"prompts": 64, "microbatches": 8, "head_chunk": 6}
    return tiny.config(root, **{"teachers": teachers, "batch": batch} | changes)


@pytest.fixture(scope="module")
def this(root):
    return plan.plan(large(root), CPU8, names=("fused", "evaluate"))


def limited(this, usable):
    chip = dataclasses.replace(CHIP, usable=usable)
    return dataclasses.replace(this, topology=dataclasses.replace(CPU8, chip=chip))


def test_a_teacher_whose_sampling_does_not_fit_is_told_and_fewer_rows_at_a_time_do(this):
    fused, evaluate = this.found
    assert fused.memory.peak < evaluate.memory.peak
    there = limited(this, evaluate.memory.peak - 1)
    assert plan.verdict_of(there) == "does not fit: evaluate on cpu:8"
    text = plan.report(there)
    assert "evaluate samples from teacher:code, which needs most of ['teacher:math', " in text
    row = next(line for line in text.splitlines() if line.startswith("evaluate  "))
    assert row.endswith("  does not fit")
    assert plan.first_that_fits(there, say=print) == (f"{ROWS}32", [])
    unseen = dataclasses.replace(there, found=(fused,))
    assert plan.verdict_of(unseen).endswith("; training runs ['evaluate'], which --phase left out")
    fits = limited(this, evaluate.memory.peak)
    assert plan.verdict_of(fits) == "fits: fused, evaluate on cpu:8"


def test_rows_down_to_one_a_device_are_tried_then_no_teachers(this, monkeypatch):
    there, asked = limited(this, this.found[1].memory.peak - 1), []

    def planned(config, topology, *, names, mfu, say):
        asked.append((config.evaluation.rows, config.evaluation.teachers, names))
        return there

    monkeypatch.setattr(plan, "plan", planned)
    # Without teachers nothing is left that would have to be compiled.
    assert plan.first_that_fits(there, say=print) == (WITHOUT, [f"{ROWS}{n}" for n in (32, 16, 8)])
    assert asked == [(n, True, ("evaluate",)) for n in (32, 16, 8)]
    (*_, (told, config)) = changes.smaller_evaluation(there.config, there.run.recipe.mesh)
    assert told == WITHOUT
    run = abstract.prepare(config, there.topology.devices)  # the same step
    graded = dataclasses.replace(there.config, teachers={})  # a student that samples in 8 bits, say
    alone = [told for told, _ in changes.smaller_evaluation(graded, run.recipe.mesh)]
    assert alone == [f"{ROWS}{n}" for n in (32, 16, 8)]
    assert not any(WITHOUT in told for told, _ in changes.smaller(graded, run.recipe.mesh))
    without = dataclasses.replace(there, config=config, run=run, found=this.found[:1])
    assert plan.verdict_of(without) == "fits: fused on cpu:8"


@pytest.mark.parametrize(("rows", "fewer"), [(24, [8]), (72, [32, 16, 8]), (8, [])])
def test_rows_that_are_no_power_of_two_come_down_to_one_a_device_too(root, rows, fewer):
    c = tiny.config(root, batch={"prompts": 96}, evaluation={"rows": rows})
    mesh = setup.checked_mesh(c)
    found = [*changes.smaller_evaluation(c, mesh)]
    assert [told for told, _ in found] == [*(f"{ROWS}{n}" for n in fewer), WITHOUT]
    assert all(setup.checked_mesh(config).shape == mesh.shape for _, config in found)


def test_fewer_rows_of_an_evaluation_are_what_it_takes(root):
    mesh = Mesh(data=2, fsdp=2, tensor=2)
    few = abstract.prepare(large(root, mesh=mesh, evaluation={"rows": 16}), jax.devices())
    whole = abstract.prepare(large(root, mesh=mesh), jax.devices())
    one, of_all = evaluated.largest(few), evaluated.largest(whole)
    assert one.cache == of_all.cache // 4
    assert evaluated.prompts(few, one).tokens_BP.shape == (16, 48)
    assert evaluated.prompts(few, one).row_B.shape == (16,)
    sent = [
        least.sent(run, "evaluate") - reads.weights_read(run.recipe.mesh, one.decoder)
        for run in (few, whole)
    ]
    assert sent[0] == sent[1] / 4
    assert told(few.prompts) == told(whole.prompts)  # the step's


def test_evaluation_is_beside_the_state_and_all_models_and_no_part_of_a_steps_seconds(this):
    run, (_, one) = this.run, this.found
    of = evaluated.largest(run)
    teacher, prompts = run.roles["teacher:code"].params, evaluated.prompts(run, of)
    assert one.memory.arguments == sum(map(phases.bytes_of, (teacher, prompts, run.key)))
    models = [run.roles[name].params for name in ("reference", "teacher:math", "teacher:code")]
    held = phases.bytes_of((abstract.state(run), models, prompts))
    assert one.memory.arguments + one.memory.beside == held
    assert space.bound(run, ("evaluate",)) == held + of.cache
    assert space.bound(run, ("evaluate",)) < one.memory.peak
    assert of.cache == 2 * 4 * 4 * 8 * 4 * (48 + 6) * 16  # layers, rows, heads, slots, width
    with_chip = limited(this, 2**30).topology
    again = phases.roofline(run, "evaluate", one.work, one.memory, with_chip, mfu=0.5)
    assert again == {}
    assert phases.parts([dataclasses.replace(one, estimate=again)]) == {}
    values = json.loads(json.dumps(plan.to_json(this, "", None)))["phases"]["evaluate"]
    assert values["decode"] is None  # which is of the step's own writers
    assert values["memory"]["peak"] == one.memory.peak


@pytest.mark.parametrize("longer", ["math", "code"])  # all teachers' rows have the longest's width
def test_the_evaluations_prompts_are_the_real_ones(root, longer):
    teachers = {
        "math": Model(path=str(root / "teacher_math")),
        "code": Model(path=str(root / "large")),
    }
    teachers[longer].prompt_length = 60
    config = tiny.config(root, teachers=teachers)
    real, run = setup.prepare(config), abstract.prepare(config, jax.devices())
    one = evaluated.largest(run)
    role, records = real.roles["teacher:code"], real.test.records["math"]
    prompts = data.of_records(([*records] * 8)[:8], role.reader).replace(records=())
    assert told(evaluated.prompts(run, one)) == told(processes.to_global(real.mesh, prompts))
    assert one.n_prompt == 60
    assert one.decoder == role.decoder


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["teacher:math", "teacher:code"]),
        (NARROW, ["teacher:math", "teacher:code", "student"]),
        (NARROW | {"evaluation": {"teachers": False}}, ["student"]),
        ({"evaluation": {"teachers": False}}, []),
        (
            {
                "objective": {"source": "teacher", "advantage": "imitation", "lam": 1.0},
                "reference": None,
                "evaluation": {"teachers": False},
            },
            ["student"],  # of whom the step samples nothing
        ),
    ],
)
def test_who_is_evaluated_otherwise_than_the_step_samples(root, options, names):
    run = abstract.prepare(tiny.config(root, **options), jax.devices())
    assert evaluated.names(run) == names
    assert phases.used_by(run) == ("fused", "evaluate")[: 1 + bool(names)]
    assert phases.possible(run, phases.PHASES) == phases.PHASES[: 4 + bool(names)]
    assert (evaluated.largest(run) is None) == (not names)
    programs = phases.programs(run, ("evaluate",))
    assert [program.name for program in programs] == ["evaluate"] * bool(names)
    if not names:
        with pytest.raises(ValueError, match="--phase=evaluate, and this run evaluates with the"):
            phases.possible(run, ("evaluate",))


@pytest.mark.parametrize(("more", "names"), [(0, []), (12, ["teacher:math", "teacher:code"])])
def test_a_teacher_that_follows_is_the_student_unless_it_reads_more(root, more, names):
    path, length = str(root / "base"), 48 + more
    teachers = {t: Model(path=path, follows=0.9, prompt_length=length) for t in ("math", "code")}
    run = abstract.prepare(tiny.config(root, teachers=teachers), jax.devices())
    assert evaluated.names(run) == names
    for program in phases.programs(run, ("evaluate",)):
        params, prompts, _ = program.traced.in_avals[0]
        assert prompts.tokens_BP.shape == (8, 60)
        student = jax.tree.map(lambda x: x.shape, abstract.state(run).params)
        assert jax.tree.map(lambda x: x.shape, params) == student


def test_students_that_sample_in_8_bits_are_evaluated_from_their_own_numbers(root):
    options = NARROW | {"evaluation": {"teachers": False}}
    run = abstract.prepare(tiny.config(root, **options), jax.devices())
    one = evaluated.largest(run)
    assert one.cache > 2 * reads.cache_of(run)
    (program,) = phases.programs(run, ("evaluate",))
    assert "i8[" not in str(program.traced.jaxpr)
    (generate,) = phases.programs(run, ("generate",))
    assert "i8[" in str(generate.traced.jaxpr)


def test_both_that_fail_are_cured_by_a_change_of_the_step_and_one_beside_it(this, monkeypatch):
    there, asked = limited(this, this.found[0].memory.peak - 1), []
    assert [one.name for one in there.too_large] == ["fused", "evaluate"]

    def planned(config, topology, *, names, mfu, say):
        asked.append((names, config.evaluation.rows))
        step = names == ("fused",) and config.batch.prompts == 16
        fits = step or (names == ("evaluate",) and config.evaluation.rows == enough)
        return limited(this, 2**40 if fits else 1)

    monkeypatch.setattr(plan, "plan", planned)
    monkeypatch.setattr(space, "bound", lambda run, names: 0)
    of_step, enough = "--config.batch.prompts=16 --config.batch.microbatches=2", 8
    found, tried = plan.first_that_fits(there, say=print)
    assert found == f"{of_step} {ROWS}8"
    assert tried[-1] == of_step  # the change of the step may be enough
    assert asked[-2:] == [(("evaluate",), None), (("evaluate",), 8)]
    assert asked[:-2] == [(("fused",), None)] * len(tried)
    step = dataclasses.replace(there, found=there.found[:1])
    assert plan.first_that_fits(step, say=print) == (of_step, tried[:-1])
    enough = None
    assert plan.first_that_fits(there, say=print) == (of_step, tried[:-1])
    enough = 0
    found, _ = plan.first_that_fits(there, say=print)
    assert found == f"{of_step} {WITHOUT}"


def test_slots_hold_fewer_rows_of_an_evaluation_too(root):
    whole, few = (
        abstract.prepare(tiny.config(root, batch={"prompts": 32}, **slots), jax.devices())
        for slots in ({}, {"sampling": {"slots": 8}})
    )
    assert evaluated.largest(few).cache == evaluated.largest(whole).cache // 4
    assert space.guess(few, ("evaluate",)) < space.guess(whole, ("evaluate",))
    (program,) = phases.programs(few, ("evaluate",))
    (of_all,) = phases.programs(whole, ("evaluate",))
    works = [phases.flops.count(x.jaxpr) for x in (program.counted, of_all.traced)]
    assert works[0] == works[1]


@pytest.mark.parametrize(("slots", "rows", "told"), [(8, 16, 8), (8, None, 8), (16, 8, 8)])
def test_rows_at_a_time_are_told_as_slots_hold_them(root, this, slots, rows, told):
    options = {"sampling": {"slots": slots}, "evaluation": {"rows": rows}}
    run = abstract.prepare(tiny.config(root, batch={"prompts": 32}, **options), jax.devices())
    text = plan.report(dataclasses.replace(this, config=run.config, run=run))
    assert f"['teacher:math', 'teacher:code'], {told} rows at a time\n" in text


def test_a_teacher_on_the_host_comes_in_for_its_evaluation(root):
    def guessed(placement):
        model = {"path": str(root / "large"), "placement": placement}
        teachers = {"math": Model(**model), "code": Model(**model)}
        run = abstract.prepare(tiny.config(root, teachers=teachers), jax.devices())
        return run, space.bound(run, ("evaluate",)), space.guess(run, ("evaluate",))

    here, bound, guess = guessed("device")
    _, away_bound, away_guess = guessed("host")
    one = phases.bytes_of(here.roles["teacher:math"].params)
    assert bound - away_bound == one
    assert away_guess == guess


def test_an_evaluation_gathers_its_models_weights_once(root):
    run = abstract.prepare(large(root, mesh=Mesh(data=2, fsdp=2, tensor=2)), jax.devices())
    decoder = evaluated.largest(run).decoder
    sums = (2 * 4 + 1) * 64 / 4 * (48 + 6 - 1) * 4 * 128
    weights = reads.weights_read(run.recipe.mesh, decoder)
    assert least.sent(run, "evaluate") == weights + sums
    size = sum(np.prod(x.shape) for x in jax.tree.leaves(lm_params.abstract_params(LARGE)))
    assert weights == pytest.approx(4 * size / 2, rel=0.01)  # half of its heads and of its words
