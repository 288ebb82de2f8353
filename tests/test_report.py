"""The page holds what the rows hold, loads nothing, and runs nothing that a model wrote."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gopd_jax import report
from gopd_jax.metrics import Writer
from gopd_jax.reporting import plots

SCRIPT = "</pre><script>alert(1)</script><img src=http://a.example/b.png onerror=alert(2)>"
FINAL = {"student": (0.84, 0.76), "teacher:math": (0.82, 0.48), "teacher:code": (0.47, 0.75)}


class Page(HTMLParser):
    """Tags with their attributes, and the text of the elements in `inside`, by element."""

    def __init__(self, html, *inside):
        super().__init__()
        self.tags, self.texts, self.inside, self._open = [], {n: [] for n in inside}, inside, []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in self.inside:
            self._open.append(tag)
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data):
        if self._open:
            self.texts[self._open[-1]][-1] += data


def evaluation_at(step, model, accuracies, stderr=0.01):
    return [
        {
            **{"step": step, "model": model, "task": task, "accuracy": accuracy},
            **{"stderr": stderr, "length": 9.25, "truncated": 0.125, "problems": 64, "samples": 4},
            "pass_at": {"1": accuracy, "2": accuracy, "4": (1 + accuracy) / 2},
        }
        for task, accuracy in zip(("math", "code"), accuracies)
    ]


def sample_at(step, model, task, completion, score, prompt="1 + 1 ="):
    place = {"step": step, "model": model, "task": task, "prompt": prompt}
    return place | {"completion": completion, "score": score, "reason": "because"}


def make_run(
    workdir, *, lam=1.25, steps=20, keys=("kl_teacher", "entropy"), final=FINAL["student"]
):
    with Writer(workdir, resume_step=0) as writer:
        writer.evaluation(evaluation_at(0, "student", (0.46, 0.45)))
        for teacher in ("teacher:math", "teacher:code"):
            writer.evaluation(evaluation_at(0, teacher, FINAL[teacher]))
        writer.samples([sample_at(0, "student", "math", SCRIPT, 0.0)])
        writer.samples([sample_at(0, "teacher:math", "math", "2 (taught)", 1.0)])
        for step in range(1, steps + 1):
            row = {key: 1.0 / (step + i) for i, key in enumerate(keys)}
            writer.write(step, row | {"skipped": 0.0}, {"seconds": 2.0, "tokens_per_second": 50.0})
        writer.evaluation(evaluation_at(steps, "student", final))
        again = sample_at(steps, "student", "math", "2 (again)", 1.0)
        writer.samples([again | {"completion": "2 (after) \ud83d"}, again])
    info = {
        "config": {"steps": steps, "seed": 3, "objective": {"lam": lam, "loss": "policy_gradient"}},
        "environment": {"jax": "0.10.2"},
        "models": {"student": {"path": "/data/base", "digest": "ab12", "parameters": 345}},
        "formula": "A = log T - log S < 0 & more",
    }
    (workdir / "run.json").write_text(json.dumps(info))
    return workdir


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = report.write(make_run(tmp_path_factory.mktemp("runs") / "exopd"))
    assert path.name == "report.html"
    return path.read_text()


def table(html):
    """The rows of the results' table as lists of texts, spaces collapsed."""
    section = html[html.index('<section id="results">') : html.index('<section id="accuracy">')]
    rows = re.findall(r"<tr.*?</tr>", section, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", c).split()) for c in row] for row in cells]


def titles(html):
    return [text.strip() for text in re.findall(r"<figcaption>(.*?)<small>", html)]


def test_nothing_is_loaded_and_no_script_is_in_the_page(page):
    parsed = Page(page, "style")
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                assert value.startswith("#"), (tag, name, value)
            for target in re.findall(r"url\(\s*(.)", value or ""):
                assert target == "#", (tag, value)
    assert not [text for text in parsed.texts["style"] if "url(" in text or "@import" in text]
    policy = [a["content"] for tag, a in parsed.tags if "http-equiv" in a]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_what_models_and_configs_wrote_is_shown_as_text(page):
    texts = Page(page, "pre").texts["pre"]
    assert SCRIPT in texts
    assert "A = log T - log S < 0 & more" in texts


def test_samples_stand_side_by_side_before_after_teacher(page):
    section = page[page.index('<section id="samples">') : page.index('<section id="settings">')]
    assert re.findall(r"<h4>(.*?)</h4>", section) == [
        "student, step 0",
        "student, step 20",
        "teacher:math",
    ]
    assert Page(section, "pre").texts["pre"] == ["1 + 1 =", SCRIPT, "2 (after) ?", "2 (taught)"]
    assert re.findall(r"<b.*?>(.*?)</b>", section) == ["✗ wrong", "✓ right", "✓ right"]


def test_the_table_has_accuracy_error_length_and_the_share_of_the_way_to_the_teacher(page):
    header, columns, *rows = table(page)
    assert [*filter(None, header)] == ["math", "code", "mean"]
    assert columns == ["model", *("accuracy", "length", "cut off") * 2, "accuracy"]
    # 38 of 36 points, 31 of 30; the mean's error is sqrt(2) / 2 of one task's.
    assert rows == [
        [
            "student, step 0",
            *("46.0 ± 1.0 pass@4 73.0", "9.2", "12.5"),
            *("45.0 ± 1.0 pass@4 72.5", "9.2", "12.5"),
            "45.5 ± 0.7",
        ],
        [
            "student, step 20",
            *("84.0 ± 1.0 +38.0 · 106 % of the way pass@4 92.0", "9.2", "12.5"),
            *("76.0 ± 1.0 +31.0 · 103 % of the way pass@4 88.0", "9.2", "12.5"),
            "80.0 ± 0.7",
        ],
        [
            "teacher:math",
            *("82.0 ± 1.0 pass@4 91.0", "9.2", "12.5"),
            *("48.0 ± 1.0 pass@4 74.0", "9.2", "12.5"),
            "65.0 ± 0.7",
        ],
        [
            "teacher:code",
            *("47.0 ± 1.0 pass@4 73.5", "9.2", "12.5"),
            *("75.0 ± 1.0 pass@4 87.5", "9.2", "12.5"),
            "61.0 ± 0.7",
        ],
    ]


def test_a_teacher_within_two_standard_errors_gives_no_share_of_the_way(tmp_path):
    with Writer(tmp_path, resume_step=0) as writer:
        writer.evaluation(evaluation_at(0, "student", (0.80, 0.45)))
        writer.evaluation(evaluation_at(0, "teacher:math", (0.82, 0.48)))
        writer.write(1, {"loss": 1.0}, {})
        writer.evaluation(evaluation_at(1, "student", (0.78, 0.45)))
    after = table(report.write(tmp_path).read_text())[3]
    assert after[:2] == ["student, step 1", "78.0 ± 1.0 \u22122.0 pass@4 89.0"]
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    earlier = [{key: row[key] for key in row.keys() - {"pass_at"}} for row in rows]
    (tmp_path / "evaluation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in earlier))
    after = table(report.write(tmp_path).read_text())[3]
    assert after[:2] == ["student, step 1", "78.0 ± 1.0 \u22122.0"]


def test_plots_appear_for_the_keys_that_exist_and_no_others(page, tmp_path):
    assert titles(page) == [
        "math",
        "code",
        "KL(student ‖ teacher)",
        "Entropy of the student",
        "Throughput",
    ]
    levels = re.findall(r'<i class="dashed"[^>]*></i>(.*?)</li>', page)
    assert levels == ["teacher:math", "teacher:code"] * 2  # every teacher on every task
    make_run(tmp_path / "run", keys=("grad_norm", "reward", "reward/math"))
    html = report.write(tmp_path / "run").read_text()
    assert titles(html) == ["math", "code", "Reward", "Gradient norm", "Throughput"]
    assert html.count("<svg") == 5


def test_metrics_alone_make_a_page_and_a_missing_file_names_the_cure(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl; give the workdir of a run"):
        report.write(tmp_path)
    with pytest.raises(SystemExit):
        report.main([f"--workdir={tmp_path}"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "entropy": 0.5, "reward": null}\n{"st')
    html = report.write(tmp_path).read_text()
    assert titles(html) == ["Entropy of the student"]
    assert 'id="results"' not in html


@pytest.mark.parametrize("text", ["", '{"checks": [', "[]", '{"checks": [{"role": "student"}]}'])
def test_a_damaged_preflight_does_not_take_the_report(tmp_path, text):
    run = make_run(tmp_path / "run", steps=2)
    (run / "preflight.json").write_text(text)
    html = report.write(run).read_text()
    assert str(run / "preflight.json") in html
    items = json.loads((run / "report.json").read_text())["checklist"]
    (told,) = [i["values"][0] for i in items if i["item"] == "preflight"]
    assert told.startswith(f"not recorded: {run / 'preflight.json'} ")
    assert "put back an undamaged copy, or remove it" in told


@pytest.mark.parametrize("text", ["", '{"config": ', "[]"])
def test_a_damaged_run_json_is_named(tmp_path, capsys, text):
    run = make_run(tmp_path / "run", steps=2)
    (run / "run.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        report.main([f"--workdir={run}"])
    said = capsys.readouterr().err
    assert f"{run / 'run.json'} is no JSON object" in said
    assert "start the run's command again" in said


@pytest.mark.parametrize("out", [".", "no/page.html", "/proc/x/e", "/proc/x.html"])
def test_a_page_that_cannot_be_written_is_named(tmp_path, capsys, out):
    run = make_run(tmp_path / "run", steps=2)
    with pytest.raises(SystemExit, match="2"):
        report.main([f"--workdir={run}", f"--out={tmp_path / out}"])
    said = capsys.readouterr().err
    assert f"{tmp_path / out}" in said
    assert re.search("give DIR/report.html|--out=FILE.html puts the page elsewhere", said)


def test_several_runs_share_plots_and_one_table_that_names_what_differs(tmp_path, capsys):
    first = make_run(tmp_path / "opd", lam=1.0, final=(0.81, 0.74))
    second = make_run(tmp_path / "exopd")
    report.main([f"--workdir={first}", f"--workdir={second}"])
    path = first / "comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    html = path.read_text()
    assert not (first / "report.html").exists()
    names = [row[0] for row in table(html)[2:]]
    assert names == [
        *("student, step 0", "opd: student, step 20", "exopd: student, step 20"),
        *("teacher:math", "teacher:code"),
    ]
    # Overlaid: as many plots as one run has, and each training curve in both runs' colours.
    assert titles(html) == [
        "math",
        "code",
        "KL(student ‖ teacher)",
        "Entropy of the student",
        "Throughput",
    ]
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        assert "stroke: var(--s0)" in svg
        assert "stroke: var(--s1)" in svg
    levels = re.findall(r'<i class="dashed"[^>]*></i>(.*?)</li>', html)
    assert levels == ["teacher:math", "teacher:code"]  # of each task its own, all in one colour
    differing = re.findall(r'<tr class="differs"><th><code>(.*?)</code>', html)
    assert differing == ["objective.lam"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [make_run(tmp_path / parent / "run", steps=2) for parent in ("a", "b")]
    html = report.write(*paths, out=tmp_path / "page.html").read_text()
    assert f"<th>{paths[0]}</th><th>{paths[1]}</th>" in html


def test_a_report_is_the_same_bytes_every_time_and_its_ids_are_unique(page, tmp_path):
    path = make_run(tmp_path / "exopd")
    assert report.write(path).read_bytes() == report.write(path).read_bytes()
    ids = [attributes["id"] for _, attributes in Page(page).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert used
    assert used <= set(ids)


def test_plots_take_every_colour_from_the_page(page):
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", svgs)) == set()
    used = set(re.findall(r"var\(--(\w+)\)", svgs))
    assert {"ink", "muted", "grid", "s0", "s1"} <= used
    assert used <= set(re.findall(r"--(\w+):", page))


def test_a_level_is_drawn_where_the_teacher_is():
    """The dashed height, read back from the drawing, halves that of a line from 50 to 100 %."""
    line = plots.Line(label="t", points=[(0, 0.75)], colour=plots.MUTED, dashed=True, level=True)
    ramp = plots.Line(label="s", points=[(0, 0.5), (10, 1.0)], colour=plots.INK)
    svg = str(plots.draw([ramp, line], name="x", percent=True))
    paths = re.findall(
        r'd="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+)[^"]*"[^>]*?style="([^"]*)"', svg
    )
    (student,) = [p for p in paths if "--ink" in p[4]]
    (level,) = [p for p in paths if "dasharray" in p[4]]
    assert level[1] == level[3]
    middle = (float(student[1]) + float(student[3])) / 2
    np.testing.assert_allclose(float(level[1]), middle, atol=1e-3)
    assert {"60%", "100%"} <= set(re.findall(r">(\d+%)<", svg))


def test_the_running_mean_is_centred():
    values = np.random.default_rng(0).normal(size=200)
    got = plots.running_mean(values)
    want = [values[max(i - 4, 0) : i + 5].mean() for i in range(200)]
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_teachers_of_a_mixture_are_beside_the_student_each_under_its_own_name(tmp_path):
    def mix(workdir, routes):
        made = make_run(workdir)
        info = json.loads((made / "run.json").read_text())
        info["config"]["routes"] = routes
        (made / "run.json").write_text(json.dumps(info))
        return report._read(made, made.name)

    mixed = mix(tmp_path / "mixed", {"math": "math=0.7, code = 0.3"})
    plain = mix(tmp_path / "plain", {})
    assert mixed.teachers("math") == ["teacher:math", "teacher:code"]
    assert plain.teachers("math") == ["teacher:math"]
    (shown,) = report._samples([mixed], ["math"])
    assert [heading for heading, _ in shown["shown"][0][1]][-1] == "teacher:math"
    legends = [
        [label for label, *_ in plots.accuracy_figures(runs, ["math"])[0]["legend"]]
        for runs in ([mixed, mixed], [plain, plain])
    ]
    assert [name for name in legends[0] if "teacher" in name] == ["teacher:math", "teacher:code"]
    assert [name for name in legends[1] if "teacher" in name] == ["teacher:math"]
    # Of which of them would the share be?
    gaps = [report._results([run], ["math"])[1]["gains"]["math"]["gap"] for run in (mixed, plain)]
    assert gaps[0] is None
    assert gaps[1] == pytest.approx((0.84 - 0.46) / (0.82 - 0.46))
