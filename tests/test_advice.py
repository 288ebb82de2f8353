"""Advice: what triggers each, what close by does not, and flags that exist."""

import ast
import importlib
import json
import math
import re
import shlex

import pytest

from gopd_jax.config import Config, Critic, Model, to_dict
from gopd_jax.problems import leaves
from gopd_jax.reporting.advice import ADVICE, advise

CONFIG = {
    "student": {"path": "base", "dtype": "float32"},
    "objective": {"lam": 1.25, "loss": "policy_gradient"},
    "sampling": {"completion_length": 64},
    "batch": {"prompts": 50, "rollouts": 2},
    "optimizer": {"learning_rate": 3e-5},
}
CRITIC = CONFIG | {"critic": {"warmup_steps": 10, "closed_form": True}}
STALE = CONFIG | {"sampling": {"completion_length": 64, "lag": 2}}
TEACHER = CONFIG | {"objective": {"source": "teacher"}}
# Settings that sentences may name and that a Config of this version may not have yet.


def flat(n=40, **values):
    """n rows; a value that is a list is spread over the steps, from its first to its last."""

    def at(value, i):
        if isinstance(value, list):
            begin, end = value
            return begin + (end - begin) * i / (n - 1)
        return value

    return [{"step": i + 1} | {k: at(v, i) for k, v in values.items()} for i in range(n)]


