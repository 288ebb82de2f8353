"""The checklist says what the run's files say, and of the rest that it is not recorded."""

import json
import re

import pytest
from test_report import evaluation_at, make_run

from gopd_jax import report
from gopd_jax.config import Batch, Config, Model, Objective, to_dict
from gopd_jax.objectives import objective
from gopd_jax.reporting.checklist import checklist
from gopd_jax.reporting.plots import Run

CONFIG = Config(
    workdir="w",
    student=Model(path="base", dtype="bfloat16"),
    teachers={"math": Model(path="better", template="enable_thinking=False")},
    routes={"code": "math"},
    reference=Model(path="base"),
    steps=9,
    seed=5,
    batch=Batch(prompts=4, rollouts=2),
    objective=Objective(lam=1.25),
)
ROLES = {"student": "base", "reference": "base", "teacher:math": "better"}
# What a paper has to report, as (section, item): objectives, section 7.
WANTED = {
    *(("Models", f"{r}: {i}") for r in ROLES for i in ("checkpoint", "tokenizer", "template")),
    *(("States", item) for item in ("source", "staleness")),
    *(("Signal", item) for item in ("target", "divergence and direction", "formula")),
    *(("Signal", item) for item in ("estimator that is differentiated", "verifier's reward")),
    ("Signal", "support and mass outside it"),
    *(("Credit", item) for item in ("gamma and lambda", "baseline", "critic")),
    *(("Weights", item) for item in ("routing", "gates", "off-policy correction", "clips")),
    *(("Weights", item) for item in ("mask", "aggregation", "regularisers")),
    *(("Sampling", item) for item in ("temperature", "top-p", "rollouts per prompt")),
    *(("Sampling", item) for item in ("lengths", "truncation")),
    *(("Compute", item) for item in ("optimiser", "steps", "teacher forwards", "tokens")),
    *(("Compute", item) for item in ("wall clock", "devices")),
    *(("Evaluation", item) for item in ("matched baselines", "samples", "seeds", "error bars")),
    ("Evaluation", "share of the way to the teacher"),
    *(("Diagnostics", item) for item in ("recorded", "preflight")),
    *(("Negative results", i) for i in ("advice", "skipped updates", "tasks that got worse")),
}


def made(config=CONFIG, *, metrics=(), evaluation=(), timing=(), checks=(), **changes):
    """A run of two steps with `changes` in its config, by key: objective__lam=1.0."""
    values = json.loads(json.dumps(to_dict(config)))
    for key, value in changes.items():
        *path, last = key.replace("__", ".").split(".")
        inner = values
        for name in path:
            inner = inner[name]
        inner[last] = value
    rows = [
        {"step": i, "tokens": 20.0, "length": 2.0 + i, "truncated": 0.25 * i, "skipped": i - 1.0}
        for i in (1, 2)
    ]
    return Run(
        name="run",
        metrics=[row | dict(metrics) for row in rows],
        timing=list(timing) or [{"step": 1, "seconds": 7.0, "seconds/save": 2.0}],
        evaluation=list(evaluation),
        samples=[],
        checks=list(checks),
        info={
            "config": values,
            "identity": {"tokenizer": "feed", "data.train content": "c0de"},
            "environment": {"devices": "4 x TPU v4", "mesh": {"data": 2}, "jax": "0.10"},
            "models": {
                role: {"path": path, "digest": f"{path}-digest", "parameters": 1234}
                for role, path in ROLES.items()
            },
            "formula": "A = B",
        },
    )


def told(run):
    return {item: text for _, item, text in checklist(run)}


def test_every_item_of_the_list_is_there_once():
    found = [(section, item) for section, item, _ in checklist(made())]
    assert len(found) == len(set(found))
    assert set(found) == WANTED


def test_it_holds_what_the_files_hold():
    text = told(made())
    wanted = {
        "student: checkpoint": ["base", "1,234 parameters", "base-digest", "bfloat16"],
        "teacher:math: checkpoint": ["better", "float32"],
        "student: tokenizer": ["feed"],
        "source": ["on-policy", "microworld:train", "c0de"],
        "staleness": ["0 steps old", "1 update a batch"],
        "target": ["lambda = 1.25", "reference^(1 − lambda)"],
        "divergence and direction": ["KL(student ‖ target)"],
        "formula": ["A = B"],
        "routing": ["math → math", "code → math"],
        "rollouts per prompt": ["2 of each of 4 prompts"],
        "lengths": ["at most 64", "at most 32", "mean 3.5 (3.0 → 4.0)"],
        "truncation": ["mean 38 % (25 % → 50 %)"],
        "optimiser": ["AdamW", "1e-05", "0.9 and 0.999", "0.01", "all weights"],
        "steps": ["2 of 9"],
        "teacher forwards": ["16 rows, 40 completion", "1 teacher", "once by the reference"],
        "tokens": ["40 completion tokens in 2 steps"],
        "wall clock": ["7 s", "saving 2 s"],
        "devices": ["4 x TPU v4", "data 2", "jax 0.10"],
        "seeds": ["one, 5", "not recorded"],
        "recorded": ["length, skipped, tokens, truncated"],
        "skipped updates": ["1 of 2"],
        "advice": ["skipped_updates at step 2"],
    }
    for item, parts in wanted.items():
        for part in parts:
            assert part in text[item], (item, text[item])


