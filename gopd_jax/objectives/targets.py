"""What the student is drawn to: the tilted teacher, its lambda over the steps, mixed teachers."""

import jax
import jax.numpy as jnp

from gopd_jax.spec import table


def tilted(teacher, ref, *, lam, cap=None):
    """Log-probs of the tilted teacher T_lam ~ T^lam R^(1 - lam), up to a constant per state.

    log T + (lam - 1) clip(log T - log R, +-cap): teacher, ref are float32 nats of one shape, of
    sampled tokens or of the vocabulary; so is the result. lam: a number, or an array that
    broadcasts against them. lam = 1 is the teacher itself and takes ref None, because R cancels;
    0 is the reference; above 1 extrapolates past the teacher. cap: nats by which a token's
    log T - log R counts at most, against tokens that T likes by far more than R. Any other lam
    without ref is a ValueError. G-OPD, arXiv 2602.12125, section 3.
    """
    if isinstance(lam, (int, float)) and lam == 1:
        return teacher
    if ref is None:
        raise ValueError(f"lam = {lam} needs the reference's log-probs and ref is None")
    ratio = teacher - ref
    if cap is not None:
        ratio = jnp.clip(ratio, -cap, cap)
    return teacher + (lam - 1) * ratio


def along(lam, n_axes: int):
    """Lambda against arrays of B rows and n_axes more: [B] as [B, 1, ..], a number as it is."""
    return lam if jnp.ndim(lam) == 0 else lam.reshape(-1, *(1,) * n_axes)


def tilted_distribution(teacher_xV, ref_xV, real_xV, *, lam, cap=None):
    """log T_lam over the vocabulary, normalised: float32 nats, -inf where real_xV is False."""
    if isinstance(lam, (int, float)) and lam == 1:
        return teacher_xV
    # -inf - -inf is NaN, and NaN in a value that is not taken is one in its gradient.
    teacher_xV, ref_xV = (jnp.where(real_xV, x, 0.0) for x in (teacher_xV, ref_xV))
    tilted_xV = tilted(teacher_xV, ref_xV, lam=lam, cap=cap)
    return jax.nn.log_softmax(jnp.where(real_xV, tilted_xV, -jnp.inf))


def mixed(logps, weights, *, space: str):
    """Log-probs of a mixture of teachers: one array for each, weights that broadcast against them.

    space "probability": log sum_i w_i T_i, a distribution. "log": sum_i w_i log T_i, a geometric
    mean up to a constant per state. A weight of 0 takes its teacher out, whatever that says.
    """
    logps = jnp.stack(logps)
    weights = jnp.stack([jnp.broadcast_to(w, logps.shape[1:]) for w in weights])
    if space == "log":
        return jnp.where(weights > 0, weights * logps, 0.0).sum(0)
    return jax.nn.logsumexp(jnp.where(weights > 0, logps, -jnp.inf), axis=0, b=weights)


# --- lambda over the steps: (step, the objective's lam) -> lam of this step


def constant(step, lam):
    """The same at every step."""
    return lam


def linear(step, lam, *, steps, start=1.0):
    """From `start` at step 0 in equal parts to lam at step `steps`, and lam from there on."""
    return start + (lam - start) * _share(step, steps)


def cosine(step, lam, *, steps, start=1.0):
    """As linear, slow at both ends: half a period of the cosine."""
    return start + (lam - start) * 0.5 * (1 - jnp.cos(jnp.pi * _share(step, steps)))


def _share(step, steps):
    if not steps > 0:
        raise ValueError(f"steps is {steps}; give the steps, above 0, after which lam is reached")
    return jnp.minimum(step / steps, 1.0)


SCHEDULES = table(constant, linear, cosine)
