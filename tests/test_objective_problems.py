"""Settings of an objective that are refused as a config is read: all at once, with cures."""

import ast
import re
from pathlib import Path

import pytest

from gopd_jax import method, notes
from gopd_jax.config import Config, Critic, Model
from gopd_jax.objectives import checks
from gopd_jax.objectives.objective import TABLES

MANY = ("gates", "regularizers")


def config(changes) -> Config:
    """Right but for the changes, and with nothing to be read."""
    made = Config(workdir="run", student=Model(), teachers={"math": Model(), "code": Model()})
    for key, value in changes.items():
        *above, name = key.split(".")
        setattr(getattr(made, above[0]) if above else made, name, value)
    return made


def given(key, text):
    return {key: (text,) if key in MANY else text}


def only(problems, *words):
    """Each of the words is found in a problem of its own, and there is no other."""
    assert len(problems) == len(words), problems
    for pattern in words:
        assert sum(re.search(pattern, problem) is not None for problem in problems) == 1, pattern


# --- names and options


@pytest.mark.parametrize("key", TABLES)
def test_a_name_that_does_not_exist_is_answered_with_those_that_do(key):
    (problem,) = checks.objective_problems(given(key, "nothing(k=1)"))
    assert problem == f"objective.{key}: there is no 'nothing'; there are {sorted(TABLES[key])}"


@pytest.mark.parametrize("key", [k for k in TABLES if "none" not in TABLES[k] and k != "task"])
def test_what_an_objective_cannot_do_without_is_not_none(key):
    (problem,) = checks.objective_problems(given(key, "none"))
    assert problem.startswith(f"objective.{key}: there is no 'none'; there are [")


OUT_OF_RANGE = [
    ("divergence", "alpha(alpha=1)", "alpha is 1: write 'forward_kl'"),
    ("divergence", "alpha(alpha=0)", "alpha is 0: write 'reverse_kl'"),
    ("divergence", "jsd(beta=0)", "beta is 0; it must be above 0 and below 1"),
    ("divergence", "skew_reverse(alpha=1)", "1 - alpha is 0; it must be above 0"),
    ("divergence", "skew_forward(alpha=2)", "alpha is 2; it must be above 0 and below 1"),
    ("divergence", "mixture(weights=(1,))", r"weights = \(1,\); give each a weight > 0"),
    ("divergence", "mixture(of=('mse',), weights=(1,))", "no 'mse'; there are .*'hellinger'"),
    ("lam_schedule", "linear(steps=0)", "steps is 0; give the steps, above 0"),
    ("lam_schedule", "cosine(steps=-3)", "steps is -3; give"),
    ("credit", "discounted(gamma=2)", "gamma is 2; it must be from 0 to 1"),
    ("credit", "k_step(k=0)", "k is 0; give a whole number of steps, at least 1"),
    ("credit", "k_step(k=1.5)", "k is 1.5; give a whole number"),
    ("credit", "gae(lam=-0.1)", "lam is -0.1; it must be from 0 to 1"),
    ("gates", "first(n=0)", "n is 0; give at least 1 token"),
    ("gates", "drift(half_life=0)", "half_life is 0; give tokens above 0"),
    ("gates", "skip_ids(ids=())", r"ids is \(\); name tokens"),
    ("gates", "teacher_entropy", "give at_most, at_least or both"),
    ("importance", "sequence(cap=0.5)", "cap is 0.5; give a ratio of at least 1"),
    ("rejection", "token(cap=0)", "cap is 0; give a ratio of at least 1"),
    ("veto", 0.0, "floor is 0.0; give a log-ratio below 0"),
    ("loss", "ppo(low=2)", "low = 2, .* give 0 <= low <= 1"),
    ("loss", "ppo(dual=1)", "dual = 1; give .* dual above 1 or None"),
    ("loss", "entropy_gated(k=0)", "k = 0 counts no ids; give an int of at least 1"),
    ("loss", "ratio_gated(temperature=0)", "temperature = 0 .* give one above 0"),
    ("loss", "cr_opd(teacher_k=0)", "teacher_k = 0 counts no ids"),
    ("loss", "cr_opd(threshold=-1)", "threshold = -1 .* give 0 or more"),
    ("loss", "cr_opd(fallback=-1)", "fallback = -1 .* give 0 or more"),
    ("loss", "cr_opd(clip=0)", "clip = 0 leaves no advantage; give one above 0, or None"),
    ("support", "top_k(k=0)", "k = 0 counts no ids; give an int of at least 1"),
    ("support", "top_k(k=2, of='both')", r"of = 'both' .* there are \['intersection', 'student'"),
    ("reduction", "sequence_sum(length = -1)", "a positive number of tokens and is -1"),
]


