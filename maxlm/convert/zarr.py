"""How an array lies in the files of a checkpoint: Zarr 3, uncompressed, its dimensions in any order.

With the order of a tensor of Hugging Face the bytes are the same, and nothing has to be transposed on the way.

References:
    https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html
"""

import math
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]
FILE = "zarr.json"
"""Says what the others are."""
CHUNK_BYTES = 64 << 20


class Layout(NamedTuple):
    """Where the elements of an array are.

    Attributes:
        dtype: name of its type.
        shape: of the array.
        chunks: shape of a chunk, which is a file.
        order: the dims, as they follow one another in a chunk's memory.
    """

    dtype: str
    shape: Shape
    chunks: Shape
    order: Shape

    @classmethod
    def of_shares(cls, dtype: np.dtype, shape: Shape, num_layer_dims: int, order: Shape) -> "Layout":
        """A file for each layer's share, or several of CHUNK_BYTES, if its first dim in memory can be divided so.

        Args:
            dtype: of the elements.
            shape: of the array.
            num_layer_dims: leading dims that are layers.
            order: dims of a share, counted from 0, as they follow one another in memory.
        """
        own = list(shape[num_layer_dims:])
        size = math.prod(own) * dtype.itemsize
        if order and size > CHUNK_BYTES:
            first = order[0]
            most = min(own[first], 4096)
            parts = (n for n in range(2, most + 1) if own[first] % n == 0 and size / n <= CHUNK_BYTES)
            own[first] //= next(parts, 1)
        leading = range(num_layer_dims)
        return cls(dtype.name, shape, (*[1 for _ in leading], *own), (*leading, *[num_layer_dims + i for i in order]))

    @classmethod
    def read(cls, dtype: str, shape: Shape, tree: Any) -> "Layout | None":
        """That of an array whose zarr.json is known; None if it says more than there is in a layout."""
        try:
            order = tuple(tree["codecs"][0]["configuration"]["order"])
            chunks = tuple(tree["chunk_grid"]["configuration"]["chunk_shape"])
            fits = sorted(order) == list(range(len(shape))) and len(chunks) == len(shape)
            counts = all(type(number) is int for number in order + chunks) and min(chunks, default=1) > 0
        except (KeyError, TypeError, IndexError):
            return None
        found = cls(dtype, shape, chunks, order)
        return found if fits and counts and found.tree() == tree else None

    def files(self, slot: Shape) -> list[str] | None:
        """Names of the files of the share at `slot`, as they follow one another in memory; None if they do not."""
        lead = len(slot)
        if lead >= len(self.order):
            return None
        first = self.order[lead]
        shares = self.order[:lead] == tuple(range(lead)) and self.chunks[:lead] == (1,) * lead
        whole = all(self.chunks[dim] == self.shape[dim] for dim in self.order[lead + 1 :])
        if not (shares and whole) or self.shape[first] % self.chunks[first]:
            return None
        place = [*slot, *[0] * (len(self.shape) - lead)]
        return [
            ".".join(map(str, [*place[:first], i, *place[first + 1 :]]))
            for i in range(self.shape[first] // self.chunks[first])
        ]

    def tree(self) -> dict[str, Any]:
        """What zarr.json says."""
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunks)}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "fill_value": 0.0,
            "codecs": [
                {"name": "transpose", "configuration": {"order": list(self.order)}},
                {"name": "bytes", "configuration": {"endian": "little"}},
            ],
        }