def stepped(first, last, n=40, **values):
    """n rows, of the first half with one set of values and of the second with another."""
    return [
        {"step": i + 1} | values | (first if i < n // 2 else last) for i in range(n)
    ]  # the half is longer than any mean


def probes(**values):
    """Forty steps with a probe at every tenth."""
    keys = {key.replace("__", "/"): value for key, value in values.items()}
    return [{"step": i} | (keys if i % 10 == 0 else {}) for i in range(1, 41)]


# name -> (rows that trigger it, evidence in its sentence, rows close by that do not), by settings.
CASES = [
    (
        "prefix_drift",
        CONFIG,
        probes(probe__overlap_1=0.9, probe__overlap_3=0.59),
        ["90 %", "59 %", "quarter 3", "first(n=16)", "drift(half_life=16)"],
        probes(probe__overlap_1=0.9, probe__overlap_3=0.61),
    ),
    (
        "bad_start",
        CONFIG,
        [{"step": 1, "probe/overlap": 0.3}, {"step": 21, "probe/overlap": 0.49}],
        ["30 %", "49 %", "configs/sft.py"],
        [{"step": 1, "probe/overlap": 0.3}, {"step": 21, "probe/overlap": 0.51}],
    ),
    (
        "outliers",
        CONFIG,
        flat(token_reward_p01=-5.1, token_reward_p99=0.5, advantage_absmax=9.0),
        ["beyond 5.1", "9.0", "log_u_clip=5.0", "jsd"],
        flat(token_reward_p01=-4.9, token_reward_p99=0.5, advantage_absmax=19.9),
    ),
    ("outliers", CONFIG, flat(advantage_absmax=20.1), ["20.1"], flat(advantage_absmax=19.9)),
    (
        "clipped",
        CONFIG | {"objective": {"log_u_clip": 1.5}},
        flat(advantage_clipped=0.11),
        ["11 %", "objective.log_u_clip=3"],
        flat(advantage_clipped=0.09),
    ),
    (
        "variance",  # 0.19 sqrt(100) = 1.9 standard errors, and 2.1
        CONFIG,
        flat(advantage_snr=0.19, tokens=100.0),
        ["0.19", "1.9 standard errors", "leave_one_out", "batch.prompts=100"],
        flat(advantage_snr=0.21, tokens=100.0),
    ),
    (
        "variance",
        CONFIG | {"objective": {"baseline": "leave_one_out"}},
        probes(probe__cosine=0.09),
        ["cosine 0.09", "objective.loss=exact"],
        probes(probe__cosine=0.11) + flat(advantage_snr=0.0, tokens=9.0),
    ),
    (
        "diversity_loss",
        CONFIG,
        stepped({"entropy": 1.0}, {"entropy": 0.49}),
        ["from 1 to 0.49", "jsd", "entropy(weight=0.001)"],
        stepped({"entropy": 1.0}, {"entropy": 0.51}),
    ),
    (
        "diversity_loss",
        CONFIG,
        stepped({"entropy": 1.0}, {"entropy": 0.4}, **{"probe/entropy_teacher": 0.51}),
        ["the teacher's is 0.51"],
        stepped({"entropy": 1.0}, {"entropy": 0.4}, **{"probe/entropy_teacher": 0.49}),
    ),
    (
        "length_runaway",
        CONFIG,
        stepped(
            {"truncated": 0.3, "eos_probability": 0.12},
            {"truncated": 0.71, "eos_probability": 0.03},
        ),
        ["71 %", "from 0.12 to 0.03", "lam=1.0", "completion_length=128", "sampling.stop"],
        stepped({"truncated": 0.3, "eos_probability": 0.12}, {"truncated": 0.49}),
    ),
    ("length_runaway", CONFIG, flat(truncated=0.51), ["51 %"], flat(truncated=0.49)),
    (
        "length_runaway",
        CONFIG,
        stepped({"truncated": 0.1}, {"truncated": 0.31}),
        ["31 %", "10 % at first"],
        stepped({"truncated": 0.1}, {"truncated": 0.29}),
    ),
    (
        "extrapolation_hacking",  # 0.25 * 12 = 3
        CONFIG,
        flat(extrapolation_p99=12.1),
        ["12.1 nats", "lambda = 1.25", "3.0 nats", "ratio_cap=6", "lam=1.125", "reference.path"],
        flat(extrapolation_p99=11.9),
    ),
    (
        "extrapolation_hacking",
        CONFIG,
        stepped({"extrapolation_p99": 4.0}, {"extrapolation_p99": 6.1}),
        ["4.0 at first"],
        stepped({"extrapolation_p99": 4.0}, {"extrapolation_p99": 5.9}),
    ),
    (
        "extrapolation_hacking",  # grown, from little: 0.25 * 4 = 1
        CONFIG,
        stepped({"extrapolation_p99": 2.0}, {"extrapolation_p99": 4.1}),
        ["2.0 at first"],
        stepped({"extrapolation_p99": 2.0}, {"extrapolation_p99": 3.9}),
    ),
    (
        "extrapolation_hacking",  # a schedule's lambda in place of the settings'
        CONFIG,
        flat(extrapolation_p99=8.1, lam=[1.2, 1.5]),
        ["lambda = 1.5"],
        flat(extrapolation_p99=8.1, lam=[1.5, 1.2]),
    ),
    (
        "stale_rollouts",
        STALE,
        flat(log_ess=math.log(0.49), staleness=2.0),
        ["49 %", "2 steps old", "importance=token", "sampling.lag"],
        flat(log_ess=math.log(0.51), staleness=2.0),
    ),
    (
        "sampler_mismatch",
        CONFIG,
        flat(sampler_kl=-0.0011, staleness=0.0),
        ["-0.0011", "bug", "float32"],
        flat(sampler_kl=0.0009, staleness=0.0),
    ),
    (
        "sampler_mismatch",
        CONFIG | {"student": {"dtype": "bfloat16"}},
        flat(sampler_kl=0.031),
        ["bfloat16 makes 0.03"],
        flat(sampler_kl=0.029),
    ),
    (
        "skipped_updates",
        CONFIG | {"student": {"dtype": "bfloat16"}},
        stepped({"skipped": 0.0}, {"skipped": 0.0}) + [{"step": 41, "skipped": 1.0}],
        ["1 in the last 20", "learning_rate=1e-05", "dtype=float32"],
        [{"step": 1, "skipped": 1.0}] + flat(20, skipped=0.0),
    ),
    (
        "critic_not_learning",
        CRITIC,
        flat(50, explained_variance=-0.01),
        ["-0.01", "step 50", "critic.learning_rate", "warmup_steps=20", "return_to_go"],
        flat(50, explained_variance=0.01),
    ),
    (
        "reward_falls",  # 4 steps of 100 verdicts: two standard errors are 6.9 points
        CONFIG,
        stepped({"reward": 0.6, "kl_teacher": 0.2}, {"reward": 0.525, "kl_teacher": 0.1}),
        ["0.6 to 0.525", "0.2 to 0.1", "task=grpo", "agree"],
        stepped({"reward": 0.6, "kl_teacher": 0.2}, {"reward": 0.535, "kl_teacher": 0.1}),
    ),
    (
        "reward_falls",
        CONFIG,
        stepped({"reward": 0.6, "kl_teacher": 0.2}, {"reward": 0.4, "kl_teacher": 0.17}),
        ["0.17"],
        stepped({"reward": 0.6, "kl_teacher": 0.2}, {"reward": 0.4, "kl_teacher": 0.19}),
    ),
    (
        "reward_falls",  # two standard errors of 40000 verdicts are 0.7 points
        CONFIG | {"batch": {"prompts": 10_000}},
        stepped({"reward": 0.6, "kl_teacher": 0.2}, {"reward": 0.579, "kl_teacher": 0.1}),
        ["0.579"],
        stepped({"reward": 0.6, "kl_teacher": 0.2}, {"reward": 0.581, "kl_teacher": 0.1}),
    ),
    (
        "runaway",
        CONFIG,
        stepped({"kl_teacher": 0.03}, {"kl_teacher": 1.01}),
        ["from 0.03 to 1 nats", "learning_rate=1e-05", "lam=1.125", "warmup_steps=10"],
        stepped({"kl_teacher": 0.03}, {"kl_teacher": 0.99}),
    ),
    (
        "runaway",  # from far away
        CONFIG | {"objective": {}},
        stepped({"kl_teacher": 0.5}, {"kl_teacher": 1.51}),
        ["from 0.5 to 1.5 nats"],
        stepped({"kl_teacher": 0.5}, {"kl_teacher": 1.49}),
    ),
    (
        "repetition",
        CONFIG,
        stepped({"probe/repetition": 0.1}, {"probe/repetition": 0.31}),
        ["31 %", "10 % at first", "lam=1.125"],
        stepped({"probe/repetition": 0.1}, {"probe/repetition": 0.29}),
    ),
    (
        "repetition",
        CONFIG,
        flat(**{"probe/repetition": 0.51}),
        ["51 %"],
        probes(probe__repetition=0.49),
    ),
]
IDS = [f"{case[0]}-{i}" for i, case in enumerate(CASES)]


def mentioned(text):
    """Settings that a sentence names."""
    keys = set(re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", text))
    assert len(keys) >= len(set(re.findall(r"--config\.", text))), text
    return keys


def test_every_entry_has_a_case():
    assert {case[0] for case in CASES} == set(ADVICE)


@pytest.mark.parametrize(("name", "config", "rows", "told", "near"), CASES, ids=IDS)
def test_it_applies_beyond_its_limit_and_not_just_before(name, config, rows, told, near):
    sentence = advise(rows, config).get(name)
    assert sentence is not None
    assert sentence.endswith(".")
    assert sentence == ADVICE[name](rows, config)
    for evidence_ in told:
        assert evidence_ in sentence, sentence
    assert name not in advise(near, config)


@pytest.mark.parametrize(("name", "config", "rows", "told", "near"), CASES, ids=IDS)
def test_absent_and_null_keys_say_nothing_and_raise_nothing(name, config, rows, told, near):
    keys = sorted({key for row in rows for key in row} - {"step"})
    for left_out in (*[(key,) for key in keys], tuple(keys)):
        without = [{k: v for k, v in row.items() if k not in left_out} for row in rows]
        null = [row | {k: None for k in row if k in left_out} for row in rows]
        nan = [row | {k: math.nan for k in row if k in left_out} for row in rows]
        assert advise(null, config) == advise(nan, config) == advise(without, config)
        advise(rows, {})
    assert not advise([{"step": row["step"]} for row in rows], config)
    assert not advise([], config)
    assert not advise(rows[:1], {"objective": None, "critic": None, "sampling": None}).keys() - {
        *("bad_start", "repetition", "skipped_updates")
    }


@pytest.mark.parametrize(("name", "config", "rows", "told", "near"), CASES, ids=IDS)
def test_every_flag_in_a_sentence_is_a_setting(name, config, rows, told, near):
    whole = Config(workdir="w", student=Model(), reference=Model(), critic=Critic())
    known = {key for key, *_ in leaves(whole)}
    keys = mentioned(advise(rows, config)[name])
    assert keys or name == "bad_start"
    assert keys <= known | {"configs/sft.py"}, keys - known


def test_what_is_set_already_is_not_advised():
    def cures(**objective):
        rows = flat(token_reward_p01=-9.0)
        return ADVICE["outliers"](rows, {"objective": objective})

    assert "jsd" in cures()
    assert "jsd" not in cures(divergence="jsd(beta=0.3)")
    assert cures(log_u_clip=3.0) is None
    skipped = ADVICE["skipped_updates"]
    assert "log_u_clip=5.0" in skipped(flat(skipped=1.0, advantage_absmax=1.0), {})
    # A loss without an advantage refuses the setting.
    assert "log_u_clip" not in skipped(flat(skipped=1.0), {})
    rows = probes(probe__overlap_1=0.9, probe__overlap_4=0.1)
    config = {"objective": {"gates": ["first(n=3)"]}, "sampling": {"completion_length": 8}}
    sentence = ADVICE["prefix_drift"](rows, config)
    # A gate is added to those that there are.
    assert """--config.objective.gates='("first(n=3)","drift(half_life=2)",)'""" in sentence


def test_the_sampler_of_other_weights_or_of_another_source_is_no_mismatch():
    rows = flat(sampler_kl=0.5)
    assert "sampler_mismatch" in advise(rows, CONFIG)
    for config in (STALE, TEACHER):
        assert "sampler_mismatch" not in advise(rows, config)
    assert "sampler_mismatch" not in advise(flat(sampler_kl=0.5, staleness=1.0), CONFIG)
    assert "stale_rollouts" not in advise(flat(log_ess=-3.0), CONFIG)


def test_a_critic_has_its_first_steps():
    for steps, warm, told in ((49, 0, False), (50, 0, True), (99, 50, False), (100, 50, True)):
        rows = flat(steps, explained_variance=-1.0)
        config = {"critic": {"warmup_steps": warm}}
        assert ("critic_not_learning" in advise(rows, config)) == told, (steps, warm)


@pytest.mark.parametrize(
    ("name", "n", "config", "value"),
    [
        ("outliers", 10, CONFIG, {"token_reward_p01": -9.0}),
        ("clipped", 10, CONFIG, {"advantage_clipped": 0.5}),
        ("variance", 20, CONFIG, {"advantage_snr": 0.0, "tokens": 9.0}),
        ("length_runaway", 10, CONFIG, {"truncated": 0.9}),
        ("extrapolation_hacking", 10, CONFIG, {"extrapolation_p99": 99.0}),
        ("stale_rollouts", 10, STALE, {"log_ess": -9.0}),
        ("sampler_mismatch", 3, CONFIG, {"sampler_kl": 1.0}),
        ("prefix_drift", 2, CONFIG, {"probe/overlap_1": 0.9, "probe/overlap_2": 0.1}),
    ],
)
def test_a_few_bad_steps_are_no_evidence(name, n, config, value):
    rows = [{"step": i + 1} | value for i in range(n)]
    assert name not in advise(rows[:-1], config)
    assert name in advise(rows, config)


def test_a_change_takes_a_beginning_and_an_end_that_do_not_overlap():
    rows = [{"step": i + 1, "entropy": 1.0 if i < 10 else 0.1} for i in range(20)]
    assert "diversity_loss" not in advise(rows[:-1], CONFIG)
    assert "diversity_loss" in advise(rows, CONFIG)


def test_a_sentence_is_a_function_of_the_rows():
    for _, config, rows, *_ in CASES:
        copied = json.loads(json.dumps([rows, config]))
        assert advise(*copied) == advise(rows, config)


def test_the_settings_of_this_version_are_read():
    config = to_dict(Config(workdir="w", student=Model(dtype="bfloat16")))
    assert advise(flat(sampler_kl=0.02), config) == {}
    assert "bfloat16" in advise(flat(sampler_kl=0.04), config)["sampler_mismatch"]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("length_runaway", flat(truncated=0.9)),
        ("extrapolation_hacking", flat(extrapolation_p99=40.0)),
        ("runaway", flat(kl_teacher=[0.1, 2.0])),
        ("repetition", probes(probe__repetition=0.9)),
    ],
)
def test_lambdas_that_tasks_have_of_their_own_are_lowered_there(name, rows):
    made = Config(workdir="w", student=Model())
    for lam, own in ((1.5, {}), (1.0, {"math": 1.5, "code": 1.25})):
        made.objective.lam, made.objective.task_lam = lam, own
        sentence = ADVICE[name](rows, to_dict(made))
        assert ("--config.objective.lam=" in sentence) is not bool(own)
        assert ("smaller ones in --config.objective.task_lam" in sentence) is bool(own)


