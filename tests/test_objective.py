"""What an objective is read to need and what it makes of quantities; entries of one's own."""

import inspect
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gopd_jax.objectives import checks
from gopd_jax.objectives.divergences import DIVERGENCES, token_reward
from gopd_jax.objectives.objective import TABLES, build

# --- what is said of it


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "A = log T - log S  (plain on-policy distillation);  loss = policy_gradient, "),
        ({"lam": 1.25}, "A = 1.25 (log T - log R) - (log S - log R)  (G-OPD, lambda = 1.25);  "),
        (
            {"lam_by_row": True},
            "A = lambda (log T - log R) - (log S - log R)  (G-OPD, lambda = the ",
        ),
        ({"lam": 2, "lam_schedule": "linear(steps=9)"}, "(G-OPD, lambda = 2 by linear(steps=9));"),
        (
            {"credit": "return_to_go", "baseline": "batch_mean"},
            "return_to_go, less baseline batch_",
        ),
        (
            {"task": "grpo", "distil_weight": 0.5},
            "A = grpo of the reward + 0.5 A_distil, A_distil = log T - log S",
        ),
        (
            {"divergence": "jsd"},
            "A = u f'(u) - f(u) - f'(1) of jsd, u = T_lam / S, lambda = 1  (OPD",
        ),
        ({"divergence": "jsd", "estimator": "stop_gradient"}, "A = -f(u) of jsd, u = T_lam / S, "),
        ({"divergence": "jsd", "loss": "exact", "lam": 2}, "D = jsd of S and T_lam, lambda = 2;  "),
        ({"loss": "k3"}, "loss = k3, reduced by token_mean"),
    ],
    ids=str,
)
def test_the_formula_holds_every_part_of_the_objective(settings, said):
    text = build(**settings).formula
    assert said in text
    assert ("A = " in text) == (settings.get("loss") is None)


# --- what has to be computed

