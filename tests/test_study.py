"""The study's plan, its resumption, and its figures against oracles of their own."""

import dataclasses
import importlib
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny

from gopd_jax import microworld
from gopd_jax.advance import Stepper
from gopd_jax.microworld import dataset, study, study_bench, study_cells, study_tables
from gopd_jax.microworld.study_bench import Bench, Gradients, Trainer, flows
from gopd_jax.microworld.study_cells import GROUPS, METHODS, Scope, cells, config, identity
from gopd_jax.objectives.losses import LOSSES
from gopd_jax.objectives.objective import build
from gopd_jax.recipe import init_state


@pytest.fixture
def scope(tmp_path, monkeypatch):
    monkeypatch.setattr(study_cells, "_weights", lambda directory: directory.rsplit("/", 1)[-1])
    return Scope(out=tmp_path / "out", seeds=2)


# --- the plan


def test_every_method_of_every_group_has_one_cell_a_seed(scope):
    found = cells(scope)
    wanted = {(m, seed) for group in GROUPS.values() for m in group.methods for seed in (0, 1)}
    assert sorted(cell.key for cell in found) == sorted(wanted)
    assert {m for group in GROUPS.values() for m in group.methods} == METHODS.keys()


def test_a_stopped_group_has_the_same_methods_at_each_seed_but_the_last(scope):
    found = [cell for cell in cells(scope) if cell.group == "credit"]
    half = len(found) // 2
    assert [c.seed for c in found] == [0] * half + [1] * half
    assert [c.method for c in found[:half]] == [c.method for c in found[half:]]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_config_without_problems_and_of_the_same_rows(scope, name):
    c = config(name, scope, seed=3)
    assert c.problems() == []
    assert (c.batch.prompts * c.batch.rollouts, c.steps, c.seed) == (scope.rows, scope.steps, 3)
    assert c.optimizer.learning_rate == scope.learning_rate


def test_groups_compare_with_one_of_their_own_methods():
    for group in GROUPS.values():
        assert group.against in group.methods
        assert {*group.gradients, *group.timed} <= {*group.methods}


def test_the_identity_follows_everything_but_the_place_and_the_number_of_seeds(scope, monkeypatch):
    trained = [name for name, method in METHODS.items() if method.model is None]
    # A method at another's time differs from its own by its steps alone.
    alike = [name for name in trained if METHODS[name].steps_of is None]
    assert len({identity(name, scope, 0) for name in alike}) == len(alike)
    own = identity("opd", scope, 0)
    assert own == identity("opd", dataclasses.replace(scope, out=scope.out / "x", seeds=9), 0)
    others = [identity("opd", scope, 1), identity("opd", scope, 0, steps=scope.steps - 1)]
    for change in ("steps", "rows", "learning_rate", "problems", "samples"):
        value = getattr(scope, change) * 2
        others.append(identity("opd", dataclasses.replace(scope, **{change: value}), 0))
    monkeypatch.setattr(study_cells, "_weights", lambda directory: "other weights")
    others.append(identity("opd", scope, 0))
    assert len({own, *others}) == 1 + len(others)


# --- resumption


@pytest.fixture
def ran(monkeypatch):
    """The names of what was run, by stand-ins whose results are functions of the cell."""
    ran = SimpleNamespace(names=[], limit=None)

    def run_cell(self, cell):
        if len(ran.names) == ran.limit:
            raise RuntimeError("killed")
        ran.names.append(cell.key)
        value = (len(cell.method) + cell.seed) / 100
        by_task = {"math": value, "code": value / 2}
        made_by = identity(cell.method, self.scope, cell.seed, self.steps(cell.method))
        line = {"kind": "cell", **dataclasses.asdict(cell), "identity": made_by}
        self.add({**line, "accuracy": by_task, "length": {"math": 20.0, "code": 22.0}})

    def look(self, group, name):
        ran.names.append((group, name))
        self.add({"kind": "gradient", "group": group, "method": name})

    def time(self, group):
        seconds = dict(zip(GROUPS[group].timed, (1.0, 2.0, 4.0)))
        self.add({"kind": "timing", "group": group, "step_seconds": seconds})

    # Nothing is loaded here to be forgotten, and whatever other tests left behind takes seconds.
    monkeypatch.setattr(study.gc, "collect", lambda: None)
    for function in (run_cell, look, time):
        monkeypatch.setattr(study.Study, function.__name__, function)
    return ran


