"""An objective: the entries of the tables that a run combines, and what they have to be fed."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import jax.numpy as jnp

from gopd_jax.objectives import divergences as f_divergences
from gopd_jax.objectives import entries, formula
from gopd_jax.objectives.advantages import ADVANTAGES
from gopd_jax.objectives.baselines import BASELINES
from gopd_jax.objectives.credit import CREDITS
from gopd_jax.objectives.divergences import DIVERGENCES
from gopd_jax.objectives.entries import (
    DRAWN,
    EARNED,
    REWARDS,
    TARGETS,
    VALUES,
    fed,
    names,
    over_vocabulary,
)
from gopd_jax.objectives.gates import GATES
from gopd_jax.objectives.importance import IMPORTANCE, REJECTIONS
from gopd_jax.objectives.losses import LOSSES
from gopd_jax.objectives.reductions import REDUCTIONS
from gopd_jax.objectives.regularizers import REGULARIZERS
from gopd_jax.objectives.supports import MASSES, SUPPORTS
from gopd_jax.objectives.targets import SCHEDULES
from gopd_jax.spec import plain, resolve

# Setting -> the table that its string chooses from; a tuple of strings in gates, regularizers.
TABLES = {
    "advantage": ADVANTAGES,
    "divergence": DIVERGENCES,
    "lam_schedule": SCHEDULES,
    "credit": CREDITS,
    "baseline": BASELINES,
    "gates": GATES,
    "importance": IMPORTANCE,
    "rejection": REJECTIONS,
    "loss": LOSSES,
    "support": SUPPORTS,
    "mass": MASSES,
    "regularizers": REGULARIZERS,
    "task": ADVANTAGES,
    "reduction": REDUCTIONS,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Resolved functions of one objective; hashable, static in a jit. See `build` for each."""

    advantage: Callable
    divergence: Callable
    corrected: bool
    lam: float
    lam_schedule: Callable
    lam_by_row: bool
    ratio_cap: float | None
    log_u_clip: float | None
    credit: Callable
    baseline: Callable | None
    advantage_clip: float | None
    gates: tuple[Callable, ...]
    importance: Callable | None
    rejection: Callable | None
    veto: float | None
    loss: Callable
    support: Callable
    mass: Callable
    regularizers: tuple[Callable, ...]
    task: Callable | None
    distil_weight: float
    reduction: Callable
    mixture: str | None
    formula: str  # what is ascended, for the log and the report

    # --- what has to be computed, read off the entries

    @property
    def losses(self) -> tuple[Callable, ...]:
        return (self.loss, *self.regularizers)  # what is differentiated

    @property
    def weighs(self) -> bool:
        """Whether anything asks what a sampled token has earned: its advantage, first of all."""
        of_tokens = [e for e in (*self.gates, self.importance, self.rejection) if e is not None]
        asked = any(EARNED & {*names(entry)} for entry in of_tokens)
        return asked or any("advantage_x" in names(entry) for entry in self.losses)

    @property
    def needs(self) -> frozenset[str]:
        """Every quantity that this objective uses."""
        used = [*self.losses, *self.gates, self.importance, self.rejection, self.vetoes]
        if self.weighs:
            used += [self.advantage, self.credit, self.baseline, self.task]
        return frozenset(name for entry in used if entry is not None for name in names(entry))

    @property
    def vetoes(self) -> Callable | None:
        """The rejection of rows that `veto` asks for."""
        return None if self.veto is None else functools.partial(REJECTIONS["veto"], floor=self.veto)

    @property
    def tilts(self) -> bool:
        """Whether the target is another than the teacher: then it needs the reference."""
        return self.lam != 1 or self.lam_by_row or self.lam_schedule is not SCHEDULES["constant"]

    @property
    def needs_teacher(self) -> bool:
        return bool(self.needs & (TARGETS | DRAWN))

    @property
    def drawn(self) -> bool:  # whether the target counts, and not the teacher's own figures alone
        return bool(self.needs & DRAWN)

    @property
    def needs_reference(self) -> bool:
        return bool(self.needs & {"ref_BT", "ref_x", "ref_xV"}) or (self.tilts and self.drawn)

    @property
    def needs_reward(self) -> bool:
        return bool(self.needs & REWARDS)

    @property
    def needs_critic(self) -> bool:
        return bool(self.needs & VALUES)

    @property
    def normalised(self) -> bool:
        """Whether the sampled tokens' target has to be normalised over the vocabulary.

        A constant of the state changes nothing in expectation under reverse KL, immediate or
        summed over the sequence (the reward of G-OPD), and in losses that take log T - S to be
        linear or squared. Everyone else asks for the ratio of two distributions.
        """
        if not (self.tilts or self.mixture == "log"):
            return False
        if self.switches or (self.mixture == "log" and self.ratio_cap is not None):
            return self.needs_teacher  # a cap and a sign move with that constant
        indifferent = {LOSSES["k1"], LOSSES["k2"]}
        linear = self.divergence is DIVERGENCES["reverse_kl"] and self.log_u_clip is None
        if linear and plain(self.advantage) is ADVANTAGES["gopd"]:
            indifferent |= {self.advantage}
        used = [*self.losses, *self.gates]
        used += [self.advantage, self.credit, self.baseline, self.task] if self.weighs else []
        asking = {"target_BT", "log_u_BT", "target_x"}
        return any(e not in indifferent and asking & {*names(e)} for e in used if e is not None)

    @property
    def needs_vocabulary(self) -> bool:
        """Whether the frozen models' distributions are needed, not their sampled tokens' alone."""
        over = {"target_xV", "target_xS", "ref_xV", "local_kl_BT"}
        mixed = self.mixture is not None and "teacher_entropy_BT" in self.needs
        return bool(self.needs & over) or self.normalised or mixed

    @property
    def prescored(self) -> bool:
        """Whether the student scores the batch beforehand: rows compared, a critic, `switches`."""
        compares = self.weighs and self.baseline is not None and "credit_BT" in names(self.baseline)
        return compares or "group_B" in self.needs or self.needs_critic or self.switches

    @property
    def switches(self) -> bool:  # between vocabulary and sampled token, by the advantage's sign
        return any(over_vocabulary(e) and "advantage_x" in names(e) for e in self.losses)

    # --- what is computed of it

    def lam_at(self, step, lam_B=None):
        """Lambda at a step: a number, or [B] where rows have their own."""
        return self.lam_schedule(step, self.lam if lam_B is None else lam_B)

    def token_reward(self, log_u):
        """-f(u), clipped as the sampled tokens' is: for E_S over all tokens of a state."""
        return f_divergences.token_reward(self.divergence, self.clipped(log_u))

    def clipped(self, log_u):
        c = self.log_u_clip
        return log_u if c is None else jnp.clip(log_u, -c, c)

    def advantages(self, quantities: dict) -> dict:
        """{token_reward_BT, credit_BT, advantage_BT}, 0 off the mask; no gradient belongs in it.

        The correction of an f-divergence is added after credit: it belongs to its own token and is
        neither summed nor discounted.
        """
        q, mask_BT = dict(quantities), quantities["mask_BT"]
        q["token_reward_BT"] = fed(self.advantage, q)
        q["credit_BT"] = advantage_BT = fed(self.credit, q)
        if self.corrected:
            log_u_BT = self.clipped(jnp.where(mask_BT, q["log_u_BT"], 0.0))
            if self.credit is CREDITS["immediate"]:
                # Their sum in closed form: added up they cancel to nothing where u is extreme.
                advantage_BT = f_divergences.corrected(self.divergence, log_u_BT)
            else:
                advantage_BT += f_divergences.correction(self.divergence, log_u_BT)
        if self.baseline is not None:
            advantage_BT = advantage_BT - fed(self.baseline, q)
        if self.task is not None:
            advantage_BT = fed(self.task, q) + self.distil_weight * advantage_BT
        if self.advantage_clip is not None:
            advantage_BT = jnp.clip(advantage_BT, -self.advantage_clip, self.advantage_clip)
        found = {name: q[name] for name in ("token_reward_BT", "credit_BT")}
        return found | {"advantage_BT": jnp.where(mask_BT, advantage_BT, 0.0)}

    def weights(self, quantities: dict):
        """weight_BT of the tokens' losses: gates, importance, rejection; None where there is none.

        What is gated or rejected still counts in the reduction's number of tokens.
        """
        weighing = (*self.gates, self.importance, self.rejection, self.vetoes)
        found = [fed(e, quantities).astype(jnp.float32) for e in weighing if e is not None]
        return jnp.where(quantities["mask_BT"], math.prod(found), 0.0) if found else None

    def kept(self, quantities: dict):
        """keep_BT of the tokens that rejection and veto leave; None where there is neither."""
        found = [fed(e, quantities) for e in (self.rejection, self.vetoes) if e is not None]
        return functools.reduce(jnp.logical_and, found) if found else None


