"""Next-token cross entropy in float32, with z-loss; losses of routers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from maxlm.config import ModelConfig
from maxlm.sharding import compute_spec

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions: int32 [B, T]; mask: float32 [B, T], 1 where a target counts."""

TokenLoss = Callable[[jax.Array, Batch], jax.Array]
"""(logits_BTV, batch) -> loss of every token [B, T], float32; the step takes the mean over batch["mask"]."""


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross entropy of every token.

    Args:
        logits_BTV: float32, sharded over vocabulary or not.
        targets_BT: int32 ids.

    Returns:
        loss in nats and log of the partition function Z, both float32 [B, T].
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    ids = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=compute_spec("BTV"))
    # a masked sum and not an indexed read: the vocabulary stays sharded, and only [B, T] numbers are exchanged
    hit_BT = jnp.where(ids == targets_BT[..., None], logits_BTV, 0.0).sum(-1)
    return log_z_BT - hit_BT, log_z_BT


def next_token_loss(z_loss: float) -> TokenLoss:
    """Cross entropy plus z_loss * log(Z)**2 (PaLM, arXiv:2204.02311, section 5)."""

    def loss(logits_BTV: jax.Array, batch: Batch) -> jax.Array:
        loss_BT, log_z_BT = cross_entropy(logits_BTV, batch["targets"])
        return loss_BT + z_loss * log_z_BT**2

    return loss


ROUTER_METRICS = ("balance_loss", "router_z_loss", "load_imbalance")
"""What routers report and the step shows as means over layers; see model.moe.router_losses."""


def router_loss(model: ModelConfig, aux: dict[str, jax.Array]) -> jax.Array:
    """What routers add to the loss of every target: the sum over layers of their weighted losses.

    Args:
        model: gives the weights, and whether biases balance the load.
        aux: float32 scalars, sums over layers, from the model.
    """
    total = model.aux_loss * aux["balance_loss"] + model.router_z_loss * aux["router_z_loss"]
    # always 0, with the load errors as its gradient
    return total + aux["router_bias"] if model.router_bias_rate else total
