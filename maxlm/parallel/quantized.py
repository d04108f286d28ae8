"""Products with quantized weights on sharded arrays: what the model multiplies by, where a path's rule says so.

A weight reaches the model as a `QuantizedWeight`, which does the product itself. Each device rounds its shard of the
float32 weight, the int8 values are gathered over fsdp, half the bytes of bfloat16, and the backward pass reuses them:
the weight's scales, one per output channel, are multiplied onto the gradient before that is rounded. Scales are maxima
over all devices that share a sum, so every mesh gives the same numbers; partial sums leave a device in the compute
dtype.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from maxlm.config_quant import Kind
from maxlm.model.dropout import GOLDEN, mix_bits
from maxlm.model.stack import KEPT
from maxlm.parallel.island import island
from maxlm.parallel.local_products import LocalProducts
from maxlm.quant import ROWS, Product, Recipe, Rounded, forward_type, round_to, without
from maxlm.quant_rules import QUANT_ERROR, RECIPE
from maxlm.sharding import compute_spec, gather

ToReport = Callable[[Recipe, jax.Array | int, jax.Array], None]
"""Takes a recipe, the number of its repeat's first layer and the error of rounding activations."""


@partial(jax.tree_util.register_dataclass, data_fields=["array", "words", "number"], meta_fields=["recipe", "report"])
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight that multiplies in int8 or fp8.

    Attributes:
        array: its value: float32, split over fsdp as it rests, or gathered.
        words: uint32 [B, T], a random word per token; None rounds gradients to the nearest.
        number: of its repeat's first layer.
        recipe: how.
        report: is told how well activations could be rounded.
    """

    array: jax.Array
    words: jax.Array | None
    number: jax.Array | int
    recipe: Recipe
    report: ToReport

    def __getitem__(self, key: Any) -> "QuantizedWeight":
        """Itself, as the model asks for a parameter's value: weight[...]."""
        return self

    def split(self, dims: str) -> dict[str, tuple[str, ...]]:
        """Mesh axes that split each of its dims, outermost first."""
        return _split(self.array, dims)

    def einsum(self, subscripts: str, x: jax.Array) -> jax.Array:
        """As sharding.einsum of x and the weight, with activations x first."""
        y, error = quantized_einsum(subscripts, self.recipe, x, self.array, self.words)
        if self.recipe.column is not None:
            self.report(self.recipe, self.number, error)
        return y


class ErrorReport:
    """Collects the errors of rounding activations in a repeat of layers, while it is traced."""

    def __init__(self, num_layers: int, num_columns: int):
        self.shape, self.found = (num_layers, num_columns), list[tuple[Any, Any, jax.Array]]()

    def tell(self, recipe: Recipe, number: jax.Array | int, error: jax.Array) -> None:
        """A ToReport."""
        self.found.append((number + recipe.block, recipe.column, error))

    def take(self) -> dict[str, jax.Array]:
        """QUANT_ERROR [layers, columns], with zeros where other repeats have theirs; nothing if nothing was told."""
        found, self.found = self.found, []
        table = jnp.zeros(self.shape)
        for layer, column, error in found:
            here = (jnp.arange(self.shape[0]) == layer)[:, None] & (jnp.arange(self.shape[1]) == column)[None]
            table += jnp.where(here, error, 0.0)
        return {QUANT_ERROR: table} if found else {}


def use_weight(
    words: jax.Array | None, report: ToReport, variable: nnx.Variable, dims: str, dtype: Any, number: jax.Array | int
) -> Any:
    """A model.stack.UseWeight that obeys quant_rules.

    Args:
        words: uint32 [B, T], a random word for each token of this step; None rounds gradients to the nearest.
        report: is told how well activations could be rounded.
        variable: a weight.
        dims: its dimension letters.
        dtype: compute dtype.
        number: of its repeat's first layer, for other random bits than other layers have.
    """
    recipe: Recipe | None = variable.get_metadata().get(RECIPE)
    if recipe is None:
        return gather(variable[...], dims, dtype)
    if words is not None:
        words = mix_bits(words ^ mix_bits(jnp.asarray(number, jnp.uint32) + np.uint32(1)))
    return QuantizedWeight(variable[...], words, number, recipe, report)


