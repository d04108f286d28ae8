"""Passes over a global batch on a mesh with stages: embedding, pipeline (parallel/pipeline.py), head."""

import dataclasses
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.loss import Batch, Sums
from maxlm.model.param import dims_of
from maxlm.model.stack import run_repeat, use_weights
from maxlm.model.transformer import Transformer
from maxlm.parallel.lead import Block
from maxlm.parallel.pipeline import Pipeline
from maxlm.parallel.schedule import Schedule, pipeline_schedule
from maxlm.passes import Passes, in_precision
from maxlm.sharding import compute_spec, constrain, enter_step, leave_step

LEAD = "dense_layers"
"""Name of the parameters of layers that come before those of the pattern."""


class PipelinePasses(Passes):
    """Microbatches one behind the other through stages that hold different layers."""

    @in_precision
    def grads(self, params: Any, batch: Batch) -> tuple[Any, Sums]:
        """Gradients of the summed objective, laid out like the parameters, and the objective's sums."""
        batch = self.arrange(batch, "MBS")
        dims = self._dims["embed"]
        outer = enter_step(self._weights(params)["embed"], dims, self.dtype, True)
        x_MBUD, pull = jax.vjp(partial(self._embed, batch=batch), outer)
        num_targets = jax.reshard(batch["mask"].sum((1, 2)), jax.P(None))
        sums, grads, dx_MBUD = self._pipeline.value_and_grad(
            self._piped(params), x_MBUD, {**batch, "num_targets": num_targets}
        )
        (d_outer,) = pull(dx_MBUD)
        total = leave_step(jax.tree.map(lambda g: g.astype(jnp.float32), d_outer), dims)
        for part in grads.values():  # a tied embedding is in two parts
            for name, g in part.items():
                total[name] = jax.tree.map(jnp.add, total[name], g) if name in total else g
        return total, {name: sums[name] for name in self.objective.names}

    @in_precision
    def evaluate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """(sum of cross entropy in nats, number of targets) of a batch [M, B, T]."""
        sums = self._forward(params, batch)
        return sums["loss"], sums["targets"]

    @in_precision
    def next_logits(self, params: Any, rows: Batch, at: jax.Array) -> jax.Array:
        """float32 logits [V] of the token after position `at`, the mean over rows [B, T]."""
        place_BT = jax.lax.broadcasted_iota(jnp.int32, rows["tokens"].shape, 1, out_sharding=compute_spec("BS"))
        batch = jax.tree.map(lambda x: x[None], {**rows, "chosen": (place_BT == at).astype(jnp.int32)})

        def head(weights: Any, x_BTD: jax.Array, rows: Batch) -> tuple[jax.Array, Sums]:
            chosen_BT = rows["chosen"].astype(x_BTD.dtype)
            x_B1D = (x_BTD * chosen_BT[..., None]).sum(1, keepdims=True)
            here_B = rows["chosen"].sum(1) > 0  # of all shards of a row's tokens, one has it
            logits_BV = self._model(weights).logits(x_B1D)[:, 0]
            return jnp.zeros(()), {"logits": jnp.where(here_B[:, None], logits_BV, 0.0).sum(0)}

        sums = self._forward(params, batch, head=head)
        return jax.reshard(sums["logits"], jax.P(None)) / rows["tokens"].shape[0]

    def _forward(self, params: Any, batch: Batch, **changes: Any) -> Sums:
        """Sums of the head over a batch of any number of microbatches. Args: changes: fields of the pipeline."""
        batch = self.arrange(batch, "MBS")
        num_microbatches = batch["tokens"].shape[0]
        outer = enter_step(self._weights(params)["embed"], self._dims["embed"], self.dtype, True)
        rows = {**batch, "num_targets": jnp.ones(num_microbatches)}
        run = dataclasses.replace(self._pipeline, schedule=self._schedule("1f1b", num_microbatches), **changes)
        return run.value(self._piped(params), self._embed(outer, batch), rows)

    def _embed(self, outer: Any, batch: Batch) -> jax.Array:
        """Embedded tokens [M, B, U, D]: each stage embeds its part."""
        names = [name for name in ("tokens", "positions", "token_types", "noise") if name in batch]
        parts = {name: constrain(batch[name], "MBU") for name in names}
        where = parts["positions"], self.drop(parts), "MBU", parts.get("token_types")
        return self._model(outer).embedded(parts["tokens"], *where)

    # ---- what the pipeline is made of

    @cached_property
    def _pipeline(self) -> Pipeline:
        mesh, model, whole = self.config.mesh, self.config.model, self._model({})

        def head(weights: Any, x_BTD: jax.Array, rows: Batch) -> tuple[jax.Array, Sums]:
            return self.objective.of_tokens(self.head(self._model(weights), x_BTD, rows), rows)

        return Pipeline(
            self._schedule(mesh.pipeline, self.config.train.grad_accum),
            model.num_repeats,
            self._block(whole.layers, "layers", model.num_lead_layers),
            head,
            self._block(whole.dense_layers, LEAD, 0) if whole.dense_layers is not None else None,
            {name: d for name, d in self._dims.items() if name != "embed"},
            self.dtype,
        )

    def _block(self, layers: nnx.Dict, name: str, first: int) -> Block:
        graph, length = nnx.split(layers)[0], len(layers)

        def block(weights: Any, x_BTD: jax.Array, rows: Batch, number: jax.Array) -> tuple[jax.Array, Sums]:
            where = rows["positions"], rows["segments"], first + length * number
            ops, (_, state) = self.ops(rows), nnx.split(nnx.merge(graph, weights[name]))
            state = use_weights(state, dims_of(state), x_BTD.dtype, where[-1], ops.weight)
            x_BTD, aux = run_repeat(graph, state, x_BTD, *where, ops)
            return x_BTD, self.objective.of_layers(aux, rows["num_targets"])

        return block

    def _schedule(self, kind: Literal["1f1b", "gpipe"], num_microbatches: int) -> Schedule:
        return pipeline_schedule(kind, self.mesh.shape["stage"], self.config.mesh.rounds, num_microbatches)

    def _piped(self, params: Any) -> Any:
        return {name: part for name, part in self._weights(params).items() if name != "embed"}

    @cached_property
    def _dims(self) -> Any:
        return self._weights(self.dims)

    def _weights(self, tree: Any) -> Any:
        """Parameters, or what belongs to them, by who uses them; a tied embedding is used twice."""
        users = {
            "embed": ["embed", "positions", "token_types", "embed_norm"],
            "lead": [LEAD],
            "layers": ["layers"],
            "head": ["final_norm", "head", "embed" if self.config.model.tie_embeddings else "unembed", "unembed_bias"],
        }
        parts = {user: {name: tree[name] for name in names if name in tree} for user, names in users.items()}
        return {user: part for user, part in parts.items() if part}

    def _model(self, weights: Any) -> Transformer:
        """The model with some of its weights; the others are shapes, which no computation takes."""
        return nnx.merge(self.graph, {**self.shapes, **weights})