def test_a_tasks_reward_turns_the_gradient_and_is_no_noise():
    rows = [{"step": i + 1, "probe/cosine": 0.01} for i in range(4)]
    mixed = CONFIG | {"objective": {"lam": 1.25, "loss": "policy_gradient", "task": "grpo"}}
    assert "cosine 0.01" in ADVICE["variance"](rows, CONFIG)
    assert ADVICE["variance"](rows, mixed) is None


# --- what a run would be refused for

PRESETS = ("opd", "exopd", "opd_plus", "grpo", "kdrl", "sft", "eopd", "gae_opd", "gkd", "cr_opd")


def preset(name):
    return importlib.import_module(f"configs.{name}").get_config()


def given(name, flag):
    """The preset under a flag."""
    made = preset(name)
    key, value = flag.removeprefix("--config.").split("=", 1)
    *path, last = key.split(".")
    section = made
    for part in path:
        section = getattr(section, part)
    try:
        value = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        value = None if value == "none" else value
    setattr(section, last, value)
    return made


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_takes_every_flag_that_it_is_told_to_try(name):
    config, n_flags = to_dict(preset(name)), 0
    for _, _, rows, *_ in CASES:
        for sentence in advise(rows, config).values():
            for flag in re.findall(r"--config\.[\w.]+=(?:'.*?'|[^\s,]+)", sentence):
                (flag,), n_flags = shlex.split(flag.rstrip(".")), n_flags + 1
                assert given(name, flag).problems(files=False) == [], sentence
    assert n_flags > 5