# Settings -> what there has to be for them. prescored: the student reads the batch beforehand.
ASKED = [
    # A = log T - log S of the sampled tokens.
    ({}, "weighs teacher"),
    ({"loss": "ppo"}, "weighs teacher"),
    # The tilted target's normaliser is a constant of the state: no matter to what is linear or
    # squared in log u under the student's own samples, and the difference to every other.
    ({"lam": 1.25}, "weighs teacher reference"),
    ({"lam": 0.0}, "weighs teacher reference"),
    ({"lam": 1.25, "credit": "return_to_go"}, "weighs teacher reference"),
    ({"lam": 1.25, "log_u_clip": 5.0}, "weighs teacher reference normalised vocabulary"),
    ({"lam": 1.25, "divergence": "jsd"}, "weighs teacher reference normalised vocabulary"),
    ({"lam": 1.25, "loss": "k1"}, "teacher reference"),
    ({"lam": 1.25, "loss": "k2"}, "teacher reference"),
    ({"lam": 1.25, "loss": "k3"}, "teacher reference normalised vocabulary"),
    ({"lam": 1.25, "loss": "ratio_gated"}, "teacher reference normalised vocabulary"),
    # The sign of A, and a cap of log T - log R, move with that constant.
    (
        {"lam": 1.25, "loss": "cr_opd"},
        "weighs teacher reference normalised vocabulary prescored",
    ),
    (
        {"lam": 1.25, "loss": "asymmetric"},
        "weighs teacher reference normalised vocabulary prescored",
    ),
    (
        {"lam": 1.25, "mixture": "log", "ratio_cap": 2.0},
        "weighs teacher reference normalised vocabulary",
    ),
    ({"lam": 1.25, "mixture": "log"}, "weighs teacher reference"),
    ({"lam": 1.25, "gates": ("trust",)}, "weighs teacher reference normalised vocabulary"),
    ({"divergence": "jsd"}, "weighs teacher"),
    ({"gates": ("trust",)}, "weighs teacher"),
    # Lambda need not be another than 1 at every step and in every row.
    ({"lam_by_row": True}, "weighs teacher reference"),
    ({"lam_schedule": "linear(steps=3, start=1.5)"}, "weighs teacher reference"),
    # So is a geometric mean of teachers known up to a constant, and an average's entropy is not
    # that of its sampled tokens.
    ({"mixture": "log"}, "weighs teacher"),
    ({"mixture": "log", "loss": "k3"}, "teacher normalised vocabulary"),
    ({"mixture": "probability", "loss": "k3"}, "teacher"),
    (
        {"mixture": "probability", "gates": ("teacher_entropy(at_most=1.0)",)},
        "weighs teacher vocabulary",
    ),
    ({"gates": ("teacher_entropy(at_most=1.0)",)}, "weighs teacher"),
    # Whole distributions; no token has an advantage unless the loss says so.
    ({"loss": "exact"}, "teacher vocabulary"),
    ({"loss": "exact", "lam": 1.25}, "teacher reference vocabulary"),
    ({"loss": "entropy_gated"}, "teacher vocabulary"),
    ({"loss": "cr_opd"}, "weighs teacher vocabulary prescored"),
    ({"loss": "asymmetric"}, "weighs teacher vocabulary prescored"),
    # Other rows, other positions, a value.
    ({"baseline": "batch_mean"}, "weighs teacher prescored"),
    ({"baseline": "leave_one_out"}, "weighs teacher prescored"),
    ({"baseline": "local_kl"}, "weighs teacher vocabulary"),
    ({"baseline": "local_kl", "lam": 1.25}, "weighs teacher reference vocabulary"),
    ({"baseline": "value"}, "weighs teacher critic prescored"),
    ({"credit": "gae"}, "weighs teacher critic prescored"),
    ({"credit": "discounted(gamma=0.5)"}, "weighs teacher"),
    # Verdicts; without a distillation beside them lambda has no target to tilt.
    ({"advantage": "grpo"}, "weighs reward"),
    ({"advantage": "grpo", "lam": 1.25}, "weighs reward"),
    ({"task": "grpo"}, "weighs teacher reward"),
    ({"gates": ("agree",)}, "weighs teacher reward"),
    ({"loss": "k2", "gates": ("agree",)}, "weighs teacher reward"),
    # Maximum likelihood asks nobody, an anchor the reference alone.
    ({"advantage": "imitation"}, "weighs"),
    ({"advantage": "imitation", "regularizers": ("entropy(weight=0.1)",)}, "weighs"),
    ({"advantage": "imitation", "regularizers": ("anchor(weight=0.1)",)}, "weighs reference"),
    (
        {"advantage": "imitation", "gates": ("teacher_entropy(at_most=1.0)",), "lam": 1.25},
        "weighs teacher",
    ),
    # The sampler is always there.
    ({"importance": "token", "rejection": "sequence", "veto": -9.0}, "weighs teacher"),
]
NEEDED = ("teacher", "reference", "reward", "critic", "vocabulary")
PROPERTIES = {name: f"needs_{name}" for name in NEEDED}
PROPERTIES |= {name: name for name in ("weighs", "normalised", "prescored")}


@pytest.mark.parametrize(("settings", "want"), ASKED, ids=str)
def test_an_objective_asks_for_what_its_mathematics_needs_and_no_more(settings, want):
    made = build(**settings)
    found = {name for name, key in PROPERTIES.items() if getattr(made, key)}
    assert found == {*want.split()}


@pytest.mark.parametrize(
    "settings",
    [{"importance": "token"}, {"rejection": "sequence"}, {"veto": -9.0}],
    ids=str,
)
def test_off_policy_weights_need_both_log_probs_of_the_sampled_tokens(settings):
    assert {"student_BT", "sampler_BT", "mask_BT"} <= build(**settings | {"loss": "k2"}).needs
    assert not {"student_BT", "sampler_BT"} & build(loss="k2").needs


def test_lambda_goes_from_its_start_to_the_rows_own():
    made = build(lam=1.5, lam_schedule="linear(steps=4, start=0.5)")
    assert [float(made.lam_at(step)) for step in (0, 1, 4, 9)] == [0.5, 0.75, 1.5, 1.5]
    lam_B = jnp.array([0.5, 2.5])
    assert made.lam_at(2, lam_B).tolist() == [0.5, 1.5]
    slow = build(lam=1.5, lam_schedule="cosine(steps=4, start=0.5)")
    want = [1 - np.cos(np.pi * share) / 2 for share in (0, 0.25, 1, 1)]
    np.testing.assert_allclose([slow.lam_at(step) for step in (0, 1, 4, 9)], want, rtol=1e-6)
    assert build(lam=1.5).lam_at(7) == 1.5


