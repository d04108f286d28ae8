"""Fingerprints of arrays on devices: the same on every mesh, taken before a save and again after a restore.

Each element's bits are mixed with its place and summed, so devices add up what they hold and the order does not matter.
Not cryptographic: against accidents on the way from device memory to a disk and back, not against forgers.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.model.dropout import GOLDEN, mix_bits

WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprints(arrays: dict[str, jax.Array]) -> Callable[[], dict[str, str]]:
    """Starts to take fingerprints, in order with other work of the devices.

    Args:
        arrays: by name, of types of 8 to 32 bits, sharded in any way.

    Returns:
        Waits for the 16 hexadecimal digits of each.
    """
    on_host = {name for name, x in arrays.items() if x.sharding.memory_kind == "pinned_host"}
    found = dict(_all({name: x for name, x in arrays.items() if name not in on_host}))
    for name in on_host:  # one at a time: together they may not fit on the devices
        x = jax.device_put(arrays[name], arrays[name].sharding.with_memory_kind("device"))
        found |= jax.block_until_ready(_all({name: x}))

    def wait() -> dict[str, str]:
        return {name: "{:08x}{:08x}".format(*map(int, np.asarray(words))) for name, words in found.items()}

    return wait


@jax.jit
def _all(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # one program: CPUs deadlock over the sums of several that run at the same time
    return {name: _fingerprint(x) for name, x in arrays.items()}


def _fingerprint(x: jax.Array) -> jax.Array:
    """uint32 [2]."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    sharding, place = jax.typeof(x).sharding, jnp.uint32(1)
    for dim in range(x.ndim):
        stride = np.uint32(math.prod(x.shape[dim + 1 :]) * GOLDEN % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim, out_sharding=sharding) * stride
    mixed = mix_bits(words ^ mix_bits(place))
    return jnp.stack([jnp.sum(h, dtype=jnp.uint32) for h in (mixed, mix_bits(mixed + np.uint32(GOLDEN)))])


class Running:
    """The fingerprint of an array on a host that is seen in parts, in any order."""

    def __init__(self) -> None:
        self._words = np.zeros(2, np.uint32)

    def add(self, part: np.ndarray, start: int, strides: Sequence[int] | None = None) -> None:
        """Adds elements.

        Args:
            part: [...] of a type of 8 to 32 bits.
            start: place of its first element in the array.
            strides: how far apart neighbours along each of its dims are in the array; default: it is consecutive
                elements. Both in elements.
        """
        if strides is None:
            part, strides = part.reshape(-1), [1]
        words, dims = np.ascontiguousarray(part).reshape(-1).view(f"u{part.dtype.itemsize}"), [(1, 0)]
        for size, stride in zip(part.shape, strides, strict=True):
            if dims[-1][0] == 1 or dims[-1][1] == size * stride:
                dims[-1] = dims[-1][0] * size, stride
            else:
                dims.append((size, stride))
        *outer, (size, stride) = dims
        width = math.gcd(size, ROW) if outer else ROW
        first = np.full(1, start * GOLDEN % 2**32, np.uint32)  # of each row
        for count, step in (*outer, (-(-size // width), width * stride)):
            first = np.add.outer(first, np.arange(count, dtype=np.uint32) * np.uint32(step * GOLDEN % 2**32)).ravel()
        rows = max(1, (PART if words.size > SMALL else SMALL) // width)
        for i in range(0, len(first), rows):
            piece, places = words[i * width : (i + rows) * width], first[i : i + rows]
            count = piece.size
            if count < rows * width:  # two programs for all sizes
                piece, places = (np.resize(x, n) for x, n in ((piece, rows * width), (places, rows)))
            step = np.uint32(stride * GOLDEN % 2**32)
            self._words += np.asarray(_part(piece.reshape(rows, width), places, step, np.uint32(count)))

    def join(self, other: "Running") -> None:
        """Adds what another has seen of the same array."""
        self._words += other._words

    def text(self) -> str:
        """What fingerprints gives of the whole array."""
        return "{:08x}{:08x}".format(*map(int, self._words))


PART, SMALL, ROW = 1 << 20, 1 << 12, 256
"""Elements that Running looks at together, of arrays that are large and small, and of those that have one stride, where
that can be."""


@jax.jit
def _part(words: jax.Array, first: jax.Array, step: jax.Array, count: jax.Array) -> jax.Array:
    """uint32 [2] of the first `count` elements.

    Args:
        words: [rows, columns].
        first: of each row, the multiple of GOLDEN of the place of its first element.
        step: the same of the distance between columns.
        count: of elements.
    """
    rows, columns = (jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) for dim in (0, 1))
    counted = rows * np.uint32(words.shape[1]) + columns < count
    mixed = mix_bits(words.astype(jnp.uint32) ^ mix_bits(jnp.uint32(1) + first[:, None] + columns * step))
    both = (mixed, mix_bits(mixed + np.uint32(GOLDEN)))
    zero, add = np.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
    # both sums in one pass: two would each compute what they add, and take three times as long on a CPU
    return jnp.stack(jax.lax.reduce(tuple(jnp.where(counted, x, zero) for x in both), (zero, zero), add, (0, 1)))
