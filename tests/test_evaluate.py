"""Accuracy, its standard error and lengths against completions that are known beforehand."""

import itertools

import jax
import numpy as np
import pytest
import tiny

from gopd_jax import data, evaluate, sharding, step, train
from gopd_jax.models import tokenizer as tokenizers
from gopd_jax.reader import Reader
from gopd_jax.types import Rollout
from gopd_jax.verifiers import Verdict

LENGTH = 64
# Rights among the samples of each problem, math then code: means 1, 1/2, 0 and 0, 0, 1/2.
RIGHT = [[True, True], [True, False], [False, False], [False, False], [False, False], [False, True]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(test set, tokenizer) of the tiny run."""
    root = tmp_path_factory.mktemp("world")
    tiny.build(root)
    dataset = data.load(str(root / "test.jsonl"), ("math", "code"))
    return dataset, tokenizers.load(root / "base")


def scripted(dataset, chat, calls):
    """A sampler that writes the right or a wrong answer by the row's number, with known ends."""
    records = [r for task in dataset.tasks for r in dataset.records[task][:3]]
    texts = []
    for record, rights in zip(records, RIGHT):
        texts += [record.completion if right else "no" for right in rights]

    def sample(params, prompts, key):
        calls.append(prompts.row_B.shape[0])
        tokens_BP, row_B = np.asarray(prompts.tokens_BP), np.asarray(prompts.row_B)
        n_rows, width = tokens_BP.shape
        tokens_BL = np.zeros((n_rows, width + LENGTH), np.int32)
        mask_BT = np.zeros((n_rows, width + LENGTH - 1), bool)
        ended_B = np.zeros(n_rows, bool)
        tokens_BL[:, :width] = tokens_BP
        for b, row in enumerate(row_B.tolist()):
            # Rows past the last problem fill a batch; they would be right and long.
            text = texts[row] if row < len(texts) else records[-1].completion
            ids = chat.encode(text)[:LENGTH]
            tokens_BL[b, width : width + len(ids)] = ids
            mask_BT[b, width - 1 : width - 1 + len(ids)] = True
            ended_B[b] = row % 3 != 0
        rollout = Rollout(
            tokens_BL=tokens_BL,
            valid_BL=tokens_BL > 0,
            mask_BT=mask_BT,
            logp_BT=np.zeros(mask_BT.shape, np.float32),
            ended_B=ended_B,
            group_B=row_B,
            task_B=row_B,
            n_prompt=width,
        )
        return jax.tree.map(jax.numpy.asarray, rollout)

    return sample, [len(chat.encode(text)[:LENGTH]) for text in texts]


def measured(world, n_rows, n_problems=3, n_samples=2):
    dataset, chat = world
    calls: list[int] = []
    sample, lengths = scripted(dataset, chat, calls)
    result = evaluate.evaluate(
        sample,
        None,
        dataset,
        Reader(tokenizer=chat, length=48),
        mesh=sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1]),
        n_problems=n_problems,
        n_samples=n_samples,
        n_rows=n_rows,
        seed=1,
        step=7,
        model="student",
    )
    return result, calls, lengths


def test_the_figures_are_those_of_known_completions(world):
    result, calls, lengths = measured(world, n_rows=4)
    assert calls == [4, 4, 4]
    math, code = result.rows
    # Means of the problems 1, 1/2, 0: deviation 1/2, over the square root of three problems.
    assert (math["accuracy"], math["stderr"]) == pytest.approx((0.5, 0.5 / 3**0.5), abs=1e-12)
    # Means 0, 0, 1/2: squared deviations 1/36, 1/36, 4/36, over n - 1 = 2, over 3.
    assert (code["accuracy"], code["stderr"]) == pytest.approx((1 / 6, 1 / 6), abs=1e-12)
    for row, part, n_cut in ((math, lengths[:6], 2), (code, lengths[6:], 2)):
        assert row["length"] == pytest.approx(np.mean(part), abs=1e-12)
        assert row["truncated"] == pytest.approx(n_cut / 6, abs=1e-12)
        assert (row["step"], row["model"], row["problems"], row["samples"]) == (7, "student", 3, 2)
    # Problems that the two samples solve both, one and none of; none, none, one of.
    assert math["pass_at"] == pytest.approx({"1": 0.5, "2": 2 / 3}, abs=1e-12)
    assert code["pass_at"] == pytest.approx({"1": 1 / 6, "2": 1 / 3}, abs=1e-12)
    assert [row["task"] for row in result.rows] == ["math", "code"]
    assert result.accuracy() == {"math": math["accuracy"], "code": code["accuracy"]}


