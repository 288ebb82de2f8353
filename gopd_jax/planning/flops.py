"""Matrix products of a traced program, counted: what a step has to compute, whatever compiles it.

XLA's own cost analysis counts a loop's body once, however often it runs; here a scan counts its
length and a while loop the bound in its condition.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import jax
import numpy as np
from jax.extend import core

from gopd_jax import sharding

COMPARISONS = {"lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of the whole mesh, a multiply-add being two: of narrow and of float32 operands.

    in_loops: the part of them that lies in while loops, whose number of turns is a bound.
    """

    narrow: float = 0.0
    float32: float = 0.0
    in_loops: Work | None = None

    @property
    def total(self) -> float:
        return self.narrow + self.float32

    @property
    def looped(self) -> Work:
        return self.in_loops or Work()

    def __add__(self, other: Work) -> Work:
        return self._with(other, 1)

    def __sub__(self, other: Work) -> Work:
        return self._with(other, -1)

    def _with(self, other: Work, sign: int) -> Work:
        inner = [work for work in (self.in_loops, other.in_loops) if work is not None]
        narrow, wide = self.narrow + sign * other.narrow, self.float32 + sign * other.float32
        in_loops = self.looped._with(other.looped, sign) if inner else None
        return Work(narrow, wide, in_loops)

    def times(self, n: float) -> Work:
        in_loops = None if self.in_loops is None else self.in_loops.times(n)
        return Work(n * self.narrow, n * self.float32, in_loops)


def count(jaxpr, shares: dict[int, int] | None = None) -> Work:
    """Work of a jaxpr, open or closed, with everything that it calls.

    Products are dot_general, ragged_dot and convolutions. Of a cond the dearest branch counts. A
    shard_map's body counts once for each device, but for ragged products whose groups are spread
    over some of them: a row is in one group and so one device's work. A kernel's counts for each
    block of its grid. What the compiler drops as unused counts, as it is traced. ValueError for a
    while loop with products in it and no bound that can be read off.

    shares: groups at hand -> devices among which all groups are divided, within a shard_map.
    """
    consts = getattr(jaxpr, "consts", ())
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    known = _Known(zip(jaxpr.constvars, consts))
    total = Work()
    for eqn in jaxpr.eqns:
        known.follow(eqn)
        total += _of(eqn, known, shares or {})
    return total


def _of(eqn, known: _Known, shares: dict[int, int]) -> Work:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _product(eqn, _dot_flops(eqn))
    if name == "ragged_dot_general" or name == "ragged_dot":
        n_groups = eqn.invars[2].aval.shape[-1]
        return _product(eqn, _ragged_flops(eqn) / shares.get(n_groups, 1))
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        window = math.prod(kernel) / kernel[params["dimension_numbers"].rhs_spec[0]]
        return _product(eqn, 2 * math.prod(eqn.outvars[0].aval.shape) * window)
    if name == "scan":
        return count(params["jaxpr"], shares).times(params["length"])
    if name == "cond":
        return max(
            (count(branch, shares) for branch in params["branches"]), key=lambda work: work.total
        )
    if name == "while":
        inside = count(params["body_jaxpr"], shares) + count(params["cond_jaxpr"], shares)
        if not inside.total:
            return inside
        inside = inside.times(turns(eqn, known))
        return Work(inside.narrow, inside.float32, in_loops=Work(inside.narrow, inside.float32))
    if name == "shard_map":
        shares = _shares(params)
    if name == "pallas_call":
        # A kernel's products are bfloat16 passes whatever their operands, where it asks for no
        # precision. The dearest turn counts for each: blocks that a mask skips count too.
        turns_of_grid = math.prod(params["grid_mapping"].grid)
        return Work(narrow=turns_of_grid * count(params["jaxpr"]).total)
    called = Work()
    for inner in _called(params):
        called += count(inner, shares)
    if name == "shard_map":
        # Along the other axes the compiler divides what is counted whole.
        manual = params["newly_manual_axes"]
        return called.times(math.prod(params["mesh"].shape[axis] for axis in manual))
    return called


def _shares(params: dict) -> dict[int, int]:
    """Of a shard_map: length at hand -> devices that divide it, of the first axis of operands of
    three, as the matrices of groups are. Copies for other rows are not other groups.
    """
    found = {}
    for var, spec in zip(params["jaxpr"].invars, params["in_specs"]):
        if len(var.aval.shape) == 3 and len(spec) and spec[0] is not None:
            axes = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
            shared = [axis for axis in axes if axis in sharding.EXPERTS]
            n = math.prod(params["mesh"].shape[axis] for axis in shared)
            # Rows lie along some of these axes too; groups of the same number lie along all.
            found[var.aval.shape[0]] = max(n, found.get(var.aval.shape[0], 1))
    return found


def _called(params: dict):
    """Jaxprs among an equation's parameters: jit, remat, custom derivatives and the like.

    Of a custom derivative only the function itself: its rules are in other equations once used.
    """
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one


def _product(eqn, flops: float) -> Work:
    wide = any(v.aval.dtype.itemsize >= 4 for v in eqn.invars[:2])
    return Work(float32=float(flops)) if wide else Work(narrow=float(flops))


def _dot_flops(eqn) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)


