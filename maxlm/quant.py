"""Matrix products in int8 or fp8: how operands are rounded, and what a product of the rounded ones is.

Everything here is local to one device; `parallel/quantized.py` brings it onto meshes and into the model. Each operand
is divided by a scale per channel, its largest value along the dimensions that the product sums over, so that the scales
can be multiplied onto the result. Gradients are rounded stochastically.

References:
    Abdolrashidi et al., Pareto-Optimal Quantized ResNet, arXiv:2105.03536 (AQT); Micikevicius et al., FP8 Formats for
    Deep Learning, arXiv:2209.05433; Zhang et al., Training with Fewer Bits, arXiv:2502.06309 (rounding of gradients).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config_quant import Kind

ROWS = "ECBT"
"""Letters of tokens, and of experts: with a random word each."""
ODD = 0x9E3779B9  # 2**32 / golden ratio: bits of a product depend on all below
FP8_FORWARD, FP8_GRADIENT = jnp.float8_e4m3fn, jnp.float8_e5m2


@dataclass(frozen=True)
class Recipe:
    """How the products with one weight are computed.

    Attributes:
        forward: type of the product of activations and weight.
        d_activation: of the one that makes the activations' gradient.
        d_weight: of the one that makes the weight's.
        anew: the backward pass rounds the weight for itself; with rounding to the nearest these are the very numbers of
            AQT's config_v4. Else it takes the forward pass' rounded weight, so that fewer bytes are gathered.
        summed_inside: for the weight's gradient, lay out rounded activations with tokens innermost in memory. On TPU
            v5e and v5p its product then takes half the time.
        salt: a number of this weight's own, for other random bits than its neighbours have.
        block: which of a repeat's blocks the weight is of.
        column: its column in reports, if it reports.
    """

    forward: Kind = "int8"
    d_activation: Kind = "int8"
    d_weight: Kind = "int8"
    anew: bool = False
    summed_inside: bool = False
    salt: int = 0
    block: int = 0
    column: int | None = None

    @property
    def kept(self) -> bool:
        """Whether the gradient by the activations is made with the forward pass' rounded weight."""
        return self.d_activation == self.forward and not self.anew


class Rounded(NamedTuple):
    """Rounded values [dims], and what to multiply them by: float32, of the dims that are not summed over."""

    values: jax.Array
    scale: jax.Array


@dataclass(frozen=True)
class Product:
    """A product of two operands, as einsum's letters: each sum goes over letters of both."""

    left: str
    right: str
    out: str

    @classmethod
    def of(cls, subscripts: str) -> "Product":
        """Args: subscripts: such as "BTD,DF->BTF"."""
        operands, out = subscripts.split("->")
        left, right = operands.split(",")
        return cls(left, right, out)

    @property
    def summed(self) -> str:
        """Letters that are summed over."""
        return "".join(d for d in self.left if d in self.right and d not in self.out)

    @property
    def d_left(self) -> "Product":
        """The product of the result's gradient and the right operand, that makes the left one's gradient."""
        return Product(self.out, self.right, self.left)

    @property
    def d_right(self) -> "Product":
        """The product of the result's gradient and the left operand, that makes the right one's gradient."""
        return Product(self.out, self.left, self.right)

    def __call__(self, left: jax.Array, right: jax.Array, **options: Any) -> jax.Array:
        """The plain product."""
        return jnp.einsum(f"{self.left},{self.right}->{self.out}", left, right, **options)

    def of_values(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """The product of rounded values, float32. Sums are int32, of fp8 float32."""
        sums = jnp.int32 if left.dtype == jnp.int8 else jnp.float32
        return self(left, right, preferred_element_type=sums).astype(jnp.float32)

    def of_rounded(self, left: Rounded, right: Rounded) -> jax.Array:
        """The product of rounded operands, float32. Their scales have the dims that it keeps."""
        y = self.of_values(left.values, right.values)
        for dims, operand in ((self.left, left), (self.right, right)):
            y = y * spread(operand.scale, without(dims, self.summed), self.out)
        return y


def forward_type(kind: Kind) -> Any:
    """Type that activations and weights are rounded to."""
    return jnp.int8 if kind == "int8" else FP8_FORWARD


def round_to(
    x: jax.Array,
    dims: str,
    summed: str,
    dtype: Any,
    noise: jax.Array | None = None,
    axes: Sequence[str] = (),
) -> Rounded:
    """Rounds an operand to int8 or fp8, with a scale per channel.

    Args:
        x: [dims], of any float type.
        dims: its letters.
        summed: those that the product sums over.
        dtype: int8, or a type of fp8.
        noise: like x, uniform in [-0.5, 0.5): with it int8 is rounded up or down at random, right on average. The
            largest value then has 127 steps, so that it is not cut; else 127.5, as in AQT.
        axes: manual mesh axes that split the summed dims.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=tuple(dims.index(d) for d in summed))
    if axes:
        largest = jax.lax.pmax(largest, tuple(axes))
    largest = jnp.where(largest == 0, 1.0, largest)
    kept = without(dims, summed)
    if dtype == jnp.int8:
        scale = largest / np.float32(127.5 if noise is None else 127.0)
        y = x * spread(1 / scale, kept, dims)
        if noise is not None:
            y += noise
        return Rounded(jnp.round(jnp.clip(y, -127.0, 127.0)).astype(jnp.int8), scale)
    top = float(jnp.finfo(dtype).max)
    scale = largest / np.float32(top)
    return Rounded(jnp.clip(x * spread(1 / scale, kept, dims), -top, top).astype(dtype), scale)


def spread(x: jax.Array, letters: str, dims: str) -> jax.Array:
    """x [letters], ready to meet an array of dims: transposed, with dims of size one where it has none."""
    ordered = [d for d in dims if d in letters]
    x = jnp.transpose(x, [letters.index(d) for d in ordered])
    return jnp.expand_dims(x, [i for i, d in enumerate(dims) if d not in letters])


def noise(words: jax.Array, rows: str, columns: jax.Array, dims: str) -> jax.Array:
    """Uniform numbers in [-0.5, 0.5), of a random word per row and one per column.

    Which device holds an element does not matter, and it takes two operations: no generator, no key.

    Args:
        words: uint32 [rows].
        rows: letters of the rows.
        columns: uint32, of the letters of dims that are not rows.
        dims: letters of the result.
    """
    bits = (spread(words, rows, dims) ^ spread(columns, without(dims, rows), dims)) * np.uint32(ODD)
    return jax.lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32) * np.float32(2**-32)


def without(dims: str, letters: str) -> str:
    """Dims that are not among the letters."""
    return "".join(d for d in dims if d not in letters)
