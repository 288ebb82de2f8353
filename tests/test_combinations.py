"""What benchmarks/combinations.py draws is allowed, and what it compares is noticed."""

import dataclasses
import math

import pytest

from benchmarks import combinations, combinations_drawn


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    roots = tmp_path_factory.mktemp("combinations")
    for name, cfg in combinations_drawn.MODELS.items():
        combinations.build(roots / name, cfg)
    return roots


def test_what_is_drawn_is_allowed_and_the_seeds_alone(roots):
    drawn = [combinations_drawn.draw(seed, roots) for seed in range(40)]
    assert drawn[:6] == [combinations_drawn.draw(seed, roots) for seed in range(6)]
    assert len({str(one) for one in drawn}) == 40
    for one in drawn:
        single = combinations_drawn.one_device(one.mesh)
        assert one.config(roots, single, roots / "run").problems() == []
        assert all(math.prod(m.values()) in (2, 4, 8) for m in (one.mesh, one.then or one.mesh))
        assert one.then != one.mesh
    sources = {one.objective.get("source", "student") for one in drawn}
    assert sources == {"student", "teacher", "data"}
    assert {"solution", None} == {one.teacher["context"] for one in drawn}


ROWS = [{"step": n, "loss": 0.5, "kl_ref": 0.0, "tokens": 34.0} for n in (1, 2)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"loss": 0.50005}, []),
        ({"loss": 0.5002}, ["step 1: loss is 0.5 and 0.5002"]),
        ({"kl_ref": 1e-4}, ["step 1: kl_ref is 0.0 and 0.0001"]),
        ({"kl_ref": math.nan}, ["step 1: kl_ref is 0.0 and nan"]),
        ({"kl_ref": None}, ["step 1: kl_ref is 0.0 and None"]),
        ({"tokens": 33.0}, ["step 1: tokens is 34.0 and 33.0"]),
        ({"more": 1.0}, ["more is of one alone"]),
    ],
)
def test_what_differs_is_told(changes, said):
    assert combinations.differences(ROWS, [ROWS[0] | changes, ROWS[1]]) == said


def test_a_sampler_of_eight_bits_is_as_near_as_rounding_is():
    rows = [row | {"sampler_kl": 2.8e-4} for row in ROWS]
    others = [row | {"sampler_kl": 2.9e-4} for row in ROWS]
    told = ["step 1: sampler_kl is 0.00028 and 0.00029"]  # the second step may be 5e-5 apart
    assert combinations.differences(rows, others) == told
    assert combinations.differences(rows, others, eight_bits=True) == []
    others = [row | {"sampler_kl": 3.6e-4} for row in ROWS]
    assert len(combinations.differences(rows, others, eight_bits=True)) == 2


def test_a_second_step_that_is_made_again_is_held_to_the_second():
    again = [*ROWS, ROWS[1] | {"loss": 0.502}]
    assert combinations.differences([*ROWS, ROWS[1]], again) == []  # 5e-3, as behind any update
    again = [*ROWS, ROWS[1] | {"loss": 0.51}]
    assert combinations.differences([*ROWS, ROWS[1]], again) == ["step 2: loss is 0.5 and 0.51"]


def test_a_run_that_ends_early_differs():
    assert combinations.differences(ROWS, ROWS[:1]) == ["2 rows and 1"]


GKD = combinations_drawn.Drawn(
    models="dense",
    objective={"lam": 1.0, "loss": "exact", "divergence": "jsd"},
    sections={
        "batch": {"prompts": 8},
        "sampling": {"completion_length": 6},
        "routes": {"math": "math", "code": "math"},
    },
    teacher={},
    reference=False,
    mesh={"fsdp": 2},
)


def test_only_a_mesh_that_does_not_divide_is_refused(roots, monkeypatch):
    word, said = combinations.compared(dataclasses.replace(GKD, mesh={"tensor": 8}), roots)
    assert word == "refused"
    assert "does not divide" in said
    too_short = {"context": "solution", "prompt_length": 8}  # on any mesh
    word, said = combinations.compared(dataclasses.replace(GKD, teacher=too_short), roots)
    assert word == "fails"
    assert "teachers.math.prompt_length" in said

    def breaks(*_):
        raise ValueError("shapes of a program")

    monkeypatch.setattr(combinations.train.checkpoint, "restore", breaks)
    word, said = combinations.compared(GKD, roots)
    assert word == "fails"
    assert "ValueError: shapes of a program" in said


@pytest.mark.slow
def test_a_combination_is_equal_on_its_mesh_and_where_it_goes_on(roots):
    on_two = dataclasses.replace(GKD, then={"fsdp": 1, "sequence": 2})
    assert combinations.compared(on_two, roots) == ("equal", "{'fsdp': 2}, then {'sequence': 2}")
