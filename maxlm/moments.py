"""Optimizer state in fewer bytes: bfloat16, or int8 with a scale per row. It is float32 while an update is computed.

Rounding is stochastic and unbiased: an average that moves by less than half a step of its type would else never move.
The random bits are a hash of the count of updates, of the place in the last two dims, and of the number's sign,
exponent and first bits, which hardly depend on the order of a sum: they are the same on every mesh.

int8 codes are spaced like powers, finer towards zero (as in Dettmers et al., 8-bit Optimizers via Block-wise
Quantization, arXiv:2110.02861, whose dynamic type is a table): first moments x = scale * (code / 127) ** 2 with a sign,
second moments x = scale * (code / 255) ** 4, where nothing but zero becomes zero: an update divides by their root.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from maxlm.model.dropout import GOLDEN, mix_bits

SECOND_MOMENTS = {"nu", "v", "v_row", "v_col"}
MOMENTS = {"mu", "trace", *SECOND_MOMENTS}
"""Names of what optax states keep for each parameter; second moments are never negative."""


class Rows(NamedTuple):
    """An array in int8 or uint8.

    Attributes:
        code: its shape.
        scale: float32, its largest magnitude along the last dim, which is 1 here.
    """

    code: jax.Array
    scale: jax.Array


class Kept(NamedTuple):
    """State of `kept_in`.

    Attributes:
        count: int32 scalar, finished updates.
        inner: state of the transformation, with arrays in the type they are kept in.
    """

    count: jax.Array
    inner: Any


def kept_in(dtype: str, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """A transformation whose state is kept in another type between updates.

    Args:
        dtype: "float32" (nothing changes), "bfloat16" or "int8".
        inner: any transformation whose state is float32 arrays and integer counts.
    """
    if dtype == "float32":
        return inner

    def init(params: Any) -> Kept:
        count = jnp.zeros((), jnp.int32)
        return Kept(count, _pack(dtype, inner.init(params), count))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Kept]:
        whole = jax.tree.map(_unpack, state.inner, is_leaf=lambda x: isinstance(x, Rows))
        updates, new = inner.update(updates, whole, params)
        return updates, Kept(state.count + 1, _pack(dtype, new, state.count + 1))

    return optax.GradientTransformation(init, update)


def _pack(dtype: str, state: Any, count: jax.Array) -> Any:
    def pack(path: Any, x: jax.Array) -> Any:
        names = {getattr(key, "name", None) for key in path}
        if not names & MOMENTS or x.dtype != jnp.float32 or x.ndim == 0:
            return x
        if dtype == "bfloat16":
            return to_bfloat16(x, count)
        return to_rows(x, count, positive=bool(names & SECOND_MOMENTS))

    return jax.tree_util.tree_map_with_path(pack, state)


def to_bfloat16(x: jax.Array, count: jax.Array) -> jax.Array:
    """Rounds float32 up or down with probabilities that keep its mean. Args: count: int32, for other bits each time."""
    up = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_noise(x, count) >> np.uint32(16))
    rounded = jax.lax.bitcast_convert_type(up & np.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def to_rows(x: jax.Array, count: jax.Array, positive: bool) -> Rows:
    """Codes of float32 [..., n], rounded up or down with probabilities that keep its mean.

    Args:
        x: values.
        count: int32, for other bits each time.
        positive: none is negative: uint8.
    """
    top, power = (255, 4) if positive else (127, 2)
    scale = jnp.abs(x).max(-1, keepdims=True)
    share = jnp.abs(x) / jnp.where(scale > 0, scale, 1.0)  # 0 to 1
    low = jnp.minimum(jnp.floor(_root(share, power) * top), top - 1)
    at_low, at_high = (low / top) ** power, ((low + 1) / top) ** power
    chance = (share - at_low) / (at_high - at_low)
    code = low + (_uniform(_noise(x, count)) < chance).astype(jnp.float32)
    if positive:
        return Rows(jnp.where(x > 0, jnp.maximum(code, 1.0), 0.0).astype(jnp.uint8), scale)
    return Rows((jnp.sign(x) * code).astype(jnp.int8), scale)


def _unpack(x: Any) -> jax.Array:
    if not isinstance(x, Rows):
        return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    top, power = (255, 4) if x.code.dtype == jnp.uint8 else (127, 2)
    code = x.code.astype(jnp.float32)
    return jnp.sign(code) * (jnp.abs(code) / top) ** power * x.scale


def _root(x: jax.Array, power: int) -> jax.Array:
    return jnp.sqrt(x) if power == 2 else jnp.sqrt(jnp.sqrt(x))


def _noise(x: jax.Array, count: jax.Array) -> jax.Array:
    """uint32 like float32 x: bits that know nothing of the part of x that is rounded."""
    word = mix_bits(count.astype(jnp.uint32) + np.uint32(1))
    for dim in range(max(0, x.ndim - 2), x.ndim):
        shape = [1] * x.ndim
        shape[dim] = x.shape[dim]
        word = mix_bits(word ^ jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * np.uint32(GOLDEN))
    return mix_bits(word ^ (jax.lax.bitcast_convert_type(x, jnp.uint32) >> np.uint32(16)))


def _uniform(bits: jax.Array) -> jax.Array:
    """float32 in [0, 1) of uint32."""
    return (bits >> np.uint32(8)).astype(jnp.float32) * np.float32(2**-24)
