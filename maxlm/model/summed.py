"""Gradients of stacked layers, added in place to sums while the backward pass computes them.

Left to itself, differentiation stacks the gradients of all layers and the caller adds them to those of the microbatches
before: two copies. Here the backward pass over layers starts from the sums so far and adds to them layer by layer. The
sums' dtype is that in which gradients are kept.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from maxlm.sharding import put_layer


@partial(jax.tree_util.register_dataclass, data_fields=["weight", "slot", "total"], meta_fields=[])
@dataclass(frozen=True)
class Summed:
    """A stacked weight [L, ...] whose gradient is summed. Differentiate by the slot, not by the weight.

    Attributes:
        weight: its value.
        slot: zeros, like the weight, in the dtype of gradients.
        total: sum of gradients so far, None for nothing; the slot's gradient is this and the weight's own.
    """

    weight: jax.Array
    slot: jax.Array
    total: jax.Array | None = None


def make_slot(weight: jax.Array, dtype: Any) -> jax.Array:
    """Zeros like a weight, with its sharding, in another dtype."""
    spec = jax.typeof(weight).sharding.spec
    zeros = jnp.zeros(weight.shape, dtype, out_sharding=P(*spec.partitions))
    return jax.reshard(zeros, spec) if spec.reduced else zeros


def take_apart(state: Any) -> tuple[Any, Any, Any]:
    """The weights of a state of layers, their slots and totals; None where there are none."""
    values = [v.get_value() for v in jax.tree.leaves(state, is_leaf=_is_variable)]
    if not isinstance(values[0], Summed):
        return state, None, None
    weights = jax.tree.map(lambda v: v.replace(v.get_value().weight), state, is_leaf=_is_variable)
    totals = None if values[0].total is None else [v.total for v in values]
    return weights, [v.slot for v in values], totals


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def collect(add: bool, weights: Any, slots: Any, layer: jax.Array) -> tuple[Any, Any]:
    """The weights of a layer, and the slots of all layers, to be handed on; gradients of the one go to the others.

    Args:
        add: to what is there, else in its place.
        weights: of one layer, [...] each.
        slots: of all layers, [L, ...] each.
        layer: its place in them.
    """
    return weights, slots


def _collect_bwd(add: bool, layer: jax.Array, grads: tuple[Any, Any]) -> tuple[None, Any, None]:
    new, totals = jax.tree.leaves(grads[0]), grads[1]
    return None, [put_layer(total, layer, g, add) for total, g in zip(totals, new, strict=True)], None


collect.defvjp(lambda add, weights, slots, layer: ((weights, slots), layer), _collect_bwd)


@jax.custom_vjp
def begin(x: jax.Array, slots: Any, totals: Any) -> jax.Array:
    """x, after the last layer: the backward pass begins here, with the sums so far."""
    return x


begin.defvjp(lambda x, slots, totals: (x, totals), lambda totals, g: (g, totals, None))


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
