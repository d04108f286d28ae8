"""The plain layer stack: one scan over repeats of the layer pattern, each repeat rematerialized as configured."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import ModelConfig
from maxlm.model.attention import Attention, AttentionKernel
from maxlm.model.dropout import Drop, keep_all
from maxlm.model.mlp import Mlp
from maxlm.model.moe import Aux, Dispatch, Moe
from maxlm.model.norm import Norm
from maxlm.model.param import dims_of
from maxlm.model.summed import begin, collect, take_apart
from maxlm.sharding import gather, in_groups, keep_layout, param_spec

KEPT = "kept"
"""Name of what every policy keeps: what a UseWeight derives from a weight as it rests, smaller than it."""

_keep = jax.checkpoint_policies
_full, _attention = _keep.save_only_these_names(KEPT), _keep.save_only_these_names(KEPT, "attention_out")
_dots = _keep.save_from_both_policies(_keep.dots_with_no_batch_dims_saveable, _full)
REMAT_POLICIES = {
    # What the forward pass keeps of a layer for the backward pass, in bytes per token of a Llama-like layer in bf16
    # (D width, Q = N H, K = K H, F feed-forward), and the share of the forward pass that runs again. Plain attention
    # gives nothing to keep: with it "attention" is "full", and "minimal" is "dots".
    "none": None,  # every intermediate; nothing is computed twice
    "full": _full,  # 2 D, its input; all
    "attention": _attention,  # 2 (D + Q) + 4 N: also what attention gives; all but attention
    "dots": _dots,  # 2 (2 D + Q + 2 K + 2 F): also what products with weights give; attention, norms, nonlinearities
    "minimal": _keep.save_from_both_policies(_dots, _attention),  # 2 (2 D + 2 Q + 2 K + 2 F) + 4 N; norms and the like
    "offload": _keep.save_and_offload_only_these_names(  # nothing: its input goes to the host and comes back; all
        names_which_can_be_saved=[KEPT],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

UseWeight = Callable[[nnx.Variable, str, Any, jax.Array | int], Any]
"""(a layer's float32 weight as sharding.enter_step left it, its dimension letters, compute dtype, number of the layer)
-> what the layer multiplies by: the weight in that dtype and whole over fsdp, or what has an einsum of its own."""

LEADING_DIMS = {0: "", 1: "L", 3: "RPL"}
"""Dimension letters that stacked parameters have before their own, by their number."""


def gather_weight(variable: nnx.Variable, dims: str, dtype: Any, number: jax.Array | int = 0) -> jax.Array:
    """A UseWeight: cast to the compute dtype, whole over fsdp."""
    del number
    return gather(variable[...], dims, dtype)


@dataclass(frozen=True)
class Ops:
    """What layers are given, since it depends on the mesh and the step.

    Attributes:
        kernel: attention kernel.
        dispatch: brings tokens to experts.
        drop: dropout of what is added to the residual stream.
        weight: brings a weight into use.
        report: what is to be reported of a repeat that has run, beside what its blocks report.
    """

    kernel: AttentionKernel
    dispatch: Dispatch
    drop: Drop = keep_all
    weight: "UseWeight" = gather_weight
    report: Callable[[], Aux] = dict


class Block(nnx.Module):
    """Attention and MLP or experts, each with its norms, added to the residual stream."""

    def __init__(self, key: jax.Array, config: ModelConfig, kind: str, dense: bool):
        attention_key, mlp_key = jax.random.split(key)
        self.attention = Attention(attention_key, config, kind)
        self.mlp = Mlp(mlp_key, config) if dense else None
        self.moe = None if dense else Moe(mlp_key, config)
        pre, post = config.norm_position in ("pre", "both"), config.norm_position != "pre"
        self.norm_sum = config.norm_position == "residual"
        self.attention_norm = Norm(config) if pre else None
        self.attention_post_norm = Norm(config) if post else None
        self.mlp_norm = Norm(config) if pre else None
        self.mlp_post_norm = Norm(config) if post else None

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array,
        number: jax.Array | int,
        ops: Ops,
    ) -> tuple[jax.Array, Aux]:
        """Returns the residual stream [B, T, D] after this block, the number-th, and what its router reports."""
        aux: Aux = {}
        with jax.named_scope("attention"):
            h = _apply(self.attention_norm, x_BTD)
            h = self.attention(h, positions_BT, segments_BT, ops.kernel)
            x_BTD = self._added(x_BTD, h, self.attention_post_norm, ops.drop, 2 * number + 1)
        with jax.named_scope("mlp" if self.moe is None else "experts"):
            h = _apply(self.mlp_norm, x_BTD)
            if self.mlp is not None:
                h = self.mlp(h)
            elif self.moe is not None:
                h, aux = self.moe(h, ops.dispatch)
            return self._added(x_BTD, h, self.mlp_post_norm, ops.drop, 2 * number + 2), aux

    def _added(self, x: jax.Array, h: jax.Array, norm: Norm | None, drop: Drop, number: jax.Array | int) -> jax.Array:
        """The residual stream and what a sublayer gives, normed before or after."""
        return _apply(norm, x + drop(h, number)) if self.norm_sum else x + drop(_apply(norm, h), number)


def make_layers(
    key: jax.Array,
    config: ModelConfig,
    pattern: Sequence[str],
    repeats: int,
    dense: bool,
    shape: tuple[int, ...] | None = None,
) -> nnx.Dict:
    """Blocks of each position in a pattern of layers, stacked over its repeats: parameters gain leading dims.

    Args:
        key: PRNG key.
        config: the model.
        pattern: kinds of layers.
        repeats: of the pattern.
        dense: they have a dense MLP, not experts.
        shape: default (L,), the repeats of the pattern; (R, P, K) for a pipeline, where the stack may be longer than
            it has repeats: what fills it up is never run.
    """
    shape = shape or (repeats,)
    keys = jax.random.split(key, (len(pattern), repeats))
    filled = keys[:, jnp.arange(math.prod(shape)) % repeats].reshape(len(pattern), *shape)
    lead = param_spec(LEADING_DIMS[len(shape)])
    stacked = {}
    for i, kind in enumerate(pattern):
        make: Callable[[jax.Array], Block] = lambda k, kind=kind: Block(k, config, kind, dense)  # noqa: E731
        for _ in shape:
            make = jax.vmap(make)
        stacked[str(i)] = make(jax.reshard(filled[i], lead))
    return nnx.Dict(stacked)


def run_layers(
    layers: nnx.Dict,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    first: int,
    *,
    ops: Ops,
    remat: str,
    per_scan: int = 1,
) -> tuple[jax.Array, Aux]:
    """Runs all blocks of a stack in order; weights are gathered one repeat of the pattern at a time.

    Args:
        layers: from make_layers, with the step's parameters.
        x_BTD: residual stream; its dtype is the compute dtype.
        positions_BT: int32 positions within documents.
        segments_BT: int32 document numbers.
        first: number of the first block in the model.
        ops: what layers are given.
        remat: a key of REMAT_POLICIES.
        per_scan: repeats in one iteration of the loop. Unless remat is "none", of more than one only the first one's
            input is kept, and their forward pass runs once more.

    Returns:
        The residual stream, and the sums over layers of what they add up beside it.
    """
    graphdef, state = nnx.split(layers)
    dims, count = dims_of(state), len(layers)
    state, slots, totals = take_apart(state)
    repeats = jax.tree.leaves(state)[0].shape[0]

    def body(carry: Any, repeat: Any) -> tuple[Any, Aux]:
        (x, slots), (stored, place) = carry, repeat
        x, number = checkpoint_name(x, "layer_input"), first + count * place
        if slots is not None:
            stored, slots = collect(totals is not None, stored, slots, place)
        stored = jax.tree.map(lambda w: w if w.dtype == x.dtype else _stay(w, number), stored)
        with jax.named_scope("weights"):
            weights = use_weights(stored, dims, x.dtype, number, ops.weight)
        x, aux = run_repeat(graphdef, weights, x, positions_BT, segments_BT, number, ops)
        return (x, slots), aux

    body, each = _in_iterations(body, (state, jnp.arange(repeats)), remat, per_scan)
    (x_BTD, slots), aux = jax.lax.scan(body, (x_BTD, slots), each)
    if totals is not None:
        x_BTD = begin(x_BTD, slots, totals)
    return x_BTD, jax.tree.map(lambda values: values.sum(0), aux)


def _in_iterations(body: Callable[[Any, Any], Any], each: Any, remat: str, count: int) -> tuple[Any, Any]:
    """A scan's body that is rematerialized and does `count` steps of the given one, and what it is to run over."""
    if remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[remat], prevent_cse=False)
    if count == 1:
        return body, each

    def steps(carry: Any, each: Any) -> tuple[Any, Aux]:
        reports = []
        for i in range(count):
            carry, aux = body(carry, jax.tree.map(lambda x, i=i: x[i], each))
            reports.append(aux)
        return carry, jax.tree.map(lambda *values: sum(values[1:], values[0]), *reports)

    if remat != "none":
        steps = jax.checkpoint(steps, policy=REMAT_POLICIES["full"], prevent_cse=False)
    return steps, jax.tree.map(lambda x: in_groups(x, count), each)


