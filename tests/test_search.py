"""The search for a mesh and a division of the batch: its space, its bound, its order, its best."""

import dataclasses
import itertools
import json
import types

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import plan
from gopd_jax.config import Mesh, Model
from gopd_jax.models.params import logical_axes
from gopd_jax.planning import abstract, phases, search, space
from gopd_jax.planning.chips import Chip, Topology

pytestmark = pytest.mark.slow

CHIP = Chip(flops=1e12, bandwidth=1e15, usable=2**40, source="made up")


def topology(n, usable=2**40):
    chip = dataclasses.replace(CHIP, usable=int(usable))
    return Topology(name=f"cpu:{n}", devices=tuple(jax.devices()[:n]), chip=chip)


def key(config):
    m, b = config.mesh, config.batch
    return m.data, m.fsdp, m.tensor, b.microbatches, b.remat


def answer(peaks, usable, seconds=None):
    """A compile function that knows each candidate's peak, and remembers what it was asked."""
    asked = []

    def compile(config, names):
        asked.append(key(config))
        peak = peaks(config)
        time = 1.0 if seconds is None else seconds(config)
        part = types.SimpleNamespace(
            name="fused",
            memory=types.SimpleNamespace(peak=peak),
            needed=None,
            exhausted=None,
            estimate={"fused: compute": time},
        )
        return types.SimpleNamespace(found=[part], too_large=[part] if peak > usable else [])

    return compile, asked


def test_the_space_is_every_division_that_the_models_and_the_rows_allow(root):
    config = tiny.config(root, batch={"prompts": 8})
    found = {key(run.config) for run in space.space(config, jax.devices())}
    wanted = set()
    for data, fsdp, tensor, pieces in itertools.product((1, 2, 4, 8), repeat=4):
        divides = data * fsdp * tensor == 8 and 8 % (data * fsdp * pieces) == 0
        if divides and tensor <= 4:  # the models' 4 heads
            wanted |= {(data, fsdp, tensor, pieces, remat) for remat in space.REMATS}
    assert found == wanted
    assert len(found) == 3 * (4 + 2 * 3 + 3 * 2)


def test_factorizations_are_all_and_distinct():
    found = space.factorizations(24)
    wanted = [x for x in itertools.product(range(1, 25), repeat=3) if np.prod(x) == 24]
    assert sorted(found) == sorted(wanted)


def test_where_no_mesh_goes_what_is_wrong_with_all_is_said(root):
    config = tiny.config(root, student=Model(path="/models/absent"))
    with pytest.raises(ValueError, match=r"student: '/models/absent' has no config.json") as caught:
        space.space(config, jax.devices())
    assert "mesh" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no mesh does; .*\n.*3 rows .* do not divide over"):
        space.space(
            tiny.config(root, batch={"prompts": 3}, data={"tasks": ("math",)}), jax.devices()
        )


@pytest.mark.parametrize(
    ("usable", "tries", "says"),
    [(None, 6, "give a slice: --topology=v5e:4x4"), (1, 0, "--tries is 0")],
)
def test_wrong_input_is_refused_with_its_cure(root, usable, tries, says):
    there = topology(4, usable or 1)
    if usable is None:
        there = dataclasses.replace(there, chip=None)
    with pytest.raises(ValueError, match=says):
        search.search(tiny.config(root), there, None, tries=tries)


NAMES = ("generate", "score", "update")


def test_the_bound_is_the_bytes_of_state_models_cache_and_gradient(root):
    config = tiny.config(root, mesh=Mesh(data=1, fsdp=2, tensor=2), batch={"prompts": 8})
    run = abstract.prepare(config, jax.devices()[:4])
    sizes, axes = run.roles["student"].params, logical_axes(run.recipe.student.cfg)
    shared = 0  # by hand: what lies along embed is halved by fsdp, along the others by tensor
    for x, names in zip(
        jax.tree.leaves(sizes), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    ):
        parts = 2 ** len({*names} & {"embed"}) * 2 ** len(
            {*names} & {"heads", "kv_heads", "mlp", "vocab"}
        )
        shared += x.size // parts
    held = 4 * 6 * shared + 2 * 4  # student thrice, its first weights (R too), two teachers; steps
    assert space.bound(run, ("score",)) == pytest.approx(held, abs=16)
    assert space.bound(run, ("update",)) == pytest.approx(held + 4 * shared, abs=16)
    cache = 2 * 2 * 4 * 2 * (48 + 6) * 8 * 4  # keys and values, layers, rows, heads, slots, width
    prompts = phases.bytes_of(run.prompts)
    assert space.bound(run, ("generate",)) == pytest.approx(held + cache + prompts, abs=16)
    fused = space.bound(run, ("fused",))
    assert fused == max(space.bound(run, ("generate",)), space.bound(run, ("update",)))
    # The student's first weights are given up where no other model is the same.
    config.reference, config.objective.lam = None, 1.0
    alone = abstract.prepare(config, jax.devices()[:4])
    assert space.bound(alone, ("score",)) == pytest.approx(held - 4 * shared, abs=16)


