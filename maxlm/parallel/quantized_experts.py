"""Quantized weights of experts on their way into an island: rounded, gathered over fsdp, and their gradients scattered.

Products with rows and with gradients are of rounded ones; the weights' own gradients are made in the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.kernels.grouped_rounded import RoundedExperts
from maxlm.model.dropout import mix_bits
from maxlm.parallel.local_products import LocalProducts
from maxlm.parallel.quantized import QuantizedWeight, hashes, own_words
from maxlm.quant import Product, Recipe
from maxlm.sharding import manual_axes

PRODUCTS = (Product("CD", "EDF", "CF"), Product("CD", "EDF", "CF"), Product("CF", "EFD", "CD"))
"""Of up, gate and down; rows know their expert."""


@dataclass(frozen=True)
class Crossing:
    """How up, gate and down cross.

    Attributes:
        recipes: of quantized ones; None of others.
        fsdp: mesh axes that split D of quantized ones, outermost first.
    """

    recipes: tuple[Recipe | None, ...]
    fsdp: tuple[tuple[str, ...], ...]

    def enter(self, weights: Sequence[Any], dtype: Any, words_C: jax.Array | None) -> list[Any]:
        """What rows multiply by: arrays as they are, RoundedExperts where there is a recipe.

        Args:
            weights: up, gate and down, this device's.
            dtype: compute dtype.
            words_C: uint32, a random word per row; None rounds to the nearest.
        """
        return [w if recipe is None else self._rounded(i, w, dtype, words_C) for i, (w, recipe) in self._each(weights)]

    def leave(self, grads: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
        """Gradients of quantized weights scattered as these are, in their type."""
        found = list(grads)
        for i, (w, recipe) in self._each(weights):
            if recipe is not None:
                for axis in self.fsdp[i]:
                    at = PRODUCTS[i].right.index("D")
                    found[i] = lax.psum_scatter(found[i], axis, scatter_dimension=at, tiled=True)
                found[i] = found[i].astype(w.dtype)
        return found

    def _each(self, weights: Sequence[Any]) -> Any:
        return enumerate(zip(weights, self.recipes, strict=True))

    def _rounded(self, i: int, w: jax.Array, dtype: Any, words_C: jax.Array | None) -> RoundedExperts:
        recipe, product = self.recipes[i], PRODUCTS[i]
        assert recipe is not None
        axes = {letter: manual_axes(letter) if letter == "F" else () for letter in "DF"}
        local = LocalProducts(product, recipe, self.fsdp[i], tuple(axes.items()))
        kinds = {recipe.forward, recipe.d_activation}
        rounded = sorted(kinds - {"bf16"}, key=lambda kind: kind != recipe.forward)
        matrices = local.weight(w, product.summed, rounded[0]) if rounded else None
        into, out = product.left[1], product.out[1]
        columns = None
        if words_C is not None and matrices is not None:
            count = matrices.values.shape[2]
            first = lax.axis_index(axes[out]) * count if axes[out] else 0
            columns = hashes(jnp.arange(count, dtype=jnp.uint32) + jnp.uint32(first))
            words_C = mix_bits(own_words(words_C, recipe))
        plain = local.gathered(w, dtype) if "bf16" in kinds else None
        return RoundedExperts(matrices, plain, recipe, axes[into], axes[out], words_C, columns)


def unwrap(weights: Sequence[Any]) -> tuple[list[Any], Crossing, jax.Array | None]:
    """Arrays of weights that may be QuantizedWeights, how these cross, and random words of their tokens [B, T]."""
    quantized = [w if isinstance(w, QuantizedWeight) else None for w in weights]
    split = [() if q is None else q.split(p.right).get("D", ()) for q, p in zip(quantized, PRODUCTS, strict=True)]
    words = next((q.words for q in quantized if q is not None), None)
    arrays = [w if q is None else q.array for w, q in zip(weights, quantized, strict=True)]
    return arrays, Crossing(tuple(None if q is None else q.recipe for q in quantized), tuple(split)), words
