"""What a step minimizes and reports: next-token cross entropy in float32, z-loss, losses of routers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp

from maxlm.config import ModelConfig
from maxlm.sharding import compute_spec

BATCH = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segments": jnp.int32,
    "positions": jnp.int32,
    "mask": jnp.float32,
}
"""Entries of a batch, and their types."""

Batch = dict[str, jax.Array]
"""The entries of BATCH [B, T]; mask is 1 where a target counts.

In training with dropout also noise: uint32 [B, T], a random word for each token.
"""

Sums = dict[str, jax.Array]
"""float32 scalars."""

TokenLoss = Callable[[jax.Array, Batch], jax.Array]
"""(logits_BTV, batch) -> loss of every token [B, T], float32; the step takes the mean over batch["mask"].

It is called with any part of the batch, whose tokens may stand in another order than in their rows (mesh.context,
mesh.stage): a token's loss is made of its own logits and its own entries, "positions" among them.
"""


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


class Head(Protocol):
    """The end of a model, for some tokens."""

    def logits(self) -> jax.Array:
        """float32 [B, T, V]."""

    def cross_entropy(self, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As loss.cross_entropy of those logits, which need not be in memory for it."""


ROUTER_METRICS = ("balance_loss", "router_z_loss", "load_imbalance")
"""What routers report and the step shows as means over layers; see model.moe.router_losses."""


@dataclass(frozen=True)
class Objective:
    """The objective, and what is reported with it, as sums over targets: parts of a batch may be added up.

    Attributes:
        model: says what routers weigh.
        z_loss: weight of log(Z)**2 (PaLM, arXiv:2204.02311, section 5).
        token_loss: loss of every token; None is cross entropy with z_loss.
        reports: shapes of what layers report besides, by name.
    """

    model: ModelConfig
    z_loss: float
    token_loss: TokenLoss | None
    reports: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The sums; "objective" is one where it is not "loss", the cross entropy."""
        other = self.token_loss is not None or bool(self.z_loss or self.model.aux_loss or self.model.router_z_loss)
        of_routers = (*ROUTER_METRICS, "dropped_tokens") if self.model.num_experts else ()
        return ["loss", "targets", *of_routers, *self.reports] + ["objective"] * other

    def of_tokens(self, head: Head, rows: Batch) -> tuple[jax.Array, Sums]:
        """The objective of tokens, and its sums."""
        mask = rows["mask"]
        if self.token_loss is None:
            loss_BT, log_z_BT = head.cross_entropy(rows["targets"])
            objective_BT = loss_BT + self.z_loss * log_z_BT**2 if self.z_loss else loss_BT
        else:
            logits_BTV, batch = head.logits(), {name: x for name, x in rows.items() if name in BATCH}
            loss_BT, objective_BT = cross_entropy(logits_BTV, rows["targets"])[0], self.token_loss(logits_BTV, batch)
        sums = {"loss": (loss_BT * mask).sum(), "targets": mask.sum(), "objective": (objective_BT * mask).sum()}
        return sums["objective"], {name: x for name, x in sums.items() if name in self.names}

    def of_layers(self, aux: Sums, num_targets: jax.Array) -> Sums:
        """What layers report about a microbatch, counted as if each of its targets had it.

        So the mean over targets weighs the losses of routers, like those of tokens, by targets.

        Args:
            aux: sums over layers, from the model.
            num_targets: of the microbatch, on all devices.
        """
        reports = {name: aux[name] * num_targets for name in self.reports if name in aux}
        if "balance_loss" not in aux:
            return reports
        model = self.model
        metrics = {name: aux[name] * num_targets / model.num_expert_layers for name in ROUTER_METRICS}
        loss = model.aux_loss * aux["balance_loss"] + model.router_z_loss * aux["router_z_loss"]
        if model.router_bias_rate:
            loss += aux["router_bias"]  # always 0, with the load errors as its gradient
        return {**reports, **metrics, "dropped_tokens": aux["dropped_tokens"], "objective": num_targets * loss}
