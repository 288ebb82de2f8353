"""What a run's own rows say is going wrong, in a sentence with the numbers and what to try.

An entry of ADVICE is a pure function of the rows of metrics.jsonl so far and the settings as plain
values. A key may be absent or None anywhere: then there is nothing to say. Limits are keyword
options; where no theory gives one it is a judgement, and its comment says so.
"""

from __future__ import annotations

import math

from gopd_jax.reporting.evidence import (
    WINDOW,
    closer,
    ends,
    is_number,
    lam_of,
    last,
    lower,
    percent,
    quarter,
    same_weights,
    sampled,
    say,
    setting,
    slower,
    some,
)
from gopd_jax.spec import table

LENGTH = "sampling.completion_length"


# With a third lost the teacher judges late states by another standard than early ones: judgement.
def prefix_drift(rows, config, *, lost=1 / 3, n=2):
    """The overlap of likely tokens falls along the completion."""
    quarters = [(q, last(rows, f"probe/overlap_{q}", n)) for q in (1, 2, 3, 4)]
    quarters = [(q, value) for q, value in quarters if value is not None]
    if len(quarters) < 2 or quarters[-1][1] > (1 - lost) * quarters[0][1]:
        return None
    (first, begin), (final, end) = quarters[0], quarters[-1]
    return say(
        config,
        f"prefix drift: student and teacher share {percent(begin)} of their likeliest tokens in "
        f"quarter {first} of the completion limit and {percent(end)} in quarter {final}, where the "
        "teacher reads prefixes that it would not write",
        ("objective.gates", f"first(n={quarter(config)})", "early tokens only"),
        ("objective.gates", f"drift(half_life={quarter(config)})", "the same, softly"),
    )


# Half: beyond it most of what the student may sample is nothing that the teacher would: judgement.
def bad_start(rows, config, *, least=0.5):
    """Student and teacher hardly share likely tokens at the start, and still do not."""
    first, now = some(rows[:WINDOW], "probe/overlap", 1), last(rows, "probe/overlap", 1)
    if not first or now is None or first[0][0] >= least or now >= least:
        return None
    return say(
        config,
        f"bad start: student and teacher shared {percent(first[0][0])} of their likeliest tokens "
        f"at the first probe and share {percent(now)} now, under {percent(least)}: the teacher has "
        "little to say about what the student samples",
        "a cold start on right completions with python -m gopd_jax.main --config=configs/sft.py, "
        "its export then as --config.student.path",
        "a teacher of the student's own family, read through the right template",
    )


# exp(-5) = 1/150 of the student's probability; at 20 one token weighs as much as 2000 of 0.01.
def outliers(rows, config, *, nats=5.0, largest=20.0, n=10):
    """A few tokens' rewards are so large that they make the gradient."""
    if setting(config, "objective.log_u_clip") is not None:
        return None
    tails = [last(rows, f"token_reward_{q}", n) for q in ("p01", "p99")]
    tail = max((abs(x) for x in tails if x is not None), default=None)
    most = last(rows, "advantage_absmax", n)
    if (tail is None or tail < nats) and (most is None or most < largest):
        return None
    told = [] if tail is None else [f"1 % of the token rewards are beyond {tail:.1f}"]
    told += [] if most is None else [f"the largest |advantage| of a step is {most:.1f}"]
    return say(
        config,
        f"outliers: {' and '.join(told)} (means of {n} steps)",
        ("objective.log_u_clip", "5.0", "nats"),
        ("objective.divergence", "jsd", "a bounded reward"),
    )


# A clip on one token in ten is no guard against outliers but another objective: judgement.
def clipped(rows, config, *, share=0.1, n=10):
    """The clips touch so many tokens that they are the objective."""
    found = last(rows, "advantage_clipped", n)
    if found is None or found < share:
        return None
    keys = [f"objective.{key}" for key in ("log_u_clip", "ratio_cap", "advantage_clip")]
    clips = {key: value for key in keys if is_number(value := setting(config, key))}
    return say(
        config,
        f"clips: {percent(found)} of the tokens are clipped (mean of {n} steps), so what is learnt "
        "is not the divergence that the settings name",
        *(f"--config.{key}={2 * value:g}" for key, value in clips.items()),
    )


