"""What a run learnt from, in words: its models, states, divergence, credit, gates and clips.

Functions of a Run that return a text, or None where the question does not apply to the run. What
its files cannot tell is an Unknown with the reason; nothing is guessed. A setting that run.json
lacks, because the run is of an earlier version, is what that version did: off.
"""

from __future__ import annotations

import math
import statistics
from functools import partial

from gopd_jax.objectives.entries import EARNED, names, over_vocabulary
from gopd_jax.objectives.objective import TABLES
from gopd_jax.reporting import evidence
from gopd_jax.reporting.plots import Run

DIRECTIONS = {
    "reverse_kl": "reverse KL, KL(student ‖ target)",
    "forward_kl": "forward KL, KL(target ‖ student)",
}
# Losses with a measure of their own; in any other it is the advantage's or `exact`'s.
OF_LOSS = {
    "entropy_gated": "reverse KL, KL(student ‖ target), and forward KL, KL(target ‖ student), "
    "besides where the target is uncertain",
    "ratio_gated": "forward KL, KL(target ‖ student), and reverse KL, KL(student ‖ target), in "
    "shares that the sampled token's log-ratio sets",
    "k1": "none: its expected gradient is zero",
    "k3": DIRECTIONS["forward_kl"],
}
# What the expected gradient is of a log-ratio's estimate that is taken as a loss.
LOG_RATIOS = {
    "k1": "its expected gradient is zero",
    "k2": "its expected gradient is that of KL(student ‖ target)",
    "k3": "its expected gradient is that of KL(target ‖ student)",
}


class Unknown(Exception):
    """The run's files cannot tell; the text says why."""


def get(run: Run, key: str, default=None):
    """A setting; `default` where an earlier version had none or it is None. Unknown without any."""
    if "config" not in run.info:
        raise Unknown("the workdir has no run.json with the settings")
    value = evidence.setting(run.info["config"], key, default)
    if value is None:
        raise Unknown(f"run.json has no {key}")
    return value


def off(run: Run, key: str):
    """A setting that may be off: its value, or "none"."""
    return get(run, key, "none")


def entry_name(entry: str) -> str:
    """Of a table's entry without its options."""
    return entry.split("(")[0]


def count(n: int, one: str, many: str | None = None) -> str:
    return f"{n:,} {one if n == 1 else many or f'{one}s'}"


def span(run: Run, key: str, form: str, *, scale: float = 1.0, rows: str = "metrics") -> str:
    """The mean over the steps, and the first and last of them."""
    values = [scale * value for value in run.values(key, rows)]
    if not values:
        raise Unknown(f"{rows}.jsonl has no {key}")
    mean = form.format(statistics.fmean(values))
    ends = f"{form.format(values[0])} → {form.format(values[-1])}"
    return f"mean {mean} ({ends})" if len(values) > 1 else mean


# Each role's model, tokenizer and template.


def models(run: Run):
    """(section, item, function) of each role."""
    for role in run.info.get("models") or roles_of(run):
        yield "Models", f"{role}: checkpoint", partial(checkpoint, role=role)
        yield "Models", f"{role}: tokenizer", partial(tokenizer, role=role)
        yield "Models", f"{role}: template", partial(template, role=role)


def roles_of(run: Run) -> list[str]:
    config = run.info.get("config", {})
    teachers = [f"teacher:{name}" for name in config.get("teachers") or {}]
    return ["student", *(["reference"] if config.get("reference") else []), *teachers]


def of_role(run: Run, role: str) -> dict:
    """The settings of a role; {} where they are not known."""
    config = run.info.get("config", {})
    if role.startswith("teacher:"):
        return (config.get("teachers") or {}).get(role.removeprefix("teacher:")) or {}
    return config.get(role) or {}


def checked(run: Run, role: str, name: str) -> str | None:
    """What preflight told of a role."""
    told = (c["value"] for c in run.checks if (c["role"], c["name"]) == (role, name))
    return next(told, None)


def checkpoint(run: Run, role: str) -> str:
    model, asked = run.info.get("models", {}).get(role, {}), of_role(run, role)
    path = model.get("path") or asked.get("path")
    if path is None:
        raise Unknown(f"run.json names no model of {role}")
    told = [path]
    if model:
        told += [f"{model['parameters']:,} parameters", f"sha256 {model['digest'][:16]}"]
    told += [f"computed in {asked['dtype']}"] if "dtype" in asked else []
    if (decay := asked.get("follows")) is not None:
        told.append(f"follows the student with decay {decay:g}")
    return ", ".join(told)


