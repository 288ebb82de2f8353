"""The comparison's numbers by hand, its cells and its resumption."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import microworld
from gopd_jax.microworld import cells, compare, preset, statistics
from gopd_jax.microworld.cells import Cell, Scope
from gopd_jax.microworld.statistics import Interval
from gopd_jax.types import Record

pytestmark = pytest.mark.slow


def result(method, seed, math_, code, length=20.0):
    return {
        "method": method,
        "seed": seed,
        "accuracy": {"math": math_, "code": code},
        "length": {"math": length, "code": length + 4},
        "stderr": {"math": 0.01, "code": 0.01},
        "truncated": {"math": 0.0, "code": 0.0},
        "seconds": {"train": 2.0, "evaluate": 1.0},
    }


# --- statistics


def test_intervals_are_those_of_the_published_t_table():
    five = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    # Standard deviation sqrt(5/2); the table's t at 4 degrees of freedom is 2.776, at 1 12.706.
    assert (five.mean, five.n) == (3.0, 5)
    assert five.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-4)
    assert Interval.of([0.0, 2.0]).half == pytest.approx(12.706, rel=1e-4)
    assert Interval.of([7.0]) == Interval(mean=7.0, half=None, n=1)
    with pytest.raises(ValueError, match="at least one value"):
        Interval.of([])


def test_an_interval_excludes_zero_only_where_it_ends_before_it():
    assert Interval(mean=-2.0, half=1.9, n=3).excludes_zero
    assert not Interval(mean=-2.0, half=2.1, n=3).excludes_zero
    assert not Interval(mean=2.0, half=None, n=1).excludes_zero


def test_differences_are_paired_by_seed():
    # The seeds differ by far more than the methods, and come in another order.
    rows = [result("opd", s, m, m / 2) for s, m in ((0, 0.1), (1, 0.5), (2, 0.9))]
    rows += [result("exopd", s, m, m / 2) for s, m in ((2, 0.92), (1, 0.53), (0, 0.14), (7, 0.0))]
    found = statistics.by_method(rows)
    np.testing.assert_allclose(
        statistics.differences(found, "exopd", "opd", "math"), [0.04, 0.03, 0.02], atol=1e-12
    )
    np.testing.assert_allclose(
        statistics.differences(found, "exopd", "opd", "mean"), [0.03, 0.0225, 0.015], atol=1e-12
    )
    assert Interval.of(statistics.differences(found, "exopd", "opd", "math")).excludes_zero


def test_the_best_teachers_are_each_tasks_own():
    rows = [result("teacher_math", 0, 0.8, 0.1), result("teacher_code", 0, 0.2, 0.7)]
    rows += [result("teacher_math", 1, 0.6, 0.1), result("exopd", 0, 0.9, 0.75, length=30)]
    found = statistics.by_method(rows)
    assert list(found[statistics.DOMAIN_TEACHERS]) == [0]
    own = statistics.DOMAIN_TEACHERS
    delta = {c: statistics.differences(found, "exopd", own, c) for c in statistics.COLUMNS}
    want = {"math": [0.1], "code": [0.05], "mean": [0.075], "length": [10.0]}
    assert delta == {column: pytest.approx(x) for column, x in want.items()}


def test_two_results_of_one_cell_are_refused():
    with pytest.raises(ValueError, match="opd seed 3 has two results"):
        statistics.by_method([result("opd", 3, 0.1, 0.1), result("opd", 3, 0.2, 0.2)])


def made_up():
    rows = []
    for seed, shift in enumerate((0.0, 0.01, 0.02)):
        rows += [
            result("base", seed, 0.2 + shift, 0.3 + shift),
            result("teacher_math", seed, 0.5 + shift, 0.3 + shift),
            result("teacher_code", seed, 0.2 + shift, 0.6 + shift),
            result("opd", seed, 0.5 + shift, 0.6 + 2 * shift),
            result("exopd", seed, 0.55 + shift, 0.61 + shift),
        ]
    return rows


def test_the_tables_hold_percent_with_intervals_and_mark_what_excludes_zero():
    text = statistics.tables(made_up(), ["five seeds"])
    lines = text.splitlines()
    assert "- five seeds" in lines
    # 4.303 * 0.01 / sqrt(3) = 0.0248; twice that where the shifts are doubled.
    assert "| base | 3 | 21.0 ± 2.5 | 31.0 ± 2.5 | 26.0 ± 2.5 | 22.0 ± 0.0 |" in lines
    assert "| OPD, λ = 1 | 3 | 51.0 ± 2.5 | 62.0 ± 5.0 | 56.5 ± 3.7 | 22.0 ± 0.0 |" in lines
    pair = "| ExOPD, λ = 1.25 − OPD, λ = 1 | 3 | +5.0 ± 0.0 * | +0.0 ± 2.5 | +2.5 ± 1.2 * | "
    assert any(line.startswith(pair) for line in lines)
    own = "| ExOPD, λ = 1.25 − each task's own teacher | 3 | +5.0 ± 0.0 * | +1.0 ± 0.0 * |"
    assert any(line.startswith(own) for line in lines)
    assert not any(word in text for word in ("SFT", "Strong", "## λ", "nan"))
    # Stars of many differences: the page that shows them says what they leave out.
    caveat = "Nothing is corrected for the number of comparisons."
    assert caveat in text
    for page in ("README.md", "docs/RESULTS.md"):
        assert caveat in (tiny.REPOSITORY / page).read_text()


def test_the_tables_show_the_sweep_and_strong_to_weak_where_there_are_results():
    rows = [*made_up(), result("lam_0.5", 0, 0.4, 0.5), result("strong_opd", 0, 0.4, 0.5)]
    lines = statistics.tables(rows).splitlines()
    sweep = lines[lines.index("## λ") :]
    assert [line.split("|")[1].strip() for line in sweep if line[:1] == "|"] == [
        *("λ", "---", "0.5", "1", "1.25")
    ]
    assert "| 0.5 | 1 | 40.0 | 50.0 | 45.0 | 22.0 |" in sweep
    strong = lines[lines.index("## Strong to weak") : lines.index("## λ")]
    assert [line.split("|")[1].strip() for line in strong if line[:1] == "|"] == [
        *("method", "---", "base", "OPD, λ = 1")
    ]


def test_figures_are_plain_json_and_agree_with_the_tables():
    got = json.loads(json.dumps(statistics.figures(made_up()), allow_nan=False))
    assert got["methods"]["opd"]["code"]["mean"] == pytest.approx(0.62)
    assert got["methods"]["opd"]["math"]["values"] == pytest.approx([0.5, 0.51, 0.52])
    pair = next(row for row in got["differences"] if row["difference"] == "exopd - opd")
    assert pair["math"]["excludes_zero"]
    assert not pair["code"]["excludes_zero"]
    assert got["sweep"] == {"1": "opd", "1.25": "exopd"}


def test_the_sweep_is_plotted_in_both_formats(tmp_path):
    rows = [*made_up(), *(result(f"lam_{x:g}", 0, 0.3 + x / 5, 0.4) for x in (0.5, 2.0))]
    png, svg = statistics.plot(rows, tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    assert "</svg>" in text
    first = svg.read_bytes()
    statistics.plot(rows, tmp_path)
    assert svg.read_bytes() == first
    assert statistics.plot(rows[:1], tmp_path) == []


# --- cells


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Directories that pass for the shipped checkpoints."""

    def path(name):
        directory = tmp_path / "checkpoints" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text("{}")
        return str(directory)

    monkeypatch.setattr(microworld, "path", path)
    monkeypatch.setattr(preset, "path", path)
    monkeypatch.setattr(cells, "_weights", lambda directory: directory.rsplit("/", 1)[-1])


