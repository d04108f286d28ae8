"""Next-token cross entropy in float32, with z-loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

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