def test_a_killed_study_goes_on_and_nothing_is_done_twice(scope, ran):
    ran.limit = 5
    with pytest.raises(RuntimeError, match="killed"):
        study.run(scope)
    file = scope.out / "results.jsonl"
    assert len(file.read_text().splitlines()) == 5 + 1  # and the seconds of a step
    with file.open("a") as stream:
        stream.write('{"kind": "cell", "method": "op')  # torn by the kill
    ran.limit = None
    study.run(scope)
    assert len(ran.names) == len(set(ran.names))
    assert {cell.key for cell in cells(scope)} <= {*ran.names}
    n_done = len(ran.names)
    study.run(scope)
    assert len(ran.names) == n_done
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_gradient_is_looked_at_once_though_two_groups_ask_for_it(scope, ran):
    study.run(scope)
    looked = [name for name in ran.names if name[0] in GROUPS and isinstance(name[1], str)]
    methods = [method for group, method in looked if group != "routing"]
    assert len(methods) == len(set(methods))
    assert ("routing", "opd") in looked  # where what is freed is measured


def test_only_takes_groups_and_methods_and_refuses_other_names(scope, ran):
    study.run(scope, ("lag_4_token",))
    assert {name for name in ran.names} == {("lag_4_token", 0), ("lag_4_token", 1)}
    with pytest.raises(ValueError, match=r"there is no \['lagg'\]; there are .*'lag'"):
        study.run(scope, ("lagg",))


def test_results_of_other_settings_are_refused(scope, ran):
    study.run(scope, ("opd",))
    with pytest.raises(ValueError, match="a result of opd, seed 0 that other settings or models"):
        study.run(dataclasses.replace(scope, samples=3), ("opd",))


def test_equal_time_is_the_steps_by_the_ratio_of_the_step_times(scope, ran):
    study.run(scope, ("exopd",))
    under_way = study.Study(scope)
    assert under_way.steps("exopd_top16_time") == scope.steps // 2
    assert under_way.steps("exopd_exact_time") == scope.steps // 4
    assert under_way.steps("exopd") is None


def test_equal_time_is_measured_also_for_a_method_that_is_asked_for_alone(scope, ran):
    name = "exopd_top16_time"
    study.run(scope, (name,))
    under_way = study.Study(scope)
    assert under_way.steps(name) == scope.steps // 2
    line = under_way.found("cell", method=name, seed=0)
    assert line["identity"] == identity(name, scope, 0, scope.steps // 2)
    study.run(scope)  # takes it, and times nothing anew
    assert ran.names.count((name, 0)) == 1
    kinds = [json.loads(line)["kind"] for line in (scope.out / "results.jsonl").open()]
    assert kinds.count("timing") == 1


def test_a_result_at_equal_steps_is_not_taken_for_one_at_equal_time(scope, ran):
    name = "exopd_top16_time"
    made_by = identity(name, scope, 0)
    study.Study(scope).add({"kind": "cell", "method": name, "seed": 0, "identity": made_by})
    with pytest.raises(ValueError, match="a result of exopd_top16_time, seed 0 that other"):
        study.run(scope, (name,))


# --- the command


@pytest.fixture
def command(scope, monkeypatch):
    """The command on the scope's directory, and a page with lines of its own."""
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    docs = scope.out.parent / "docs"
    (docs / "study").mkdir(parents=True)
    kept = {docs / "RESULTS.md": "the page", docs / "study" / "results.jsonl": "its lines"}
    for file, text in kept.items():
        file.write_text(text)

    def run(*argv):
        study.main([f"--out={scope.out}", f"--docs={docs}", *argv])

    run.untouched = lambda: all(file.read_text() == text for file, text in kept.items())
    return run


@pytest.mark.parametrize("found", ["no directory", "no file", "nothing", "a part"])
def test_no_page_is_written_of_less_than_a_study(scope, ran, command, capsys, found):
    file, words = scope.out / "results.jsonl", "missing or empty; give the --out of a study that"
    if found != "no directory":
        scope.out.mkdir()
    if found == "nothing":
        file.touch()
    if found == "a part":
        study.run(scope, ("opd",))
        words = "that of base, seed 0; run the study to its end, with --out="
    with pytest.raises(SystemExit, match="2"):
        command("--write", "--seeds=2")
    said = capsys.readouterr().err
    assert str(file) in said
    assert words in said
    assert command.untouched()


def test_the_whole_study_alone_writes_its_page_without_being_asked(
    scope, ran, command, capsys, monkeypatch
):
    written = []
    monkeypatch.setattr(study_tables, "write", lambda rows, docs: written.append(len(rows)))
    command("--only=opd , start", "--seeds=1")
    assert {name for name, seed in ran.names} == {"opd", *GROUPS["start"].methods}
    assert "RESULTS.md is left as it is" in capsys.readouterr().out
    command("--seeds=1")  # whole, but for the seeds
    assert not written
    command("--seeds=1", "--write")
    assert written == [n := len((scope.out / "results.jsonl").read_text().splitlines())]
    command()
    assert written == [n, n + 4 * len(METHODS)]
    file = scope.out / "results.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for kind in ("gradient", "timing", "cell"):
        at = max(i for i, line in enumerate(lines) if json.loads(line)["kind"] == kind)
        file.write_text("".join(lines[:at] + lines[at + 1 :]))
        with pytest.raises(SystemExit, match="2"):
            command("--write")
    assert len(written) == 2


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        *((f"--{name}=0", f"--{name}: 0 is below 1") for name in ("seeds", "steps", "rows")),
        *((f"--{name}=-1", f"--{name}: -1 is below 1") for name in ("problems", "samples")),
        *((f"--learning-rate={x}", "--learning-rate: ") for x in ("0", "nan", "-1e-4")),
        ("--only=opd,,exopd", "--only: 'opd,,exopd' has an empty name"),
    ],
)
def test_flags_without_sense_are_named(ran, command, capsys, flag, words):
    with pytest.raises(SystemExit, match="2"):
        command(flag)
    assert words in capsys.readouterr().err


