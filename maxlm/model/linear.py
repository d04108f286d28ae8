"""Matrix products and biases on gathered weights."""

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.sharding import compute_spec, einsum, share


def linear(subscripts: str, x: jax.Array, weight: nnx.Param, bias: nnx.Param | None) -> jax.Array:
    """einsum(subscripts, x, weight) + bias; the letters say shapes and shardings, such as "BTD,DF->BTF"."""
    y = einsum(subscripts, x, weight[...])
    return y if bias is None else y + spread(bias[...], y, subscripts.split("->")[1])


def spread(bias: jax.Array, x: jax.Array, dims: str) -> jax.Array:
    """Broadcasts a bias over the leading dimensions of x [dims], by an outer product with ones.

    A gathered weight's type says that its gradient is summed over devices: a contraction does that sum, a plain
    broadcast would not (and is refused by the types).
    """
    lead = dims[: x.ndim - bias.ndim]
    ones = jnp.ones(x.shape[: len(lead)], x.dtype, out_sharding=compute_spec(lead))
    return einsum(f"{lead},{dims[len(lead) :]}->{dims}", ones, share(bias, lead))