@pytest.mark.parametrize("n", [1, 5, 6])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_have_a_solution(n):
    solved = np.array(list(itertools.product((False, True), repeat=n)))
    for k in range(1, n + 1):
        chosen = [
            rows[:, list(c)].any(1).mean()
            for rows in [solved]
            for c in itertools.combinations(range(n), k)
        ]
        assert evaluate.pass_at(solved, k) == pytest.approx(np.mean(chosen), abs=1e-12)


def test_pass_at_k_counts_whole_solutions_of_1_2_4_and_all_samples(world, monkeypatch):
    half = [Verdict(0.5, ""), Verdict(0.99, ""), Verdict(1.0, "")]
    monkeypatch.setattr(evaluate, "verify", lambda texts, records: half * (len(texts) // 3))
    for row in measured(world, n_rows=6, n_samples=3)[0].rows:
        assert row["accuracy"] == pytest.approx(0.83, abs=1e-12)
        assert row["pass_at"] == pytest.approx({"1": 1 / 3, "2": 2 / 3, "3": 1}, abs=1e-12)


def test_the_samples_shown_are_the_first_of_each_problem_with_their_verdicts(world):
    result, _, _ = measured(world, n_rows=4)
    assert [s["task"] for s in result.samples] == ["math"] * 3 + ["code"] * 3
    assert [s["score"] for s in result.samples] == [float(rights[0]) for rights in RIGHT]
    dataset, _ = world
    asked = [r.messages[-1]["content"] for task in dataset.tasks for r in dataset.records[task]]
    assert [s["prompt"] for s in result.samples] == asked
    assert result.samples[0]["completion"] == dataset.records["math"][0].completion
    assert result.samples[2]["completion"] == "no"


@pytest.mark.parametrize("n_rows", [1, 5, 12, 16])
def test_a_partial_last_batch_and_its_filling_change_nothing(world, n_rows):
    result, calls, _ = measured(world, n_rows)
    want, _, _ = measured(world, 4)
    assert calls == [n_rows] * -(-12 // n_rows)
    assert result == want


def test_a_run_samples_the_same_completions_at_fewer_rows_at_a_time(tmp_path, monkeypatch):
    tiny.build(tmp_path)
    found = []

    def evaluated(sample, params, *args, n_rows, **options):
        result = evaluate.evaluate(sample, params, *args, n_rows=n_rows, **options)
        found.append((n_rows, result.samples, [row["length"] for row in result.rows]))
        if len(found) == 3:  # two teachers' and the student's
            raise InterruptedError
        return result

    monkeypatch.setattr(train, "evaluate", evaluated)
    told = []
    for name, rows in (("few", 8), ("whole", None)):
        evaluation = {"problems": 3, "samples": 2, "rows": rows}
        c = tiny.config(tmp_path, batch={"prompts": 16}, evaluation=evaluation)
        c.workdir = str(tmp_path / name)
        with pytest.raises(InterruptedError):
            train.run(c)
        told.append([*found])
        found.clear()
    few, whole = told
    assert [n_rows for n_rows, *_ in (*few, *whole)] == [8] * 3 + [16] * 3
    assert [rest for _, *rest in few] == [rest for _, *rest in whole]


def test_one_problem_has_no_standard_error(world):
    result, _, _ = measured(world, n_rows=2, n_problems=1)
    assert np.isnan(result.rows[0]["stderr"])
    assert result.rows[0]["problems"] == 1


def test_too_few_problems_are_refused_with_the_number_there_is(world):
    with pytest.raises(ValueError, match=r"evaluation.problems = 4 .*'code': 3.*ask for 3"):
        measured(world, n_rows=4, n_problems=4)


@pytest.mark.slow
def test_a_models_completions_do_not_depend_on_the_batch(tmp_path):
    tiny.build(tmp_path)
    results = []
    for prompts in (8, 16):
        this = train.prepare(tiny.config(tmp_path, batch={"prompts": prompts}))
        found = evaluate.evaluate(
            step.sampling(this.recipe, this.student.decoder),
            this.student.params,
            this.test,
            this.student.reader,
            mesh=this.mesh,
            n_problems=3,
            n_samples=4,
            n_rows=prompts,
            seed=1,
            step=0,
            model="student",
        )
        results.append(found)
    assert results[0] == results[1]
    assert len({sample["completion"] for sample in results[0].samples}) > 3