@pytest.mark.parametrize(
    ("changes", "item", "part"),
    [
        ({"objective__lam": 1.0}, "target", "the teacher itself"),
        ({"batch__updates": 2, "batch__epochs": 3}, "skipped updates", "1 of 12"),
        (
            {"objective__lam": 1.0, "objective__task_lam": {"math": 2.0}},
            "target",
            "math 2: teacher^",
        ),
        (
            {"objective__divergence": "forward_kl"},
            "divergence and direction",
            "KL(target ‖ student",
        ),
        ({"objective__divergence": "jsd(beta=0.3)"}, "divergence and direction", "jsd(beta=0.3)"),
        (
            {"objective__divergence": "jsd", "objective__estimator": "stop_gradient"},
            "estimator that is differentiated",
            "biased",
        ),
        ({"objective__divergence": "jsd"}, "estimator that is differentiated", "f′(u)"),
        ({"objective__loss": "k3"}, "estimator that is differentiated", "KL(target ‖ student)"),
        (
            {"objective__loss": "k3"},
            "divergence and direction",
            "forward KL, KL(target ‖ student)",
        ),
        (
            {"objective__loss": "entropy_gated(k=4)"},
            "divergence and direction",
            "besides where the target is uncertain",
        ),
        (
            {"objective__loss": "ratio_gated"},
            "divergence and direction",
            "KL(target ‖ student), and reverse KL",
        ),
        (
            {"objective__loss": "cr_opd(margin=0.1)"},
            "estimator that is differentiated",
            "biased by design",
        ),
        (
            {"objective__loss": "asymmetric"},
            "estimator that is differentiated",
            "where the advantage is above 0",
        ),
        (
            {"objective__lam": 1.0, "objective__lam_by_row": True},
            "target",
            "own that one: teacher^",
        ),
        ({"routes": {"math": "math=0.5, code=0.5"}}, "teacher forwards", "once by every teacher"),
        ({"objective__loss": "exact"}, "support and mass outside it", "the whole vocabulary"),
        (
            {"objective__loss": "exact", "objective__support": "top_k(k=9)"},
            "support and mass outside it",
            "top_k(k=9); mass outside: rest",
        ),
        ({"objective__credit": "gae"}, "gamma and lambda", "gamma = 1, lambda = 0.95"),
        ({"objective__credit": "discounted(gamma=0.9)"}, "gamma and lambda", "gamma=0.9"),
        ({"objective__baseline": "leave_one_out"}, "baseline", "leave_one_out"),
        ({"critic": {"hidden": 7}}, "critic", "hidden 7"),
        ({"objective__gates": ["trust", "first(n=3)"]}, "gates", "trust, first(n=3)"),
        ({"objective__regularizers": ["entropy(weight=1)"]}, "regularisers", "entropy(weight=1)"),
        ({"objective__log_u_clip": 5.0}, "clips", "log_u_clip 5.0"),
        ({"objective__veto": -9.0}, "off-policy correction", "veto -9.0"),
        ({"objective__source": "teacher"}, "source", "the teacher's completions"),
        ({"objective__task": "grpo"}, "verifier's reward", "grpo, and 1 times"),
        ({"objective__advantage": "grpo"}, "verifier's reward", "the advantage itself"),
        ({"sampling__lag": 3, "batch__updates": 2}, "staleness", "3 steps old; 2 updates"),
        ({"lora": {"rank": 8}}, "optimiser", "adapters of rank 8"),
    ],
)
def test_a_setting_changes_its_item(changes, item, part):
    assert part not in (told(made())[item] or "")
    assert part in told(made(**changes))[item]


def test_what_does_not_apply_is_none():
    assert told(made())["critic"] is None
    imitation = told(made(objective__advantage="imitation", objective__source="data"))
    absent = ("staleness", "target", "divergence and direction", "teacher forwards", "critic")
    assert {item for item, text in imitation.items() if text is None} == set(absent)


