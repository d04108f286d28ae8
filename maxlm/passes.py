"""Passes over a global batch, forward and backward, on a mesh without stages. Those of a pipeline: pipeline_passes.py.

Both are made of the same model, kernels and objective, and give the same numbers.
"""

import math
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
from maxlm.hardware import detect
from maxlm.kernels import fused
from maxlm.lora import adapt, adapters_of, frozen_of, use_adapted
from maxlm.loss import Batch, Objective, Sums, cross_entropy
from maxlm.model.dropout import Drop, dropout, keep_all
from maxlm.model.moe import Dispatch
from maxlm.model.stack import Aux, Ops, UseWeight, run_layers
from maxlm.model.summed import Summed, make_slot
from maxlm.model.transformer import STACKS, Transformer
from maxlm.parallel.attention import sharded_attention, zigzag_order
from maxlm.parallel.expert import dispatch_experts
from maxlm.parallel.head import Options as HeadOptions
from maxlm.parallel.head import head_cross_entropy
from maxlm.parallel.quantized import ErrorReport, use_weight
from maxlm.quant import Recipe
from maxlm.quant_rules import QUANT_ERROR, head_recipe
from maxlm.sharding import (
    compute_spec,
    constrain,
    enter_step,
    leave_step,
    num_shards,
    weight_dtype,
    zeros_like_gradient,
)

PART_LOGITS = 2**27
"""Logits that a device holds at a time, at most, as a count (512 MiB), unless configured."""

Result = TypeVar("Result")


def in_precision(method: Callable[..., Result]) -> Callable[..., Result]:
    """A float32 model's products are float32: on TPU they would be of bfloat16 parts."""

    @wraps(method)
    def run(self: "Passes", *arguments: Any) -> Result:
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else "default"):
            return method(self, *arguments)

    return run


def choose_kernel(
    device: Any, local: str = "auto", context: str = "ring", packed: bool = True
) -> Callable[..., jax.Array]:
    """The attention kernel of layers.

    Args:
        device: one of the mesh's.
        local: what a device computes with: "splash", "cudnn", "plain", or "auto", the best that it has.
        context: "ring" or "gather", over the context axis.
        packed: rows may hold several documents.
    """
    on_tpu, on_cudnn = device.platform == "tpu", fused.runs_on(device)
    if local == "auto":
        local = "splash" if on_tpu else "cudnn" if on_cudnn else "plain"
    interpret = not {"splash": on_tpu, "cudnn": on_cudnn}.get(local, False)
    chip = detect(device)
    name = None if chip is None else chip.name
    return partial(sharded_attention, context, local, interpret=interpret, packed=packed, chip=name)


def choose_dispatch(device: Any, kind: str = "auto", capacity_factor: float | None = None) -> Dispatch:
    """What brings tokens to experts. Args: kind: "exchange", "gather", or "auto", the best that the device has."""
    if kind == "auto":
        kind = "exchange" if device.platform == "tpu" else "gather"
    return partial(dispatch_experts, kind, capacity_factor)