def test_weights_on_the_host_are_not_in_the_bound_and_are_in_the_guess(root):
    def both(**options):
        teachers = {t: Model(path=str(root / f"teacher_{t}"), **options) for t in ("math", "code")}
        config = tiny.config(root, teachers=teachers, mesh=Mesh(fsdp=4))
        return abstract.prepare(config, jax.devices()[:4])

    here, away = both(), both(placement="host")
    one = phases.bytes_of(here.frozen.teachers[0])
    assert space.bound(here, ("score",)) - space.bound(away, ("score",)) == 2 * one
    assert phases.bytes_of(away.frozen.teachers[0]) == 0
    assert space.guess(here, ("score",)) - space.guess(away, ("score",)) == one


def space_of(root, n=8, usable=2**40, **changes):
    config = tiny.config(root, **({"batch": {"prompts": 8}} | changes))
    there = topology(n, usable)
    runs = space.space(config, there.devices)
    return config, there, space.ranked(runs, ("fused",), there, mfu=0.5)


@pytest.fixture(scope="module")
def ranked(root):
    return space_of(root)


@pytest.fixture
def remembered(ranked, monkeypatch):
    """`ranked`, which searches take as found: to trace it anew is most of their time."""
    config, there, found = ranked
    runs = [abstract.prepare(found[0].config, there.devices)]
    monkeypatch.setattr(search, "space", lambda *_: runs)
    monkeypatch.setattr(search, "ranked", lambda *_, **__: list(found))
    return config, there, found


def test_the_fastest_is_first_and_recomputing_is_slower(ranked):
    _, _, found = ranked
    seconds = [one.seconds for one in found]
    assert seconds == sorted(seconds)
    by_key = {key(one.config): one for one in found}
    for (data, fsdp, tensor, pieces, _), one in by_key.items():
        less, more = (by_key[data, fsdp, tensor, pieces, remat] for remat in (None, "layers"))
        assert less.seconds < more.seconds
        assert less.guess >= more.guess
        if one.config.batch.remat == "products":
            assert less.seconds <= one.seconds <= more.seconds


def test_a_candidates_flags_are_its_config(ranked):
    _, _, found = ranked
    for one in found:
        given = dict(flag.removeprefix("--config.").split("=") for flag in one.flags.split())
        m, b = one.config.mesh, one.config.batch
        assert given == {
            "mesh.data": str(m.data),
            "mesh.fsdp": str(m.fsdp),
            "mesh.tensor": str(m.tensor),
            "batch.microbatches": str(b.microbatches),
            "batch.remat": b.remat or "none",
        }


def true_peak(config):
    """A made-up memory that grows as the real one does, unlike the guess in its amounts."""
    m, b = config.mesh, config.batch
    kept = 30_000 // m.fsdp + 90_000 // (m.fsdp * m.tensor)
    rows = 8 // (m.data * m.fsdp * b.microbatches)
    return kept + rows * 40_000 * (1 if b.remat else 3) // m.tensor


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_with_tries_enough_the_best_of_the_search_is_that_of_all(remembered, monkeypatch, share):
    config, there, found = remembered
    peaks = sorted({true_peak(one.config) for one in found})
    usable = peaks[int(share * (len(peaks) - 1))]
    limit = dataclasses.replace(there, chip=dataclasses.replace(CHIP, usable=usable))
    by_key = {key(one.config): one for one in found}
    # The made-up memory lies anywhere beside the bound, which has to be out of the way here.
    made_up = [dataclasses.replace(x, bound=0, guess=true_peak(x.config)) for x in found]
    monkeypatch.setattr(search, "ranked", lambda *_, **__: made_up)
    compile, asked = answer(true_peak, usable, lambda c: by_key[key(c)].seconds)
    made = search.search(config, limit, compile, tries=100)
    fitting = [one for one in found if true_peak(one.config) <= usable]
    best = min(fitting, key=lambda one: one.rank)
    assert made.best.candidate.seconds == best.seconds
    assert made.best.candidate.rank == best.rank
    assert len(asked) == len(set(asked)) < len(found)


def test_what_needs_no_less_than_one_that_failed_is_not_compiled(remembered):
    config, there, found = remembered
    never = answer(lambda c: 2**60, 2**40)
    made = search.search(config, there, never[0], tries=100)
    assert made.best is None
    for late, early in itertools.combinations(reversed(made.tried), 2):
        assert not late.candidate.needs_no_less(early.candidate)
    failed = [one.candidate for one in made.tried]
    for one in made.left:
        assert any(one.needs_no_less(other) for other in failed)
    assert len(made.tried) + len(made.left) + len(made.pruned) == len(found)
    text = search.report(made, there)
    assert "none that was compiled fits" in text
    assert "--config.teachers.NAME.placement=host" in text