def tokenizer(run: Run, role: str) -> str:
    if vocabulary := checked(run, role, "vocabulary"):
        ends, pad = checked(run, role, "ends"), checked(run, role, "pad")
        return f"sha256 {vocabulary}; ends of a completion {ends}; padding {pad}"
    identity = run.info.get("identity", {})
    if role == "student" and "tokenizer" in identity:
        ends = identity.get("ends of completions", "not recorded")
        return f"sha256 {identity['tokenizer']}; ids that end a completion {ends}"
    raise Unknown("preflight.json has no fingerprint of it; set --config.preflight=warn or refuse")


def template(run: Run, role: str) -> str:
    asked, told = of_role(run, role), []
    if template := checked(run, role, "template"):
        told.append(f"sha256 {template}")
    elif reader := run.info.get("identity", {}).get(f"reader of {role}"):
        told.append(f"sha256 of template, options and context {reader}")
    else:
        raise Unknown("neither preflight.json nor run.json has a fingerprint of it")
    told += [f"options {asked['template']}"] if asked.get("template") else []
    told += [f"also reads {asked['context']}"] if asked.get("context") else []
    return "; ".join(told)


# States and what is learnt at them.


def source(run: Run) -> str:
    source = get(run, "objective.source", "student")
    told = {
        "student": "the student's own completions (on-policy)",
        "teacher": "the teacher's completions",
        "data": "completions of the data",
    }
    return f"{told.get(source, source)} of prompts of {get(run, 'data.train')}" + (
        f", content {digest}"
        if (digest := run.info.get("identity", {}).get("data.train content"))
        else ""
    )


def staleness(run: Run) -> str | None:
    if get(run, "objective.source", "student") != "student":
        return None
    lag, updates = get(run, "sampling.lag", 0), get(run, "batch.updates", 1)
    told = f"the sampler's weights are {count(lag, 'step')} old; {count(updates, 'update')} a batch"
    told += f", {count(get(run, 'batch.epochs', 1), 'pass', 'passes')} over it"
    if run.values("staleness"):
        told += f"; measured, steps: {span(run, 'staleness', '{:.3g}')}"
    if ess := run.values("log_ess"):
        told += f"; effective share of the sample at least {100 * math.exp(min(ess)):.0f} %"
    return told


def gopd(run: Run) -> bool:
    return entry_name(get(run, "objective.advantage", "gopd")) == "gopd"


def loss_of(run: Run) -> str:
    return get(run, "objective.loss", "policy_gradient")


def over_states(run: Run) -> bool:
    """Whether the loss is over more of a state than the sampled token."""
    name = entry_name(loss_of(run))
    if (loss := TABLES["loss"].get(name)) is None:
        raise Unknown(
            f"no table has the loss {name!r}; it was a preset's own, or another version's"
        )
    return over_vocabulary(loss)


def divergence(run: Run) -> str | None:
    """The divergence of the advantage, or that of a loss which has its own."""
    if not gopd(run):
        return None
    if (told := OF_LOSS.get(entry_name(loss_of(run)))) is not None:
        return told
    text = get(run, "objective.divergence", "reverse_kl")
    return DIRECTIONS.get(text, f"D_f = E_student[f(target / student)], f of {text}")


def target(run: Run) -> str | None:
    if not gopd(run):
        return None
    lam, schedule = get(run, "objective.lam"), get(run, "objective.lam_schedule", "constant")
    told = f"lambda = {lam:g}, {schedule}"
    tasks = get(run, "objective.task_lam", {})
    told += "".join(f", for {task} {value:g}" for task, value in tasks.items())
    if by_row := get(run, "objective.lam_by_row", False):
        told += ", for rows that name their own that one"
    plain = lam == 1 and schedule == "constant" and not tasks and not by_row
    return f"{told}: " + (
        "the teacher itself"
        if plain
        else "teacher^lambda · reference^(1 − lambda), normalised at each state"
    )


