"""RMSNorm (Zhang and Sennrich, arXiv:1910.07467) and LayerNorm (Ba et al., arXiv:1607.06450)."""

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.linear import spread
from maxlm.model.param import constant
from maxlm.sharding import einsum, share


class Norm(nnx.Module):
    """Normalizes the last dimensions in float32, then scales them in the compute dtype."""

    def __init__(self, config: ModelConfig, dims: str = "D"):
        """Args: dims: what is normalized together."""
        self.dims = dims
        self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset
        self.weight = constant(dims, config, 0.0 if config.norm_offset else 1.0)
        self.bias = constant(dims, config, 0.0) if config.norm_bias else None

    def __call__(self, x: jax.Array, dims: str = "BTD") -> jax.Array:
        """Args: x of any float type, its dimensions `dims`. Returns the same shape and type."""
        y, own = x.astype(jnp.float32), self.dims
        axes = tuple(range(-len(own), 0))
        if self.kind == "layer":
            y -= y.mean(axes, keepdims=True)
        y = (y * jax.lax.rsqrt((y * y).mean(axes, keepdims=True) + self.eps)).astype(x.dtype)
        # einsum and not `*`, for the same reason as in spread
        weight = share(self.weight[...], dims[: -len(own)])
        y = einsum(f"{dims},{own}->{dims}", y, weight + 1 if self.offset else weight)
        return y if self.bias is None else y + spread(self.bias[...], x, dims)
