"""One model's tensors beside its parameters: what goes where, and how it is turned, in both directions."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.config import ModelConfig
from maxlm.convert.families import Family, FamilyError
from maxlm.convert.parallel import bands
from maxlm.parameters import Parameter, Shape, parameters


@dataclass(frozen=True)
class Part:
    """A parameter, or one layer's share of it, as a part of their tensor.

    Attributes:
        path: of the parameter, such as layers/0/attention/q.
        slot: place in the stack of layers, and the expert's in the layer; () of what is whole.
        shape: of ours, padding included.
        apart: their dimensions, those that they join taken apart; without padding.
        joined: their shape.
        order: transpose of `apart` that gives our order.
    """

    path: str
    slot: Shape
    shape: Shape
    apart: Shape
    joined: Shape
    order: tuple[int, ...]

    @property
    def stored(self) -> Shape:
        """Our dimensions as they follow one another in their memory."""
        return tuple(int(dim) for dim in np.argsort(self.order))

    def to_ours(self, theirs: np.ndarray) -> np.ndarray:
        """Their tensor in our order, in place where nothing is padded; padding is zeros. Memory keeps their order."""
        x = theirs.reshape(self.apart).transpose(self.order)
        if x.shape == self.shape:
            return x
        padded = np.zeros([self.shape[dim] for dim in self.stored], x.dtype).transpose(self.order)
        padded[tuple(slice(size) for size in x.shape)] = x
        return padded

    def to_theirs(self, ours: np.ndarray) -> Iterator[np.ndarray]:
        """Our parameter in their order, padding cut off, in pieces along dimension 0."""
        real = [self.apart[i] for i in self.order]
        for band in bands(ours[tuple(map(slice, real))].transpose(self.stored)):
            yield band.reshape(-1, *self.joined[1:])


@dataclass(frozen=True)
class Entry:
    """A tensor of theirs: its shape, and its parts, which follow one another along dimension `axis`."""

    name: str
    shape: Shape
    parts: tuple[Part, ...]
    axis: int = 0

    def to_ours(self, theirs: np.ndarray) -> list[tuple[Part, np.ndarray]]:
        """Each part and its values in our order."""
        cuts = np.cumsum([part.joined[self.axis] for part in self.parts])[:-1]
        pieces = np.split(theirs, cuts, self.axis) if len(self.parts) > 1 else [theirs]
        return [(part, part.to_ours(x)) for part, x in zip(self.parts, pieces, strict=True)]

    def to_theirs(self, ours: Sequence[np.ndarray]) -> np.ndarray:
        """Their tensor, of the values of each part."""
        return np.concatenate(list(self.in_bands(ours)))

    def in_bands(self, ours: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The same, in pieces along dimension 0."""
        pieces = [part.to_theirs(x) for part, x in zip(self.parts, ours, strict=True)]
        if self.axis == 0:
            yield from itertools.chain.from_iterable(pieces)
        else:
            yield np.concatenate([np.concatenate(list(piece)) for piece in pieces], self.axis)


def entries(family: Family, model: ModelConfig) -> list[Entry]:
    """All tensors of a model in its family's form, in the order of the layers.

    Raises:
        FamilyError: a parameter of the model has no place in it.
    """
    ours, found = parameters(model), list[Entry]()
    for row in family.rows:
        stacked = "*" in row.parts[0][0]
        for layer in range(model.num_layers) if stacked else [0]:
            stack, slot = _place(layer, model) if stacked else ("", ())
            paths = [path.replace("layers/*", stack) for path, _ in row.parts]
            present = [path in ours for path in paths]
            if not any(present):
                continue
            if not all(present):
                raise FamilyError(f"{family.model_type} joins {paths[0]} with {paths[present.index(False)]}")
            is_split = "E" in ours[paths[0]].dims and "E" not in row.parts[0][1]
            for expert in range(model.num_experts or 0) if is_split else [None]:
                share = slot if expert is None else (*slot, expert)
                parts = tuple(
                    _part(path, ours[path], dims, share, model)
                    for path, (_, dims) in zip(paths, row.parts, strict=True)
                )
                shape = list(parts[0].joined)
                shape[row.axis] = sum(part.joined[row.axis] for part in parts)
                found.append(Entry(row.theirs.format(layer, expert), tuple(shape), parts, row.axis))
    placed = {part.path for entry in found for part in entry.parts}
    if left := [path for path in ours if path not in placed]:
        raise FamilyError(f"{family.model_type} has no tensor for the parameter {left[0]}")
    return found


def check_tensors(wanted: Sequence[Entry], found: Mapping[str, Shape], where: str) -> None:
    """Accounts for every tensor.

    Args:
        wanted: what the config says.
        found: shape by name.
        where: they are, for the message.

    Raises:
        FamilyError: names the first tensor that is missing, has another shape, or is too many.
    """
    for entry in wanted:
        if entry.name not in found:
            raise FamilyError(f"{where} has no tensor {entry.name}, which its config.json asks for")
        if tuple(found[entry.name]) != entry.shape:
            raise FamilyError(
                f"{where}: tensor {entry.name} is {list(found[entry.name])}, and config.json makes it "
                f"{list(entry.shape)}"
            )
    names = {entry.name for entry in wanted}
    if extra := [name for name in found if name not in names]:
        raise FamilyError(f"{where} has a tensor {ascii(extra[0])[:120]} that has no place in the model")


def _place(layer: int, model: ModelConfig) -> tuple[str, Shape]:
    """Where a layer is: its stack and place in the pattern, and the repeat."""
    lead = model.num_lead_layers
    name, pattern = ("dense_layers", model.lead_pattern) if layer < lead else ("layers", model.main_pattern)
    repeat, kind = divmod(layer if layer < lead else layer - lead, len(pattern))
    return f"{name}/{kind}", (repeat,)


def _part(path: str, ours: Parameter, dims: str, slot: Shape, model: ModelConfig) -> Part:
    own = dict(zip(ours.dims, ours.own, strict=True))
    letters = dims.replace("(", "").replace(")", "")
    if "E" not in letters and len(slot) == 2:
        del own["E"]
    assert sorted(letters) == sorted(own), (path, dims, ours.dims)
    size = {**own, "V": model.vocab_size}
    joined, inside = list[int](), False
    for letter in dims:
        if letter in "()":
            inside = letter == "("
            joined += [1] * inside
        elif inside:
            joined[-1] *= size[letter]
        else:
            joined.append(size[letter])
    apart, order = tuple(size[d] for d in letters), tuple(letters.index(d) for d in own)
    assert math.prod(joined) == math.prod(apart)
    return Part(path, slot, tuple(own.values()), apart, tuple(joined), order)
