"""The train step: one pure, jitted, donated function of (state, batch). train, plan and bench build it here.

State is a plain dict: "step" (int32, finished steps), "params" (float32), "opt" (optax state) and, when configured,
"ema" (float32 averaged weights) and "recent" (guard.judge). With lora, "params" never change: "lora" holds what is
trained, and "opt" and "ema" are of these.

A step that is not to count, such as one with a loss that is not finite, leaves everything as it was and makes
"step" negative (~step). So do those that follow, until someone has looked and has set it right: see loop.Loop.
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

from maxlm import guard, host_state, lora, optim
from maxlm.compiler_options import Options, compiler_options
from maxlm.config import Config
from maxlm.flops import train_flops_per_token
from maxlm.loss import BATCH, Batch, Objective, Sums, TokenLoss
from maxlm.model.param import dims_of
from maxlm.model.stack import LEADING_DIMS
from maxlm.model.transformer import Transformer
from maxlm.passes import PlainPasses
from maxlm.pipeline_passes import PipelinePasses
from maxlm.quant_rules import QUANT_ERROR, error_metrics, set_recipes
from maxlm.restack import Stack
from maxlm.schedule import make_schedule
from maxlm.sharding import compute_spec, param_spec, update_spec

State = dict[str, Any]
COUNTS = ("targets", "dropped_tokens")
"""Metrics that are sums over the global batch; others are means over its targets."""


@dataclass(frozen=True)
class Program:
    """Everything that is compiled for one run on one mesh; made by build_program.

    Attributes:
        config: the run.
        mesh: its devices, all axes Explicit.
        passes: forward and backward, plain or through a pipeline.
        dims: dimension letters of everything that is trained, as its tree; stacked layers lead with theirs.
        optimizer: the optax chain.
        stack_shape: leading dims (R, P, K) of the layers' parameters in a pipeline; None without one.
        quantized: names of weights whose activations are rounded to int8, which metrics tell errors of.
    """

    config: Config
    mesh: Mesh
    passes: PlainPasses | PipelinePasses
    dims: Any
    optimizer: optax.GradientTransformation
    stack_shape: tuple[int, ...] | None
    quantized: tuple[str, ...] = ()

    # ---- shapes and places

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate at a step."""
        return make_schedule(self.config.optim, self.config.train.num_steps)

    @property
    def trained(self) -> str:
        """Name of what is trained in the state."""
        return "params" if self.config.lora is None else "lora"

    @cached_property
    def num_adapters(self) -> int | None:
        """Number of weights of adapters; None where the parameters are trained."""
        return None if self.trained == "params" else sum(x.size for x in jax.tree.leaves(self.state_shapes["lora"]))

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a token's forward and backward pass (flops.train_flops_per_token)."""
        return train_flops_per_token(self.config.model, self.config.train.seq_len, self.num_adapters)

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

        def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            spec = leaf.sharding.spec if leaf.sharding else PartitionSpec()
            on_host = self.config.optim.state_on_host and path[0].key == "opt" and leaf.ndim
            sharding = NamedSharding(self.mesh, spec, memory_kind=host_state.ON_HOST if on_host else None)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return jax.tree_util.tree_map_with_path(place, shapes)

    @cached_property
    def state_shardings(self) -> Any:
        """Where every leaf of the state rests."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.state_shapes)

    @cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch: [M, B, T], M microbatches of B sequences."""
        train = self.config.train
        shape = (train.grad_accum, train.batch_size // train.grad_accum, train.seq_len)
        return {k: jax.ShapeDtypeStruct(shape, d, sharding=self.batch_sharding) for k, d in BATCH.items()}

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
    def begin(self) -> Callable[[Any], State]:
        """Parameters -> the state before the first step, all else as init makes it; they are donated."""
        return jax.jit(self._begin, donate_argnums=0, out_shardings=self.state_shardings)

    @cached_property
    def step(self) -> Any:
        """(state, batch) -> (state, metrics); the state is donated."""
        scalar = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(
            self._step,
            donate_argnums=0,
            out_shardings=(self.state_shardings, scalar),
            compiler_options=self._options,
        )

    @cached_property
    def evaluate(self) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
        """(weights, batch [M, B, T]) -> (sum of cross entropy in nats, number of targets)."""
        return jax.jit(self.passes.evaluate, compiler_options=self._options)

    @cached_property
    def grads(self) -> Any:
        """(weights, batch, step=0) -> (mean gradients, laid out where parameters are updated, and metrics)."""
        return jax.jit(self._grads, compiler_options=self._options)

    def complete(self, state: State) -> State:
        """A restored state, and what a spike guard that is new to the run knows."""
        if guard.RECENT in state or guard.RECENT not in self.state_shapes:
            return state
        value, place = np.asarray(guard.no_steps()), self.state_shardings[guard.RECENT]
        return {**state, guard.RECENT: jax.make_array_from_callback(value.shape, place, lambda at: value[at])}

    def weights(self, state: State, averaged: bool = True) -> Any:
        """What a state's model multiplies by: its parameters, or their average, with adapters where there are some."""
        trained = state["ema"] if averaged and "ema" in state else state[self.trained]
        return trained if self.trained == "params" else lora.adapt(state["params"], trained)

    def lower_step(self) -> Any:
        """The step lowered for this mesh without any array: `.compile()` it for its memory and its program text."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state_shapes, self.batch_shapes)

    @cached_property
    def _options(self) -> Options | None:
        return compiler_options(self.mesh.devices.flat[0], self.config.train.compiler_options)

    # ---- pure functions

    def next_logits(self, weights: Any, rows: Batch, at: jax.Array) -> jax.Array:
        """float32 logits [V] of the token after position `at`, the mean over rows [B, T]."""
        return self.passes.next_logits(weights, rows, at)

    def _init(self, key: jax.Array) -> State:
        return self._begin(nnx.to_pure_dict(nnx.split(Transformer(key, self.config.model, self.stack_shape))[1]))

    def _begin(self, params: Any) -> State:
        state = {"step": jnp.zeros((), jnp.int32), "params": params}
        if (config := self.config.lora) is not None:
            state["params"] = jax.tree.map(lambda p: p.astype(config.base_dtype), params)
            key = jax.random.fold_in(jax.random.key(self.config.train.seed), lora.SALT)
            state["lora"] = lora.draw(config, key, params, self.passes.dims)
        state["opt"] = self.optimizer.init(self._for_update(state[self.trained]))
        if self.config.optim.ema is not None:
            state["ema"] = jax.tree.map(jnp.copy, state[self.trained])  # donated buffers must not be shared
        if self.config.train.spike_sigma is not None:
            state[guard.RECENT] = guard.no_steps()
        return state

    def _step(self, state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        sums, metrics = self._sums(self.weights(state, averaged=False), batch, state["step"])
        mean = partial(_mean, metrics["targets"])
        grads, params = jax.tree.map(mean, sums), self._for_update(state[self.trained])
        step = state["step"]
        metrics["grad_norm"] = optim.grad_norm(grads, self.dims)
        sigma = self.config.train.spike_sigma
        good, recent = guard.judge(step, metrics["loss"], metrics["grad_norm"], state.get(guard.RECENT), sigma)
        metrics["skipped"] = 1.0 - good.astype(jnp.float32)
        if self.config.optim.state_on_host:
            factor = optim.clip_factor(self.config.optim, grads, self.dims)
            ready = lambda g: mean(g) * factor  # noqa: E731
            params, opt = host_state.update(
                self.optimizer, self.mesh, self.dims, params, state["opt"], sums, ready, good
            )
        else:
            params, opt = optim.update(self.optimizer, params, state["opt"], grads, good)
        params = jax.tree.map(lambda p, d: jax.reshard(p, param_spec(d)), params, self.dims)
        new = {"step": jnp.where(good, step + 1, jnp.minimum(step, ~step)), "opt": opt}
        new |= {"params": state["params"], self.trained: params}
        if self.config.optim.ema is not None:
            ema = optim.ema_update(state["ema"], params, self.config.optim.ema, step)
            new["ema"] = jax.tree.map(partial(jnp.where, good), ema, state["ema"])
        if recent is not None:
            new[guard.RECENT] = recent
        metrics["learning_rate"] = jnp.asarray(self.schedule(step), jnp.float32)
        return new, metrics

    def _for_update(self, tree: Any) -> Any:
        """What is trained, or its gradients, laid out like the optimizer's state."""
        over_data = self.config.optim.state_over_data
        return jax.tree.map(lambda x, d: jax.reshard(x, update_spec(d, x.shape, over_data)), tree, self.dims)

    def _grads(self, weights: Any, batch: Batch, step: jax.typing.ArrayLike = 0) -> tuple[Any, Sums]:
        """Gradient of the mean over all targets of the global batch, whatever the number of microbatches."""
        sums, metrics = self._sums(weights, batch, step)
        return jax.tree.map(partial(_mean, metrics["targets"]), sums), metrics

    def _sums(self, weights: Any, batch: Batch, step: jax.typing.ArrayLike) -> tuple[Any, Sums]:
        """Gradients of the sum over all targets, in the type they are kept in, and metrics."""
        if self.config.train.dropout or self.config.quant.stochastic:
            batch = {**batch, "noise": self._noise(batch["tokens"].shape, step)}
        grads, sums = self.passes.grads(weights, batch)
        mean = partial(_mean, sums["targets"])
        metrics = {name: x if name in COUNTS else mean(x) for name, x in sums.items()}
        return self._for_update(grads), error_metrics(metrics, self.quantized)

    def _noise(self, shape: tuple[int, ...], step: jax.typing.ArrayLike) -> jax.Array:
        """A random word for each token [M, B, T] of a step, the same however it is cut into microbatches."""
        M, B, T = shape
        key = jax.random.fold_in(jax.random.key(self.config.train.seed), step)
        bits_BMT = jax.random.bits(key, (B, M, T), jnp.uint32, out_sharding=compute_spec("BMS"))
        return bits_BMT.swapaxes(0, 1)


def _mean(targets: jax.Array, total: jax.Array) -> jax.Array:
    return total.astype(jnp.float32) / jnp.maximum(targets, 1.0)


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
    quantized = set_recipes(model, config.quant, mesh.devices.flat[0])
    graph, state = nnx.split(model)
    own, shapes = nnx.to_pure_dict(dims_of(state)), nnx.to_pure_dict(state)
    dims = jax.tree.map(lambda d, s: LEADING_DIMS[len(s.shape) - len(d)] + d, own, shapes)
    model, trained, rules, bias_rate = config.model, dims, config.optim, config.model.router_bias_rate
    if config.lora is not None:
        trained, bias_rate = lora.adapter_dims(config.lora, dims), 0.0
        dims, rules = lora.adapt(dims, trained), lora.optimizer_rules(rules)
    optimizer = optim.make_optimizer(rules, config.train.num_steps, trained, bias_rate, model.num_repeats)
    reports: dict[str, tuple[int, ...]] = {QUANT_ERROR: (model.num_layers, len(quantized))} if quantized else {}
    objective = Objective(model, config.train.z_loss, token_loss, reports)
    passes = (PlainPasses if stages == 1 else PipelinePasses)(config, mesh, graph, shapes, dims, objective)
    return Program(config, mesh, passes, trained, optimizer, shape, tuple(quantized))