# Two standard errors: below them a step's tokens do not tell the sign of the mean advantage. With a
# baseline that mean is about 0 by design, and only the cosine to distillation's exact one tells. A
# verifier's reward has another gradient, and GRPO's is centred in each group: neither tells of it.
def variance(rows, config, *, errors=2.0, cosine=0.1, n=20, n_probes=2):
    """The sampled gradient is mostly noise."""
    snr, tokens = last(rows, "advantage_snr", n), last(rows, "tokens", n)
    angle, told = last(rows, "probe/cosine", n_probes), []
    graded = setting(config, "objective.task") or setting(config, "objective.advantage") == "grpo"
    if graded or not sampled(config):
        return None
    plain = setting(config, "objective.baseline", "none") == "none"
    if plain and None not in (snr, tokens) and snr * math.sqrt(tokens) < errors:
        told.append(
            f"|mean| / std of the advantage is {snr:.2g}, {snr * math.sqrt(tokens):.1f} standard "
            f"errors with {tokens:.0f} tokens a step"
        )
    if angle is not None and angle < cosine:
        told.append(f"the sampled gradient has cosine {angle:.2g} to the exact one")
    if not told:
        return None
    group, prompts = setting(config, "batch.rollouts", 1) > 1, setting(config, "batch.prompts", 1)
    baseline = ("objective.baseline", "leave_one_out" if group else "local_kl", "")
    return say(
        config,
        f"variance: {' and '.join(told)}",
        baseline if plain else None,
        ("objective.loss", "exact", "the whole vocabulary in place of one token"),
        f"--config.batch.prompts={2 * prompts}",
    )


# Half: judgement. A student that comes to a sharper teacher loses entropy too, so where the
# teacher's is known the student's must also be a fifth below it.
def diversity_loss(rows, config, *, share=0.5, under=0.8, n=10):
    """The student's entropy falls, and not because the teacher's is as low."""
    found, teacher = ends(rows, "entropy", n), last(rows, "probe/entropy_teacher", 1)
    if found is None or found[1] > share * found[0]:
        return None
    if teacher is not None and found[1] > under * teacher:
        return None
    beside = "" if teacher is None else f" (the teacher's is {teacher:.2g})"
    return say(
        config,
        f"diversity loss: the student's entropy fell from {found[0]:.2g} to {found[1]:.2g} nats a "
        f"token{beside}",
        ("objective.divergence", "jsd", ""),
        ("objective.divergence", "mixture", "reverse and forward KL"),
        ("objective.regularizers", "entropy(weight=0.001)", "an entropy bonus"),
    )


# A truncated row has no end to learn from. Half of them is too many at any time; a fifth more than
# at first is the way there: judgement.
def length_runaway(rows, config, *, most=0.5, rise=0.2, n=10):
    """Completions run into the length limit."""
    now, found = last(rows, "truncated", n), ends(rows, "truncated", n)
    rose = found is not None and found[1] >= found[0] + rise
    if now is None or (now < most and not rose):
        return None
    told = f"{percent(now)} of completions are truncated"
    told += f", {percent(found[0])} at first," if rose else ""
    eos, longer = ends(rows, "eos_probability", n), 2 * setting(config, LENGTH, 1)
    if eos is not None and eos[1] < eos[0]:
        told += f" and the probability of an end token fell from {eos[0]:.2g} to {eos[1]:.2g}"
    return say(
        config,
        f"length runaway: {told.rstrip(',')}",
        lower(config, 1) if lam_of(config) > 1 else None,
        f"--config.sampling.completion_length={longer}",
        "another template or --config.sampling.stop if these do not match the model",
    )