# --- what is computed of it

MASK_BT = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]], bool)


def quantities(seed=0):
    draw = np.random.default_rng(seed)
    found = {
        name: np.where(MASK_BT, draw.normal(size=MASK_BT.shape), np.nan)
        for name in ("log_u_BT", "student_BT", "sampler_BT")
    }
    found = {name: jnp.array(x, jnp.float32) for name, x in found.items()}
    position_BT = np.broadcast_to(np.arange(4) - 1, MASK_BT.shape)
    return found | {
        "mask_BT": jnp.array(MASK_BT),
        "position_BT": jnp.array(position_BT),
        "relative_reward_B": jnp.array([0.7, -0.7, 0.0]),
    }


def test_an_advantage_is_credit_and_its_own_correction_less_a_baseline_beside_the_task():
    made = build(
        divergence="forward_kl",
        log_u_clip=1.0,
        credit="discounted(gamma=0.5)",
        baseline="batch_mean",
        task="grpo",
        distil_weight=0.25,
        advantage_clip=0.8,
    )
    q = quantities()
    got = made.advantages(q)
    log_u_BT = np.clip(np.nan_to_num(np.asarray(q["log_u_BT"], np.float64)), -1, 1)
    u_BT = np.where(MASK_BT, np.exp(log_u_BT), 0)
    # f = u ln u, and u f'(u) - f'(1) = u ln u + u - 1 is neither summed nor discounted.
    reward_BT = -u_BT * log_u_BT
    credit_BT = np.zeros_like(reward_BT)
    for t in range(4):
        for m in range(t, 4):
            credit_BT[:, t] += 0.5 ** (m - t) * reward_BT[:, m]
    credit_BT *= MASK_BT
    mean_B1 = np.array([[credit_BT[1].sum() / 2], [credit_BT[0].sum() / 3], [0]])
    distil_BT = credit_BT + u_BT * log_u_BT + u_BT - 1 - mean_B1
    want_BT = np.array([[0.7], [-0.7], [0.0]]) + 0.25 * distil_BT
    want_BT = np.where(MASK_BT, np.clip(want_BT, -0.8, 0.8), 0)
    for name, want in (
        ("token_reward_BT", reward_BT),
        ("credit_BT", credit_BT),
        ("advantage_BT", want_BT),
    ):
        np.testing.assert_allclose(got[name], want, atol=1e-6, err_msg=name)
    assert 0 < (np.abs(want_BT) == 0.8).sum() < MASK_BT.sum()


def test_the_weight_of_a_token_is_the_product_of_all_that_weigh_it():
    made = build(gates=("trust", "first(n=2)"), importance="token(cap=1.5)", veto=-1.5)
    q = quantities(3)
    u_BT, log_w_BT = np.exp(q["log_u_BT"]), np.asarray(q["student_BT"] - q["sampler_BT"])
    want_BT = np.minimum(u_BT, 1) * np.minimum(np.exp(log_w_BT), 1.5)
    want_BT = np.where(np.asarray(q["position_BT"]) < 2, want_BT, 0)
    kept_B1 = ~(np.where(MASK_BT, log_w_BT, 0) < -1.5).any(1, keepdims=True)
    want_BT = np.where(MASK_BT & kept_B1, want_BT, 0)
    np.testing.assert_allclose(made.weights(q), want_BT, rtol=1e-6)
    assert sorted(kept_B1[:2, 0]) == [False, True]
    assert build().weights(q) is None


# --- an entry of one's own


def sharper(teacher_BT, student_BT, reward_B, mask_BT, *, power=2.0):
    """A token reward of three quantities and an option."""
    if not power > 0:
        raise ValueError(f"power is {power}; give one above 0")
    right_B1 = (reward_B > 0.5)[:, None]
    return jnp.where(mask_BT, power * (teacher_BT - student_BT) * right_B1, 0.0)


