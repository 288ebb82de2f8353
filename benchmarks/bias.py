"""How far estimates are from the gradient that they stand for, in the toy language.

    python -m benchmarks.bias > docs/bias.md

Every number is a sum over all completions, not a sample: what is left is bias. Rounded to three
digits, far above float32's noise, so that the document is the same wherever it is made;
tests/test_bias.py holds that it is this command's output.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import toy
from benchmarks.toy import ENDED_B, MASK_BT, STATE_BT
from gopd_jax.objectives.baselines import local_kl
from gopd_jax.objectives.credit import discounted, gae, immediate, k_step, return_to_go
from gopd_jax.objectives.divergences import DIVERGENCES, corrected, reverse_kl, token_reward

LAM = 1.25
TARGET = toy.tilt(LAM)

HEAD = f"""# Bias of the estimators

What each estimator ascends on average, against the exact gradient, in a language of three tokens
and at most three positions where every completion can be listed
([benchmarks/toy.py](../benchmarks/toy.py)). The target is the tilted teacher at λ = {LAM:g}. *Bias*
is the length of the difference over the length of the exact gradient, *cosine* that of the angle
between them. Made by `python -m benchmarks.bias > docs/bias.md`.
"""
DIVERGENCE = """## Divergences: the correction

The advantage of a sampled token is −f(u) (stop-gradient) or −f(u) + u f′(u) − f′(1) (corrected),
u = T/S. The exact gradient is that of the divergence at the states that the student visits, with
the visits held fixed. Options have their defaults.

| divergence | corrected: bias | cosine | stop-gradient: bias | cosine |
|---|---|---|---|---|
"""
DIVERGENCE_READ = """
The corrected advantage has no bias for any f. Without the correction only reverse KL has none;
where the cosine is below zero, the update climbs the divergence that it is meant to descend.
"""
CREDIT = """## Temporal credit

The token reward is log u (reverse KL). The exact gradient is that of KL(S‖T) between whole
completions, which differentiates what the student visits too. GAE's V is 0, exact, or off by a
random number of size about 0.7 at each state.

| credit | bias | cosine |
|---|---|---|
"""
CREDIT_READ = """
The sum to the end has no bias. Immediate credit leaves out that a token decides which states come
after it; discounting and a limit of steps lie in between, and their bias falls as γ → 1 or as k
reaches the length. A baseline of the state changes nothing. GAE at γ = 1 has no bias where V is
exact or λ = 1, and otherwise as much as V is wrong.
"""


def credits():
    """(name, advantage_BT) of every row of the table of credit."""
    log_u_BT, log_u_SV = toy.log_u(TARGET)
    reward_BT = token_reward(reverse_kl, log_u_BT)
    kl_S = -(jnp.exp(toy.log_softmax(toy.STUDENT)) * log_u_SV).sum(-1)
    exact_BT = toy.value(log_u_SV)[STATE_BT]
    wrong_BT = exact_BT + toy.OTHER[STATE_BT, 1]
    of_state_BT = toy.OTHER[STATE_BT, 0]
    zero_BT, zero_B = jnp.zeros_like(reward_BT), jnp.zeros(len(reward_BT))

    def advantage(value_BT, **options):
        return gae(reward_BT, value_BT, zero_B, ENDED_B, MASK_BT, **options)

    now_BT, whole_BT = immediate(reward_BT, MASK_BT), return_to_go(reward_BT, MASK_BT)
    sums = functools.partial(discounted, reward_BT, MASK_BT)
    yield "immediate", now_BT
    yield "immediate − local KL", now_BT - local_kl(kl_S[STATE_BT], MASK_BT)
    for gamma in (0.5, 0.9, 0.99):
        yield f"discounted, γ = {gamma:g}", sums(gamma=gamma)
    for k in (2, 3):
        yield f"k-step, k = {k}", k_step(reward_BT, MASK_BT, k=k)
    yield "return-to-go", whole_BT
    yield "return-to-go − a number of the state", whole_BT - of_state_BT
    for name, value_BT in (("V = 0", zero_BT), ("V exact", exact_BT), ("V wrong", wrong_BT)):
        for lam in (0.0, 0.95, 1.0):
            yield f"GAE, γ = 1, λ = {lam:g}, {name}", advantage(value_BT, lam=lam)


def compared(got_SV, want_SV):
    """Cells of bias and cosine."""
    got, want = (np.asarray(x, np.float64).ravel() for x in (got_SV, want_SV))
    bias = np.linalg.norm(got - want) / np.linalg.norm(want)
    cosine = got @ want / np.linalg.norm(got) / np.linalg.norm(want)
    # Adding 0 turns the -0 of a rounded small number into 0.
    return f"{round(bias, 3) + 0:.3f} | {round(cosine, 3) + 0:.3f}"


def document() -> str:
    """docs/bias.md."""
    log_u_BT, _ = toy.log_u(TARGET)
    lines = [HEAD, DIVERGENCE]
    for name, divergence in DIVERGENCES.items():
        exact = toy.frozen(divergence, TARGET)
        cells = [
            compared(toy.ascent(advantage(divergence, log_u_BT)), exact)
            for advantage in (corrected, token_reward)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    lines += [DIVERGENCE_READ, "\n", CREDIT]
    exact = toy.whole(reverse_kl, TARGET)
    lines += [f"| {name} | {compared(toy.ascent(a_BT), exact)} |\n" for name, a_BT in credits()]
    return "".join([lines[0], "\n", *lines[1:], CREDIT_READ])


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print(document(), end="")
