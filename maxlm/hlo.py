"""Reads what a compiled program does, from its text: collectives with bytes, loops counted, and donated arguments.

The text is `jax.jit(f).lower(...).compile().as_text()`. A while loop's body stands there once; its trip count is in
the loop's condition or its known_trip_count.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
BETWEEN_SLICES = "send between slices"
"""Kind of what crosses the data-centre network: the TPU compiler makes host transfers of it."""
GIVEN_UP = 2**63 - 1
"""Cycles of an operation that the TPU compiler does not know, such as small products beside gathers of int8."""

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
OPERATION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One array that a collective operation of a program moves. Where the compiler combines several, each counts.

    Attributes:
        kind: one of KINDS, or BETWEEN_SLICES. On TPU a reduce-scatter may be compiled as an all-reduce-scatter fusion;
            it counts as one.
        dtype: element type of the array.
        shape: its shape, which is whole for all-gather and reduce-scatter. A ragged-all-to-all has room for the worst
            case on one of its sides: it is known by the smaller one, which on average is what travels.
        bytes: bytes of that array, on one device.
        times: how often it runs, trip counts of loops multiplied.
        loops: trip counts of the loops around it, outermost first.
        groups: devices that take part with one another, by their index in the mesh; for a permute, sender and receiver.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    times: int
    loops: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]

    def axes(self, mesh: Mapping[str, int]) -> frozenset[str]:
        """Names of the mesh axes along which it moves data. Args: mesh: sizes by name, as Mesh.shape gives them."""
        if self.kind == BETWEEN_SLICES:
            return frozenset({"slice"})
        places = np.indices(tuple(mesh.values())).reshape(len(mesh), -1)
        groups = self.groups or (tuple(range(places.shape[1])),)  # none named is all
        moved = [np.ptp(places[:, list(group)], axis=1) > 0 for group in groups]
        return frozenset(name for name, along in zip(mesh, np.any(moved, axis=0), strict=True) if along)


def collectives(text: str) -> list[Collective]:
    """All collectives that the program executes, in order of the text.

    A collective that the TPU compiler runs beside other work stands in several fusions, with the same channel, chain
    and source: it is counted once. The work may be a whole loop, which it then enters and leaves again: it is counted
    where it starts.

    Raises:
        ValueError: the text is no compiled HLO module.
    """
    computations, entry = parsed(text)
    found: dict[Any, Collective] = {}
    for path, key, collective in _walk(computations, entry, (), ()):
        if not any((path[:depth], key) in found for depth in range(len(path) + 1)):
            found[path, key] = collective
    return list(found.values())


def matmul_flops(text: str, taken: float = 1.0) -> float:
    """FLOPs of all matrix products that one device runs, loops counted.

    On TPU a matrix product is a convolution. A dim that counts batches is a spatial one there, whose window moves by
    its own size; a dim whose window is padded to its full size is one of the result's.

    Args:
        text: the compiled program.
        taken: how often a condition's branches are run, as a share; both of them count so.

    Raises:
        ValueError: the text is no compiled HLO module.
    """
    computations, entry = parsed(text)
    shapes = {name: _result_shapes(lines) for name, lines in computations.items()}

    def walk(name: str, times: float) -> float:
        total = 0.0
        for line in computations.get(name, ()):
            match = OPERATION.match(line)
            if match is None:
                continue
            _, result, operation, rest = match.groups()
            if operation in ("dot", "convolution"):
                total += times * _product_flops(operation, result, rest, shapes[name])
            inside = times
            if operation == "while":
                inside *= _trips(computations, rest)
            elif operation == "conditional":
                inside *= taken
            total += sum(walk(callee, inside) for callee in callees(operation, rest))
        return total

    return walk(entry, 1.0)


@dataclass(frozen=True)
class Operation:
    """An operation of a TPU program, as the compiler prices it.

    Attributes:
        name: its name in the program.
        source: where the model asks for it, in the words of its named scopes.
        cycles: estimated cycles of one run, 0 where the compiler gives none (GIVEN_UP); None of a Pallas kernel, which
            it does not price.
        times: how often it runs, trip counts of loops multiplied.
    """

    name: str
    source: str
    cycles: int | None
    times: int


def operations(text: str) -> list[Operation]:
    """What a TPU program runs that the compiler has priced, and its Pallas kernels.

    Both branches of a condition count as run. What runs beside other work (collectives) is counted as if it did not.

    Raises:
        ValueError: the text is no compiled HLO module.
    """
    computations, entry = parsed(text)
    found = []

    def walk(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            match = OPERATION.match(line)
            if match is None:
                continue
            own, _, operation, rest = match.groups()
            priced, kernel = re.search(r'"estimated_cycles":"(\d+)"', rest), "tpu_custom_call" in rest
            if priced or kernel:
                source = re.search(r'op_name="([^"]*)"', rest)
                cycles = int(priced[1]) % GIVEN_UP if priced else None
                found.append(Operation(own, source[1] if source else "", cycles, times))
            if operation != "fusion":
                inside = times * _trips(computations, rest) if operation == "while" else times
                for callee in callees(operation, rest):
                    walk(callee, inside)

    walk(entry, 1)
    return found


def sources(text: str) -> dict[str, str]:
    """Where the model asks for each operation of a program (op_name), by the operation's name."""
    found = {}
    for line in text.splitlines():
        match, source = OPERATION.match(line.strip()), re.search(r'op_name="([^"]*)"', line)
        if match and source:
            found[match[1]] = source[1]
    return found