# 3 nats of reward from the extrapolation alone favour a token exp(3) = 20 times; half as much
# again as at first while it is 1 nat or more is the way there: judgement.
def extrapolation_hacking(rows, config, *, nats=3.0, growth=1.5, least=1.0, n=10):
    """Rare tokens on which teacher and reference differ wildly earn most of the reward."""
    now, found = last(rows, "extrapolation_p99", n), ends(rows, "extrapolation_p99", n)
    lam, cap = last(rows, "lam", 1), setting(config, "objective.ratio_cap")
    lam = lam_of(config) if lam is None else lam
    if now is None:
        return None
    tilt = abs(lam - 1) * (now if cap is None else min(now, cap))
    grew = cap is None and found is not None and found[1] >= growth * found[0]
    if tilt < nats and not (grew and tilt >= least):
        return None
    was = f", {found[0]:.1f} at first" if grew else ""
    return say(
        config,
        f"extrapolation: on 1 % of the tokens |log T - log R| is beyond {now:.1f} nats{was}, where "
        f"lambda = {lam:g} adds {tilt:.1f} nats to the reward",
        f"--config.objective.ratio_cap={(now if cap is None else cap) / 2:.2g}",
        lower(config, 1 + (lam - 1) / 2),
        "the teacher's own base model as --config.reference.path",
    )


# Half of the sample lost to uneven weights: judgement.
def stale_rollouts(rows, config, *, share=0.5, n=10):
    """The sampler's policy is far from the learner's. log_ess: of the share of the sample, <= 0."""
    log_ess, lag = last(rows, "log_ess", n), last(rows, "staleness", n)
    if log_ess is None or log_ess >= math.log(share) or same_weights(rows, config, n):
        return None
    behind = "" if lag is None else f", its weights {lag:.2g} steps old"
    return say(
        config,
        f"stale rollouts: {percent(math.exp(log_ess))} of the sample is effective, weighed{behind}",
        ("objective.importance", "token", "truncated weights"),
        ("objective.rejection", "token", "leaves out what is too far off"),
        closer(config),
        slower(config),
    )


# The same sums in another order: float32 moves a log-prob by 1e-6 to 1e-4, bfloat16 by its step of
# 0.03 near 4, and over a step's tokens that averages out.
def sampler_mismatch(rows, config, *, float32=1e-3, bfloat16=0.03, n=3):
    """Sampler and scorer disagree although their weights are the same."""
    found, kind = last(rows, "sampler_kl", n), setting(config, "student.dtype", "float32")
    limit = bfloat16 if kind == "bfloat16" else float32
    own = setting(config, "objective.source", "student") == "student"
    if found is None or abs(found) <= limit or not own or not same_weights(rows, config, n):
        return None
    return (
        f"sampler mismatch: with the same weights the sampler's log-probs are {found:.2g} nats a "
        f"token from the scorer's, where rounding in {kind} makes {limit:g} at most: this is a bug "
        "in the model's decoding or scoring and no setting; report it with run.json. Until then "
        "--config.objective.importance=token bounds the harm."
    )


# One is enough: finite weights and inputs do not make such a gradient by chance.
def skipped_updates(rows, config, *, least=1, n=20):
    """Steps whose gradient was not finite changed nothing."""
    found = [row.get("skipped") for row in rows[-n:]]
    skipped, half = sum(filter(is_number, found)), setting(config, "student.dtype") == "bfloat16"
    # A loss without an advantage has no ratio to clip, and refuses the setting.
    unclipped = setting(config, "objective.log_u_clip") is None and "advantage_absmax" in rows[-1]
    if skipped < least:
        return None
    return say(
        config,
        f"skipped updates: {skipped:g} in the last {len(found)} steps, whose gradient was not "
        "finite",
        slower(config),
        ("objective.log_u_clip", "5.0", "nats") if unclipped else None,
        "--config.student.dtype=float32" if half else None,
    )


