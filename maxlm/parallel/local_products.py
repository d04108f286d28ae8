"""The products of one device with a quantized weight, inside an island: rounding, collectives, scales."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from maxlm.model.dropout import mix_bits
from maxlm.quant import (
    FP8_GRADIENT,
    ROWS,
    Kind,
    Product,
    Recipe,
    Rounded,
    forward_type,
    noise,
    round_to,
    spread,
    without,
)
from maxlm.sharding import manual_axes


@dataclass(frozen=True)
class LocalProducts:
    """What one device computes; its shards are parts of what the letters say.

    Attributes:
        product: the forward one.
        recipe: types.
        fsdp: mesh axes that split the weight's D, outermost first.
        split: letters of the weight's other dims, and mesh axes that split them and the activations' alike.
    """

    product: Product
    recipe: Recipe
    fsdp: tuple[str, ...]
    split: tuple[tuple[str, tuple[str, ...]], ...]

    def forward(
        self, x: jax.Array, w: jax.Array, held: Rounded | None = None, dtype: Any = None
    ) -> tuple[jax.Array, jax.Array]:
        """The product, in x's dtype or another, and the error of rounding x; see quantized.quantized_einsum.

        Args:
            x: activations.
            w: the weight.
            held: its shard, rounded for this product already.
            dtype: of the product.
        """
        product, kind, error = self.product, self.recipe.forward, jnp.zeros(())
        if kind == "bf16":
            y = product(x, self.gathered(w, x.dtype), preferred_element_type=dtype)
        else:
            left = round_to(x, product.left, product.summed, forward_type(kind), axes=self._axes(product.summed))
            y = product.of_rounded(left, self.weight(w, product.summed, kind, held)).astype(dtype or x.dtype)
            error = self._error(x, left) if kind == "int8" else error
        return self._sum(y, product.summed), error

    def backward(
        self,
        x: jax.Array,
        w: jax.Array,
        held: Rounded | None,
        words: jax.Array | None,
        columns: jax.Array | None,
        g: jax.Array,
        dtype: Any = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Gradients by x, in its dtype or another, and by the weight's shard.

        Args:
            x: activations.
            w: the weight.
            held: its shard, rounded already for the product that makes the gradient by x.
            words: random words of the rows; None rounds to the nearest.
            columns: and of the other dims of the result.
            g: gradient by the result.
            dtype: of the gradient by x.
        """
        noisy = partial(self._gradient, words=words, columns=columns)
        dx = self._d_activation(noisy, w, held, g, dtype or x.dtype)
        dw = self._d_weight(noisy, x, g)
        for axis in self.fsdp:
            dw = lax.psum_scatter(dw, axis, scatter_dimension=self.product.right.index("D"), tiled=True)
        return self._sum(dx, self.product.d_left.summed), dw.astype(w.dtype)

    def weight(self, w: jax.Array, summed: str, kind: Kind, held: Rounded | None = None) -> Rounded:
        """The weight, rounded for a product that sums over these letters (unless it is held so), and gathered."""
        dims, axes = self.product.right, self._axes(summed) + (self.fsdp if "D" in summed else ())
        rounded = round_to(w, dims, summed, forward_type(kind), axes=axes) if held is None else held
        return Rounded(self._gather(rounded.values, dims), self._gather(rounded.scale, without(dims, summed)))

    def gathered(self, w: jax.Array, dtype: Any) -> jax.Array:
        """The weight in the compute dtype, whole over fsdp."""
        return self._gather(w.astype(dtype), self.product.right)

    def _d_activation(self, noisy: Any, w: jax.Array, held: Rounded | None, g: jax.Array, dtype: Any) -> jax.Array:
        product, kind, recipe = self.product.d_left, self.recipe.d_activation, self.recipe
        if kind == "bf16":
            return product(g, self.gathered(w, g.dtype), preferred_element_type=dtype)
        if not recipe.kept:
            right = self.weight(w, product.summed, kind, held)
            return product.of_rounded(noisy(g, product, kind, 1), right).astype(dtype)
        # the forward pass' weight once more: its scales are of dims that are summed over now, and go onto the gradient
        right = self.weight(w, self.product.summed, kind, held)
        letters = without(product.right, self.product.summed)
        left = noisy(g.astype(jnp.float32) * spread(right.scale, letters, product.left), product, kind, 1)
        dx = product.of_values(left.values, right.values)
        return (dx * spread(left.scale, without(product.left, product.summed), product.out)).astype(dtype)

    def _d_weight(self, noisy: Any, x: jax.Array, g: jax.Array) -> jax.Array:
        product, kind = self.product.d_right, self.recipe.d_weight
        if kind == "bf16":
            return product(g, x)
        right = round_to(x, product.right, product.summed, forward_type(kind), axes=self._axes(product.summed))
        if self.recipe.summed_inside:
            right = right._replace(values=_innermost(right.values, product.right.index(product.summed[-1])))
        return product.of_rounded(noisy(g, product, kind, 2), right).astype(x.dtype)

    def _gradient(self, g: jax.Array, product: Product, kind: Kind, use: int, words: Any, columns: Any) -> Rounded:
        random = None
        if words is not None and kind == "int8":
            rows = "".join(d for d in product.left if d in ROWS)
            random = noise(mix_bits(words + np.uint32(use)), rows, columns, product.left)
        dtype = jnp.int8 if kind == "int8" else FP8_GRADIENT
        return round_to(g, product.left, product.summed, dtype, random, self._axes(product.summed))

    def _gather(self, x: jax.Array, dims: str) -> jax.Array:
        for axis in reversed(self.fsdp) if "D" in dims else ():
            x = lax.all_gather(x, axis, axis=dims.index("D"), tiled=True)
        return x

    def _axes(self, summed: str) -> tuple[str, ...]:
        """Mesh axes over which a sum over these letters is spread."""
        own = {axis for letter, axes in self.split if letter in summed for axis in axes}
        own |= {axis for letter in summed if letter in ROWS for axis in manual_axes(letter)}
        return tuple(sorted(own))

    def _sum(self, y: jax.Array, summed: str) -> jax.Array:
        axes = self._axes(summed)
        return lax.psum(y, axes) if axes else y

    def _error(self, x: jax.Array, rounded: Rounded) -> jax.Array:
        """What rounding adds to x, relative to its size: the error of a step is uniform, its square step**2 / 12."""
        each = x.size / rounded.scale.size
        sums = jnp.stack([jnp.square(rounded.scale).sum() * (each / 12), jnp.square(x.astype(jnp.float32)).sum()])
        added, size = self._sum(sums, self.product.left)
        return jnp.sqrt(added / jnp.maximum(size, 1e-30))


def _innermost(x: jax.Array, dim: int) -> jax.Array:
    """x, in memory with this dim innermost."""
    order = range(x.ndim)
    # in their order first, or what makes x would be laid out so too; behind barriers, or the compiler undoes it
    x = lax.optimization_barrier(with_layout_constraint(x, Layout(tuple(order))))
    return lax.optimization_barrier(with_layout_constraint(x, Layout((*(i for i in order if i != dim), dim))))