def _ragged_flops(eqn) -> float:
    """Every row meets one group's matrix: as the product of one group, whatever the sizes."""
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (contract_left, contract_right), (batch_left, _) = dims.dot_dimension_numbers
    left, right = (v.aval.shape for v in eqn.invars[:2])
    group = tuple(dims.rhs_group_dimensions)
    ragged = tuple(dims.lhs_ragged_dimensions)
    if set(ragged) & set(contract_left):  # the gradient of the matrices: rows are what is summed
        out = eqn.outvars[0].aval.shape
        return 2 * math.prod(out[len(out) - 2 :]) * math.prod(left[i] for i in ragged)
    free = [n for i, n in enumerate(right) if i not in (*group, *contract_right)]
    return 2 * math.prod(left) * math.prod(free)


def largest(jaxpr, n: int = 4) -> list[tuple[int, str]]:
    """(bytes, what) of the n largest distinct arrays that a jaxpr computes, of the whole mesh.

    Where they are fused into what uses them they take no memory: it is where to look, not a sum.
    """
    found: dict[str, int] = {}

    def walk(jaxpr):
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            for one in _called(eqn.params):
                walk(one)
            for var in eqn.outvars:  # a scan's too: what its turns leave for the backward pass
                shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
                if shape and dtype is not None:
                    what = f"{dtype.name}[{', '.join(map(str, shape))}] of {eqn.primitive.name}"
                    found.setdefault(what, math.prod(shape) * dtype.itemsize)

    walk(jaxpr)
    by_shape: dict[str, tuple[int, str]] = {}
    for what, size in sorted(found.items(), key=lambda pair: -pair[1]):
        by_shape.setdefault(what.split(" of ")[0], (size, what))
    return list(by_shape.values())[:n]


# --- how often a while loop turns


class _Known:
    """Values of scalars that are the same whenever the program runs."""

    def __init__(self, pairs):
        self._of = {var: np.asarray(x) for var, x in pairs if np.ndim(x) == 0 and _is_plain(x)}

    def __call__(self, atom):
        """The value, or None where it depends on the arguments."""
        return atom.val if isinstance(atom, core.Literal) else self._of.get(atom)

    def follow(self, eqn) -> None:
        same = eqn.primitive.name in ("convert_element_type", "copy")
        if same and (value := self(eqn.invars[0])) is not None and np.ndim(value) == 0:
            self._of[eqn.outvars[0]] = np.asarray(value)


def _is_plain(x) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "dtype", np.dtype(int)).kind in "biuf"


def turns(eqn, known: _Known) -> int:
    """The most turns of a while loop: of the counters that its condition compares with a constant
    and its body moves by one, the first to arrive. ValueError where there is none.
    """
    params = eqn.params
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    outer = eqn.invars
    of_cond, carry = outer[:n_cond], outer[n_cond + n_body :]
    cond, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    at = {var: known(atom) for var, atom in zip(cond.invars[:n_cond], of_cond)}
    place = {var: i for i, var in enumerate(cond.invars[n_cond:])}
    steps = _steps(body, n_body)
    unmoved = {var for var, i in place.items() if body.outvars[i] is body.invars[n_body + i]}
    at |= {var: known(carry[place[var]]) for var in unmoved}

    def value(atom):
        return atom.val if isinstance(atom, core.Literal) else at.get(atom)

    bounds = []
    for one in _required(cond):
        name, (left, right) = one.primitive.name, one.invars
        if name not in COMPARISONS:
            continue
        for counter, limit, forward in ((left, right, 1), (right, left, -1)):
            if isinstance(counter, core.Literal) or counter not in place:
                continue
            i = place[counter]
            start, end = known(carry[i]), value(limit)
            step = steps.get(i)
            up = name.startswith("l") == (forward == 1)
            if None in (start, end, step) or (step > 0) != up:
                continue
            span = (int(end) - int(start)) * (1 if up else -1) + name.endswith("e")
            bounds.append(max(0, -(-span // abs(step))))
    if not bounds:
        raise ValueError(
            "a while loop has matrix products in it and no bound: its condition compares no "
            "counter of known start and step with a constant"
        )
    return min(bounds)


def _required(cond) -> list:
    """The equations that all have to be true for the condition to be: through every `and`, and
    through conversions of a bool to one, which weak types leave."""
    made = {eqn.outvars[0]: eqn for eqn in cond.eqns}
    found, ahead = [], [cond.outvars[0]]
    while ahead:
        eqn = made.get(ahead.pop())
        if eqn is None:
            continue
        name, of = eqn.primitive.name, [v for v in eqn.invars if not isinstance(v, core.Literal)]
        same = name == "convert_element_type" and all(v.aval.dtype == bool for v in of)
        if name == "and" or same:
            ahead += of
        elif len(eqn.invars) == 2:
            found.append(eqn)
    return found


def _steps(body, n_consts: int) -> dict[int, int]:
    """Place in the carry -> what each turn adds to it, for carries that only that changes."""
    made = {eqn.outvars[0]: eqn for eqn in body.eqns if len(eqn.outvars) == 1}
    found = {}
    for i, out in enumerate(body.outvars):
        eqn = None if isinstance(out, core.Literal) else made.get(out)
        if eqn is None or eqn.primitive.name not in ("add", "sub"):
            continue
        left, right = eqn.invars
        if left is body.invars[n_consts + i] and isinstance(right, core.Literal):
            found[i] = int(right.val) * (1 if eqn.primitive.name == "add" else -1)
        elif (
            eqn.primitive.name == "add"
            and right is body.invars[n_consts + i]
            and isinstance(left, core.Literal)
        ):
            found[i] = int(left.val)
    return {i: step for i, step in found.items() if step}