def _result_shapes(lines: list[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for line in lines:
        if (match := OPERATION.match(line)) and (array := _ARRAY.match(match[2])):
            found[match[1]] = tuple(int(n) for n in array[2].split(",") if n)
    return found


def _product_flops(operation: str, result: str, rest: str, shapes: dict[str, tuple[int, ...]]) -> float:
    array = _ARRAY.match(result)
    assert array
    out = [int(n) for n in array[2].split(",") if n]
    left, right = (shapes[name] for name in re.findall(r"%([\w.\-]+)", rest.split(")")[0])[:2])
    if operation == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
        assert contracted
        return 2.0 * math.prod(out) * math.prod(left[int(i)] for i in contracted[1].split(",") if i)
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", rest)
    assert labels
    size = right[labels[1].index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", rest) or ["", ""])[1]))
    for i, n in enumerate(int(n) for n in window.get("size", "").split("x") if n):
        steps = [int(window[key].split("x")[i]) for key in ("stride", "lhs_dilate") if key in window]
        batches = n > 1 and n == out[labels[2].index(str(i))] and bool({n, n - 1}.intersection(steps))
        padded = "pad" in window and window["pad"].split("x")[i].split("_")[0] == str(n - 1)
        size *= 1 if batches or padded else n
    return 2.0 * math.prod(out) * size


def num_aliased(text: str) -> int:
    """Number of outputs that reuse the memory of a donated argument."""
    header = text[: text.find("\n")]
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}", header))


def parsed(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation of a program, by name, and the name of the one that is run; raises as collectives."""
    found: dict[str, list[str]] = {}
    entry, lines = "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.rstrip() == "}":
            lines = None
        elif lines is not None and line.startswith(" "):
            lines.append(line.strip())
        elif lines:  # what a Pallas kernel says of itself may have several lines
            lines[-1] += line
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    return found, entry


def _walk(
    computations: dict[str, list[str]], name: str, loops: tuple[int, ...], path: tuple[str, ...], fused: bool = False
) -> Iterator[tuple[tuple[str, ...], Any, Collective]]:
    """Collectives below a computation, each with its path, the loops' bodies, and a key by which copies are known."""
    for line in computations.get(name, ()):
        match = OPERATION.match(line)
        if match is None:
            continue
        own, result, operation, rest = match.groups()
        kind = operation.removesuffix("-start")
        if operation == "send" and "xla_megascale_runtime" in rest:
            kind = BETWEEN_SLICES
        if kind in (*KINDS, BETWEEN_SLICES):
            marks = re.findall(r'(?:channel_id|chain_id|op_name)="?([^",]*)', rest)
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            array = re.sub(r"\{[^}]*\}", "", result)  # copies differ in their layouts
            key = (kind, array, *marks) if fused else (name, own)
            for i, (dtype, shape) in enumerate(_moved(kind, result, rest, computations[name])):
                size = _size((dtype, shape))
                yield path, (key, i), Collective(kind, dtype, shape, size, math.prod(loops), loops, _groups(line))
        if operation == "while":
            (body,) = callees(operation, rest)
            yield from _walk(computations, body, (*loops, _trips(computations, rest)), (*path, body))
        else:
            for callee in callees(operation, rest):
                yield from _walk(computations, callee, loops, path, fused or operation == "fusion")


def callees(operation: str, rest: str) -> list[str]:
    """Computations that an operation runs; of a loop, its body."""
    if operation == "while":
        return re.findall(r"body=%?([\w.\-]+)", rest)
    if operation not in ("call", "fusion", "conditional", "async-start"):
        return []
    callees = re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    for branches in re.findall(r"branch_computations=\{([^}]*)\}", rest):
        callees += re.findall(r"%?([\w.\-]+)", branches)
    return callees


def _moved(kind: str, result: str, rest: str, lines: list[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Element type and shape of each array that a collective moves."""
    operands = rest.split("), ")[0]
    out, named = _arrays(result), re.findall(r"%([\w.\-]+)", operands)
    if kind == "ragged-all-to-all":
        data = next((match[2] for line in lines if (match := OPERATION.match(line)) and match[1] == named[0]), result)
        return [min(out[0], _arrays(data)[0], key=_size)]
    # Each array has its result, after its operand where the operation only starts; the operand's type may also stand in
    # the operand list. The whole array of a gather or scatter is the largest of these.
    typed, count = _arrays(operands), max(len(named), 1) if kind in KINDS else 1
    return [max([*out[i::count][:2], *typed[i : i + 1]], key=_size) for i in range(min(count, len(out)))]


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in _ARRAY.findall(text)]


def _size(array: tuple[str, tuple[int, ...]]) -> int:
    return BYTES[array[0]] * math.prod(array[1])


def _groups(line: str) -> tuple[tuple[int, ...], ...]:
    """Groups in any of the forms in which XLA writes them: listed, as a reshaped range, or as axes of a mesh."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", line):
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    order = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if ranged := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={order}", line):
        ids = _device_range(ranged[3], ranged[4]).reshape(int(ranged[1]), int(ranged[2]))
        return tuple(map(tuple, ids.tolist()))
    named = re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({order}\))? *\{{([^}}]*)\}}", line)
    if named:
        mesh = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = [name in re.findall(r"'(\w+)'", named[4]) for name in mesh]
        ids = _device_range(named[2] or str(math.prod(mesh.values())), named[3]).reshape(tuple(mesh.values()))
        width = math.prod(size for size, grouped in zip(mesh.values(), inside, strict=True) if grouped)
        return tuple(map(tuple, ids.transpose(np.argsort(inside, kind="stable")).reshape(-1, width).tolist()))
    if re.search(r"replica_groups=(?!\{\})", line):
        raise ValueError(f"unknown form of replica groups: {line[line.index('replica_groups') :][:200]}")
    return ()


def _device_range(dims: str, order: str | None) -> np.ndarray:
    shape = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


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
