"""What lies in a device's memory when a compiled TPU program holds most, from the program's text.

The compiler gives totals alone. But the text is in the order in which operations run, and says which results lie in the
memory of their operands, so lifetimes can be told: a buffer is there from its first operation to its last.
"""

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from maxlm.hlo import BYTES, OPERATION, callees, parsed

_LEAF = re.compile(rf"\b({'|'.join(BYTES)})\[([\d,]*)\](?:\{{([^}}]*)\}})?")
_SAME = ("bitcast", "opt-barrier", "get-tuple-element", "tuple")
"""Operations whose results lie where their operands do."""


@dataclass
class Buffer:
    """Memory that one or several arrays have in turn.

    Attributes:
        array: type and shape of the largest, as bf16[16,2048].
        bytes: of the device's main memory, with what pads tiles.
        source: op_name of the first operation that wrote into it; empty where none says.
        first, last: when it is there, in operations since the program's start.
        is_argument: it is there before that.
    """

    array: str
    bytes: int
    source: str
    first: int
    last: int
    is_argument: bool = False


def at_peak(text: str) -> list[Buffer]:
    """Buffers beside the arguments, the largest first, at the moment when they are largest together.

    Args:
        text: the compiled program.

    Raises:
        ValueError: the text is no compiled HLO module.
    """
    found = [buffer for buffer in _Run(text).buffers() if buffer.bytes and not buffer.is_argument]
    changes = sorted([(b.first, b.bytes) for b in found] + [(b.last + 1, -b.bytes) for b in found])
    sums = list(itertools.accumulate(size for _, size in changes))
    when = changes[max(range(len(sums)), key=sums.__getitem__)][0] if sums else 0
    return sorted((b for b in found if b.first <= when <= b.last), key=lambda b: -b.bytes)