@pytest.mark.parametrize(("key", "text", "words"), OUT_OF_RANGE)
def test_an_option_out_of_its_range_is_told_with_its_setting_and_once(key, text, words):
    beside = {"loss": "exact"} if key in ("support", "divergence") else {}
    (problem,) = checks.objective_problems(beside | given(key, text))
    assert problem.startswith(f"objective.{key} is {text!r}: ")
    assert re.search(words, problem)


# Entry -> an option that it has no default for.
MISSING = {
    **{
        "credit": ("discounted", "gamma"),
        "support": ("top_k", "k"),
        "rejection": ("veto", "floor"),
    },
    **{"gates": ("drift", "half_life"), "regularizers": ("anchor", "weight")},
    **{"lam_schedule": ("cosine", "steps"), "reduction": ("sequence_sum", "length")},
}


@pytest.mark.parametrize("key", MISSING)
def test_an_option_without_a_default_is_asked_for(key):
    name, option = MISSING[key]
    (problem,) = checks.objective_problems(given(key, name))
    assert problem == f"objective.{key} is {name!r}; give it ['{option}']: '{name}({option}=...)'"


def test_everything_that_is_wrong_is_told_at_once():
    wrong = {
        "estimator": "unbiased",
        "divergence": "jsd(beta=2)",
        "credit": "discounted(gamma=1.5)",
        "baseline": "leave_two_out",
        "gates": ("first(n=0)", "trust", "drift(half_life=-1)"),
        "importance": "token(cap=0.5)",
        "rejection": "token(cap=0.5)",
        "regularizers": ("entropy",),
        "reduction": "sequence_sum(length=0)",
        "veto": 1.0,
    }
    words = ["'unbiased'; it is one of", "beta is 2", "gamma is 1.5", "no 'leave_two_out'"]
    words += ["n is 0", "half_life is -1", "importance .* cap is 0.5", "rejection .* cap is 0.5"]
    only(checks.objective_problems(wrong), *words, "'weight'", "and is 0", "floor is 1.0")
    changes = {f"objective.{key}": value for key, value in wrong.items()}
    changes |= {"batch.microbatches": 3, "objective.lam": 1.25}
    only([*method.find(config(changes))][-2:], "no reference", "do not divide into .* = 3")


# --- choices that exclude each other