@dataclass(frozen=True)
class Passes:
    """What all passes are made of.

    Attributes:
        config: the run.
        mesh: its devices.
        graph: the model's structure, without parameters.
        shapes: its parameters as ShapeDtypeStructs.
        dims: dimension letters of every parameter and adapter; stacked layers lead with theirs.
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
        rate = self.config.train.dropout
        return partial(dropout, rate, rows["noise"]) if rate and "noise" in rows else keep_all

    def ops(self, rows: Batch) -> Ops:
        """What layers are given, for these tokens."""
        mesh, device, train = self.config.mesh, self.mesh.devices.flat[0], self.config.train
        kernel = choose_kernel(device, train.attention, mesh.context_attention, self.config.data.segment_mask)
        experts = choose_dispatch(device, mesh.expert_dispatch, mesh.capacity_factor)
        errors = ErrorReport(*self.objective.reports.get(QUANT_ERROR, (0, 0)))
        weight: UseWeight = partial(use_weight, rows.get("noise"), errors.tell)
        if self.config.lora is not None:
            weight = partial(use_adapted, self.config.lora.scale, weight)
        return Ops(kernel, experts, self.drop(rows), weight, errors.take)

    def head(self, model: Transformer, x_BTD: jax.Array, rows: Batch) -> "ModelHead":
        """The end of the model, for these tokens."""
        parts = self.config.train.logit_parts
        if parts is None:
            logits = math.prod(x_BTD.shape[:-1]) * self.config.model.padded_vocab // num_shards("BTV")
            parts = max(1, -(-logits // PART_LOGITS))
        recipe = head_recipe(self.config.quant, self.mesh.devices.flat[0])
        return ModelHead(model, x_BTD, parts, recipe, rows.get("noise"))


@dataclass(frozen=True)
class ModelHead:
    """A loss.Head.

    Attributes:
        model: with its weights.
        x_BTD: what leaves the layers.
        num_parts: parts of the vocabulary whose logits are in memory at a time; 1 keeps all of them.
        recipe: of the projection in cross_entropy, where it is quantized.
        words_BT: uint32, a random word per token; None rounds its gradients to the nearest.
    """

    model: Transformer
    x_BTD: jax.Array
    num_parts: int
    recipe: Recipe | None = None
    words_BT: jax.Array | None = None

    def logits(self) -> jax.Array:
        """float32 [B, T, V]."""
        return self.model.logits(self.x_BTD)

    def cross_entropy(self, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Loss and log(Z), float32 [B, T]."""
        biased = self.model.unembed_bias is not None  # parts of the vocabulary and quantized weights have none
        if biased or (self.num_parts == 1 and self.recipe is None):
            return cross_entropy(self.logits(), targets_BT)
        config, (weight, dims) = self.model.config, self.model.projection
        cap, dtype = config.logit_softcap, self.x_BTD.dtype
        options = HeadOptions(dims, config.vocab_size, cap, self.num_parts, dtype, self.recipe)
        return head_cross_entropy(options, self.model.projected(self.x_BTD), weight, targets_BT, self.words_BT)