def between(logp_x, ref_x, student_xV, target_xV, real_xV, *, share):
    """A loss of the vocabulary that has one option without a default."""
    gap_xV = jnp.where(real_xV, target_xV - student_xV, 0.0)
    return share * (logp_x - ref_x) ** 2 - (gap_xV * jnp.exp(student_xV)).sum(-1)


def soothsaying(future_BT, mask_BT):
    return future_BT


def clairvoyant(logp_x, future_x):
    return logp_x * future_x


def longer(token_reward_BT, mask_BT):
    """Credit of one position too many."""
    return jnp.pad(jnp.where(mask_BT, token_reward_BT, 0.0), ((0, 0), (0, 1)))


def circular(credit_BT, mask_BT):
    return credit_BT


def averaged(log_u_BT, mask_BT):
    """A mean that forgot keepdims."""
    return jnp.where(mask_BT, log_u_BT, 0.0).mean(0)[None]


def number(mask_BT):
    return jnp.float32(1)


def total(logp_x):
    return logp_x.sum()


def one_array(student_xV, target_xV, real_xV):
    return student_xV.argmax(-1)


def backwards(log_t, log_s):
    """Forward KL for whoever reads its arguments, reverse KL by the order that they come in."""
    return jnp.exp(log_t) * (log_t - log_s)


def twisted(target_xV, student_xV, real_xV):
    return None


def swapped(lam, step):
    return lam


def unmasked(position_BT):
    return position_BT / 4.0


def inside_out(valid_xS, logp_xS):
    return logp_xS, valid_xS


def bucketed(logp_xS, valid_xS, share):
    return logp_xS + share, valid_xS


def lidless(logp_xS, valid_xS, outside_x):
    """A bucket that nobody says is valid."""
    return jnp.concatenate([logp_xS, outside_x[..., None]], -1), valid_xS


def trusted(log_u_BT, teacher_entropy_BT, mask_BT, *, divergence, nats=1.0):
    """A divergence's reward where the teacher is decided."""
    decided_BT = mask_BT & (teacher_entropy_BT < nats)
    return jnp.where(decided_BT, token_reward(divergence, log_u_BT), 0.0)


@pytest.fixture
def own(monkeypatch):
    for table, function in (
        ("advantage", sharper),
        *(("advantage", f) for f in (soothsaying, circular, averaged, trusted)),
        *(("baseline", number), ("gates", number), ("loss", total), ("support", one_array)),
        ("loss", between),
        ("loss", clairvoyant),
        ("credit", soothsaying),
        ("credit", longer),
        *(("divergence", backwards), ("lam_schedule", swapped), ("reduction", unmasked)),
        *(("support", twisted), ("mass", inside_out), ("mass", bucketed), ("mass", lidless)),
    ):
        monkeypatch.setitem(TABLES[table], function.__name__, function)


def test_an_own_entry_is_fed_by_the_names_of_its_parameters(own):
    settings = {"advantage": "sharper(power=3.0)", "lam": 1.25}
    assert checks.objective_problems(settings) == []
    made = build(**settings)
    assert made.needs >= {"teacher_BT", "student_BT", "reward_B", "mask_BT"}
    # The teacher itself and no target: lambda asks for no reference.
    assert (made.needs_teacher, made.needs_reward, made.needs_reference, made.needs_vocabulary) == (
        True,
        True,
        False,
        False,
    )
    q = quantities() | {"teacher_BT": quantities(1)["log_u_BT"], "reward_B": jnp.array([1.0, 0, 1])}
    want_BT = np.where(MASK_BT, 3 * (q["teacher_BT"] - q["student_BT"]), 0.0)
    want_BT[1] = 0
    np.testing.assert_allclose(made.advantages(q)["advantage_BT"], want_BT, rtol=1e-6)


def test_an_own_loss_brings_the_models_that_it_names(own):
    settings = {"loss": "between(share=0.5)"}
    assert checks.objective_problems(settings) == []
    made = build(**settings)
    assert made.needs == {*inspect.signature(between).parameters} - {"share"}
    assert (made.weighs, made.needs_teacher, made.needs_reference, made.needs_vocabulary) == (
        False,
        True,
        True,
        True,
    )