# 0 is what a constant explains; 50 steps, or twice the warm-up, are the critic's to learn in.
def critic_not_learning(rows, config, *, least=0.0, steps=50, n=10):
    """V explains no more of the returns than their mean does."""
    found, warm = last(rows, "explained_variance", n), setting(config, "critic.warmup_steps", 0)
    if found is None or found > least or rows[-1]["step"] < max(steps, 2 * warm):
        return None
    return say(
        config,
        f"critic: at step {rows[-1]['step']} its explained variance is {found:.2g} (mean of {n} "
        "steps), no better than a constant's",
        "a larger --config.critic.learning_rate or --config.critic.width",
        ("critic.closed_form", "True", "it begins at the exact local KL"),
        f"--config.critic.warmup_steps={max(2 * warm, 20)}",
        ("objective.credit", "return_to_go", "it needs no critic"),
    )


# Both must be seen: two standard errors of a share of verdicts and 2 points, and a tenth of the KL.
def reward_falls(rows, config, *, errors=2.0, least=0.02, kl=0.9, n=4, n_kl=10):
    """The student comes closer to the teacher and gets worse at the task."""
    reward, gap = ends(rows, "reward", n), ends(rows, "kl_teacher", n_kl)
    if reward is None or gap is None or gap[1] > kl * gap[0]:
        return None
    verdicts = n * setting(config, "batch.prompts", 1) * setting(config, "batch.rollouts", 1)
    spread = sum(max(r * (1 - r), 0.0) for r in reward) / verdicts
    if reward[0] - reward[1] < max(least, errors * math.sqrt(spread)):
        return None
    return say(
        config,
        f"reward: it fell from {reward[0]:.3g} to {reward[1]:.3g} while the KL to the teacher fell "
        f"from {gap[0]:.2g} to {gap[1]:.2g}: the student takes on what the teacher is like and not "
        "what it can do",
        "a look at the teacher's own accuracy on these tasks and at its template",
        ("objective.task", "grpo", "the verifier's reward beside the teacher's"),
        ("objective.gates", "agree", "only tokens whose advantage the verifier agrees with"),
    )


# One nat: what the student samples is on average a third as likely under the teacher. A student
# that is trained comes closer or, with lambda > 1, passes by at a fraction of that: judgement.
def runaway(rows, config, *, nats=1.0, growth=3.0, n=2):
    """The student leaves all that the teacher would write."""
    found = ends(rows, "kl_teacher", n)
    if found is None or found[1] < max(nats, growth * found[0]):
        return None
    return say(
        config,
        f"runaway: the KL to the teacher rose from {found[0]:.2g} to {found[1]:.2g} nats a token "
        f"(means of {n} steps): the student leaves what the teacher would write",
        f"{slower(config)} and another workdir, from the start",
        lower(config, 1 + (lam_of(config) - 1) / 2) if lam_of(config) > 1 else None,
        "--config.optimizer.warmup_steps=10"
        if not setting(config, "optimizer.warmup_steps", 0)
        else None,
    )


# Half of a text repeated is a loop in any language; a fifth more than at first is new: judgement.
def repetition(rows, config, *, most=0.5, rise=0.2):
    """Completions repeat themselves."""
    now, found = last(rows, "probe/repetition", 1), ends(rows, "probe/repetition", 1)
    rose = found is not None and found[1] >= found[0] + rise
    if now is None or (now < most and not rose):
        return None
    was = f", {percent(found[0])} at first" if rose else ""
    return say(
        config,
        f"repetition: {percent(now)} of the probed completions' text repeats itself{was}",
        lower(config, 1 + (lam_of(config) - 1) / 2) if lam_of(config) > 1 else None,
        ("objective.divergence", "jsd", ""),
        ("objective.gates", f"first(n={quarter(config)})", "early tokens only"),
        slower(config),
    )


ADVICE = table(
    *(prefix_drift, bad_start, outliers, clipped, variance, diversity_loss, length_runaway),
    *(extrapolation_hacking, stale_rollouts, sampler_mismatch, skipped_updates),
    *(critic_not_learning, reward_falls, runaway, repetition),
)


def advise(rows: list[dict], config: dict) -> dict[str, str]:
    """Name -> sentence, of what applies after the last of `rows`; {} where nothing does."""
    told = {name: entry(rows, config) for name, entry in ADVICE.items()} if rows else {}
    return {name: sentence for name, sentence in told.items() if sentence is not None}