DATA = {"objective.source": "data", "objective.advantage": "imitation"}
K2 = {"objective.loss": "k2"}
BARE = r"and objective.loss 'k2' has no advantage; take it out, or use loss = 'policy_gradient'"
ALONE = "looks at the sampled token alone; use loss = 'exact', or leave it out"
NO_CRITIC = "need a value of each state and there is no critic; set --config.critic=build"
COMPARES = "compares the rollouts of one prompt and batch.rollouts is 1; use 8"
# Changes of a config -> words of each of its problems.
EXCLUDED = [
    # A route takes the target's likeliest ids of the whole vocabulary.
    (
        {"objective.loss": "cr_opd", "objective.support": "top_k(k=4, of='student')"},
        ["support is .*of='student'.* chooses ids of its own by its options, teacher_k"],
    ),
    ({"objective.loss": "cr_opd", "objective.mass": "raw"}, ["mass is 'raw' .* ids of its own"]),
    # Somebody to compare with.
    ({"objective.baseline": "leave_one_out"}, [f"baseline = 'leave_one_out' {COMPARES}"]),
    ({"objective.task": "grpo"}, [f"task = 'grpo' {COMPARES}"]),
    # What sampled and what learns.
    (
        {"sampling.cache_dtype": "int8"},
        ["cache_dtype = 'int8' samples from another policy .* --config.objective.importance=token"],
    ),
    (
        DATA | {"sampling.weights_dtype": "int8"},
        ["weights_dtype is 'int8' and objective.source is 'data'; only what the student samples"],
    ),
    # Values.
    ({"objective.credit": "gae(lam=0.9)"}, [r"credit = 'gae\(lam=0.9\)' .* " + NO_CRITIC]),
    ({"objective.baseline": "value"}, ["baseline = 'value' " + NO_CRITIC + "$"]),
    (
        {"objective.baseline": "value", "objective.advantage": "grpo", "batch.rollouts": 8},
        ["baseline = 'value' " + NO_CRITIC + " --config.critic.closed_form=False$"],
    ),
    (
        {"objective.credit": "gae", "objective.baseline": "value", "critic": Critic()},
        ["baseline = 'value' is taken off by credit = 'gae' already; use 'none'"],
    ),
    (
        {"objective.credit": "gae", "critic": Critic(warmup_steps=80)},
        ["critic.warmup_steps = 80 leaves no step of steps = 80 .*; lower it, or raise steps"],
    ),
    (
        {"objective.credit": "gae", "critic": Critic(warmup_steps=50)}
        | {"optimizer.warmup_steps": 30},
        ["critic.warmup_steps = 50 and, after them, optimizer.warmup_steps = 30 leave none of"],
    ),
    # What V begins at, and what credit sums up.
    (
        {"objective.advantage": "grpo", "objective.baseline": "value", "batch.rollouts": 8}
        | {"critic": Critic()},
        ["closed_form = True .*advantage = 'grpo' measures none; set --config.critic.closed_form"],
    ),
    *(
        (
            changes | {"objective.credit": "return_to_go"},
            ["credit is 'return_to_go' .* 'immediate'"],
        )
        for changes in ({"objective.advantage": "grpo", "batch.rollouts": 8}, DATA)
    ),
    # A weight of whole rows is not that of the rows without some of their tokens.
    *(
        (
            {"objective.importance": importance, "objective.rejection": rejection},
            ["importance weighs whole sequences .* use rejection = 'sequence"],
        )
        for importance in ("sequence", "sequence(geometric=True)")
        for rejection in ("token", " token(cap=2.0)")
    ),
    # The verifier's reward, once.
    ({"objective.task": "imitation"}, ["task is 'imitation', .* use 'grpo'"]),
    (
        {"objective.task": "grpo", "objective.advantage": "grpo", "batch.rollouts": 8},
        ["task and objective.advantage = 'grpo' are both of the reward; use advantage = 'gopd'"],
    ),
    ({"objective.gates": ("agree",), "objective.loss": "exact"}, ["agree, .* use a sampled loss"]),
    ({"objective.distil_weight": 0.5}, ["distil_weight has no effect .*; use task = 'grpo'"]),
    # What a loss without advantages leaves unread.
    (K2 | {"objective.advantage": "grpo"}, [f"advantage is 'grpo' {BARE}"]),
    (K2 | {"objective.credit": "return_to_go"}, [f"credit is 'return_to_go' {BARE}"]),
    (K2 | {"objective.baseline": "value"}, [f"baseline is 'value' {BARE}"]),
    (K2 | {"objective.estimator": "stop_gradient"}, [f"estimator is 'stop_gradient' {BARE}"]),
    (K2 | {"objective.advantage_clip": 2.0}, [f"advantage_clip is 2.0 {BARE}"]),
    (K2 | {"objective.task": "grpo"}, [f"task is 'grpo' {BARE}"]),
    (
        K2 | {"objective.task": "grpo", "objective.distil_weight": 0.5},
        [f"task is 'grpo' {BARE}", f"distil_weight is 0.5 {BARE}"],
    ),
    (K2 | {"objective.divergence": "jsd"}, ["use loss = 'policy_gradient' or loss = 'exact'"]),
    (K2 | {"objective.log_u_clip": 5.0}, ["log_u_clip is 5.0 .* use loss = 'policy_gradient'"]),
    *(
        (
            {"objective.advantage": "grpo", "batch.rollouts": 8, f"objective.{key}": value},
            [f"objective.{key} is .* use advantage = 'gopd'"],
        )
        for key, value in (("divergence", "jsd"), ("log_u_clip", 5.0))
    ),
    ({"objective.support": "top_k(k=4)"}, [rf"support is 'top_k\(k=4\)' .* {ALONE}"]),
    ({"objective.mass": "renormalised"}, [f"mass is 'renormalised' .* {ALONE}"]),
    ({"objective.ratio_cap": 3.0}, ["ratio_cap is 3.0 .* at objective.lam = 1; take it out, or"]),
    ({"objective.advantage": "gopd(clip=2)"}, ["'gopd.clip=2.'; give clip as .*log_u_clip"]),
    (
        {"objective.loss": "exact(divergence='jsd')"},
        ["exact.*; give divergence as objective.divergence"],
    ),
    # Teachers and references.
    ({"routes": {"law": "math"}}, [r"routes names tasks \['law'\], .* data.tasks = \('math'"]),
    ({"routes": {"math": "math=x"}}, [r"routes\['math'\] is 'math=x'; give a teacher, or"]),
    ({"routes": {"math": "math=0.7, code=0.7"}}, ["code=0.7'; weights are positive and sum to 1"]),
    ({"objective.mixture": "mean"}, [r"mixture is 'mean'; it is one of \('probability', 'log'\)"]),
    ({"objective.task_lam": {"law": 1.5}}, [r"task_lam names \['law'\], .* data.tasks = \('math'"]),
    (
        {"routes": {"math": "math=0.5, code=0.5"}} | DATA | {"objective.source": "teacher"},
        [r"source = 'teacher' and tasks \['math'\] have several teachers; .* Route each to one"],
    ),
    (
        {"objective.regularizers": ("anchor(weight=0.1)",)},
        ["no reference, so anchor has no R; set --config.reference=build .* take the anchor out"],
    ),
    # Rows in pieces.
    (
        {"batch.prompts": 12, "batch.updates": 5},
        ["12 rows do not divide into batch.updates .* = 5 . 1; choose a divisor of 12"],
    ),
    (
        {"batch.prompts": 12, "batch.microbatches": 4, "objective.loss": "exact"},
        ["a task has 6 rows .* is 4; .* several teachers .* choose a divisor of 6"],
    ),
    (
        {"batch.buckets": 4, "objective.loss": "exact"},
        ["batch.buckets is 4, .* several teachers, whose rows cannot be .*; use batch.buckets = 1"],
    ),
    # Nothing to correct, or nobody.
    *(
        (DATA | {f"objective.{key}": value}, [f"objective.{key} = {value!r} compares .* 'data'; t"])
        for key, value in (("importance", "token"), ("rejection", "sequence"), ("veto", -9.0))
    ),
    (DATA | {"sampling.lag": 2}, ["sampling.lag is 2 and objective.source is 'data'; .* lag = 0"]),
]


