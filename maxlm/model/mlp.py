"""Feed-forward block: gated (Shazeer, arXiv:2002.05202) or plain."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.linear import linear
from maxlm.model.param import constant, normal

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Mlp(nnx.Module):
    """Up (and gate), nonlinearity, down."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        self.activation = config.activation
        keys = jax.random.split(key, 3)
        D, F = config.d_model, config.d_ff
        # gate and up stay apart: fused into one [D, 2, F] their reduce-scatter becomes an all-reduce on TPU
        self.gate = normal(keys[0], "DF", config, D**-0.5) if config.mlp == "gated" else None
        self.up = normal(keys[1], "DF", config, D**-0.5)
        self.down = normal(keys[2], "FD", config, (2 * config.num_layers * F) ** -0.5)
        biased = config.mlp_bias
        self.gate_bias = constant("F", config, 0.0) if biased and config.mlp == "gated" else None
        self.up_bias = constant("F", config, 0.0) if biased else None
        self.down_bias = constant("D", config, 0.0) if biased else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns [B, T, D], to be added to the residual stream."""
        act = ACTIVATIONS[self.activation]
        h_BTF = linear("BTD,DF->BTF", x_BTD, self.up, self.up_bias)
        if self.gate is None:
            h_BTF = act(h_BTF)
        else:
            h_BTF = act(linear("BTD,DF->BTF", x_BTD, self.gate, self.gate_bias)) * h_BTF
        return linear("BTF,FD->BTD", h_BTF, self.down, self.down_bias)
