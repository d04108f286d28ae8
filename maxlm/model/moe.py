"""Mixture of experts: a router that chooses experts for each token, and their MLPs.

References:
    Fedus et al., Switch Transformer, arXiv:2101.03961; Zoph et al., ST-MoE, arXiv:2202.08906; DeepSeek-AI, DeepSeek-V3,
    arXiv:2412.19437 (sigmoid scores, shared experts); Wang et al., arXiv:2408.15664 (balancing by biases).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config import ModelConfig
from maxlm.model.mlp import ACTIVATIONS, Mlp
from maxlm.model.param import constant, normal
from maxlm.sharding import constrain, einsum, token_mean

Dispatch = Callable[..., tuple[jax.Array, jax.Array]]
"""Signature of parallel.expert.dispatch_experts, from x_BTD on."""

Aux = dict[str, jax.Array]
"""What layers report beside the residual stream: float32 scalars, summed over layers; dense ones report nothing."""


class Router(nnx.Module):
    """Scores of all experts for each token, in float32."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        self.config = config
        self.weight = normal(key, "DX", config, config.d_model**-0.5)
        self.bias = constant("X", config, 0.0) if config.router_bias_rate else None

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, Aux]:
        """Chooses experts.

        Returns:
            int32 numbers [B, T, A] of the experts of each token, their float32 weights, and what router_losses gives
            together with `router_bias`, which is always 0 (see _lean).
        """
        config, num_chosen = self.config, self.config.experts_per_token or 0
        logits_BTX = einsum("BTD,DX->BTX", x_BTD.astype(jnp.float32), self.weight[...], precision="highest")
        if config.router_scores == "softmax":
            scores_BTX = jax.nn.softmax(logits_BTX, axis=-1)
        else:
            scores_BTX = jax.nn.sigmoid(logits_BTX)
        ranked_BTX = jax.lax.stop_gradient(scores_BTX)
        if self.bias is not None:
            ranked_BTX += constrain(jax.lax.stop_gradient(self.bias[...]), "X")[None, None]
        chosen_BTA = jax.lax.top_k(ranked_BTX, num_chosen)[1]
        # comparisons and masked sums instead of indexed reads, whose gradient would be a slow scatter
        hit_BTAX = chosen_BTA[..., None] == jnp.arange(logits_BTX.shape[-1])[None, None, None]
        weights_BTA = jnp.where(hit_BTAX, scores_BTX[:, :, None], 0.0).sum(-1)
        if config.router_normalize:
            weights_BTA /= weights_BTA.sum(-1, keepdims=True)
        hits_BTX = hit_BTAX.sum(2, dtype=jnp.float32)
        aux = router_losses(logits_BTX, scores_BTX, hits_BTX)
        if self.bias is not None:
            aux["router_bias"] = _lean(self.bias[...], hits_BTX)
        return chosen_BTA, weights_BTA * config.router_scale, aux


def router_losses(logits_BTX: jax.Array, scores_BTX: jax.Array, hits_BTX: jax.Array) -> Aux:
    """Statistics of a router over all tokens of the microbatch, on all devices.

    Args:
        logits_BTX: float32 router logits.
        scores_BTX: float32 scores, positive.
        hits_BTX: float32, 1 where a token visits an expert, else 0.

    Returns:
        Scalars: `balance_loss`, num_experts * sum over experts of (share of all visits) * (mean score, scores of a
        token divided by their sum), 1 when balanced (Switch, equation 4; DeepSeek-V3, equation 17);
        `router_z_loss`, mean of log(Z)**2 (ST-MoE, equation 5); `load_imbalance`, visits of the busiest expert over
        the mean.
    """
    # equal loads and scores give 1
    load_X = token_mean(hits_BTX)
    load_X /= load_X.mean()
    share_X = token_mean(scores_BTX / scores_BTX.sum(-1, keepdims=True))
    return {
        "balance_loss": (load_X * share_X).sum(),
        "router_z_loss": token_mean(jax.nn.logsumexp(logits_BTX, axis=-1) ** 2),
        "load_imbalance": load_X.max(),
    }


def _lean(bias_X: jax.Array, hits_BTX: jax.Array) -> jax.Array:
    """Zero, whose gradient by the biases is each expert's load error, so that this reaches the optimizer as others do.

    The error is in visits per token, more than the mean or less; the optimizer takes its sign (arXiv:2408.15664,
    algorithm 1).
    """
    error_BTX = hits_BTX - hits_BTX.mean(-1, keepdims=True)
    nothing_X = bias_X - jax.lax.stop_gradient(bias_X)
    return token_mean(einsum("BTX,X->BT", error_BTX, nothing_X, precision="highest"))


class Moe(nnx.Module):
    """Routed experts, and shared ones that every token visits."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        router_key, up_key, gate_key, down_key, shared_key = jax.random.split(key, 5)
        D, F = config.d_model, config.expert_width
        expert = config.model_copy(update={"d_ff": F})
        self.activation = config.activation
        self.router = Router(router_key, config)
        self.up = normal(up_key, "EDF", expert, D**-0.5)
        self.gate = normal(gate_key, "EDF", expert, D**-0.5) if config.mlp == "gated" else None
        self.down = normal(down_key, "EFD", expert, (2 * config.num_layers * F) ** -0.5)
        shared = config.model_copy(update={"d_ff": config.num_shared_experts * F})
        self.shared = Mlp(shared_key, shared) if config.num_shared_experts else None

    def __call__(self, x_BTD: jax.Array, dispatch: Dispatch) -> tuple[jax.Array, Aux]:
        """Returns [B, T, D], to be added to the residual stream; and the router's statistics with dropped_tokens."""
        chosen_BTA, weights_BTA, aux = self.router(x_BTD)
        weights = (self.up[...], None if self.gate is None else self.gate[...], self.down[...])
        y_BTD, dropped = dispatch(x_BTD, chosen_BTA, weights_BTA, weights, ACTIVATIONS[self.activation])
        if self.shared is not None:
            y_BTD += self.shared(x_BTD)
        return y_BTD, {**aux, "dropped_tokens": dropped}
