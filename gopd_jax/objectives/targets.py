"""What the student is drawn to: log-probs of the distribution that an advantage compares with."""


def tilted(teacher_BT, ref_BT, *, lam):
    """Log-probs of the tilted teacher T_lam ~ T^lam R^(1 - lam), up to a constant per state.

    teacher_BT, ref_BT: float32 nats of the sampled tokens; returns the same shape. lam = 1 is the
    teacher itself and takes ref_BT None, because R cancels; lam = 0 is the reference; lam > 1
    extrapolates past the teacher. The normaliser is left out: it is the same for every token of a
    state, so that it changes no expected gradient. Any other lam without ref_BT is a ValueError.
    G-OPD, arXiv 2602.12125, section 3.
    """
    if lam == 1:
        return teacher_BT
    if ref_BT is None:
        raise ValueError(f"lam = {lam} needs the reference's log-probs and ref_BT is None")
    return ref_BT + lam * (teacher_BT - ref_BT)