@pytest.mark.slow
def test_what_leaves_a_mesh_out_is_said(root):
    config, said = tiny.config(root, batch={"prompts": 8}, sampling={"slots": 4}), []
    found = space.space(config, jax.devices(), said.append)
    assert all(run.config.mesh.data * run.config.mesh.fsdp <= 4 for run in found)
    slots, heads = said
    assert slots.startswith("4 meshes left out, 8 x 1 x 1 for one: sampling.slots = 4 does not")
    assert slots.endswith("choose a multiple of 8")
    assert heads.startswith("a mesh left out, 1 x 1 x 8 for one: student has 4 along")


@pytest.mark.slow
def test_tries_are_a_limit_and_each_has_its_lines(remembered):
    config, there, _ = remembered
    compile, asked = answer(lambda c: 2**60, 2**40)
    said = []
    made = search.search(config, there, compile, tries=3, say=said.append)
    assert len(asked) == len(made.tried) == 3
    assert [text.split(":")[0] for text in said if text.startswith("trying")] == [
        "trying 1/3",
        "trying 2/3",
        "trying 3/3",
    ]
    assert sum("does not fit, 1073741824.000 GiB, " in text for text in said) == 3


@pytest.mark.slow
def test_where_all_fit_the_fastest_is_compiled_and_no_other(ranked):
    config, there, found = ranked
    compile, asked = answer(lambda c: 1, 2**40)
    made = search.search(config, there, compile)
    assert asked == [key(found[0].config)]
    assert made.best.candidate.rank == found[0].rank
    text = search.report(made, there)
    assert f"the best that fits: {found[0].flags}" in text
    values = json.loads(json.dumps(search.to_json(made)))
    assert values["best"] == found[0].flags
    assert values["tried"][0]["fits"] is True
    assert len(values["not_compiled"]) == len(found) - 1


@pytest.mark.slow
def test_what_cannot_fit_is_not_compiled(remembered):
    config, _, found = remembered
    bounds = sorted(one.bound for one in found)
    few = topology(8, bounds[3])
    compile, asked = answer(lambda c: 2**60, bounds[3])
    made = search.search(config, few, compile, tries=100)
    assert len(made.pruned) == sum(bound > bounds[3] for bound in bounds)
    assert {*asked} & {key(one.config) for one in made.pruned} == set()
    none = search.search(config, topology(8, bounds[0] - 1), compile)
    assert (none.tried, none.left, none.best) == ((), (), None)
    assert "nothing fits: the least that is needed" in search.report(none, few)


@pytest.mark.slow
def test_a_mesh_on_which_the_compiler_fails_is_told_and_passed_over(remembered):
    config, there, found = remembered
    works, _ = answer(lambda c: 1, 2**40)
    calls = []

    def compile(config, names):
        calls.append(config)
        if len(calls) == 1:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such luck\nmore")
        return works(config, names)

    made = search.search(config, there, compile)
    assert [one.fits for one in made.tried] == [False, True]
    assert made.tried[0].said == "the compiler failed: INTERNAL: no such luck"
    assert made.best.candidate.rank == found[1].rank


@pytest.mark.slow
def test_no_candidate_that_fits_is_pruned_and_the_best_is_that_of_compiling_all(root):
    # 12 candidates on four devices, the update of each compiled.
    config = tiny.config(root, batch={"prompts": 2})
    there, names = topology(4), ("update",)

    def compile(config, names):
        return plan.plan(config, there, names=names)

    found = space.ranked(space.space(config, there.devices), names, there, mfu=0.5)
    assert len(found) == 12
    whole = {key(one.config): compile(one.config, names) for one in found}
    peaks = {of: this.found[0].memory.peak for of, this in whole.items()}
    assert all(one.bound <= peaks[key(one.config)] for one in found)
    for usable in np.quantile([*peaks.values()], [0.0, 0.25, 0.5, 1.0]).astype(int):
        limit = dataclasses.replace(there, chip=dataclasses.replace(CHIP, usable=int(usable)))

        def limited(config, names, limit=limit):
            return dataclasses.replace(whole[key(config)], topology=limit)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search, "ranked", lambda *_, **__: list(found))  # the same at any limit
            made = search.search(config, limit, limited, names=names, tries=100)
        fitting = {of for of, peak in peaks.items() if peak <= usable}
        assert not {key(one.config) for one in made.pruned} & fitting
        seconds = {of: sum(phases.parts(whole[of].found).values()) for of in fitting}
        assert made.best.seconds == pytest.approx(min(seconds.values()), rel=0.011)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 4, 1), (2, 1, 2), (1, 1, 4)], ids=str)
def test_the_whole_step_and_its_sampling_take_no_less_than_their_bounds(root, mesh):
    data, fsdp, tensor = mesh
    shape = Mesh(data=data, fsdp=fsdp, tensor=tensor)
    config = tiny.config(root, batch={"prompts": 4}, mesh=shape)
    this = plan.plan(config, topology(4), names=("generate", "fused"))
    for one in this.found:
        assert 0 < space.bound(this.run, (one.name,)) <= one.memory.peak
