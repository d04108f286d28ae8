"""Block sizes of splash attention, by what a chip's compiler schedules for them.

Pallas kernels carry no estimate of the compiler's, but it writes the instruction bundles that a core issues, one a
cycle. tools/splash_blocks.py counts them for many block sizes, and splash_blocks.csv holds what it found: one row per
chip, head size, kernel and block sizes. What a kernel costs for a length and a window follows from how many blocks it
computes and how many it passes over.
"""

import csv
import functools
from dataclasses import dataclass
from importlib import resources

import numpy as np

LANES = 128
KERNELS = ("fwd", "dq", "dkv")
"""Of splash: forward, gradient by queries, gradients by keys and values."""
Blocks = tuple[int, int, int]
"""Queries of a block, keys of a block, and keys of it that are computed at a time."""


@dataclass(frozen=True)
class Mask:
    """What queries see.

    Attributes:
        num_queries: of a row.
        num_keys: of a row.
        causal: keys at their place and before; else all.
        window: keys that a query sees, itself included; None is all.
    """

    num_queries: int
    num_keys: int
    causal: bool = True
    window: int | None = None


@dataclass(frozen=True)
class Cost:
    """Cycles of a kernel with certain blocks, for one head.

    Attributes:
        blocks: their sizes.
        seen: a step over a block with logits that count, at least the time in which its arrays arrive.
        hidden: a step over a block without.
        ends: what the first and the last step of a row of blocks cost more.
    """

    blocks: Blocks
    seen: int
    hidden: int
    ends: int

    def cycles(self, kernel: str, mask: Mask) -> int:
        """Of a whole row of tokens."""
        q, kv, _ = self.blocks
        first_q, first_kv = np.arange(0, mask.num_queries, q)[:, None], np.arange(0, mask.num_keys, kv)[None]
        seen = np.ones((first_q.size, first_kv.size), bool)
        if mask.causal or mask.window is not None:
            seen &= first_kv < first_q + q
        if mask.window is not None:
            seen &= first_q - first_kv - kv < mask.window - 1
        seen = seen.T if kernel == "dkv" else seen
        num_steps = len(seen) * seen.sum(1).max()  # splash makes all rows as long as the longest
        return int(seen.sum() * (self.seen - self.hidden) + num_steps * self.hidden + len(seen) * self.ends)


def fits(num_tokens: int) -> bool:
    """Whether rows of this length can be cut into blocks of whole lanes."""
    return num_tokens % LANES == 0


def choose(chip: str | None, head_size: int, kernel: str, mask: Mask) -> Blocks:
    """The cheapest blocks that divide the row.

    Args:
        chip: hardware.Chip.name; None or one that was not measured takes blocks by rule.
        head_size: features of a head; the next larger one that was measured counts.
        kernel: one of KERNELS.
        mask: what queries see; fits(num_queries) and fits(num_keys).
    """
    cost = _cheapest(chip, head_size, kernel, mask)
    if cost is not None:
        return cost.blocks
    q, kv = by_rule(mask.num_queries, head_size), by_rule(mask.num_keys, head_size)
    return q, kv, kv


@functools.cache  # the search for a mesh asks for the same few ten thousand times
def cycles(chip: str | None, head_size: int, kernel: str, mask: Mask) -> int | None:
    """Cycles of a kernel with the blocks that choose takes, for a head and a row; None where it goes by rule."""
    cost = _cheapest(chip, head_size, kernel, mask)
    return None if cost is None else cost.cycles(kernel, mask)


def by_rule(num_tokens: int, head_size: int) -> int:
    """Rows or keys of a block that any chip takes: the largest that divides them and leaves VMEM for the logits."""
    largest = 512 if head_size <= LANES else 256
    return max(n for n in range(LANES, largest + 1, LANES) if num_tokens % n == 0)


def _cheapest(chip: str | None, head_size: int, kernel: str, mask: Mask) -> Cost | None:
    table = _table()
    size = min((size for name, size, _ in table if name == chip and size >= head_size), default=0)
    fitting = [
        cost
        for cost in table.get((chip, size, kernel), ())
        if mask.num_queries % cost.blocks[0] == 0 and mask.num_keys % cost.blocks[1] == 0
    ]
    if max((cost.blocks[0] for cost in fitting), default=0) < by_rule(mask.num_queries, head_size):
        return None  # such as 384 for 2304 tokens
    return min(fitting, key=lambda cost: cost.cycles(kernel, mask), default=None)


@functools.cache
def _table() -> dict[tuple[str | None, int, str], list[Cost]]:
    found: dict[tuple[str | None, int, str], list[Cost]] = {}
    lines = resources.files("maxlm.kernels").joinpath("splash_blocks.csv").read_text().splitlines()
    for row in csv.DictReader(lines):
        blocks = int(row["block_q"]), int(row["block_kv"]), int(row["compute"])
        cost = Cost(blocks, int(row["seen"]), int(row["hidden"]), int(row["ends"]))
        found.setdefault((row["chip"], int(row["head_size"]), row["kernel"]), []).append(cost)
    return found
