"""What buffers of a compiled step are for: gradients, gathered weights, what layers keep, or a place of the model."""

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from maxlm.buffers import Buffer
from maxlm.cost import words
from maxlm.step import Program

GRADIENTS, GATHERED, ACTIVATIONS = "gradients", "gathered", "activations"
"""Parts by the names of plan.memory; the others are places of the model: mlp, attention, head."""


def by_part(found: Sequence[Buffer], program: Program, top: int) -> dict[str, Any]:
    """Sums of buffers, and the largest.

    Args:
        found: buffers that are there together.
        program: whose they are.
        top: how many to name; those of one shape and place count as one.

    Returns:
        JSON: buffers_by_part, buffers_bytes (their sum) and buffers: dicts of place, array, count and bytes (of all).
    """
    weights, stack = _weights(program), _stack(program)
    parts, together = collections.Counter[str](), dict[tuple[str, str], list[int]]()
    for buffer in found:
        place = words(buffer.source).strip() or "other"
        part = _part(buffer, place, weights, stack)
        copied = place.startswith(("dynamic_update", "broadcast"))  # a loop over layers only copies into it
        parts[part] += buffer.bytes
        together.setdefault((part if copied else place, buffer.array), []).append(buffer.bytes)
    rows = [
        {"place": place, "array": array, "count": len(sizes), "bytes": sum(sizes)}
        for (place, array), sizes in together.items()
    ]
    largest = sorted(rows, key=lambda row: -row["bytes"])[:top]
    return {"buffers": largest, "buffers_by_part": dict(parts.most_common()), "buffers_bytes": parts.total()}


def _part(buffer: Buffer, place: str, weights: set[tuple[int, ...]], stack: tuple[int, ...]) -> str:
    """Told by its shape: a stack of the repeats' activations, or a weight's, whose dims may be turned around."""
    shape = tuple(int(n) for n in re.findall(r"\d+", buffer.array[buffer.array.index("[") :]))
    if shape[:2] == stack[:2] and stack[2] in shape[2:]:
        return ACTIVATIONS
    if _dims(shape) in weights:
        return GRADIENTS if buffer.array.startswith("f32") or "(backward)" in place else GATHERED
    is_stack = shape[:1] == stack[:1] and all(n in shape[1:] for n in stack[1:])
    if is_stack or place.startswith(("dynamic_update", "broadcast")):
        return ACTIVATIONS
    name = place.partition(" ")[0]
    return "other" if name.startswith("(") else GATHERED if name == "weights" else name


def _weights(program: Program) -> set[tuple[int, ...]]:
    """Dims of matrices on a device: as they rest and whole over fsdp, stacked and of one repeat."""
    found = set()
    for leaf in jax.tree.leaves(program.state_shapes["params"]):
        spec = [tuple(name for name in _names(entry) if not name.startswith("fsdp")) for entry in leaf.sharding.spec]
        whole = NamedSharding(leaf.sharding.mesh, PartitionSpec(*(entry or None for entry in spec)))
        for sharding in (leaf.sharding, whole):
            shape = sharding.shard_shape(leaf.shape)
            found |= {_dims(dims) for dims in (shape, shape[1:])}
    return {dims for dims in found if len(dims) > 1}


def _stack(program: Program) -> tuple[int, ...]:
    """Repeats, and of a microbatch on a device sequences and tokens of each."""
    train = program.config.train
    tokens = (train.grad_accum, train.batch_size // train.grad_accum, train.seq_len)
    rows = program.batch_sharding.shard_shape(tokens)[1]
    return (program.config.model.num_repeats, rows, train.seq_len // program.mesh.shape.get("context", 1))


def _dims(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without ones, sorted."""
    return tuple(sorted(n for n in shape if n > 1))


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