def planned(tmp_path, **changes):
    return cells.cells(Scope(out=tmp_path / "out", **changes))


def test_every_training_is_a_valid_config_of_equal_steps_and_rows(tmp_path, models):
    trained = [cell for cell in planned(tmp_path, seeds=1, steps=7) if cell.config is not None]
    for cell in trained:
        assert cell.config.problems() == [], cell.name
        assert str(cell.model) == f"{cell.config.workdir}/export"
    for group in cells.GROUPS:
        configs = [cell.config for cell in trained if cell.group == group]
        assert {c.batch.prompts * c.batch.rollouts for c in configs} == {128}
        assert {c.steps for c in configs} == {7}
        assert {c.student.path for c in configs} == {microworld.path("base")}
    rollouts = {cell.method: cell.config.batch.rollouts for cell in trained}
    assert rollouts["grpo"] == 8
    assert rollouts["exopd"] == 1


def test_each_method_learns_what_its_name_says(tmp_path, models):
    found = {cell.method: cell.config for cell in planned(tmp_path, seeds=1) if cell.config}
    lams = {name: c.objective.lam for name, c in found.items() if c.objective.advantage == "gopd"}
    assert lams == {
        **{"opd": 1.0, "exopd": 1.25, "strong_opd": 1.0},
        **{"strong_exopd": 1.25, "strong_exopd_corrected": 1.25},
        **{f"lam_{x:g}": x for x in (0.0, 0.25, 0.5, 0.75, 1.5, 2.0)},
    }
    for name, c in found.items():
        large = name.startswith("strong")
        for task, teacher in c.teachers.items():
            want = "large_teacher" if large else f"teacher_{task}"
            assert teacher.path == microworld.path(want)
        if c.objective.lam != 1:
            corrected = name == "strong_exopd_corrected"
            assert c.reference.path == microworld.path("large_base" if corrected else "base")
    for name in ("sft", "strong_sft"):
        assert (found[name].objective.source, found[name].objective.advantage) == (
            "teacher",
            "imitation",
        )
    assert found["grpo"].objective.advantage == "grpo"


