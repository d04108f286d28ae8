"""The train step: one pure, jitted, donated function of (state, batch). train, plan and bench build it here.

State is a plain dict: "step" (int32, finished steps), "params" (float32), "opt" (optax state) and, when
configured, "ema" (float32 averaged weights).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxlm import optim
from maxlm.config import Config
from maxlm.kernels.attention import attention
from maxlm.loss import ROUTER_METRICS, Batch, TokenLoss, cross_entropy, next_token_loss, router_loss
from maxlm.model.param import dims_of
from maxlm.model.stack import Aux, run_layers
from maxlm.model.transformer import Transformer
from maxlm.parallel.context import context_attention, zigzag_order
from maxlm.parallel.expert import dispatch_experts
from maxlm.schedule import make_schedule
from maxlm.sharding import compute_spec, enter_step, leave_step, zeros_like_gradient

State = dict[str, Any]
COUNTS = ("targets", "dropped_tokens")
"""Metrics that are sums over the global batch; others are means over its targets."""
BATCH_DTYPES = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "segments": jnp.int32,
    "positions": jnp.int32,
    "mask": jnp.float32,
}


@dataclass(frozen=True)
class Program:
    """Everything that is compiled for one run on one mesh; made by build_program.

    Attributes:
        config: the run.
        mesh: its devices, all axes Explicit.
        token_loss: loss of every token, whose mean over the mask is minimized; None is plain cross entropy.
        graph: the model's structure, without parameters.
        dims: dimension letters of every parameter, as the tree of parameters; stacked layers lead with L.
        optimizer: the optax chain.
    """

    config: Config
    mesh: Mesh
    token_loss: TokenLoss | None
    graph: Any
    dims: Any
    optimizer: optax.GradientTransformation

    # ---- shapes and places

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate at a step."""
        return make_schedule(self.config.optim, self.config.train.num_steps)

    @cached_property
    def state_shapes(self) -> Any:
        """The state as ShapeDtypeStructs with shardings: for restore, for ahead-of-time compilation.

        Parameters say where they rest (sharding.PARAM); the optimizer's state follows them by its types.
        """
        with jax.set_mesh(self.mesh):
            shapes = jax.eval_shape(lambda: self._init(jax.random.key(0)))

        def place(leaf: Any) -> jax.ShapeDtypeStruct:
            spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(self.mesh, spec))

        return jax.tree.map(place, shapes)

    @cached_property
    def state_shardings(self) -> Any:
        """Where every leaf of the state rests."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch: [M, B, T], M microbatches of B sequences."""
        train = self.config.train
        shape = (train.grad_accum, train.batch_size // train.grad_accum, train.seq_len)
        return {k: jax.ShapeDtypeStruct(shape, d, sharding=self.batch_sharding) for k, d in BATCH_DTYPES.items()}

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        """Whole sequences over data and fsdp: in the step each context shard takes its tokens."""
        with jax.set_mesh(self.mesh):
            return NamedSharding(self.mesh, compute_spec("MBS"))

    # ---- what is compiled

    @cached_property
    def init(self) -> Callable[[jax.Array], State]:
        """key -> state, every array created in its resting place: nothing is ever whole on one device."""
        # random bits take XLA's CPU backend as long to optimize as a whole step, for one run of a second
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 1} if on_cpu else None
        return jax.jit(self._init, out_shardings=self.state_shardings, compiler_options=options)

    @cached_property
    def step(self) -> Any:
        """(state, batch) -> (state, metrics); the state is donated."""
        scalar = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(self._step, donate_argnums=0, out_shardings=(self.state_shardings, scalar))

    @cached_property
    def evaluate(self) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
        """(params, batch [M, B, T]) -> (sum of cross entropy in nats, number of targets)."""
        return jax.jit(self._evaluate)

    @cached_property
    def grads(self) -> Callable[[Any, Batch], tuple[Any, dict[str, jax.Array]]]:
        """(params, batch) -> (mean gradients laid out like the parameters, metrics)."""
        return jax.jit(self._grads)

    def lower_step(self) -> Any:
        """The step lowered for this mesh without any array: `.compile()` it for its memory and its program text."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state_shapes, self.batch_shapes)

    # ---- pure functions

    def logits(self, params: Any, rows: Batch, at: jax.Array | None = None) -> jax.Array:
        """float32 logits [B, T, V] of rows [B, T], or [B, 1, V] of position `at` alone."""
        if self._order is None:
            return self._logits(params, rows, at)[0]
        back = jnp.asarray(np.argsort(self._order))
        if at is not None:
            return self._logits(params, self._arrange(rows, "BS"), back[at])[0]
        logits_BTV, _ = self._logits(params, self._arrange(rows, "BS"))
        return jax.reshard(logits_BTV, compute_spec("BSV"))[:, back]

    @cached_property
    def _order(self) -> np.ndarray | None:
        """Place in the row of each token, in the order in which context shards hold them; None is as it comes."""
        count = self.mesh.shape.get("context", 1)
        return None if count == 1 else zigzag_order(self.config.train.seq_len, count)

    @property
    def _dispatch_kind(self) -> str:
        kind = self.config.mesh.expert_dispatch
        on_tpu = self.mesh.devices.flat[0].platform == "tpu"
        return kind if kind != "auto" else "exchange" if on_tpu else "gather"

    def _arrange(self, batch: Batch, dims: str) -> Batch:
        """Gives each context shard its tokens, without any communication. Args: dims: "MBS" or "BS"."""
        if self._order is None:
            return batch
        spec = compute_spec(dims.replace("S", "T"))
        return {key: jax.reshard(x[..., self._order], spec) for key, x in batch.items()}

    def _logits(self, params: Any, rows: Batch, at: jax.Array | None = None) -> tuple[jax.Array, Aux]:
        kind = self.config.mesh.context_attention
        kernel = attention if self._order is None else partial(context_attention, kind)
        dispatch = partial(dispatch_experts, self._dispatch_kind, self.config.mesh.capacity_factor)
        stack = partial(run_layers, kernel=kernel, dispatch=dispatch, remat=self.config.train.remat)
        precision = "highest" if self.config.model.dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            return nnx.merge(self.graph, params)(rows["tokens"], rows["positions"], rows["segments"], stack, at)

    def _init(self, key: jax.Array) -> State:
        params = nnx.to_pure_dict(nnx.split(Transformer(key, self.config.model))[1])
        state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt": self.optimizer.init(params)}
        if self.config.optim.ema is not None:
            state["ema"] = jax.tree.map(jnp.copy, params)  # donated buffers must not be shared
        return state

    def _step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        grads, metrics = self._grads(state["params"], batch)
        params, opt = optim.update(self.optimizer, state["params"], state["opt"], grads)
        new = {"step": state["step"] + 1, "params": params, "opt": opt}
        if self.config.optim.ema is not None:
            new["ema"] = optim.ema_update(state["ema"], params, self.config.optim.ema, state["step"])
        metrics["grad_norm"] = optim.grad_norm(grads, self.dims)
        metrics["learning_rate"] = jnp.asarray(self.schedule(state["step"]), jnp.float32)
        return new, metrics

    def _grads(self, params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """Gradient of the mean over all targets of the global batch, whatever the number of microbatches."""
        train, batch = self.config.train, self._arrange(batch, "MBS")
        held = enter_step(params, self.dims, jnp.dtype(self.config.model.dtype), train.gather == "step")
        value_and_grad = jax.value_and_grad(self._loss_sum, has_aux=True)

        def microbatch(carry: Any, rows: Batch) -> tuple[Any, None]:
            (_, sums), grads = value_and_grad(held, rows)
            add = lambda total, g: total + g.astype(jnp.float32)  # noqa: E731
            return (jax.tree.map(add, carry[0], grads), jax.tree.map(jnp.add, carry[1], sums)), None

        if train.grad_accum == 1:
            (_, sums), grads = value_and_grad(held, jax.tree.map(lambda x: x[0], batch))
            grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        else:
            start = (jax.tree.map(zeros_like_gradient, held), {name: jnp.zeros(()) for name in self._sums})
            (grads, sums), _ = jax.lax.scan(microbatch, start, batch)
        count = jnp.maximum(sums["targets"], 1.0)
        grads = jax.tree.map(lambda g: g / count, leave_step(grads, self.dims))
        return grads, {name: total if name in COUNTS else total / count for name, total in sums.items()}

    @property
    def _sums(self) -> list[str]:
        """What _loss_sum adds up beside the gradient."""
        model = self.config.model
        other = self.token_loss is not None or bool(model.aux_loss or model.router_z_loss)
        of_routers = (*ROUTER_METRICS, "dropped_tokens") if model.num_experts else ()
        return ["loss", "targets", *of_routers] + ["objective"] * other

    def _loss_sum(self, params: Any, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Sum over targets, and its parts.

        What routers report about a microbatch counts as if each of its targets had it: so the mean over targets weighs
        the losses of routers, like those of tokens, by targets.
        """
        logits_BTV, aux = self._logits(params, rows)
        loss = (cross_entropy(logits_BTV, rows["targets"])[0] * rows["mask"]).sum()
        sums = {"loss": loss, "targets": rows["mask"].sum()}
        objective = loss if self.token_loss is None else (self.token_loss(logits_BTV, rows) * rows["mask"]).sum()
        model, targets = self.config.model, sums["targets"]
        if aux:
            objective += targets * router_loss(model, aux)
            sums |= {n: aux[n] * targets / model.num_expert_layers for n in ROUTER_METRICS}
            sums["dropped_tokens"] = aux["dropped_tokens"]
        if "objective" in self._sums:
            sums["objective"] = objective
        return objective, sums

    def _evaluate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def microbatch(carry: Any, rows: Batch) -> tuple[Any, None]:
            logits_BTV, _ = self._logits(params, rows)
            loss = (cross_entropy(logits_BTV, rows["targets"])[0] * rows["mask"]).sum()
            return (carry[0] + loss, carry[1] + rows["mask"].sum()), None

        return jax.lax.scan(microbatch, (jnp.zeros(()), jnp.zeros(())), self._arrange(batch, "MBS"))[0]


def build_program(config: Config, mesh: Mesh, token_loss: TokenLoss | None = None) -> Program:
    """The compiled functions of a run.

    Args:
        config: the run.
        mesh: from mesh.make_mesh.
        token_loss: replaces the default, cross entropy with config.train.z_loss. Where it is not plain cross entropy,
            the step's metrics have its mean as "objective" beside "loss".
    """
    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config.model))
    graph, state = nnx.split(model)
    own = nnx.to_pure_dict(dims_of(state))
    dims = jax.tree.map(lambda d, s: "L" * (len(s.shape) - len(d)) + d, own, nnx.to_pure_dict(state))
    optimizer = optim.make_optimizer(config.optim, config.train.num_steps, dims, config.model.router_bias_rate)
    z_loss = config.train.z_loss
    return Program(config, mesh, token_loss or (next_token_loss(z_loss) if z_loss else None), graph, dims, optimizer)