def quantized_einsum(
    subscripts: str, recipe: Recipe, x: jax.Array, weight: jax.Array, words: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """einsum(subscripts, x, weight), forward and backward as the recipe says.

    Args:
        subscripts: dimension letters, such as "BTD,DF->BTF".
        recipe: types of the three products.
        x: activations in the compute dtype, split as COMPUTE says (or on no mesh, or on an Auto one).
        weight: of any float type. Where its type splits D over fsdp, it is gathered here.
        words: uint32, a random word for each of x's rows (its letters among ROWS); None rounds to the nearest.

    Returns:
        The product in x's dtype; and the relative error that rounding x to int8 makes, a float32 scalar (0 of other
        types): 0.01 is usual, outliers make it large.
    """
    product, columns = Product.of(subscripts), None
    if words is not None:
        words = own_words(words, recipe)
        columns = _columns(without(product.out, ROWS), weight.shape, product.right)
    return _product(_How(product, recipe), x, weight, words, columns)


def own_words(words: jax.Array, recipe: Recipe) -> jax.Array:
    """Random words, other ones for each weight."""
    return mix_bits(words ^ np.uint32((recipe.salt + 1) * GOLDEN % 2**32))


def hashes(places: jax.Array) -> jax.Array:
    """A uint32 of their own for numbered places."""
    return mix_bits(places * np.uint32(GOLDEN) + np.uint32(1))


def _columns(letters: str, shape: tuple[int, ...], dims: str) -> jax.Array:
    sizes = [shape[dims.index(d)] for d in letters]
    words = hashes(lax.iota(jnp.uint32, math.prod(sizes))).reshape(sizes)
    return jax.reshard(words, compute_spec(letters)) if _typed() else words


@dataclass(frozen=True)
class _How:
    """What is fixed at compile time."""

    product: Product
    recipe: Recipe

    def local(self, w: jax.Array) -> LocalProducts:
        """The products of a device."""
        split = _split(w, self.product.right)
        return LocalProducts(self.product, self.recipe, split.pop("D", ()), tuple(split.items()))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _How, x: jax.Array, w: jax.Array, words: Any, columns: Any) -> tuple[jax.Array, jax.Array]:
    return _fwd(how, x, w, words, columns)[0]


def _fwd(how: _How, x: jax.Array, w: jax.Array, words: Any, columns: Any) -> tuple[Any, Any]:
    product, kind, local = how.product, how.recipe.forward, how.local(w)
    # whole weights are rounded once; of those split over fsdp, rounding a shard in each pass costs less than keeping it
    held = None if kind == "bf16" or local.fsdp else _kept(_rounded(w, product, product.summed, kind))
    out = _on_mesh(local.forward, (x, w, held), lambda: (compute_spec(product.out), P()))
    return out, (x, w, held if how.recipe.kept else None, words, columns)


def _bwd(how: _How, saved: Any, cotangents: Any) -> Any:
    x, w, held, words, columns = saved

    def specs() -> Any:
        spec = jax.typeof(w).sharding.spec
        return compute_spec(how.product.left), P(*spec.partitions, unreduced=spec.reduced)

    return *_on_mesh(how.local(w).backward, (x, w, held, words, columns, cotangents[0]), specs), None, None


_product.defvjp(_fwd, _bwd)


def _rounded(w: jax.Array, product: Product, summed: str, kind: Kind) -> Rounded:
    """A weight rounded for a product that sums over these letters, split as it is."""
    if _typed():
        w = jax.reshard(w, P(*jax.typeof(w).sharding.spec.partitions))  # its gradient does not come this way
    return round_to(w, product.right, summed, forward_type(kind))


def _kept(rounded: Rounded) -> Rounded:
    """The same, kept by remat policies, as bits: of fp8 values jax.checkpoint would make the largest ones NaN."""
    bits, scale = checkpoint_name((lax.bitcast_convert_type(rounded.values, jnp.int8), rounded.scale), KEPT)
    return Rounded(lax.bitcast_convert_type(bits, rounded.values.dtype), scale)


def _split(w: jax.Array, dims: str) -> dict[str, tuple[str, ...]]:
    if not _typed():
        return {}
    spec = jax.typeof(w).sharding.spec.partitions
    return {d: (s,) if isinstance(s, str) else tuple(s or ()) for d, s in zip(dims, spec, strict=True)}


def _typed() -> bool:
    """Whether types of the current mesh say where arrays are."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def _on_mesh(function: Any, arguments: Any, specs: Any) -> Any:
    return island(function, arguments, specs()) if _typed() else function(*arguments)