@pytest.mark.parametrize(("changes", "words"), EXCLUDED, ids=lambda x: str(x)[:60])
def test_choices_that_exclude_each_other_are_refused_with_a_cure(changes, words):
    only([*method.find(config(changes))], *words)


def test_routes_that_cannot_be_read_leave_other_problems_to_be_told():
    made = config({"routes": {"math": "math=x"}, "batch.prompts": 7})
    words = (r"routes\['math'\] is 'math=x'", "student.path is not set", "= 7 is not divisible")
    only(made.problems(), *words)
    assert made.notes() == []


def test_a_clip_of_routed_advantages_is_an_option_of_its_loss():
    assert [*method.find(config({"objective.loss": "cr_opd(clip=2.0)"}))] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective.loss": "exact", "objective.support": "top_k(k=4, of='student')"},
        {"objective.baseline": "leave_one_out", "batch.rollouts": 8},
        {"objective.credit": "gae", "critic": Critic()},
        {"objective.advantage": "grpo", "objective.baseline": "value", "batch.rollouts": 8}
        | {"critic": Critic(closed_form=False)},
        {"objective.task": "grpo", "objective.credit": "return_to_go", "batch.rollouts": 8},
        {"objective.importance": "sequence", "objective.rejection": "sequence"},
        {"objective.importance": "token", "objective.rejection": "token", "objective.veto": -9.0},
        {"objective.task": "grpo", "objective.distil_weight": 0.5, "batch.rollouts": 8},
        {"objective.baseline": "local_kl", "objective.support": "top_k(k=4)"},
        *(  # V begins at the divergence over the support
            {"objective.credit": credit, "objective.baseline": baseline, "critic": Critic()}
            | {"objective.support": "top_k(k=4)", "objective.mass": "raw"}
            for credit, baseline in (("gae", "none"), ("immediate", "value"))
        ),
        {"routes": {"math": "math=0.7, code=0.3", "code": "math"}},
        {"batch.prompts": 12, "batch.microbatches": 4},
        {"batch.prompts": 12, "batch.microbatches": 3, "objective.loss": "exact"},
        DATA | {"objective.lam": 1.25},
        {"objective.divergence": "jsd", "objective.log_u_clip": 5.0},
    ],
    ids=str,
)
def test_what_the_cures_lead_to_is_allowed(changes):
    assert [*method.find(config(changes))] == []


