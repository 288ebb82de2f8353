"""Entries of the objectives' tables, fed by their parameters' names."""

import functools
import inspect

import pytest

from gopd_jax.objectives.divergences import reverse_kl
from gopd_jax.spec import resolve

# An entry with options that have no default is listed here with them.
WITH_OPTIONS = {
    "sequence_sum": "sequence_sum(length=7)",
    "discounted": "discounted(gamma=0.9)",
    "k_step": "k_step(k=2)",
    "first": "first(n=2)",
    "skip_ids": "skip_ids(ids=(1, 3))",
    "teacher_entropy": "teacher_entropy(at_most=1.0)",
    "drift": "drift(half_life=3)",
    "veto": "veto(floor=-2.0)",
    "entropy": "entropy(weight=0.5)",
    "anchor": "anchor(weight=0.5)",
}


def entries(*tables):
    found = []
    for entries_of in tables:
        for name in entries_of:
            entry = resolve(WITH_OPTIONS.get(name, name), entries_of)
            parameters = inspect.signature(entry).parameters
            if (
                "divergence" in parameters
                and parameters["divergence"].default is inspect.Parameter.empty
            ):
                entry = functools.partial(entry, divergence=reverse_kl)
            found.append(pytest.param(entry, id=name))
    return found


def fed(entry, quantities):
    """The entry of the quantities that its positional parameters name."""
    names = [
        name
        for name, p in inspect.signature(entry).parameters.items()
        if p.kind is not p.KEYWORD_ONLY
    ]
    return entry(*(quantities[name] for name in names))