def test_no_cell_is_planned_twice_and_the_seed_is_the_trainings(tmp_path, models):
    found = planned(tmp_path, seeds=2, strong_seeds=3, sweep_seeds=1)
    keys = [cell.key for cell in found]
    assert len(set(keys)) == len(keys)
    assert len({cell.model for cell in found if cell.config}) == sum(
        cell.config is not None for cell in found
    )
    assert all(cell.config.seed == cell.seed for cell in found if cell.config)
    assert {cell.seed for cell in found if cell.method == "base"} == {0, 1, 2}


def test_a_seed_draws_the_same_problems_for_every_method():
    records = tuple(
        Record(messages=(), task="math", answer=str(i), verifier="math", source="")
        for i in range(40)
    )
    whole = compare.data.Dataset(records={"math": records}, identity="x", source="made up")
    one, again, other = (compare.held_out(whole, 20, seed) for seed in (3, 3, 4))
    assert one == again
    assert len(set(one.records["math"])) == 20
    assert one.records != other.records
    assert one.identity != other.identity
    with pytest.raises(ValueError, match="made up has 40 of math; ask for fewer"):
        compare.held_out(whole, 41, 0)


# --- resumption


@pytest.fixture
def ran(models, monkeypatch):
    """The cells that were run, by a stand-in that computes its result from the cell's key."""
    ran = []

    def run_cell(cell, shared):
        if len(ran) == ran_limit[0]:
            raise RuntimeError("killed")
        ran.append(cell.key)
        value = (len(cell.method) + cell.seed) / 100
        return {k: v for k, v in result(*cell.key, value, value).items() if k not in ("method",)}

    ran_limit = [None]
    monkeypatch.setattr(compare, "run_cell", run_cell)
    monkeypatch.setattr(compare, "bench", lambda scope: None)
    return SimpleNamespace(cells=ran, limit=ran_limit)


def test_a_killed_comparison_goes_on_and_no_cell_is_run_twice(tmp_path, ran):
    scope = Scope(out=tmp_path / "out", seeds=2, strong_seeds=1, sweep_seeds=1)
    ran.limit[0] = 5
    with pytest.raises(RuntimeError, match="killed"):
        compare.run(scope)
    file = scope.out / "results.jsonl"
    assert len(file.read_text().splitlines()) == 5
    assert "| base | 1 |" in (scope.out / "table.md").read_text()
    with file.open("a") as stream:
        stream.write('{"method": "opd", "se')  # torn by the kill
    ran.limit[0] = None
    compare.run(scope)
    assert sorted(ran.cells) == sorted({cell.key for cell in cells.cells(scope)})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["method"], row["seed"]) for row in lines] == ran.cells
    assert len(json.loads((scope.out / "compare.json").read_text())["results"]) == len(lines)
    assert (scope.out / "sweep.png").exists()
    n_run = len(ran.cells)
    compare.run(scope)
    compare.run(dataclasses.replace(scope, seeds=3))
    assert {seed for _, seed in ran.cells[n_run:]} == {2}


def test_only_takes_groups_and_methods_and_refuses_other_names(tmp_path, ran):
    scope = Scope(out=tmp_path / "out", seeds=1, sweep_seeds=1)
    compare.run(scope, only=("base", "sweep"))
    assert {method for method, _ in ran.cells} == {"base"} | {
        f"lam_{x:g}" for x in (0, 0.25, 0.5, 0.75, 1.5, 2)
    }
    with pytest.raises(ValueError, match=r"there is no \['exodp'\]; there are .*'exopd'"):
        compare.run(scope, only=("exodp",))