def estimator(run: Run) -> str:
    loss = entry_name(loss_of(run))
    if loss == "cr_opd":
        return (
            f"{loss_of(run)}: policy gradient; a negative's probability is routed to other ids, "
            "which is biased by design. No gradient through advantage and route"
        )
    if loss == "asymmetric":
        return (
            f"{loss_of(run)}: policy gradient of the sampled token where the advantage is above 0, "
            "the divergence's value at the state, through the student's log-probs, elsewhere"
        )
    if over_states(run):
        return f"{loss_of(run)}: its value at each visited state, through the student's log-probs"
    if loss_of(run) in LOG_RATIOS:
        return f"{loss_of(run)} of the sampled token's log-ratio: {LOG_RATIOS[loss_of(run)]}"
    told = f"{loss_of(run)} on the sampled token; no gradient through the advantage"
    if gopd(run) and entry_name(get(run, "objective.divergence", "reverse_kl")) != "reverse_kl":
        kind = get(run, "objective.estimator", "corrected")
        means = {
            "corrected": "advantage −f(u) + u f′(u) − f′(1)",
            "stop_gradient": "advantage −f(u), which is biased for this divergence",
        }
        told += f"; estimator {kind}: {means.get(kind, kind)}"
    return told


def formula(run: Run) -> str:
    if not run.info.get("formula"):
        raise Unknown("run.json has no formula")
    return run.info["formula"]


def support(run: Run) -> str | None:
    if not over_states(run):
        return "the sampled token alone"
    if entry_name(loss_of(run)) == "cr_opd":
        return f"as the loss chooses: {loss_of(run)}"
    support = get(run, "objective.support", "full")
    if support == "full":
        return "the whole vocabulary, so no mass is outside"
    return f"{support}; mass outside: {get(run, 'objective.mass', 'rest')}"


def weighs(run: Run) -> bool:
    """Whether anything asks for the advantage of a sampled token."""
    loss = TABLES["loss"].get(entry_name(loss_of(run)))
    gates = (TABLES["gates"].get(entry_name(gate)) for gate in get(run, "objective.gates", ()))
    asked = any(gate is not None and EARNED & {*names(gate)} for gate in gates)
    return asked or loss is None or "advantage_x" in names(loss)


def credit(run: Run) -> str | None:
    if not weighs(run):
        return None
    credit = get(run, "objective.credit", "immediate")
    told = {
        "immediate": "immediate: gamma = 0, a token earns its own reward and none of later ones",
        "return_to_go": "return_to_go: gamma = 1, lambda = 1, no value function",
        "gae": "gae: gamma = 1, lambda = 0.95",
    }
    return told.get(credit, credit)


def baseline(run: Run) -> str | None:
    if not weighs(run):
        return None
    if entry_name(get(run, "objective.advantage", "gopd")) == "grpo":
        return "the mean reward of the prompt's rollouts, over their standard deviation"
    return off(run, "objective.baseline")


def critic(run: Run) -> str | None:
    critic = get(run, "critic", {})
    if not critic:
        return None
    told = ", ".join(f"{key} {value}" for key, value in critic.items())
    measured = run.values("explained_variance")
    return f"{told}; explained variance at the end {measured[-1]:.2g}" if measured else told


def routing(run: Run) -> str:
    tasks, routes = get(run, "data.tasks", ()), get(run, "routes", {})
    told = [f"{task} → {routes.get(task, task)}" for task in tasks]
    own = loss_of(run) if entry_name(loss_of(run)) in ("cr_opd", "asymmetric") else "none"
    teachers = f"task → teacher: {', '.join(told)}" if get(run, "teachers", {}) else "no teacher"
    return f"{teachers}; of mass within the vocabulary: {own}"


def off_policy(run: Run) -> str:
    keys = ("importance", "rejection", "veto")
    told = [f"{key} {off(run, f'objective.{key}')}" for key in keys]
    for key, of in (("importance_capped", "capped"), ("rejected", "rejected")):
        if run.values(key):
            told.append(f"{of} tokens {span(run, key, '{:.2g} %', scale=100)}")
    return "; ".join(told)


def clips(run: Run) -> str:
    keys = ("log_u_clip", "ratio_cap", "advantage_clip")
    told = [f"{key} {off(run, f'objective.{key}')}" for key in keys]
    told.append(f"gradient norm {get(run, 'optimizer.clip_norm')}")
    if entry_name(loss_of(run)) == "ppo":
        told.append(f"ratio as in {loss_of(run)}")
    if (value := evidence.setting(run.info["config"], "critic.value_clip")) is not None:
        told.append(f"value {value}")
    if run.values("advantage_clipped"):
        told.append(f"clipped tokens {span(run, 'advantage_clipped', '{:.2g} %', scale=100)}")
    return "; ".join(told)


def task_reward(run: Run) -> str:
    task = off(run, "objective.task")
    if not gopd(run):
        return f"the advantage itself: {get(run, 'objective.advantage')}"
    weight = get(run, "objective.distil_weight", 1.0)
    return task if task == "none" else f"{task}, and {weight:g} times the distillation's advantage"
