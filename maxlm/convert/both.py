"""What both directions of a conversion share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from rich.console import Console

from maxlm.config import ModelConfig
from maxlm.convert.arrays import ArrayReader
from maxlm.convert.mapping import Entry, Part
from maxlm.convert.parallel import run_all
from maxlm.convert.safetensors import Folder
from maxlm.manifest import CheckpointError
from maxlm.parameters import parameters
from maxlm.progress import track


@dataclass(frozen=True)
class Converted:
    """What a conversion did.

    Attributes:
        family: of the model.
        model: its config.
        num_tensors: of theirs, as a count.
        num_bytes: of them.
        companions: names of files that came along.
        left_out: names of tensors that did not, since they are no part of the model.
    """

    family: str
    model: ModelConfig
    num_tensors: int
    num_bytes: int
    companions: list[str]
    left_out: list[str]


def dims_of_slots(wanted: Sequence[Entry], num_layer_dims: Callable[[str], int]) -> dict[str, int]:
    """How many leading dims of a parameter lead to a share of it: those of layers, and that of experts."""
    return {p.path: num_layer_dims(p.path) + len(p.slot[1:]) for entry in wanted for p in entry.parts}


def parts_read(reader: ArrayReader, model: ModelConfig) -> Callable[[Part], np.ndarray]:
    """Reads parts of a checkpoint, however its layers are stacked."""
    own = {path: parameter.own for path, parameter in parameters(model).items()}

    def read(part: Part) -> np.ndarray:
        shape = reader.shapes[part.path]
        lead = shape[: len(shape) - len(own[part.path])]
        if not part.slot:
            return reader.read(part.path, ())
        layer = tuple(int(i) for i in np.unravel_index(part.slot[0], lead))
        return reader.read(part.path, (*layer, *part.slot[1:]))

    return read


def verify_all(
    wanted: Sequence[Entry],
    theirs: Folder,
    read: Callable[[Part], np.ndarray],
    dtype: Callable[[Entry], np.dtype],
    total: int,
    console: Console | None,
) -> None:
    """Compares both sides, bit by bit, in the type of the one that was written."""

    def compare(entry: Entry) -> None:
        kind = dtype(entry)
        bits = f"u{kind.itemsize}"
        ours = entry.to_theirs([read(part) for part in entry.parts]).astype(kind, copy=False)
        if not np.array_equal(ours.view(bits), theirs.read(entry.name).astype(kind, copy=False).view(bits)):
            raise CheckpointError(f"tensor {entry.name} is not the same on both sides; try again")

    with track("verify", total, console=console) as advance:
        run_all(((math.prod(e.shape) * dtype(e).itemsize, partial(compare, e)) for e in wanted), advance)
