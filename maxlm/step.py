"""The train step: one pure, jitted, donated function of (state, batch). train, plan and bench build it here.

State is a plain dict: "step" (int32, finished steps), "params" (float32), "opt" (optax state) and, when
configured, "ema" (float32 averaged weights).
"""

import dataclasses
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
from maxlm.model.attention import AttentionKernel
from maxlm.model.moe import Dispatch
from maxlm.model.param import dims_of
from maxlm.model.stack import LEADING_DIMS, Aux, run_layers, run_repeat
from maxlm.model.transformer import Transformer
from maxlm.parallel.context import context_attention, zigzag_order
from maxlm.parallel.expert import dispatch_experts
from maxlm.parallel.pipeline import Pipeline
from maxlm.parallel.schedule import pipeline_schedule
from maxlm.restack import Stack
from maxlm.schedule import make_schedule
from maxlm.sharding import compute_spec, constrain, enter_step, leave_step, zeros_like_gradient

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
        stack_shape: leading dims (R, P, K) of the layers' parameters in a pipeline; None without one.
    """

    config: Config
    mesh: Mesh
    token_loss: TokenLoss | None
    graph: Any
    dims: Any
    optimizer: optax.GradientTransformation
    stack_shape: tuple[int, ...] | None

    # ---- shapes and places

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate at a step."""
        return make_schedule(self.config.optim, self.config.train.num_steps)

    @property
    def stack(self) -> Stack:
        """How layers are stacked, to read checkpoints of other pipelines."""
        repeats = self.config.model.num_repeats
        return Stack(repeats, self.stack_shape or (repeats,))

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
    def grads(self) -> Any:
        """(params, batch) -> (mean gradients laid out like the parameters, metrics)."""
        return jax.jit(self._grads)

    def lower_step(self) -> Any:
        """The step lowered for this mesh without any array: `.compile()` it for its memory and its program text."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state_shapes, self.batch_shapes)

    # ---- pure functions

    def logits(self, params: Any, rows: Batch) -> jax.Array:
        """float32 logits [B, T, V] of rows [B, T]; not in a pipeline, whose stages never hold them all."""
        assert self._num_stages == 1
        logits_BTV, _ = self._logits(params, self._arrange(rows, "BS"))
        if self._order is None:
            return logits_BTV
        return jax.reshard(logits_BTV, compute_spec("BSV"))[:, jnp.asarray(np.argsort(self._order))]

    def next_logits(self, params: Any, rows: Batch, at: jax.Array) -> jax.Array:
        """float32 logits [V] of the token after position `at`, the mean over rows [B, T], on any mesh."""
        if self._num_stages == 1:
            place = at if self._order is None else jnp.asarray(np.argsort(self._order))[at]
            logits_BV = self._logits(params, self._arrange(rows, "BS"), place)[0][:, 0]
            return jax.reshard(logits_BV, jax.P(None, None)).mean(0)
        place_BT = jax.lax.broadcasted_iota(jnp.int32, rows["tokens"].shape, 1, out_sharding=compute_spec("BS"))
        batch = jax.tree.map(lambda x: x[None], {**rows, "chosen": (place_BT == at).astype(jnp.int32)})
        batch = self._arrange(batch, "MBS")

        def head(weights: Any, x_BTD: jax.Array, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            chosen_BT = rows["chosen"].astype(x_BTD.dtype)
            x_B1D = (x_BTD * chosen_BT[..., None]).sum(1, keepdims=True)
            here_B = rows["chosen"].sum(1) > 0  # of all shards of a row's tokens, one has it
            logits_BV = self._part(weights).logits(x_B1D)[:, 0]
            return jnp.zeros(()), {"logits": jnp.where(here_B[:, None], logits_BV, 0.0).sum(0)}

        schedule = pipeline_schedule("1f1b", self._num_stages, self.config.mesh.rounds, 1)
        run = dataclasses.replace(self._pipeline, head=head, schedule=schedule)
        weights = {name: params[name] for name in self._head_names}
        batch["num_targets"] = jnp.ones(1)
        sums = run.value(params["layers"], weights, self._embed(self._outer(params), batch), batch)
        return jax.reshard(sums["logits"], jax.P(None)) / rows["tokens"].shape[0]

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
        stack = partial(run_layers, kernel=self._kernel, dispatch=self._dispatch, remat=self.config.train.remat)
        precision = "highest" if self.config.model.dtype == "float32" else "default"
        with jax.default_matmul_precision(precision):
            return nnx.merge(self.graph, params)(rows["tokens"], rows["positions"], rows["segments"], stack, at)

    def _init(self, key: jax.Array) -> State:
        params = nnx.to_pure_dict(nnx.split(Transformer(key, self.config.model, self.stack_shape))[1])
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
        batch = self._arrange(batch, "MBS")
        grads, sums = (self._plain_grads if self._num_stages == 1 else self._pipeline_grads)(params, batch)
        count = jnp.maximum(sums["targets"], 1.0)
        grads = jax.tree.map(lambda g: g / count, grads)
        return grads, {name: total if name in COUNTS else total / count for name, total in sums.items()}

    def _plain_grads(self, params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """Gradients of the summed objective, laid out like the parameters, and the sums."""
        train = self.config.train
        held = enter_step(params, self.dims, self._dtype, train.gather == "step")
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
        return leave_step(grads, self.dims), sums

    def _pipeline_grads(self, params: Any, batch: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """As _plain_grads."""
        x_MBUD, pull = jax.vjp(partial(self._embed, batch=batch), self._outer(params))
        head = {name: params[name] for name in self._head_names}
        rows = {**batch, "num_targets": jax.reshard(batch["mask"].sum((1, 2)), jax.P(None))}
        sums, d_layers, d_head, dx_MBUD = self._pipeline.value_and_grad(params["layers"], head, x_MBUD, rows)
        (d_outer,) = pull(dx_MBUD)
        outer_dims = {name: d for name, d in self.dims.items() if name != "layers"}
        grads = leave_step(jax.tree.map(lambda g: g.astype(jnp.float32), d_outer), outer_dims)
        for name, g in d_head.items():
            grads[name] = jax.tree.map(jnp.add, grads[name], g)
        return {**grads, "layers": d_layers}, {name: sums[name] for name in self._sums}

    # ---- what a pipeline is made of

    @cached_property
    def _num_stages(self) -> int:
        return self.mesh.shape.get("stage", 1)

    @cached_property
    def _head_names(self) -> list[str]:
        return ["final_norm", "embed" if self.config.model.tie_embeddings else "unembed"]

    @cached_property
    def _pipeline(self) -> Pipeline:
        config = self.config
        schedule = pipeline_schedule(
            config.mesh.pipeline, self._num_stages, config.mesh.rounds, config.train.grad_accum
        )
        layers = nnx.split(nnx.merge(self.graph, self.state_shapes["params"]).layers)[0]

        def block(weights: Any, x_BTD: jax.Array, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            where = rows["positions"], rows["segments"]
            x_BTD, aux = run_repeat(layers, weights, x_BTD, *where, kernel=self._kernel, dispatch=self._dispatch)
            return x_BTD, self._router_sums(aux, rows["num_targets"]) if aux else {}

        def head(weights: Any, x_BTD: jax.Array, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
            return self._losses(self._part(weights).logits(x_BTD), rows)

        dims = {name: self.dims[name] for name in self._head_names}
        repeats = config.model.num_repeats
        return Pipeline(schedule, repeats, block, head, self.dims["layers"], dims, self._dtype)

    def _part(self, weights: Any) -> Transformer:
        """The model with some of its weights; the others are shapes, which no computation takes."""
        return nnx.merge(self.graph, {**self.state_shapes["params"], **weights})

    def _outer(self, params: Any) -> Any:
        """What is not in the layers, gathered, for the embedding."""
        dims = {name: d for name, d in self.dims.items() if name != "layers"}
        return enter_step({name: params[name] for name in dims}, dims, self._dtype, True)

    def _embed(self, outer: Any, batch: Batch) -> jax.Array:
        """Embedded tokens [M, B, U, D]: each stage embeds its part."""
        tokens, positions = (constrain(batch[name], "MBU") for name in ("tokens", "positions"))
        return self._part(outer).embedded(tokens, positions, "MBU")

    @property
    def _dtype(self) -> Any:
        return jnp.dtype(self.config.model.dtype)

    @property
    def _dispatch(self) -> Dispatch:
        return partial(dispatch_experts, self._dispatch_kind, self.config.mesh.capacity_factor)

    @property
    def _kernel(self) -> AttentionKernel:
        return attention if self._order is None else partial(context_attention, self.config.mesh.context_attention)

    @property
    def _sums(self) -> list[str]:
        """What _loss_sum adds up beside the gradient."""
        model = self.config.model
        other = self.token_loss is not None or bool(model.aux_loss or model.router_z_loss)
        of_routers = (*ROUTER_METRICS, "dropped_tokens") if model.num_experts else ()
        return ["loss", "targets", *of_routers] + ["objective"] * other

    def _loss_sum(self, params: Any, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective and the sums that are reported, over one microbatch."""
        logits_BTV, aux = self._logits(params, rows)
        objective, sums = self._losses(logits_BTV, rows)
        if aux:
            of_routers = self._router_sums(aux, sums["targets"])
            objective += of_routers["objective"]
            sums |= {**of_routers, "objective": objective}
        return objective, {name: sums[name] for name in self._sums}

    def _router_sums(self, aux: Aux, targets: jax.Array) -> dict[str, jax.Array]:
        """What routers report about a microbatch, counted as if each of its targets had it.

        So the mean over targets weighs the losses of routers, like those of tokens, by targets.
        """
        model = self.config.model
        metrics = {name: aux[name] * targets / model.num_expert_layers for name in ROUTER_METRICS}
        return {**metrics, "dropped_tokens": aux["dropped_tokens"], "objective": targets * router_loss(model, aux)}

    def _losses(self, logits_BTV: jax.Array, rows: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The objective of tokens and its sums, over these tokens."""
        loss = (cross_entropy(logits_BTV, rows["targets"])[0] * rows["mask"]).sum()
        sums = {"loss": loss, "targets": rows["mask"].sum()}
        objective = loss if self.token_loss is None else (self.token_loss(logits_BTV, rows) * rows["mask"]).sum()
        if "objective" in self._sums:
            sums["objective"] = objective
        return objective, sums

    def _evaluate(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        batch = self._arrange(batch, "MBS")
        if self._num_stages > 1:
            head = {name: params[name] for name in self._head_names}
            rows = {**batch, "num_targets": jnp.ones(batch["mask"].shape[0])}
            sums = self._pipeline.value(params["layers"], head, self._embed(self._outer(params), batch), rows)
            return sums["loss"], sums["targets"]

        def microbatch(carry: Any, rows: Batch) -> tuple[Any, None]:
            logits_BTV, _ = self._logits(params, rows)
            loss = (cross_entropy(logits_BTV, rows["targets"])[0] * rows["mask"]).sum()
            return (carry[0] + loss, carry[1] + rows["mask"].sum()), None

        return jax.lax.scan(microbatch, (jnp.zeros(()), jnp.zeros(())), batch)[0]


def build_program(config: Config, mesh: Mesh, token_loss: TokenLoss | None = None) -> Program:
    """The compiled functions of a run.

    Args:
        config: the run.
        mesh: from mesh.make_mesh.
        token_loss: replaces the default, cross entropy with config.train.z_loss. Where it is not plain cross entropy,
            the step's metrics have its mean as "objective" beside "loss".
    """
    stages, shape = mesh.shape.get("stage", 1), None
    if stages > 1:
        rounds = config.mesh.rounds
        shape = (rounds, stages, -(-config.model.num_repeats // (stages * rounds)))
    with jax.set_mesh(mesh):
        model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config.model, shape))
    graph, state = nnx.split(model)
    own = nnx.to_pure_dict(dims_of(state))
    dims = jax.tree.map(lambda d, s: LEADING_DIMS[len(s.shape) - len(d)] + d, own, nnx.to_pure_dict(state))
    optimizer = optim.make_optimizer(config.optim, config.train.num_steps, dims, config.model.router_bias_rate)
    z_loss = config.train.z_loss
    loss = token_loss or (next_token_loss(z_loss) if z_loss else None)
    return Program(config, mesh, loss, graph, dims, optimizer, shape)
