"""Reads what a compiled program does, from its text: collectives with bytes, loops counted, and donated arguments.

The text is `jax.jit(f).lower(...).compile().as_text()`. A while loop's body stands there once; its trip count is in
the loop's condition or its known_trip_count.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_OPERATION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: one of KINDS. On TPU a reduce-scatter may be compiled as an all-reduce-scatter fusion; it counts as one.
        dtype: element type of its largest array.
        shape: shape of its largest array, which is whole for all-gather and reduce-scatter.
        bytes: bytes of that array, on one device.
        times: how often it runs, trip counts of loops multiplied.
        loops: trip counts of the loops around it, outermost first.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    loops: tuple[int, ...]


def collectives(text: str) -> list[Collective]:
    """All collectives that the program executes, in order of the text.

    A collective that the TPU compiler runs beside other work stands in several fusions, all with its channel: it is
    counted once.

    Raises:
        ValueError: the text is no compiled HLO module.
    """
    computations, entry = _computations(text)
    found: dict[Any, Collective] = {}
    for key, collective in _walk(computations, entry, (), ()):
        found.setdefault(key, collective)
    return list(found.values())


def num_aliased(text: str) -> int:
    """Number of outputs that reuse the memory of a donated argument."""
    header = text[: text.find("\n")]
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}", header))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line.strip())
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return found, entry


def _walk(
    computations: dict[str, list[str]], name: str, loops: tuple[int, ...], path: tuple[str, ...]
) -> Iterator[tuple[Any, Collective]]:
    """Collectives below a computation, each with a key by which its copies are known; path names the loops' bodies."""
    for line in computations.get(name, ()):
        match = _OPERATION.match(line)
        if match is None:
            continue
        own, result, operation, rest = match.groups()
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=(\d+)", rest)
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            yield (path, kind, channel[1] if channel else (name, own)), _collective(kind, line, result, loops)
        if operation == "while":
            body = re.search(r"body=%?([\w.\-]+)", rest)
            assert body
            yield from _walk(computations, body[1], (*loops, _trips(computations, rest)), (*path, body[1]))
        elif operation in ("call", "fusion", "conditional", "async-start"):
            callees = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
            for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
                callees += re.findall(r"%?([\w.\-]+)", branches)
            for callee in callees:
                yield from _walk(computations, callee, loops, path)


def _collective(kind: str, line: str, result: str, loops: tuple[int, ...]) -> Collective:
    # A reduce-scatter's whole array is its operand, which the TPU compiler's text names by type only in the operand
    # list; so the largest array of the line is taken, for all kinds.
    operands = line.split("), ")[0]
    arrays = [(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(result + " " + operands)]
    dtype, shape = max(arrays, key=lambda a: BYTES[a[0]] * math.prod(a[1]))
    return Collective(kind, dtype, shape, BYTES[dtype] * math.prod(shape), math.prod(loops), loops)


def _trips(computations: dict[str, list[str]], rest: str) -> int:
    if known := re.search(r"known_trip_count\D*(\d+)", rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    assert condition
    limits = [
        int(n)
        for computation in [condition[1], *re.findall(r"calls=%?([\w.\-]+)", " ".join(computations[condition[1]]))]
        for line in computations.get(computation, ())
        for n in re.findall(r"[su]32\[\]\S* constant\((\d+)\)", line)
    ]
    return max(limits, default=1)