def test_ctrl_c_ends_the_command_without_a_traceback(command, monkeypatch, capsys):
    def run(scope, only):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "run", run)
    with pytest.raises(SystemExit, match="130"):
        command()
    assert "stopped; the same command continues" in capsys.readouterr().err
    assert command.untouched()


# --- figures


def cell_line(method, seed, math, code):
    line = {"kind": "cell", "group": "divergence", "method": method, "seed": seed}
    line |= {"accuracy": {"math": math, "code": code}, "length": {"math": 20.0, "code": 24.0}}
    return line | {"probe": {"kl_teacher": 0.5}, "steps": 16}


def test_the_tables_intervals_are_scipys():
    rng = np.random.default_rng(0)
    seen = {m: rng.uniform(0.2, 0.9, (5, 2)) for m in ("opd", "jsd_corrected")}
    rows = [cell_line(m, seed, *x) for m, values in seen.items() for seed, x in enumerate(values)]
    lines = study_tables.table(rows, "divergence")
    cell = [text.strip() for text in lines[3].split("|")[1:-1]]

    def interval(values, sign=""):
        found = scipy.stats.ttest_1samp(100 * values, 0).confidence_interval(0.95)
        text = f"{(found.low + found.high) / 2:{sign}.1f} ± {(found.high - found.low) / 2:.1f}"
        return text.replace("-", "−")

    ours = seen["jsd_corrected"]
    delta = (ours - seen["opd"]).mean(1)
    assert cell[:2] == [METHODS["jsd_corrected"].label, "5"]
    assert cell[2:5] == [interval(ours.mean(1)), interval(ours[:, 0]), interval(ours[:, 1])]
    assert cell[5].removesuffix(" *") == interval(delta, "+")
    assert cell[6:8] == ["22.0", "0.5"]


