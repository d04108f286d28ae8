"""One declaration per parameter: its dimension letters are its shape, its einsum subscripts and its sharding."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.sharding import param_spec


def sizes(config: ModelConfig) -> dict[str, int]:
    """Size of every dimension letter that a parameter may have."""
    return {
        "D": config.d_model,
        "O": config.d_model,  # what a matrix makes of D
        "N": config.num_heads,
        "K": config.kv_heads,
        "J": config.kv_heads,
        "H": config.head_size,
        "F": config.d_ff,
        "E": config.num_experts or 0,
        "X": config.num_experts or 0,
        "V": config.padded_vocab,
        "T": config.max_positions or 0,  # rows of the learned position table
        "Y": config.num_token_types,
    }


def normal(key: jax.Array, dims: str, config: ModelConfig, std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std), created in its resting place.

    Args:
        key: PRNG key.
        dims: dimension letters, such as "DF".
        config: gives the letters their sizes.
        std: standard deviation.
    """
    shape = tuple(sizes(config)[d] for d in dims)
    value = jax.random.normal(key, shape, jnp.float32, out_sharding=param_spec(dims)) * std
    return nnx.Param(value, dims=dims)


def constant(dims: str, config: ModelConfig, value: float) -> nnx.Param:
    """A float32 parameter filled with one value (norm weights, biases)."""
    shape = tuple(sizes(config)[d] for d in dims)
    return nnx.Param(jnp.full(shape, value, jnp.float32, out_sharding=param_spec(dims)), dims=dims)


def dims_of(state: Any) -> Any:
    """The tree of dimension letters beside a tree of parameters, without the L of stacked ones."""
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda v: v.get_metadata()["dims"], state, is_leaf=is_variable)