@dataclass
class _Run:
    """Goes through a program, loops once each, and notes which arrays (leaves of results) lie in one place.

    Attributes:
        text: of the program.
        now: operations that were passed.
        parents: of each leaf another one in the same place, or itself: a union-find forest.
        known: what each leaf is.
        types: of each leaf, layout included.
        arguments: leaves of the program's parameters, by their number.
    """

    text: str
    now: int = 0
    parents: list[int] = field(default_factory=list)
    known: list[Buffer] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    arguments: dict[int, int] = field(default_factory=dict)

    def buffers(self) -> list[Buffer]:
        """All of them."""
        self.computations, entry = parsed(self.text)
        results = self._through(entry, [])
        for leaf in results:
            self.known[leaf].last = self.now
        header = self.text[: self.text.find("\n")]
        for place, number in re.findall(r"\{(\d+)\}: \((\d+), \{\}", header):
            self._join(results[int(place)], self.arguments[int(number)])
        found: dict[int, Buffer] = {}
        for leaf, own in enumerate(self.known):
            whole = found.setdefault(self._root(leaf), own)
            if own.bytes > whole.bytes:
                whole.array, whole.bytes = own.array, own.bytes
            whole.source = whole.source or own.source
            whole.first, whole.last = min(whole.first, own.first), max(whole.last, own.last)
            whole.is_argument |= own.is_argument
        return list(found.values())

    def _through(self, name: str, given: Sequence[list[list[int]]]) -> list[int]:
        """Args: given: what each parameter is. Returns: leaves of the result."""
        values: dict[str, list[list[int]]] = {}
        own = ""
        for line in self.computations[name]:
            match = OPERATION.match(line)
            if match is None:
                continue
            self.now += 1
            own, result, operation, rest = match.groups()
            inside = rest[: rest.index(")")]
            operands = [values[n] for n in re.findall(r"%([\w.\-]+)", inside) if n in values]
            if operation not in _SAME:  # these use nothing
                self._use(_flat(itertools.chain.from_iterable(operands)))
            if operation == "parameter" and given:
                values[own] = given[int(inside)]
            elif operation == "parameter":
                values[own] = self._made(result, operation, [], rest)
                self.arguments[int(inside)] = values[own][0][0]
            elif operation in _SAME:
                values[own] = self._same(operation, operands, rest)
            else:
                values[own] = self._made(result, operation, operands, rest)
            if line.startswith("ROOT"):
                return _flat(values[own])
        return _flat(values[own])

    def _same(self, operation: str, operands: list[list[list[int]]], rest: str) -> list[list[int]]:
        if operation == "tuple":
            return [_flat(value) for value in operands]
        if operation == "get-tuple-element":
            index = re.search(r"index=(\d+)", rest)
            assert index
            return [operands[0][int(index[1])]]
        return operands[0]

    def _made(self, result: str, operation: str, operands: list[list[list[int]]], rest: str) -> list[list[int]]:
        if operation == "while":
            (body,) = callees(operation, rest)
            for before, after in zip(_flat(operands[0]), self._through(body, operands), strict=True):
                self._join(before, after)
            self._use(_flat(operands[0]))
            return operands[0]
        if operation.endswith("-done"):
            wanted = [match[0] for match in _LEAF.finditer(result)]
            started = {self.types[leaf]: leaf for leaf in _flat(operands[0])}
            if all(text in started for text in wanted):
                return [[started[text]] for text in wanted]
        source = re.search(r'op_name="([^"]*/[^"]*)"', rest)  # those without / are names of the compiler's or arguments
        value = [
            [self._new(match, operation, source[1] if source else "") for match in _LEAF.finditer(element)]
            for element in _elements(result)
        ]
        if operation in ("conditional", "call"):
            passed = operands[1:] if operation == "conditional" else [*operands]
            for number, callee in enumerate(callees(operation, rest)):
                given = [passed[number]] if operation == "conditional" else passed
                for leaf, after in zip(_flat(value), self._through(callee, given), strict=True):
                    self._join(leaf, after)
            self._use(_flat(value))
        self._alias(value, operands, operation, rest)
        return value

    def _alias(self, value: list[list[int]], operands: list[list[list[int]]], operation: str, rest: str) -> None:
        """Results that lie in the memory of operands, as the compiler says."""
        leaves, passed = _flat(value), [leaf for operand in operands for leaf in _flat(operand)]
        both = [*passed, *leaves]
        lists = re.search(r'"aliasing_operands":\{"lists":\[(.*?)\]\}\}', rest)
        for group in re.findall(r'"indices":\[([^\]]*)\]', lists[1] if lists else ""):
            numbers = [int(n) for n in re.findall(r"\d+", group)]
            for n in numbers[1:]:
                if max(n, numbers[0]) < len(both):
                    self._join(both[numbers[0]], both[n])
        if operation.endswith("-start"):
            for leaf in leaves:
                same = [other for other in passed if self.types[other] == self.types[leaf]]
                if same:
                    self._join(leaf, passed.pop(passed.index(same[0])))

    def _new(self, match: re.Match[str], operation: str, source: str) -> int:
        size = 0 if operation == "constant" else _bytes(match)
        self.parents.append(len(self.parents))
        self.types.append(match[0])
        self.known.append(
            Buffer(match[0].partition("{")[0], size, source, self.now, self.now, operation == "parameter")
        )
        return len(self.parents) - 1

    def _use(self, leaves: Sequence[int]) -> None:
        for leaf in leaves:
            self.known[leaf].last = self.now

    def _join(self, one: int, other: int) -> None:
        self.parents[self._root(other)] = self._root(one)

    def _root(self, leaf: int) -> int:
        while self.parents[leaf] != leaf:
            self.parents[leaf] = leaf = self.parents[self.parents[leaf]]
        return leaf


def _flat(value: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(value))


def _elements(result: str) -> list[str]:
    """Of a tuple's type those of its elements, tuples of tuples whole."""
    if not result.startswith("("):
        return [result]
    found, depth = [""], 0
    for char in result[1:-1]:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            found.append("")
        else:
            found[-1] += char
    return found


def _bytes(match: re.Match[str]) -> int:
    """Of an array in main memory; its last dims in memory fill whole tiles."""
    dims, layout = [int(n) for n in match[2].split(",") if n], match[3] or ""
    if re.search(r"S\((?!0)\d+\)", layout):
        return 0
    order, tile = [int(n) for n in layout.partition(":")[0].split(",") if n], re.search(r"T\(([\d,]+)\)", layout)
    for axis, size in zip(order, reversed([int(n) for n in tile[1].split(",")] if tile else []), strict=False):
        dims[axis] = -(-dims[axis] // size) * size
    return BYTES[match[1]] * math.prod(dims)