NOTED = [
    ({"critic": Critic()}, "critic is not made: credit = 'immediate' and baseline = 'none'"),
    ({"objective.loss": "ppo"}, "'ppo' clips nothing .*; raise batch.updates or batch.epochs"),
    (
        {"objective.loss": "ppo", "sampling.lag": 2, "objective.importance": "token"},
        "'ppo' clips nothing in the first update",
    ),
    (
        {"objective.credit": "gae", "critic": Critic(value_clip=0.5)},
        "critic.value_clip clips nothing in the first update",
    ),
    ({"sampling.lag": 2}, "sampling.lag = 2 is not corrected"),
    *(
        (
            {"objective.source": "data", "objective.loss": "exact", key: 3},
            f"{key} = 3 has no effect: it looks at completions that the student writes, .*'data'",
        )
        for key in ("diagnostics.every", "evaluation.verify_every")
    ),
    *(
        (
            reward | {"batch.rollouts": 8, "evaluation.verify_every": every},
            f"verify_every = {every} has no effect: .* reward, and every step has verdicts",
        )
        for reward in ({"objective.advantage": "grpo"}, {"objective.task": "grpo"})
        for every in (1, None)
    ),
    *(
        (DATA | {f"sampling.{key}": 4}, f"sampling.{key} = 4 has no effect in a step, .* evaluat")
        for key in ("slots", "buckets", "prompt_buckets")
    ),
    (DATA | {"batch.rollouts": 4}, "rollouts = 4 has each completion of the data 4 times .* = 1"),
    *(
        (
            {"objective.credit": "gae", "critic": Critic(closed_form=False), key: value},
            f"{key} = .* has no effect: with critic.closed_form = False no distributions",
        )
        for key, value in (("objective.support", "top_k(k=4)"), ("objective.mass", "raw"))
    ),
    *(
        ({"objective.loss": "exact", "objective.mass": mass}, f"{mass}' has no effect: no id is")
        for mass in ("raw", "renormalised")
    ),
    ({"sampling.slots": 4096}, "sampling.slots = 4096 has no effect: a step samples 256 rows"),
    (DATA | {"sampling.slots": 4096}, "slots = 4096 has no .* nor in an evaluation, of 256 rows"),
    *(
        (DATA | who | {"sampling.slots": 128, "evaluation.rows": 128}, "evaluation, of 128 rows at")
        for who in ({}, {"objective.source": "teacher"})
    ),
    ({"evaluation.rows": 256}, "evaluation.rows = 256 has no effect: .* than a step's 256 rows"),
    (
        DATA | {"objective.source": "teacher", "sampling.slots": 128},
        "slots = 128 has no effect in a step, .* teacher writes 128 rows at most, and evaluat",
    ),
    (
        {"objective.advantage": "grpo", "batch.rollouts": 8, "diagnostics.every": 5},
        "diagnostics.every = 5 has no effect: they compare with a teacher",
    ),
    ({"objective.estimator": "stop_gradient"}, "'stop_gradient' has no effect: reverse KL's"),
    (
        {"objective.estimator": "stop_gradient", "objective.advantage": "grpo"}
        | {"objective.loss": "asymmetric", "objective.divergence": "jsd", "batch.rollouts": 8},
        "'stop_gradient' has no effect: objective.advantage = 'grpo' is of no divergence, and",
    ),
    (
        {"objective.lam_schedule": "linear(steps=9)", "reference": Model()},
        "goes from 1 to objective.lam = 1, and the",
    ),
    (
        {"objective.lam_schedule": "linear(steps=9, start=1.25)", "reference": Model()}
        | {"objective.lam": 1.25},
        "goes from 1.25 to objective.lam = 1.25, and stays there; move it, or leave",
    ),
    (
        {"objective.lam": 1.25, "objective.task_lam": {"math": 1.5, "code": 1.0}}
        | {"reference": Model()},
        "objective.lam = 1.25 has no effect: objective.task_lam has one of each task",
    ),
    (
        {"objective.task": "grpo", "objective.distil_weight": 0.0, "batch.rollouts": 8},
        "distil_weight = 0 leaves objective.task alone .*; objective.advantage = 'grpo' in place",
    ),
    *(
        ({f"diagnostics.{key}": 8}, f"diagnostics.{key} = 8 has no effect: diagnostics.every is n")
        for key in ("rows", "top_k")
    ),
    ({"objective.loss": "k1"}, "'k1' is KL's value .* gradient is zero on average; to descend"),
    ({"batch.epochs": 4}, r"updates \* batch.epochs = 4, and .* 'ppo' corrects them"),
    ({"objective.mixture": "log"}, "mixture = 'log' has no effect: no task has several teachers"),
    (
        {"objective.mixture": "log", "routes": {"math": "math=0.5, code=0.5"}}
        | {"objective.advantage": "grpo", "batch.rollouts": 8},
        "mixture = 'log' has no effect: no teacher is learnt from",
    ),
    *(
        (DATA | {f"objective.{key}": value}, f"{key} = .* has no effect in .* 'imitation'")
        for key, value in (
            ("lam_schedule", "linear(steps=9)"),
            ("task_lam", {"math": 2.0}),
            ("lam_by_row", True),
        )
    ),
]


