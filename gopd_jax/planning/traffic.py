"""Bytes of HBM that a turn of a compiled program's loop reads and writes, read off its HLO.

What each scheduled instruction has to move, as the text tells it: a fusion's operand that is only
sliced counts as the slice, what is updated in place as the update, what the compiler keeps in VMEM
not at all. A kernel counts its operands and results whole. An operand counts once, so what is
fetched again while an instruction works is not seen, and the sum is the least that it can be.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from gopd_jax.planning import collectives
from gopd_jax.planning.hlo import Op, computations, parse, turns

# Names for arrays that are there.
FREE = {*collectives.NO_ARRAY, "after-all", "partition-id", "replica-id"}
# All that the condition of a loop of known length is made of.
COUNTING = {"parameter", "get-tuple-element", "constant", "compare", "bitcast", "copy", "fusion"}
LARGEST = 16  # parts of a turn that are told
SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """A loop that ends when the data say so. turns: at the most, by its condition.

    read, written: bytes of one turn on one device, where each conditional takes the branch that
    moves most; least: of both, where each takes the one that moves least. parts: (bytes,
    "bf16[28,2048,6144] of ri,io->ro/dot_general"), the most first.
    """

    turns: int
    read: int
    written: int
    least: int
    parts: tuple[tuple[int, str], ...]

    @property
    def moved(self) -> int:
        return self.read + self.written


def loops(hlo: str) -> list[Loop]:
    """The outermost loops whose end depends on data, in the order of the program.

    A rollout's is one: it ends when all rows have. Those over layers, chunks and microbatches only
    compare a counter with its bound.
    """
    entry = re.search(r"^ENTRY %?([\w.-]+)", hlo, re.MULTILINE)
    return [] if entry is None else _Program(hlo).loops(entry[1])


class _Program:
    def __init__(self, hlo: str):
        self.lines = computations(hlo)
        self.ops = {
            name: {op.name: op for op in map(parse, lines) if op is not None}
            for name, lines in self.lines.items()
        }
        self.known: dict[tuple, dict[str, tuple[int, int]]] = {}

    def root(self, name: str) -> Op:
        (found,) = [op for op in self.ops[name].values() if op.root]
        return found

    def loops(self, name: str) -> list[Loop]:
        found = []
        for op in self.ops[name].values():
            if op.kind == "while" and not self.counts(op):
                found.append(self.loop(op))
            elif op.kind in ("while", "conditional", "call"):
                found += [loop for inner in op.calls for loop in self.loops(inner)]
        return found

    def counts(self, op: Op) -> bool:
        """Whether a while turns a known number of times."""
        names = re.findall(r"\bcondition=%?([\w.-]+)", op.line)
        for name in names:
            for inner in self.ops[name].values():
                if inner.kind not in COUNTING:
                    return False
                names += inner.calls
        return True

    def loop(self, op: Op) -> Loop:
        most, least = (self.sum_of(op.calls, choose) for choose in (max, min))
        parts = sorted(((r + w, what) for what, (r, w) in most.items()), reverse=True)[:LARGEST]
        return Loop(
            turns=turns(op.line, self.lines),
            read=sum(r for r, _ in most.values()),
            written=sum(w for _, w in most.values()),
            least=_total(least),
            parts=tuple(part for part in parts if part[0]),
        )

    def sum_of(self, names, choose) -> dict[str, tuple[int, int]]:
        """{what moves them: bytes (read, written)} of computations that run once each.

        choose: max or min, of the branches of a conditional.
        """
        total = defaultdict(lambda: (0, 0))
        for name in names:
            for what, (r, w) in self.moved(name, choose).items():
                total[what] = total[what][0] + r, total[what][1] + w
        return dict(total)

    def moved(self, name: str, choose) -> dict[str, tuple[int, int]]:
        """The same of one computation."""
        if (name, choose) in self.known:
            return self.known[name, choose]
        total = defaultdict(lambda: (0, 0))
        for op in self.ops[name].values():
            times = 1
            if op.kind == "while":
                times = turns(op.line, self.lines)
                part = self.sum_of(op.calls, choose)
            elif op.kind == "conditional":
                part = choose((self.moved(inner, choose) for inner in op.calls), key=_total)
            elif op.kind in ("call", "async-start"):
                part = self.sum_of(op.calls, choose)
            else:
                given = [self.ops[name][x] for x in op.operands]
                part = {_told(op, given): self.one(op, given)}
            for what, (r, w) in part.items():
                total[what] = total[what][0] + times * r, total[what][1] + times * w
        self.known[name, choose] = dict(total)
        return self.known[name, choose]

    def one(self, op: Op, given: list[Op]) -> tuple[int, int]:
        """Bytes (read, written) by a scheduled instruction that runs no other."""
        if op.kind in FREE or op.kind.endswith(("-done", "-update")):
            return 0, 0
        if "AllocateBuffer" in op.line:  # a custom call
            return 0, 0
        if op.kind == "fusion":
            (inner,) = op.calls
            read = sum(self.taken(inner, i, source) for i, source in enumerate(given))
            return read, sum(self.put(inner, self.root(inner), op.results))
        if op.kind in SLICES:
            return op.results[0].part(given[0].results[0]), op.hbm
        if op.kind == "dynamic-update-slice":
            return given[1].hbm, given[1].results[0].part(op.results[0])
        read = sum(source.hbm for source in {source.name: source for source in given}.values())
        return _started(op, given, read) if op.kind.endswith("-start") else (read, op.hbm)

    # --- inside a fusion

    def taken(self, name: str, i: int, source: Op) -> int:
        """Bytes that a fused computation reads of its parameter i, which is `source` outside."""
        parameters = [
            op
            for op in self.ops[name].values()
            if op.kind == "parameter" and f"parameter({i})" in op.line
        ]
        return min(source.hbm, self.used(name, parameters[0])) if source.hbm else 0

    def used(self, name: str, array: Op) -> int:
        """Bytes that are read of an array of a fused computation, its own at the most."""
        whole, total = array.hbm, 0
        if array.root:
            return whole
        for user in self.ops[name].values():
            places = [i for i, operand in enumerate(user.operands) if operand == array.name]
            if not places:
                continue
            if user.kind == "bitcast":
                total += self.used(name, user)
            elif user.kind == "fusion":
                total += sum(self.taken(user.calls[0], i, array) for i in places)
            elif places == [0] and user.kind in SLICES:
                total += user.results[0].part(array.results[0])
            elif places != [0] or user.kind != "dynamic-update-slice":  # which is in place
                return whole
        return min(whole, total)

    def put(self, name: str, root: Op, results) -> list[int]:
        """Bytes that a fused computation writes for each array that its root is outside."""
        ops = self.ops[name]
        if root.kind == "tuple" and len(root.operands) == len(results):
            pairs = zip(root.operands, results)
            return [n for x, result in pairs for n in self.put(name, ops[x], (result,))]
        if root.kind == "fusion":
            return self.put(root.calls[0], self.root(root.calls[0]), results)
        if root.kind == "bitcast" and ops[root.operands[0]].kind != "parameter":
            inner = ops[root.operands[0]]
            if sum(array.hbm for array in results):
                return [min(results[0].size, sum(self.put(name, inner, inner.results)))]
        if root.kind == "dynamic-update-slice":
            into, update = (ops[x] for x in root.operands[:2])
            while into.kind == "bitcast":
                into = ops[into.operands[0]]
            if into.kind == "parameter":
                return [update.results[0].part(results[0])]
        return [array.hbm for array in results]


def _started(op: Op, given: list[Op], read: int) -> tuple[int, int]:
    """Of a copy, slice or collective that goes on beside others: its shape has the operands, the
    results, and counters of its own."""
    results = [array for array in op.results if array.dims or array.kind not in ("s32", "u32")]
    for array in (array for source in given for array in source.results):
        if array in results:
            results.remove(array)
    if "slice" in op.kind:
        read = sum(array.part(given[0].results[0]) for array in results)
    return read, sum(array.hbm for array in results)


def _total(part: dict[str, tuple[int, int]]) -> int:
    return sum(r + w for r, w in part.values())


def _told(op: Op, given: list[Op]) -> str:
    """The largest array that an instruction has to do with, and its name."""
    found = [array for one in (op, *given) for array in one.results]
    largest = max(found, key=lambda array: array.size, default=None)
    return op.what if largest is None else f"{largest.told} of {op.what}"