@pytest.mark.parametrize(
    ("name", "loss"), [("grpo", None), ("kdrl", None), ("eopd", None), ("opd", "exact")]
)
def test_no_noise_is_found_where_the_mean_is_0_by_design_or_nothing_is_sampled(name, loss):
    rows = flat(advantage_snr=0.0, tokens=100.0, **{"probe/cosine": 0.01})
    assert "variance" in advise(rows, to_dict(preset("opd")))
    config = preset(name)
    config.objective.loss = loss or config.objective.loss
    assert "variance" not in advise(rows, to_dict(config))


def test_a_cure_that_would_be_refused_is_left_out_and_others_stay():
    rows = stepped({"entropy": 1.0}, {"entropy": 0.4})
    config = preset("eopd")
    for stored in (to_dict(config), json.loads(json.dumps(to_dict(config)))):
        sentence = ADVICE["diversity_loss"](rows, stored)
        assert "; try --config.objective.regularizers='(\"entropy(weight=0.001)\",)'" in sentence
    assert "divergence=jsd" in ADVICE["diversity_loss"](rows, to_dict(preset("opd")))
    # A reward of one completion a prompt has nothing to compare with.
    falls = stepped({"reward": 0.9, "kl_teacher": 0.2}, {"reward": 0.5, "kl_teacher": 0.1})
    config = preset("opd")
    assert config.batch.rollouts == 1
    assert "task=grpo" not in ADVICE["reward_falls"](falls, to_dict(config))
    config.batch.rollouts, config.batch.prompts = 4, config.batch.prompts // 4
    assert "task=grpo" in ADVICE["reward_falls"](falls, to_dict(config))
    # Of settings that are wrong already nothing can be told.
    assert "task=grpo" in ADVICE["reward_falls"](falls, {"batch": {"prompts": 100}})