def test_an_own_advantage_of_a_divergence_is_learnt_from_as_it_is(own):
    said = {"advantage": "trusted(nats=0.5)", "divergence": "jsd"}
    (problem,) = checks.objective_problems(said)
    assert re.search("'corrected' completes gopd's reward .*estimator = 'stop_gradient'", problem)
    said["estimator"] = "stop_gradient"
    assert checks.objective_problems(said) == []
    q = quantities() | {"teacher_entropy_BT": jnp.where(MASK_BT, 0.4, 9.0).at[0].set(0.6)}
    want_BT = np.where(MASK_BT, token_reward(DIVERGENCES["jsd"], q["log_u_BT"]), 0.0)
    assert want_BT[0].any()
    want_BT[0] = 0
    np.testing.assert_allclose(build(**said).advantages(q)["advantage_BT"], want_BT, rtol=1e-6)


UNKNOWN = [
    ({"advantage": "soothsaying"}, "soothsaying", "future_BT", "log_u_BT"),
    ({"advantage": "circular"}, "circular", "credit_BT", "log_u_BT"),
    ({"credit": "soothsaying"}, "soothsaying", "future_BT", "token_reward_BT"),
    ({"loss": "clairvoyant"}, "clairvoyant", "future_x", "student_xV"),
]


@pytest.mark.parametrize(("settings", "name", "unknown", "known"), UNKNOWN, ids=str)
def test_an_own_entry_that_asks_for_what_no_step_computes_hears_what_there_is(
    own, settings, name, unknown, known
):
    (problem,) = checks.objective_problems(settings)
    assert problem.startswith(f"objective: {name} asks for ['{unknown}'], which no step computes")
    assert f"'{known}'" in problem
    with pytest.raises(ValueError, match="options are keyword-only"):
        build(**settings)


@pytest.mark.parametrize(
    ("key", "name", "takes", "order"),
    [
        ("divergence", "backwards", "log_t, log_s", "log_s, log_t"),
        ("lam_schedule", "swapped", "lam, step", "step, lam"),
        ("support", "twisted", "target_xV, student_xV, real_xV", "student_xV, target_xV, real_xV"),
        ("mass", "inside_out", "valid_xS, logp_xS", "logp_xS, valid_xS"),
        ("mass", "bucketed", "logp_xS, valid_xS, share", "logp_xS, valid_xS"),
        ("reduction", "unmasked", "position_BT", "mask_BT"),
    ],
)
def test_an_own_entry_that_is_called_by_position_has_these_names_in_this_order(
    own, key, name, takes, order
):
    said = f"{name} takes ({takes}), and objective.{key} is called by position with ({order})"
    with pytest.raises(ValueError, match=re.escape(said)):
        build(**{key: name})
    problems = checks.objective_problems({key: name, "loss": "exact"})
    assert any(problem.startswith(f"objective: {said}") for problem in problems)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"advantage": "sharper(sharp=2)"}, r"sharper has no \['sharp'\]; it has \['power'\]"),
        ({"advantage": "sharper(power=0)"}, r"'sharper\(power=0\)': power is 0; give one above 0"),
        ({"advantage": "blunt"}, r"there is no 'blunt'; there are \[.*'sharper'"),
        ({"credit": "longer"}, r"credit is 'longer': it returns the shape \(2, 4\), .* \(2, 3\)"),
        ({"advantage": "averaged"}, r"advantage is 'averaged': it returns the shape \(1, 3\)"),
        ({"baseline": "number"}, r"baseline is 'number': it returns the shape \(\)"),
        ({"gates": ("number",)}, r"gates is 'number': it returns the shape \(\)"),
        ({"loss": "total"}, r"loss is 'total': it returns the shape \(\)"),
        (
            {"loss": "exact", "support": "one_array"},
            r"support is 'one_array': it returns the shapes \[\(3,\), \(3,\)\] for 5 ids",
        ),
        (
            {"loss": "exact", "support": "top_k(k=2)", "mass": "lidless"},
            r"mass is 'lidless': it returns the shapes \[\(2, 3, 6\), \(2, 3, 5\)\]",
        ),
        ({"loss": "between"}, r"is 'between'; give it \['share'\]: 'between\(share=...\)'"),
    ],
)
def test_options_of_an_own_entry_are_checked_as_those_of_any(own, settings, words):
    (problem,) = checks.objective_problems(settings)
    assert re.search(words, problem)