class PlainPasses(Passes):
    """Microbatches one after the other, each through all layers."""

    @in_precision
    def grads(self, params: Any, batch: Batch) -> tuple[Any, Sums]:
        """Gradients of the summed objective, laid out like what is trained, and the objective's sums.

        Args:
            params: float32 parameters at rest; if there are adapters, these are what is trained.
            batch: [M, B, T].
        """
        train = self.config.train
        batch = self.arrange(batch, "MBS")
        held = enter_step(params, self.dims, self.dtype, train.gather == "step")
        is_lora, trained = self.config.lora is not None, self.dims
        stacks = {name: part for name, part in held.items() if name in STACKS and not is_lora}
        outer = {name: part for name, part in held.items() if name not in STACKS}
        if is_lora:  # few and small: their gradients need not be summed in place
            frozen, outer, trained = frozen_of(held), adapters_of(held), adapters_of(self.dims)
        grad_dtype = jnp.dtype(train.grad_dtype)
        dims = {name: self.dims[name] for name in stacks}
        slots = jax.tree.map(lambda w, d: make_slot(w, weight_dtype(d, grad_dtype)), stacks, dims)

        def objective(outer: Any, slots: Any, totals: Any, rows: Batch) -> tuple[jax.Array, Sums]:
            trees = (stacks, slots) if totals is None else (stacks, slots, totals)
            params = adapt(frozen, outer) if is_lora else {**outer, **jax.tree.map(Summed, *trees)}
            return self._objective(params, rows)

        value_and_grad = jax.value_and_grad(objective, (0, 1), has_aux=True)

        def microbatch(carry: Any, rows: Batch) -> tuple[Any, None]:
            totals, outer_totals, sums = carry
            (_, more), (d_outer, totals) = value_and_grad(outer, slots, totals, rows)
            add = lambda total, g: total + g.astype(jnp.float32)  # noqa: E731
            return (totals, jax.tree.map(add, outer_totals, d_outer), jax.tree.map(jnp.add, sums, more)), None

        if train.grad_accum == 1:
            (_, sums), (d_outer, totals) = value_and_grad(outer, slots, None, jax.tree.map(lambda x: x[0], batch))
            d_outer = jax.tree.map(lambda g: g.astype(jnp.float32), d_outer)
        else:
            zeros = {name: jnp.zeros(self.objective.reports.get(name, ())) for name in self.objective.names}
            in_float32 = partial(zeros_like_gradient, dtype=jnp.float32)
            start = (jax.tree.map(zeros_like_gradient, slots), jax.tree.map(in_float32, outer), zeros)
            (totals, d_outer, sums), _ = jax.lax.scan(microbatch, start, batch)
        grads = {**totals, **d_outer}
        return leave_step(grads, trained, self.config.optim.state_over_data), sums

    @in_precision
    def evaluate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of cross entropy in nats, number of targets) of a batch [M, B, T]."""

        def microbatch(carry: Any, rows: Batch) -> tuple[Any, None]:
            head, _ = self._run(params, rows)
            loss = (head.cross_entropy(rows["targets"])[0] * rows["mask"]).sum()
            return (carry[0] + loss, carry[1] + rows["mask"].sum()), None

        return jax.lax.scan(microbatch, (jnp.zeros(()), jnp.zeros(())), self.arrange(batch, "MBS"))[0]

    @in_precision
    def next_logits(self, params: Any, rows: Batch, at: jax.Array) -> jax.Array:
        """float32 logits [V] of the token after position `at`, the mean over rows [B, T]."""
        place = at if self.order is None else jnp.asarray(np.argsort(self.order))[at]
        head, _ = self._run(params, self.arrange(rows, "BS"))
        x_B1D = jax.lax.dynamic_slice_in_dim(constrain(head.x_BTD, "BSD"), place, 1, axis=1)
        # each context shard computes the same one: a single token does not divide over them
        x_BTD = constrain(jnp.repeat(x_B1D, self.mesh.shape.get("context", 1), axis=1), "BTD")
        return jax.reshard(head.model.logits(x_BTD), jax.P(None, None, None))[:, 0].mean(0)

    @in_precision
    def token_losses(self, params: Any, rows: Batch, greedy: bool = False) -> tuple[jax.Array, jax.Array | None]:
        """Cross entropy in nats of every target, float32 [B, T], and, if asked for, whether no token is likelier.

        Args:
            params: parameters, in any type.
            rows: [B, T]; its mask is not looked at.
            greedy: holds the logits of all tokens at a time.
        """
        rows = self.arrange(rows, "BS")
        head, _ = self._run(params, rows)
        if not greedy:
            return self._as_it_came(head.cross_entropy(rows["targets"])[0]), None
        logits_BTV = head.logits()
        loss_BT = cross_entropy(logits_BTV, rows["targets"])[0]
        ids = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, 2, out_sharding=compute_spec("BTV"))
        others = jnp.where(ids == rows["targets"][..., None], -jnp.inf, logits_BTV).max(-1)
        own = jnp.where(ids == rows["targets"][..., None], logits_BTV, 0.0).sum(-1)
        return self._as_it_came(loss_BT), self._as_it_came(own >= others)

    def _as_it_came(self, x: jax.Array, dims: str = "BS") -> jax.Array:
        """Undoes arrange."""
        return x if self.order is None else jax.reshard(x, compute_spec(dims))[:, jnp.asarray(np.argsort(self.order))]

    @in_precision
    def logits(self, params: Any, rows: Batch) -> jax.Array:
        """float32 logits [B, T, V] of rows [B, T]; "token_types" (int32) may be among them."""
        return self._as_it_came(self._run(params, self.arrange(rows, "BS"))[0].logits(), "BSV")

    @in_precision
    def hidden_states(self, params: Any, rows: Batch) -> jax.Array:
        """Hidden states [B, T, D] of rows [B, T], in the compute dtype; "token_types" may be among them."""
        head = self._run(params, self.arrange(rows, "BS"))[0]
        return self._as_it_came(head.model.hidden(head.x_BTD), "BSD")

    def _objective(self, params: Any, rows: Batch) -> tuple[jax.Array, Sums]:
        head, aux = self._run(params, rows)
        with jax.named_scope("head"):
            objective, sums = self.objective.of_tokens(head, rows)
        of_layers = self.objective.of_layers(aux, sums["targets"])
        if "objective" in of_layers:
            objective += of_layers["objective"]
        sums |= {**of_layers, "objective": objective}
        return objective, {name: sums[name] for name in self.objective.names}

    def _run(self, params: Any, rows: Batch) -> tuple[ModelHead, Aux]:
        """Through all layers, up to the head."""
        ops = self.ops(rows)
        train = self.config.train
        stack = partial(run_layers, ops=ops, remat=train.remat, per_scan=train.repeats_per_scan)
        model: Transformer = nnx.merge(self.graph, params)
        where = rows["positions"], rows["segments"]
        x_BTD, aux = model(rows["tokens"], *where, stack, ops.drop, rows.get("token_types"))
        return self.head(model, x_BTD, rows), aux
