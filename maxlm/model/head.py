"""What may stand before the output projection: matrix, nonlinearity and norm (BERT, arXiv:1810.04805)."""

import jax
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.linear import linear
from maxlm.model.mlp import ACTIVATIONS
from maxlm.model.norm import Norm
from maxlm.model.param import constant, normal


class HeadTransform(nnx.Module):
    """Hidden states to what the output projection multiplies."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        self.activation = config.activation
        self.dense = normal(key, "DO", config, config.d_model**-0.5)
        self.dense_bias = constant("O", config, 0.0) if config.mlp_bias else None
        self.norm = Norm(config)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns [B, T, D]."""
        return self.norm(ACTIVATIONS[self.activation](linear("BTD,DO->BTO", x_BTD, self.dense, self.dense_bias)))