def run_repeat(
    graphdef: Any,
    weights: Any,
    x_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    first: jax.Array | int,
    ops: Ops,
) -> tuple[jax.Array, Aux]:
    """Runs the blocks of one repeat of the layer pattern.

    Args:
        graphdef: structure of the layers, from nnx.split.
        weights: their state for this repeat (no L), from gather_weights.
        x_BTD: residual stream; its dtype is the compute dtype.
        positions_BT: int32 positions within documents.
        segments_BT: int32 document numbers.
        first: number of the first of these blocks in the model.
        ops: what layers are given.

    Returns:
        The residual stream, and sums over the blocks of what their routers report about all tokens of the microbatch:
        float32 scalars, the same on every device that shares these layers. Dense blocks report nothing.
    """
    blocks, reports = nnx.merge(graphdef, weights), []
    for i in range(len(blocks)):  # not .values(): those are sorted as text, 10 before 2
        x_BTD, aux = blocks[str(i)](x_BTD, positions_BT, segments_BT, first + i, ops)
        reports.append(aux)
    return x_BTD, {**jax.tree.map(lambda *values: sum(values[1:], values[0]), *reports), **ops.report()}


def use_weights(state: Any, dims: Any, dtype: Any, number: jax.Array | int, use: UseWeight) -> Any:
    """Brings the weights of one repeat into use.

    Args:
        state: float32 weights as sharding.enter_step left them.
        dims: their dimension letters, from dims_of.
        dtype: compute dtype.
        number: of their first layer.
        use: does it.
    """
    return jax.tree.map(lambda v, d: v.replace(use(v, d, dtype, number)), state, dims, is_leaf=_is_variable)


@jax.custom_vjp
def _stay(w: jax.Array, number: jax.Array) -> jax.Array:
    """w, made so that its cast stays in the loop over layers; number is that of a layer, never negative.

    XLA would move the casts of all layers out of it, a copy of the model in the compute dtype, and it looks through an
    optimization_barrier. A product with a number that it cannot know stays.
    """
    return keep_layout(w) * (number >= 0).astype(w.dtype)


_stay.defvjp(lambda w, number: (_stay(w, number), None), lambda _, g: (g, None))


def _apply(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
