"""What a compiled program sends between devices, read off its HLO: a cross-check, not a measure.

The text names operations that the compiler has rewritten, and fused ones keep other names; the sum
is of the right size where it is large, and may miss what is small. Its largest arrays, too.
"""

from __future__ import annotations

import math
import re

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_SENT = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALL = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_FUSED = re.compile(r" fusion\(.*calls=%?([\w.-]+)")
_COMPUTED = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([\w-]+)\(")
_NAME = re.compile(r'op_name="([^"]*)"')
# Operations whose arrays are another's.
NO_ARRAY = (
    "parameter",
    "get-tuple-element",
    "bitcast",
    "constant",
    "tuple",
    "while",
    "conditional",
)
NO_ARRAY += ("call", "optimization-barrier")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def sent(hlo: str) -> dict[str, float]:
    """Kind of collective -> bytes of its results on one device, loops counted as often as they
    turn.

    A loop's turns are its known trip count, or the bound that its condition compares with.
    """
    parts = computations(hlo)
    done: dict[str, dict[str, float]] = {}

    def of(name: str) -> dict[str, float]:
        if name in done:
            return done[name]
        done[name] = total = dict.fromkeys(KINDS, 0.0)
        for line in parts.get(name, ()):
            if match := _SENT.search(line):
                total[match[2]] += _result_bytes(match[1], bool(match[3]))
            n = turns(line, parts) if " while(" in line else 1
            names = _CALL.findall(line)
            if branches := _BRANCHES.search(line):
                names += re.findall(r"[\w.-]+", branches[1])
            for inner in names:
                for kind, size in of(inner).items():
                    total[kind] += n * size
        return total

    entry = re.search(r"^ENTRY %?([\w.-]+)", hlo, re.MULTILINE)
    return {} if entry is None else {kind: n for kind, n in of(entry[1]).items() if n}


def largest(hlo: str, n: int = 4) -> list[tuple[int, str]]:
    """(bytes, "f32[1,8,64,64] of dot_general") of the n largest arrays of distinct shape that one
    device computes. They need not exist at one time.
    """
    parts = computations(hlo)
    fused = {name for lines in parts.values() for line in lines for name in _FUSED.findall(line)}
    found: dict[str, tuple[int, str]] = {}
    for name, lines in parts.items():
        for line in lines if name not in fused else ():
            match = _COMPUTED.match(line)
            if match is None or match[2] in NO_ARRAY or match[2].endswith("-start"):
                continue
            of = _NAME.search(line)
            what = of[1].rsplit("/", 1)[-1] if of else match[2]
            for kind, dims in _ARRAY.findall(match[1]):
                shape = f"{kind}[{dims}]"
                found.setdefault(shape, (int(_result_bytes(shape, False)), f"{shape} of {what}"))
    return sorted(found.values(), reverse=True)[:n]


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
    """Of a while: its known trip count, else the largest integer of its condition, else 1."""
    if match := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    lines = list(parts.get(condition[1], ())) if condition else []
    for inner in [name for one in lines for name in _CALL.findall(one)]:
        lines += parts.get(inner, ())
    bounds = [int(n) for one in lines for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", one)]
    return max(bounds, default=1)


def _result_bytes(shape: str, started: bool) -> float:
    """Bytes of a result; of a started collective, whose tuple holds its operand too, the larger."""
    sizes = [
        BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    ]
    return max(sizes, default=0) if started else sum(sizes)
