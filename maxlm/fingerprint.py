"""Fingerprints of arrays on devices: the same on every mesh, taken before a save and again after a restore.

Each element's bits are mixed with its place and summed, so devices add up what they hold and the order does not matter.
Not cryptographic: against accidents on the way from device memory to a disk and back, not against forgers.
"""

import math
from collections.abc import Callable

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

    def add(self, part: np.ndarray, start: int) -> None:
        """Adds consecutive elements.

        Args:
            part: of a type of 8 to 32 bits.
            start: elements of the array that stand before it.
        """
        words = np.ascontiguousarray(part).reshape(-1).view(f"u{part.dtype.itemsize}")
        for at in range(0, words.size, PART):
            piece, first = words[at : at + PART], np.uint32((start + at) * GOLDEN % 2**32)
            count = np.uint32(piece.size)
            if piece.size < PART:  # one program for all sizes
                piece = np.empty(PART, words.dtype)
                piece[:count] = words[at:]
            self._words += np.asarray(_part(piece, first, count))

    def join(self, other: "Running") -> None:
        """Adds what another has seen of the same array."""
        self._words += other._words

    def text(self) -> str:
        """What fingerprints gives of the whole array."""
        return "{:08x}{:08x}".format(*map(int, self._words))


PART = 1 << 20
"""Elements that Running looks at together."""


@jax.jit
def _part(words: jax.Array, first: jax.Array, count: jax.Array) -> jax.Array:
    """uint32 [2] of the first `count` of consecutive elements [PART]; first: the multiple of GOLDEN of their place."""
    number = jax.lax.iota(jnp.uint32, len(words))
    mixed = mix_bits(words.astype(jnp.uint32) ^ mix_bits(jnp.uint32(1) + first + number * np.uint32(GOLDEN)))
    both = (mixed, mix_bits(mixed + np.uint32(GOLDEN)))
    zero, add = np.uint32(0), lambda a, b: (a[0] + b[0], a[1] + b[1])
    # both sums in one pass: two would each compute what they add, and take three times as long on a CPU
    return jnp.stack(jax.lax.reduce(tuple(jnp.where(number < count, x, zero) for x in both), (zero, zero), add, (0,)))