def test_results_of_other_settings_or_models_are_refused(tmp_path, ran, monkeypatch):
    scope = Scope(out=tmp_path / "out", seeds=1, strong_seeds=1, steps=4)
    compare.run(scope, only=("base", "opd"))
    with pytest.raises(ValueError, match="a result of base, seed 0 that other settings or models"):
        compare.run(dataclasses.replace(scope, samples=2))
    with pytest.raises(ValueError, match="a result of opd, seed 0 that other settings or models"):
        compare.run(dataclasses.replace(scope, steps=3))
    monkeypatch.setattr(cells, "_weights", lambda directory: "other weights")
    with pytest.raises(ValueError, match="a result of base, seed 0 that other settings or models"):
        compare.run(scope)


def test_a_training_stopped_by_a_signal_is_continued_in_its_own_workdir(
    tmp_path, models, monkeypatch
):
    workdirs, stopped_by = [], [15, None]

    def train_run(config):
        workdirs.append(config.workdir)
        return SimpleNamespace(stopped_by=stopped_by.pop(0))

    judged = {k: result("opd", 0, 0.1, 0.2)[k] for k in ("accuracy", "length")}
    monkeypatch.setattr(compare.train, "run", train_run)
    monkeypatch.setattr(compare, "judge", lambda cell, shared: judged)
    monkeypatch.setattr(compare, "bench", lambda scope: None)
    scope = Scope(out=tmp_path / "out", seeds=1, steps=4)
    with pytest.raises(compare.Stopped):
        compare.run(scope, only=("opd",))
    assert not (scope.out / "results.jsonl").exists()
    compare.run(scope, only=("opd",))
    assert workdirs == [str(scope.out / "runs" / "4-steps" / "opd-0")] * 2


@pytest.mark.parametrize("stop", [compare.Stopped(2), KeyboardInterrupt()], ids=["saved", "^C"])
def test_the_command_says_how_to_go_on(tmp_path, models, monkeypatch, capsys, stop):
    def run(scope, only):
        assert (scope.seeds, only) == (5, ("opd", "sweep"))
        raise stop

    monkeypatch.setattr(compare, "run", run)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    out = str(tmp_path / "out")
    with pytest.raises(SystemExit) as exit_:
        compare.main([f"--out={out}", "--only=opd,sweep"])
    assert exit_.value.code == 130
    command = f"python -m gopd_jax.microworld.compare --out={out} --only=opd,sweep"
    assert command in capsys.readouterr().err


NO_SEEDS = ("--seeds=0", "--strong-seeds=0", "--sweep-seeds=0")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        *(((f"--{n}=0",), f"--{n}: 0 is below 1") for n in ("steps", "problems", "samples")),
        (("--seeds=-1",), "--seeds: -1 is below 0; give 0 or more"),
        (NO_SEEDS, "--seeds=0, --strong-seeds=0, --sweep-seeds=0 leave nothing to run"),
        (("--only=sweep", "--sweep-seeds=0"), "--sweep-seeds=0 leave nothing to run"),
        (("--only=opd,",), "--only: 'opd,' has an empty name"),
    ],
)
def test_numbers_and_names_without_sense_are_refused(
    tmp_path, ran, monkeypatch, capsys, flags, words
):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        compare.main([f"--out={tmp_path / 'out'}", *flags])
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", NO_SEEDS)
def test_a_part_can_have_the_only_seeds(tmp_path, ran, monkeypatch, capsys, part):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    seeds = [flag for flag in NO_SEEDS if flag != part] + [part.replace("0", "1")]
    compare.main([f"--out={tmp_path / 'out'}", *seeds])
    assert {seed for _, seed in ran.cells} == {0}
    assert "| seeds |" in capsys.readouterr().out
    ran.cells.clear()
    compare.main([f"--out={tmp_path / 'both'}", "--seeds=1", "--only= base , sweep "])
    assert {name for name, _ in ran.cells} >= {"base", "lam_0"}


def test_the_time_left_is_each_methods_own_where_it_is_known():
    def cell(method, seed, config):
        return Cell(group="methods", method=method, seed=seed, model=None, config=config)

    plan = [cell(m, s, c) for s in (0, 1) for m, c in (("base", None), ("opd", 1), ("sft", 1))]
    left = plan[2:]
    assert compare._seconds_left(left, plan, {}) is None
    seconds = {("base", 0): 5.0, ("opd", 0): 60.0}
    done = {key: {"seconds": {"train": 0.0, "evaluate": x}} for key, x in seconds.items()}
    # sft is unknown and taken for an average training: 60 + (5 + 60 + 60).
    assert compare._seconds_left(left, plan, done) == 185.0
