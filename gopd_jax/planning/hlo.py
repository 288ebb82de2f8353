"""The text of a compiled program as instructions, and the bytes of its arrays as they are laid out.

An array of a TPU's HLO names its layout, `bf16[8,1,2048]{2,0,1:T(8,128)(2,1)S(1)}`: dimensions from
the innermost, tiles that the innermost ones are filled up to, and a memory where it is not HBM.
"""

from __future__ import annotations

import dataclasses
import math
import re

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
BYTES |= {"f8e4m3fn": 1, "f8e5m2": 1}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALL = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
_INTEGER = re.compile(r"= [su]32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """Of a shape's text. layout "": none is named, which is the first dimension outermost, HBM."""

    kind: str
    dims: tuple[int, ...]
    layout: str

    @property
    def told(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.dims))}]"

    @property
    def in_hbm(self) -> bool:
        """S(1) is a TPU's VMEM, other numbers are smaller memories and the host's."""
        space = re.search(r"S\((\d+)\)", self.layout)
        return space is None or space[1] == "0"

    @property
    def size(self) -> int:
        """Bytes in whichever memory, filled up to whole tiles."""
        order, _, rest = self.layout.partition(":")
        plain = not re.fullmatch(r"[\d,]+", order)
        inner_first = [*self.dims[::-1]] if plain else [self.dims[int(i)] for i in order.split(",")]
        if tile := re.match(r"T\(([\d,]+)\)", rest):
            tiles = [int(n) for n in tile[1].split(",")][::-1]
            inner_first += [1] * (len(tiles) - len(inner_first))
            filled = [-(-size // n) * n for size, n in zip(inner_first, tiles)]
            inner_first[: len(tiles)] = filled
        return int(BYTES.get(self.kind, 0) * math.prod(inner_first))

    @property
    def hbm(self) -> int:
        """Its size, if it is there and no scalar, which a TPU keeps elsewhere."""
        return self.size if self.in_hbm and self.dims else 0

    def part(self, of: Array) -> int:
        """Bytes of HBM that these dimensions are in the layout of an array that they are cut of."""
        same = len(self.dims) == len(of.dims)
        laid = dataclasses.replace(self, layout=of.layout) if same else self
        return laid.size if of.in_hbm else 0


def arrays(shape: str) -> list[Array]:
    """Those of a shape, a tuple's in order."""
    return [
        Array(
            kind=kind,
            dims=tuple(int(n) for n in dims.split(",") if n),
            layout=layout,
        )
        for kind, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """An instruction. kind: its operation. calls: the computations that it runs, but for those that
    it runs for each element."""

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    line: str
    root: bool

    @property
    def hbm(self) -> int:
        """Bytes of its results in HBM."""
        return sum(array.hbm for array in self.results)

    @property
    def what(self) -> str:
        """The end of the name that the traced program gave it, "ri,io->ro/dot_general"."""
        named = re.search(r'op_name="([^";]*)', self.line)
        return "/".join(named[1].rsplit("/", 2)[-2:]) if named else self.kind


def parse(line: str) -> Op | None:
    """The instruction of a line; None where it has none."""
    head = re.match(r"\s+(ROOT )?%?([\w.-]+) = ", line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    if (kind := re.match(r"([\w-]+)\(", rest)) is None:
        return None
    rest = rest[kind.end() - 1 :]
    end = _closing(rest)
    return Op(
        name=head[2],
        kind=kind[1],
        results=tuple(arrays(shape)),
        operands=tuple(re.findall(r"%([\w.-]+)", rest[:end])),
        calls=tuple(_calls(kind[1], rest[end:])),
        line=line,
        root=head[1] is not None,
    )


def _closing(text: str) -> int:
    """The end of the parenthesis that text begins with."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    return len(text)


def _calls(kind: str, attributes: str) -> list[str]:
    if kind == "while":
        return re.findall(r"\b(?:condition|body)=%?([\w.-]+)", attributes)
    if kind == "conditional":
        if branches := re.search(r"branch_computations=\{([^}]*)\}", attributes):
            return re.findall(r"[\w.-]+", branches[1])
        return re.findall(r"(?:true|false)_computation=%?([\w.-]+)", attributes)
    if kind in ("fusion", "call", "async-start"):
        return re.findall(r"\b(?:calls|to_apply)=%?([\w.-]+)", attributes)[:1]
    return []


def computations(hlo: str) -> dict[str, list[str]]:
    """Name of each computation -> its lines."""
    found, lines = {}, []
    for line in hlo.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            lines = found[match[1]] = []
        elif line.startswith(" "):
            lines.append(line)
    return found


def turns(line: str, parts: dict[str, list[str]]) -> int:
    """Of a while: its known trip count, else the largest integer of its condition in steps of its
    counter, else 1. The counter is taken to start at 0."""
    if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    names = [condition[1]] if condition else []
    lines = []
    for name in names:
        found = parts.get(name, ())
        lines += found
        names += [inner for one in found for inner in _CALL.findall(one) if inner not in names]
    bounds = [int(n) for one in lines for n in _INTEGER.findall(one)]
    return max(1, -(-max(bounds, default=1) // _step(line, parts)))


def _step(line: str, parts: dict[str, list[str]]) -> int:
    """What a while's body adds to the counter that its condition compares; 1 where that is not
    plain. A compiler that unrolls a loop, as that of products in which shards come by turns, leaves
    the bound and adds more."""
    ops = []
    for role in ("condition", "body"):
        name = re.search(rf"\b{role}=%?([\w.-]+)", line)
        found = (parse(one) for one in parts.get(name[1] if name else None, ()))
        ops.append({op.name: op for op in found if op is not None})
    compare, result = (next((op for op in of.values() if op.root), None) for of in ops)
    if compare is None or result is None or (compare.kind, result.kind) != ("compare", "tuple"):
        return 1
    places = [_index(ops[0][name]) for name in compare.operands if name in ops[0]]
    places = [i for i in places if i is not None]
    if len(places) != 1 or places[0] >= len(result.operands):
        return 1
    total, op = 0, ops[1].get(result.operands[places[0]])
    while op is not None and op.kind in ("add", "copy", "bitcast"):
        given = [ops[1][name] for name in op.operands if name in ops[1]]
        fixed = [int(n) for one in given for n in _INTEGER.findall(one.line)]
        rest = [one for one in given if not _INTEGER.search(one.line)]
        if len(rest) != 1:
            return 1
        total, op = total + sum(fixed), rest[0]
    return total if op is not None and total > 0 and _index(op) == places[0] else 1


def _index(op: Op) -> int | None:
    """Of a get-tuple-element."""
    match = re.search(r"\), index=(\d+)", op.line)
    return int(match[1]) if op.kind == "get-tuple-element" and match else None