def absent(key: str, text: str | None) -> bool:
    """Whether a setting names no entry: some say so by "none", the others need one."""
    may_be = ("baseline", "importance", "rejection", "task")
    return text is None or (text == "none" and key in may_be)


def build(
    *,
    advantage: str = "gopd",
    divergence: str = "reverse_kl",
    estimator: str = "corrected",
    lam: float = 1.0,
    lam_schedule: str = "constant",
    lam_by_row: bool = False,
    ratio_cap: float | None = None,
    log_u_clip: float | None = None,
    credit: str = "immediate",
    baseline: str = "none",
    advantage_clip: float | None = None,
    gates: tuple[str, ...] = (),
    importance: str = "none",
    rejection: str = "none",
    veto: float | None = None,
    loss: str = "policy_gradient",
    support: str = "full",
    mass: str = "rest",
    regularizers: tuple[str, ...] = (),
    task: str | None = None,
    distil_weight: float = 1.0,
    reduction: str = "token_mean",
    mixture: str | None = None,
) -> Objective:
    """Resolve the settings of config.objective. ValueError for a name or option that is not there.

    mixture: "probability" or "log", where a task has several teachers.
    """
    said = dict(locals())

    def entry(key, text):
        if absent(key, text):
            return None
        function = resolve(text, TABLES[key])
        entries.check(key, function)
        return function

    def given(function, own):  # options that have settings of their own
        bound = {k: x for k, x in own.items() if k in inspect.signature(function).parameters}
        return functools.partial(function, **bound) if bound else function

    of = entry("divergence", divergence)
    rewarded = given(entry("advantage", advantage), {"divergence": of, "clip": log_u_clip})
    made = Objective(
        advantage=rewarded,
        divergence=of,
        # The reward -f(u) is gopd's and no other's; reverse KL's correction is 0.
        corrected=(estimator, plain(rewarded)) == ("corrected", ADVANTAGES["gopd"])
        and of is not DIVERGENCES["reverse_kl"],
        lam=lam,
        lam_schedule=entry("lam_schedule", lam_schedule),
        lam_by_row=lam_by_row,
        ratio_cap=ratio_cap,
        log_u_clip=log_u_clip,
        credit=entry("credit", credit),
        baseline=entry("baseline", baseline),
        advantage_clip=advantage_clip,
        gates=tuple(entry("gates", gate) for gate in gates),
        importance=entry("importance", importance),
        rejection=entry("rejection", rejection),
        veto=veto,
        loss=given(entry("loss", loss), {"divergence": of}),
        support=entry("support", support),
        mass=entry("mass", mass),
        regularizers=tuple(entry("regularizers", one) for one in regularizers),
        task=entry("task", task),
        distil_weight=distil_weight,
        reduction=entry("reduction", reduction),
        mixture=mixture,
        formula="",
    )
    return dataclasses.replace(made, formula=formula.of(made, said, estimator))