@pytest.mark.parametrize("loss", ["exact", "k2", "ratio_gated", "entropy_gated(k=4)"])
def test_a_loss_without_an_advantage_has_no_credit_and_no_baseline(loss):
    text = told(made(objective__loss=loss))
    assert text["gamma and lambda"] is text["baseline"] is None
    asked = told(made(objective__loss=loss, objective__gates=["agree"]))
    assert asked["gamma and lambda"].startswith("immediate")
    for weighing in ("ppo(dual=None)", "cr_opd", "asymmetric"):
        assert told(made(objective__loss=weighing))["baseline"] == "none"


def test_a_loss_of_ones_own_is_described_by_what_it_takes(monkeypatch):
    def own(student_xS, target_xS, valid_xS):
        """Never called: its parameters say that it is over the support."""

    items = "estimator that is differentiated", "support and mass outside it"
    run = made(objective__loss="own")
    for item in items:
        assert "no table has the loss 'own'" in told(run)[item]
    monkeypatch.setitem(objective.TABLES["loss"], "own", own)
    estimator, support = (told(run)[item] for item in items)
    assert estimator.startswith("own: its value at each visited state")
    assert support.startswith("the whole vocabulary")


def test_an_earlier_versions_settings_are_off():
    """A run.json that has no key of what came later says what was done at its time."""
    run = made()
    objective = {"advantage": "gopd", "lam": 1.0, "loss": "policy_gradient", "reduction": "r"}
    run.info["config"] |= {"objective": objective}
    text = told(run)
    assert text["gamma and lambda"].startswith("immediate")
    assert text["divergence and direction"].startswith("reverse KL")
    assert text["source"].startswith("the student's own")
    for item in ("baseline", "gates", "regularisers", "verifier's reward"):
        assert text[item] == "none"
    assert not [item for item, words in text.items() if words and "run.json has no" in words]


def test_without_files_it_says_so_and_invents_nothing():
    run = Run(name="run", metrics=[], timing=[], evaluation=[], samples=[], info={})
    found = checklist(run)
    fixed = {"mask"}  # what every run of this package does
    for _, item, text in found:
        if item not in fixed and item != "recorded":
            assert text is not None, item
            assert text.startswith("not recorded: "), (item, text)
            assert len(text) > 25, item
    assert {item for _, item, _ in found} - {"student: checkpoint"} >= {"seeds", "advice"}


def test_fingerprints_come_from_preflight_where_there_is_one():
    names = {"vocabulary": "abba", "template": "cafe", "ends": "<e>", "pad": "<p>"}
    checks = [
        *(
            {"role": "teacher:math", "name": n, "value": v, "limit": "sha256", "verdict": "ok"}
            for n, v in names.items()
        ),
        {"role": "student", "name": "KL", "value": "3", "limit": "at most 2", "verdict": "fail"},
    ]
    text = told(made(checks=checks))
    assert text["teacher:math: tokenizer"] == "sha256 abba; ends of a completion <e>; padding <p>"
    assert text["teacher:math: template"] == "sha256 cafe; options enable_thinking=False"
    assert text["reference: tokenizer"].startswith("not recorded: ")
    assert text["preflight"] == "4 of 5 checks passed; student: KL is 3 (at most 2): fail"


def test_tasks_that_fell_are_negative_results_with_their_error():
    evaluation = [
        *evaluation_at(0, "student", (0.50, 0.50), stderr=0.03),
        *evaluation_at(2, "student", (0.41, 0.42), stderr=0.03),
        *evaluation_at(0, "teacher:math", (0.9, 0.9), stderr=0.03),
    ]
    text = told(made(evaluation=evaluation))
    # Two standard errors of a difference are 2 sqrt(2) 0.03 = 8.5 points.
    worse = text["tasks that got worse"].split("; ")
    assert worse[0].startswith("math by 9.0 points, beyond 2 standard errors (4.2)")
    assert worse[1].startswith("code by 8.0 points, within")
    assert text["share of the way to the teacher"] == "math -23 %; code -20 %"
    assert text["matched baselines"].startswith("evaluated alike: student at step 0, teacher:math.")
    assert text["samples"] == "64 problems of each task, 4 completions of each"


def evaluated(*models, stderr=0.01):
    """The student at 50 % and then 60, and teachers at 70 % of both tasks."""
    student = (evaluation_at(i, "student", (x, x), stderr) for i, x in ((0, 0.5), (2, 0.6)))
    teachers = (evaluation_at(0, f"teacher:{name}", (0.7, 0.7), stderr) for name in models)
    return [row for rows in (*student, *teachers) for row in rows]