@pytest.mark.parametrize(("changes", "words"), NOTED)
def test_a_choice_without_effect_is_noted(changes, words):
    said = [text for text in method.unused(config(changes)) if "not loaded" not in text]
    only(said, words)
    assert [*method.find(config(changes))] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"objective.lam_schedule": "linear(steps=9, start=0.5)", "objective.lam": 1.25},
        {"objective.lam_schedule": "linear(steps=9)", "objective.task_lam": {"math": 1.5}},
        {"objective.lam": 1.25, "objective.task_lam": {"math": 1.5}},
    ],
)
def test_a_lambda_that_moves_or_is_a_tasks_is_not_noted(changes):
    assert [*method.unused(config(changes | {"reference": Model()}))] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling.slots": 64},
        {"sampling.slots": 128, "routes": {"math": "code"}},  # one teacher writes all
    ],
)
def test_slots_that_a_teacher_fills_again_are_not_noted(changes):
    made = config(DATA | {"objective.source": "teacher"} | changes)
    assert not [text for text in method.unused(made) if "slots" in text]


# test_problems.py has the words of these.
ELSEWHERE = [
    {"objective.lam": 1.25},
    {"objective.advantage": "grpo", "objective.lam": 2.0},
    {"objective.advantage": "grpo", "objective.source": "data"},
    {"objective.advantage": "imitation", "reference": Model()},
    {"objective.advantage": "gopd(lam=2)"},
    {"objective.estimator": "biased"},
    {"teachers": {}},
    {"objective.source": "data", "objective.advantage": "imitation", "evaluation.teachers": False},
    {"objective.lam": 2.0} | DATA,
    {"reference": Model()},
]


def sentences(module):
    """Of each sentence that the module may say: its line, a pattern of it."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Yield):
            parts = node.value.values if isinstance(node.value, ast.JoinedStr) else [node.value]
            texts = [re.escape(p.value) if isinstance(p, ast.Constant) else ".*" for p in parts]
            yield node.lineno, "".join(texts)


@pytest.fixture(scope="module")
def said():
    """Everything that is said of these tables' settings."""
    found = []
    rows = [changes for changes, _ in EXCLUDED + NOTED] + ELSEWHERE
    rows += [given(f"objective.{key}", text) for key, text, _ in OUT_OF_RANGE[::6]]
    rows += [{"objective.loss": "nothing"}, {"objective.support": "top_k"}]
    for changes in rows:
        made = config(changes)
        found += [*method.find(made), *method.unused(made)]
    with pytest.MonkeyPatch.context() as patch:  # an own entry that takes a divergence
        patch.setitem(TABLES["advantage"], "own", lambda log_u_BT, mask_BT, *, divergence: log_u_BT)
        changes = {"objective.advantage": "own", "objective.divergence": "jsd"}
        found += method.find(config(changes))
    return found


@pytest.mark.parametrize("module", [checks, method, notes], ids=lambda module: module.__name__)
def test_every_sentence_is_said_of_some_settings(said, module):
    found = [*sentences(module)]
    assert len(found) > 8
    unsaid = [line for line, text in found if not any(re.fullmatch(text, one) for one in said)]
    assert not unsaid
