"""What a compiled program sends between devices, read off its HLO: a cross-check, not a measure.

The text names operations that the compiler has rewritten, and fused ones keep other names; the sum
is of the right size where it is large, and may miss what is small. Its largest arrays, too.
"""

from __future__ import annotations

import math
import re

from gopd_jax.planning.hlo import BYTES, computations, turns

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
_CHAINED = re.compile(r"channel_id=(\d+).*chain_id=")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def sent(hlo: str) -> dict[str, float]:
    """Kind of collective -> bytes of its results on one device, loops counted as often as they
    turn (`hlo.turns`).

    Of a collective that goes on inside fusions with other work each fusion has a copy, of one
    channel and in one chain: it is counted where that is least often, which is where it starts.
    """
    parts = computations(hlo)
    total = dict.fromkeys(KINDS, 0.0)
    chained: dict[str, tuple[float, str]] = {}

    def walk(name: str, times: int) -> None:
        for line in parts.get(name, ()):
            if match := _SENT.search(line):
                size = times * _result_bytes(match[1], bool(match[3]))
                if channel := _CHAINED.search(line):
                    found = chained.get(channel[1], (math.inf, ""))
                    chained[channel[1]] = min(found, (size, match[2]))
                else:
                    total[match[2]] += size
            n = turns(line, parts) if " while(" in line else 1
            names = _CALL.findall(line)
            if branches := _BRANCHES.search(line):
                names += re.findall(r"[\w.-]+", branches[1])
            for inner in names:
                walk(inner, times * n)

    if entry := re.search(r"^ENTRY %?([\w.-]+)", hlo, re.MULTILINE):
        walk(entry[1], 1)
    for size, kind in chained.values():
        total[kind] += size
    return {kind: n for kind, n in total.items() if n}


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


def _result_bytes(shape: str, started: bool) -> float:
    """Bytes of a result; of a started collective, whose tuple holds its operand too, the larger."""
    sizes = [
        BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for kind, dims in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    ]
    return max(sizes, default=0) if started else sum(sizes)