def test_a_teacher_that_nobody_evaluated_is_not_said_to_be_behind():
    def way(*models, **changes):
        return told(made(evaluation=evaluated(*models), **changes))[
            "share of the way to the teacher"
        ]

    unknown = "not known: its teacher was not evaluated"
    assert way("math") == "math 50 %; code 50 %"
    assert way() == f"math {unknown}; code {unknown}"
    assert way("math", routes={}) == f"math 50 %; code {unknown}"
    assert way(teachers={}) is None
    # 3 points ahead, where two standard errors are 2.8 and 14.
    ahead = [*evaluated(), *evaluation_at(0, "teacher:math", (0.53, 0.53), stderr=0.01)]
    assert told(made(evaluation=ahead))["share of the way to the teacher"].startswith("math 333 %")
    ahead = [row | {"stderr": 0.05} for row in ahead]
    text = told(made(evaluation=ahead))["share of the way to the teacher"]
    assert text.startswith("math none: its teacher is not ahead by 2 standard errors;")
    mixed = {"math": "math=0.7, code=0.3", "code": "math"}
    assert way("math", routes=mixed) == (
        f"math to teacher:math 50 %; math to teacher:code {unknown}; code 50 %"
    )


def test_one_problem_has_no_standard_error_and_nothing_is_claimed_of_it():
    fell = [
        *evaluation_at(0, "student", (0.9, 0.5), stderr=None),
        *evaluation_at(2, "student", (0.1, 0.6), stderr=None),
        *evaluation_at(0, "teacher:math", (1.0, 1.0), stderr=None),
    ]
    text = told(made(evaluation=fell))
    why = "one problem has no standard error"
    assert (
        text["share of the way to the teacher"] == f"math not known: {why}; code not known: {why}"
    )
    assert text["tasks that got worse"] == (
        "math by 80.0 points, of one problem, which has no standard error"
    )


def strict(path):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_tables_are_json_beside_the_page(tmp_path):
    path = make_run(tmp_path / "exopd")
    with (path / "evaluation.jsonl").open("a") as file:
        row = evaluation_at(0, "teacher:art", (0.5,))[0] | {"stderr": float("nan")}
        file.write(json.dumps(row) + "\n")
    page = report.write(path)
    first = (path / "report.json").read_bytes()
    found = strict(path / "report.json")
    assert list(found) == [
        *("runs", "tasks", "overview", "results", "advice", "checklist", "settings"),
    ]
    assert found["runs"] == ["exopd"]
    assert found["results"][1]["name"] == "student, step 20"
    assert found["results"][1]["cells"]["math"]["accuracy"] == 0.84
    items = {row["item"]: row["values"] for row in found["checklist"]}
    assert items["seeds"][0].startswith("one, 3")
    assert report.write(path) == page
    assert (path / "report.json").read_bytes() == first
    with pytest.raises(ValueError, match=r"x\.json is the page, .* give \.html"):
        report.write(path, out=tmp_path / "x.json")


def test_a_comparison_has_a_column_for_each_run_and_marks_what_differs(tmp_path):
    paths = [make_run(tmp_path / name, lam=lam) for name, lam in (("opd", 1.0), ("exopd", 1.25))]
    page = report.write(*paths).read_text()
    rows = strict(paths[0] / "comparison.json")["checklist"]
    assert {len(row["values"]) for row in rows} == {2}
    differing = [row["item"] for row in rows if row["differs"]]
    assert differing == ["target"]
    section = page[page.index('<section id="checklist">') : page.index('<section id="settings">')]
    assert re.findall(r'<tr class="differs"><th>(.*?)</th>', section) == differing
    sections = re.findall(r'<th class="group" colspan="3">(.*?)</th>', section)
    assert sections == list(dict.fromkeys(row["section"] for row in rows))
    assert len(sections) == len(set(sections))


def test_advice_is_on_the_page_where_there_is_any(tmp_path):
    quiet = report.write(make_run(tmp_path / "quiet", keys=("kl_teacher",))).read_text()
    assert 'id="advice"' not in quiet
    path = make_run(tmp_path / "loud", keys=("kl_teacher", "advantage_absmax"))
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [row | {"advantage_absmax": 99.0} for row in rows]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = report.write(path).read_text()
    section = page[page.index('<section id="advice">') : page.index('<section id="accuracy">')]
    assert re.findall(r"<b>(.*?)</b>", section) == ["step 10"]
    assert "99.0" in section
    (told_,) = strict(path / "report.json")["advice"]
    assert (told_["run"], told_["step"], told_["name"]) == ("loud", 10, "outliers")
