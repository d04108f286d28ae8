"""Matrices of several experts that multiply rows sorted by expert in int8 or fp8; see quant.py."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from maxlm.kernels.grouped import Way, grouped_product
from maxlm.quant import FP8_GRADIENT, Recipe, Rounded, noise, round_to


@dataclass(frozen=True)
class RoundedExperts:
    """A matrix per expert, in place of an array [E, I, O].

    Attributes:
        matrices: rounded values [E, I, O] with a scale [E, O] for each expert and column; None where no product is of
            rounded ones.
        plain: in the compute dtype; None where all are.
        recipe: types of the products with rows and with gradients of rows.
        axes_in: manual mesh axes that split I.
        axes_out: that split O.
        words: uint32 [C], a random word per row; None rounds to the nearest.
        columns: uint32 [O], random words.
    """

    matrices: Rounded | None
    plain: jax.Array | None
    recipe: Recipe
    axes_in: tuple[str, ...]
    axes_out: tuple[str, ...]
    words: jax.Array | None
    columns: jax.Array | None

    def forward(self, rows_CI: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Products of rows with the matrix of their expert [C, O], in the rows' dtype; undefined after the last."""
        if self.recipe.forward == "bf16" or self.matrices is None:
            assert self.plain is not None
            return grouped_product(rows_CI, self.plain, sizes_E, Way.FORWARD)
        dtype = self.matrices.values.dtype
        rows = round_to(rows_CI, "CI", "I", dtype, axes=self.axes_in)
        y = _product(rows, self.matrices.values, sizes_E, Way.FORWARD)
        return (y * _of_rows(self.matrices.scale, sizes_E, y.shape[0])).astype(rows_CI.dtype)

    def transposed(self, d_CO: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """Gradients by those rows [C, I], of gradients by the results; likewise."""
        if self.recipe.d_activation == "bf16" or self.matrices is None:
            assert self.plain is not None
            return grouped_product(d_CO, self.plain, sizes_E, Way.TRANSPOSED)
        scaled = d_CO.astype(jnp.float32) * _of_rows(self.matrices.scale, sizes_E, d_CO.shape[0])
        int8 = self.matrices.values.dtype == jnp.int8
        random = None
        if int8 and self.words is not None and self.columns is not None:
            random = noise(self.words, "C", self.columns, "CO")
        d = round_to(scaled, "CO", "O", jnp.int8 if int8 else FP8_GRADIENT, noise=random, axes=self.axes_out)
        return _product(d, self.matrices.values, sizes_E, Way.TRANSPOSED).astype(d_CO.dtype)


def _product(rows: Rounded, matrices: jax.Array, sizes_E: jax.Array, way: Way) -> jax.Array:
    sums = jnp.int32 if matrices.dtype == jnp.int8 else jnp.float32
    return grouped_product(rows.values, matrices, sizes_E, way, sums).astype(jnp.float32) * rows.scale[:, None]


def _of_rows(scale_EO: jax.Array, sizes_E: jax.Array, count: int) -> jax.Array:
    """The scales of each row's expert [C, O]; rows after the last have the last expert's."""
    ends = jnp.cumsum(sizes_E)
    expert_C = (jnp.arange(count)[:, None] >= ends[None, :-1]).sum(1)
    return scale_EO[expert_C]
