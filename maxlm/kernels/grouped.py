"""Grouped matrix products: rows sorted by group meet the matrix of their group."""

import enum
from typing import Any

import jax


class Way(enum.Enum):
    """What is contracted: dims of the rows and of the matrices, and which dims of these are groups."""

    FORWARD = ((1, 1), (0,))
    TRANSPOSED = ((1, 2), (0,))
    OUTER = ((0, 0), ())


def grouped_product(a: jax.Array, b: jax.Array, sizes_E: jax.Array, way: Way, dtype: Any = None) -> jax.Array:
    """The rows of group e meet matrix e; outer: rows of group e of both make matrix e.

    Sums are float32 (int32 of int8) inside the kernels; results leave them in the compute dtype unless another is
    given, since a float32 copy of so many rows would cost more memory than all else here.

    Args:
        a: rows [C, I].
        b: matrices [E, I, O], transposed [E, O, I]; outer: rows [C, O].
        sizes_E: int32 rows of each group.
        way: which of these.
        dtype: of the results.
    """
    contract, groups = way.value
    numbers = jax.lax.RaggedDotDimensionNumbers(((contract[:1], contract[1:]), ((), ())), (0,), groups)
    return jax.lax.ragged_dot_general(a, b, sizes_E, numbers, preferred_element_type=dtype)
