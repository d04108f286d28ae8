"""Passes over a global batch, forward and backward, on a mesh without stages. Those of a pipeline: pipeline_passes.py.

Both are made of the same model, kernels and objective, and give the same numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from maxlm.config import Config
from maxlm.kernels.attention import attention
from maxlm.loss import Batch, Objective, Sums, cross_entropy
from maxlm.model.dropout import Drop, dropout, keep_all
from maxlm.model.stack import Aux, Ops, run_layers
from maxlm.model.transformer import Transformer
from maxlm.parallel.context import context_attention, zigzag_order
from maxlm.parallel.expert import dispatch_experts
from maxlm.sharding import compute_spec, enter_step, leave_step, zeros_like_gradient

Result = TypeVar("Result")


def in_precision(method: Callable[..., Result]) -> Callable[..., Result]:
    """A float32 model's products are float32: on TPU they would be of bfloat16 parts."""

    @wraps(method)
    def run(self: "Passes", *arguments: Any) -> Result:
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default"):
            return method(self, *arguments)

    return run


@dataclass(frozen=True)
class Passes:
    """What all passes are made of.

    Attributes:
        config: the run.
        mesh: its devices.
        graph: the model's structure, without parameters.
        shapes: its parameters as ShapeDtypeStructs.
        dims: dimension letters of every parameter; stacked layers lead with theirs.
        objective: what is minimized.
    """

    config: Config
    mesh: Mesh
    graph: Any
    shapes: Any
    dims: Any
    objective: Objective

    @property
    def dtype(self) -> Any:
        """Compute dtype."""
        return jnp.dtype(self.config.model.dtype)

    @cached_property
    def order(self) -> np.ndarray | None:
        """Place in the row of each token, in the order in which context shards hold them; None is as it comes."""
        count = self.mesh.shape.get("context", 1)
        return None if count == 1 else zigzag_order(self.config.train.seq_len, count)

    def arrange(self, batch: Batch, dims: str) -> Batch:
        """Gives each context shard its tokens, without any communication. Args: dims: "MBS" or "BS"."""
        if self.order is None:
            return batch
        spec = compute_spec(dims.replace("S", "T"))
        return {key: jax.reshard(x[..., self.order], spec) for key, x in batch.items()}

    def drop(self, rows: Batch) -> Drop:
        """Dropout of these tokens, if there is any in this pass."""
        return partial(dropout, self.config.train.dropout, rows["noise"]) if "noise" in rows else keep_all

    def ops(self, rows: Batch) -> Ops:
        """What layers are given, for these tokens."""
        mesh, kind = self.config.mesh, self.config.mesh.expert_dispatch
        if kind == "auto":
            kind = "exchange" if self.mesh.devices.flat[0].platform == "tpu" else "gather"
        kernel = attention if self.order is None else partial(context_attention, mesh.context_attention)
        return Ops(kernel, partial(dispatch_experts, kind, mesh.capacity_factor), self.drop(rows))


class PlainPasses(Passes):
    """Microbatches one after the other, each through all layers."""

    @in_precision
    def grads(self, params: Any, batch: Batch) -> tuple[Any, Sums]:
        """Gradients of the summed objective, laid out like the parameters, and the objective's sums.

        Args:
            params: float32 parameters at rest.
            batch: [M, B, T].
        """
        train = self.config.train
        batch = self.arrange(batch, "MBS")
        held = enter_step(params, self.dims, self.dtype, train.gather == "step")
        value_and_grad = jax.value_and_grad(self._objective, has_aux=True)

        def microbatch(carry: Any, rows: Batch) -> tuple[Any, None]:
            (_, sums), grads = value_and_grad(held, rows)
            add = lambda total, g: total + g.astype(jnp.float32)  # noqa: E731
            return (jax.tree.map(add, carry[0], grads), jax.tree.map(jnp.add, carry[1], sums)), None

        if train.grad_accum == 1:
            (_, sums), grads = value_and_grad(held, jax.tree.map(lambda x: x[0], batch))
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        else:
            zeros = {name: jnp.zeros(()) for name in self.objective.names}
            start = (jax.tree.map(zeros_like_gradient, held), zeros)
            (grads, sums), _ = jax.lax.scan(microbatch, start, batch)
        return leave_step(grads, self.dims), sums

    @in_precision
    def evaluate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of cross entropy in nats, number of targets) of a batch [M, B, T]."""

        def microbatch(carry: Any, rows: Batch) -> tuple[Any, None]:
            logits_BTV, _ = self._logits(params, rows)
            loss = (cross_entropy(logits_BTV, rows["targets"])[0] * rows["mask"]).sum()
            return (carry[0] + loss, carry[1] + rows["mask"].sum()), None

        return jax.lax.scan(microbatch, (jnp.zeros(()), jnp.zeros(())), self.arrange(batch, "MBS"))[0]

    @in_precision
    def next_logits(self, params: Any, rows: Batch, at: jax.Array) -> jax.Array:
        """float32 logits [V] of the token after position `at`, the mean over rows [B, T]."""
        place = at if self.order is None else jnp.asarray(np.argsort(self.order))[at]
        logits_BTV, _ = self._logits(params, self.arrange(rows, "BS"), place)
        return jax.reshard(logits_BTV, jax.P(None, None, None))[:, 0].mean(0)

    @in_precision
    def logits(self, params: Any, rows: Batch) -> jax.Array:
        """float32 logits [B, T, V] of rows [B, T]."""
        logits_BTV, _ = self._logits(params, self.arrange(rows, "BS"))
        if self.order is None:
            return logits_BTV
        return jax.reshard(logits_BTV, compute_spec("BSV"))[:, jnp.asarray(np.argsort(self.order))]

    def _objective(self, params: Any, rows: Batch) -> tuple[jax.Array, Sums]:
        logits_BTV, aux = self._logits(params, rows)
        objective, sums = self.objective.of_tokens(logits_BTV, rows)
        if of_routers := self.objective.of_routers(aux, sums["targets"]):
            objective += of_routers["objective"]
            sums |= {**of_routers, "objective": objective}
        return objective, {name: sums[name] for name in self.objective.names}

    def _logits(self, params: Any, rows: Batch, at: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        ops = self.ops(rows)
        stack = partial(run_layers, ops=ops, remat=self.config.train.remat)
        model: Transformer = nnx.merge(self.graph, params)
        return model(rows["tokens"], rows["positions"], rows["segments"], stack, ops.drop, at)