def test_tables_go_between_their_marks_and_leave_the_rest(tmp_path):
    page = "before\n<!-- study:{0}:begin -->\nold\n<!-- study:{0}:end -->\nafter\n"
    (tmp_path / "RESULTS.md").write_text(page.format("divergence"))
    rows = [cell_line("opd", seed, 0.5, 0.6) for seed in (0, 1)]
    with pytest.raises(ValueError, match="study:credit:begin"):  # opd is of that group too
        study_tables.write(rows, tmp_path)
    whole = "".join(page.format(name) for name in GROUPS)
    (tmp_path / "RESULTS.md").write_text(whole)
    rows = [r | {"method": "jsd_corrected"} for r in rows]
    study_tables.write(rows, tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.count("before") == text.count("after") == len(GROUPS)
    assert "| JSD, corrected | 2 | 55.0 ± 0.0 |" in text
    assert (tmp_path / "study" / "divergence.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "study" / "results.jsonl").read_text().splitlines()) == 2


def test_a_gradients_noise_is_that_of_draws_with_a_known_covariance(monkeypatch):
    rng = np.random.default_rng(1)
    mean, n = np.full(400, 0.5), 400
    draws = mean + rng.normal(size=(n, 400)) * np.linspace(0, 2, 400)
    known = (np.linspace(0, 2, 400) ** 2).sum() / (mean**2).sum()
    monkeypatch.setattr(study_bench, "init_state", lambda *_: None)
    looked = Gradients(bench=None, n_batches=n)
    looked.rollouts = [None]
    monkeypatch.setattr(looked, "_all", lambda this, start: draws)
    monkeypatch.setattr(looked, "_exact", lambda this: np.tile(mean, (n, 1)))
    this = SimpleNamespace(recipe=None, student=SimpleNamespace(params=None))
    found = looked.of(this, seed=0)
    assert found["variance"] == pytest.approx(known, rel=0.02)
    assert found["cosine_mean"] > 0.99
    assert found["cosine"] == pytest.approx(1 / np.sqrt(1 + known), rel=0.02)


@pytest.mark.parametrize("name", ["policy_gradient", "cr_opd", "exact"])
def test_flows_are_the_change_of_probabilities_after_a_small_step(name):
    rng = np.random.default_rng(2)
    n, n_vocab, n_real = 40, 9, 8
    real_V = np.arange(n_vocab) < n_real

    def log_probs():
        logits = np.where(real_V, rng.normal(size=(n, n_vocab)) * 1.5, -np.inf)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    student, target = log_probs(), log_probs()
    ids = rng.integers(0, n_real, n)
    loss = build(loss="exact").loss if name == "exact" else LOSSES[name]
    arrays = {"student_xV": student, "target_xV": target}
    arrays = {key: jnp.asarray(x, jnp.float32) for key, x in arrays.items()}
    real = jnp.broadcast_to(real_V, student.shape)
    got = flows(
        ids_x=jnp.asarray(ids),
        **arrays,
        teacher_xV=None,
        ref_xV=None,
        real_xV=real,
        losses={name: loss},
    )
    s, t = np.exp(student), np.exp(target)
    log_u = np.where(real_V, np.where(real_V, target, 0) - np.where(real_V, student, 0), 0.0)
    a = np.take_along_axis(log_u, ids[:, None], 1)[:, 0]
    taken = np.eye(n_vocab)[ids]
    if name == "policy_gradient":
        direction = a[:, None] * (taken - s)
    elif name == "exact":
        direction = s * (log_u - (s * log_u).sum(-1, keepdims=True))
    else:
        free = real_V & (log_u > 0) & (taken == 0)
        rho = np.where(free, t * s * np.exp(log_u), 0.0)
        some = rho.sum(-1, keepdims=True) > 0
        rho = rho / np.where(some, rho.sum(-1, keepdims=True), 1.0)
        plain = a[:, None] * (taken - s)
        direction = np.where(some, np.abs(a)[:, None] * (rho - taken), plain)
    step = 1e-6
    moved = np.where(real_V, np.where(real_V, student, 0) + step * direction, -np.inf)
    moved = np.exp(moved) / np.exp(moved).sum(-1, keepdims=True)
    gain = np.where((a < 0)[:, None], np.maximum((moved - s) / step, 0.0), 0.0)
    np.testing.assert_allclose(got[f"{name}/all"], gain.sum(-1), atol=2e-5)
    right = np.where(log_u > 0, gain, 0.0).sum(-1)
    np.testing.assert_allclose(got[f"{name}/right"], right, atol=2e-5)
    assert 0 < right.sum() < gain.sum() * 1.0001


# --- on models of a few thousand parameters


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The microworld with random models and few problems."""
    tiny.build(tmp_path)
    for module in (microworld, importlib.import_module("gopd_jax.microworld.preset")):
        monkeypatch.setattr(module, "path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(dataset, "ROWS", {"train": 64, "test": 16})
    monkeypatch.setenv("GOPD_JAX_DATA", str(tmp_path / "data"))
    return Scope(out=tmp_path / "out", seeds=2, steps=1, rows=16, problems=4, samples=1)


def lines(scope):
    found = [json.loads(line) for line in (scope.out / "results.jsonl").open()]
    unlike = ("seconds", "step_seconds", "compiled")  # that depend on the clock and on who compiles
    return [{k: v for k, v in row.items() if k not in unlike} for row in found]


@pytest.mark.slow
def test_a_resumed_study_is_the_uninterrupted_one_and_seeds_share_what_is_compiled(world):
    both = ("opd", "gae_0.95_closed")
    study.run(world, both)
    compiled = [json.loads(line)["compiled"] for line in (world.out / "results.jsonl").open()]
    assert [n > 0 for n in compiled] == [True, False, True, False]
    other = dataclasses.replace(world, out=world.out.with_name("other"))
    study.run(dataclasses.replace(other, seeds=1), both[:1])
    study.run(other, both)
    assert lines(other) == lines(world)
    assert lines(world)[0]["train"] != lines(world)[1]["train"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gae_0.95_closed", "lag_1_token"])
def test_a_cell_is_the_training_that_its_config_asks_for(world, name):
    scope = dataclasses.replace(world, steps=2)
    bench = Bench(config("exopd", scope))
    _, ours, _ = Trainer(bench.of(config(name, scope))).train(seed=3)
    this = bench.of(config(name, scope, seed=3))
    stepper = Stepper(this)
    state = stepper.begin(init_state(this.recipe, this.student.params))
    for i in range(2):
        state, _ = stepper(state, stepper.make(i + this.recipe.lag), i)
    for got, want in zip(jax.tree.leaves(ours), jax.tree.leaves(state)):
        np.testing.assert_array_equal(got, want)
