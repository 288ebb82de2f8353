"""Which keys of a run's rows are drawn together, and what each plot says."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """The curves of a row's keys, with those of key/<task> beside that of the first one.

    Several runs in one plot show the first and the last of the keys alone.
    """

    title: str
    unit: str
    keys: tuple[str, ...]
    labels: tuple[str, ...] = ("all",)  # a word for each key
    bands: tuple[tuple[str, str], ...] = ()  # pairs of keys with an area between them
    percent: bool = False
    varies: bool = False  # whether it is drawn only where its values differ
    calm: float | None = None  # where no value is further from 0, it is not drawn
    rows: str = "metrics"


CHARTS = (
    Chart(
        title="Reward",
        unit="verifier's score of training completions",
        keys=("reward",),
        percent=True,
    ),
    Chart(title="KL(student ‖ teacher)", unit="nats a token, sampled", keys=("kl_teacher",)),
    Chart(title="KL(student ‖ reference)", unit="nats a token, sampled", keys=("kl_ref",)),
    Chart(title="Entropy of the student", unit="nats a token", keys=("entropy",)),
    Chart(
        title="Completion length",
        unit="tokens",
        keys=("length", "length_p95"),
        labels=("mean", "95th percentile"),
    ),
    Chart(
        title="Truncated",
        unit="share of completions cut at the length limit",
        keys=("truncated",),
        percent=True,
    ),
    Chart(
        title="Negative advantages",
        unit="share of tokens",
        keys=("advantage_negative",),
        percent=True,
    ),
    Chart(title="Gradient norm", unit="global, before clipping", keys=("grad_norm",)),
    Chart(
        title="Throughput",
        unit="completion tokens a second",
        keys=("tokens_per_second",),
        rows="timing",
    ),
)

QUARTERS = ("1st quarter", "2nd", "3rd", "4th")


def _by_quarter(key: str) -> dict[str, tuple[str, ...]]:
    return {"keys": tuple(f"{key}_{q}" for q in (1, 2, 3, 4)), "labels": QUARTERS}


DIAGNOSTICS = (
    Chart(
        title="Token reward",
        unit="median; areas: 10 to 90 %, 1 to 99 % of tokens",
        keys=("token_reward_p50",),
        bands=(("token_reward_p10", "token_reward_p90"), ("token_reward_p01", "token_reward_p99")),
    ),
    Chart(
        title="Advantage, signal to noise",
        unit="|mean| / standard deviation",
        keys=("advantage_snr",),
    ),
    Chart(
        title="Clipped",
        unit="share of tokens that a clip touched",
        keys=("advantage_clipped",),
        percent=True,
        calm=0.0,
    ),
    Chart(
        title="Probability of an end token",
        unit="mean over positions",
        keys=("eos_probability",),
    ),
    Chart(
        title="|log teacher − log reference|",
        unit="nats, 99th percentile of tokens",
        keys=("extrapolation_p99",),
    ),
    Chart(title="lambda", unit="of the extrapolation", keys=("lam",), varies=True),
    Chart(
        title="Overlap of likely tokens",
        unit="probe rows; shared, and the student's mass on it",
        keys=("probe/overlap", "probe/overlap_mass"),
        labels=("tokens", "mass"),
        percent=True,
    ),
    Chart(
        title="Overlap by position",
        unit="probe rows; by quarter of the length limit",
        percent=True,
        **_by_quarter("probe/overlap"),
    ),
    Chart(
        title="KL to the target by position",
        unit="nats, exact, probe rows; by quarter of the length limit",
        **_by_quarter("probe/kl_target"),
    ),
    Chart(
        title="Exact KL",
        unit="nats a token, probe rows; of the student to",
        keys=("probe/kl_teacher", "probe/kl_target", "probe/kl_ref"),
        labels=("teacher", "target", "reference"),
    ),
    Chart(
        title="Entropy of the teacher",
        unit="nats a token, probe rows",
        keys=("probe/entropy_teacher",),
    ),
    Chart(
        title="Tail mass",
        unit="outside the likeliest tokens, probe rows",
        keys=("probe/tail_mass",),
        percent=True,
    ),
    Chart(
        title="Actionability and routable share",
        unit="probe rows; of the distance to the teacher, of negatives",
        keys=("probe/actionability", "probe/routable"),
        labels=("actionability", "routable"),
        percent=True,
    ),
    Chart(
        title="Sampled against exact gradient",
        unit="cosine, probe rows",
        keys=("probe/cosine",),
    ),
    Chart(
        title="Repetition",
        unit="share of the completions' text, probe rows",
        keys=("probe/repetition",),
        percent=True,
    ),
    Chart(
        title="Teacher's log-prob against correctness",
        unit="AUROC, probe rows; 0.5 is chance",
        keys=("probe/auroc",),
    ),
    Chart(title="Staleness", unit="steps", keys=("staleness",), varies=True),
    Chart(
        title="Effective sample",
        unit="log of its share of the tokens",
        keys=("log_ess",),
        calm=1e-3,  # rounding, where the rollouts are the student's own
    ),
    Chart(
        title="Sampler against scorer",
        unit="KL, nats a token; k1 and k3 estimates",
        keys=("sampler_kl", "sampler_k3"),
        labels=("k1", "k3"),
    ),
    Chart(title="Sampler against scorer, χ²", unit="a token", keys=("sampler_chi2",), calm=1e-3),
    Chart(
        title="Off-policy tokens",
        unit="share of tokens whose weight is capped, or that are left out",
        keys=("importance_capped", "rejected"),
        labels=("capped", "rejected"),
        percent=True,
        calm=0.0,
    ),
    Chart(
        title="Critic: explained variance",
        unit="1 is perfect, 0 a constant's",
        keys=("explained_variance",),
    ),
    Chart(title="Critic: loss", unit="½ (V − return)²", keys=("value_loss",)),
    Chart(title="Critic: gradient norm", unit="global", keys=("critic_grad_norm",)),
)
