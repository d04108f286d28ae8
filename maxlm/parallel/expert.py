"""Tokens meet their experts, which are split over the expert axis: the dispatch that is passed to model/moe.py.

A device keeps C rows for tokens of its experts, sorted by expert. Tokens come there in one of two ways:

- gather: all tokens are gathered over the expert axis, each device picks those of its experts, and results are summed
  and scattered back. It runs on any backend; traffic grows with the number of devices.
- exchange: each token travels to its experts alone and back (ragged_all_to_all; TPU and GPU).

Both fill the rows in the same order, by expert, then by where the token comes from: the same numbers, up to rounding.
Where C is smaller than the worst case, the experts with the most tokens get fewer rows than they want, and the last of
their tokens none: these choices are dropped, add nothing to their tokens, and are counted. `receive` is the transpose
of `send`, so that the backward pass, written out here, needs no others.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.kernels.grouped_mlp import Activation, ExpertWeights, grouped_mlp, grouped_mlp_grads
from maxlm.parallel.island import island, vary_like
from maxlm.parallel.quantized_experts import Crossing, unwrap
from maxlm.sharding import compute_spec, manual_axes


@dataclass(frozen=True)
class Options:
    """What is fixed at compile time.

    Attributes:
        kind: gather or exchange.
        capacity_factor: see dispatch_experts.
        act: the nonlinearity.
        crossing: of weights.
    """

    kind: str
    capacity_factor: float | None
    act: Activation
    crossing: Crossing


def dispatch_experts(
    kind: str,
    capacity_factor: float | None,
    x_BTD: jax.Array,
    chosen_BTA: jax.Array,
    scale_BTA: jax.Array,
    weights: tuple[jax.Array, jax.Array | None, jax.Array],
    act: Activation,
) -> tuple[jax.Array, jax.Array]:
    """Sums over a token's experts their MLPs of it, each times its scale.

    Args:
        kind: "gather" or "exchange".
        capacity_factor: rows per device, as a multiple of the mean; None is room for the worst case.
        x_BTD: tokens, in the compute dtype.
        chosen_BTA: int32 numbers of each token's experts.
        scale_BTA: float32 weights of those experts.
        weights: up and gate (None where experts are not gated) [E, D, F] and down [E, F, D] of all experts, split over
            the expert axis and maybe over tensor. Of quantized ones, d_weight is always in the compute dtype.
        act: nonlinearity of the experts.

    Returns:
        [B, T, D] in x's dtype; and the number of choices that were dropped, a float32 scalar over all devices.
    """
    # a pipeline's stage is manual over the axes that split tokens: there each device differentiates its own copy
    arrays, crossing, words = unwrap(weights)
    own = vary_like(ExpertWeights(*arrays), x_BTD)
    return _experts(Options(kind, capacity_factor, act, crossing), x_BTD, chosen_BTA, scale_BTA, own, words)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(
    options: Options, x: jax.Array, chosen: jax.Array, scale: jax.Array, weights: ExpertWeights, words: Any
) -> tuple[jax.Array, jax.Array]:
    forward = lambda *blocks: _forward(options, *blocks)[:2]  # noqa: E731
    return island(forward, (x, chosen, scale, weights), (compute_spec("BTD"), P()))


def _experts_fwd(
    options: Options, x: jax.Array, chosen: jax.Array, scale: jax.Array, weights: ExpertWeights, words: Any
) -> Any:
    rows = compute_spec("C")
    out = (compute_spec("BTD"), P(), (rows, rows, rows, compute_spec("CF")))
    y, dropped, saved = island(partial(_forward, options), (x, chosen, scale, weights), out)
    return (y, dropped), (chosen, weights, words, saved)


def _experts_bwd(options: Options, saved: Any, cotangents: Any) -> Any:
    specs = jax.tree.map(lambda w: jax.typeof(w).sharding.spec, saved[1])
    of_weights = jax.tree.map(lambda s: P(*s.partitions, unreduced=s.reduced), specs)
    out = (compute_spec("BTD"), compute_spec("BTA"), of_weights)
    dx, d_scale, d_weights = island(partial(_backward, options), (*saved, cotangents[0]), out)
    return dx, None, d_scale, d_weights, None


_experts.defvjp(_experts_fwd, _experts_bwd)


# ---- on one device: n tokens, a choices each. Choices are numbered a first, then n: sums over a add whole blocks, and
# do not shuffle within the tiles that a TPU computes on.


def _forward(
    options: Options, x: jax.Array, chosen: jax.Array, scale: jax.Array, weights: ExpertWeights
) -> tuple[jax.Array, jax.Array, Any]:
    a = chosen.shape[-1]
    plan, dropped = _plan(options, chosen.reshape(-1, a).T.reshape(-1), weights.down.shape[0])
    rows = plan.send(x.reshape(-1, x.shape[-1]), a)
    row_scale = plan.send(scale.reshape(-1, a).T.reshape(-1), 1)
    matrices = ExpertWeights(*options.crossing.enter(weights, x.dtype, None))
    out, hidden = grouped_mlp(options.act, rows, row_scale, plan.sizes, matrices)
    y = _sum_over_tensor(plan.receive(out, a)).reshape(x.shape)
    dropped = dropped.astype(jnp.float32)
    if axes := manual_axes("C"):
        dropped = jax.lax.psum(dropped, axes)
    return y, dropped, (plan, rows, row_scale, hidden)


def _backward(
    options: Options, chosen: jax.Array, weights: ExpertWeights, words: Any, saved: Any, dy: jax.Array
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    plan, rows, row_scale, hidden = saved
    row_scale, a = vary_like(row_scale, hidden[0]), chosen.shape[-1]  # its gradient is then a term of a sum
    d_out = plan.send(dy.reshape(-1, dy.shape[-1]), a)
    words_C = None if words is None else plan.send(words.reshape(-1), a)
    matrices = ExpertWeights(*options.crossing.enter(weights, dy.dtype, words_C))
    d_rows, d_scale, d_weights = grouped_mlp_grads(options.act, rows, row_scale, plan.sizes, matrices, hidden, d_out)
    d_weights = ExpertWeights(*options.crossing.leave(d_weights, weights))
    dx = _sum_over_tensor(plan.receive(d_rows, a)).reshape(dy.shape)
    d_scale = _sum_over_tensor(plan.receive(d_scale, 1)).reshape(a, -1).T.reshape(chosen.shape)
    return dx, d_scale, d_weights


def _sum_over_tensor(x: jax.Array) -> jax.Array:
    axes = manual_axes("F")
    return jax.lax.psum(x, axes) if axes else x


def _plan(options: Options, chosen: jax.Array, num_own: int) -> tuple["Gather | Exchange", jax.Array]:
    """Who sits where, and how many choices of this device's experts find no row.

    Args:
        options: gather or exchange, and the capacity factor.
        chosen: expert of each of this device's choices [n * a].
        num_own: experts of this device.
    """
    axes = manual_axes("E")
    num_devices = jax.lax.axis_size(axes) if axes else 1
    worst = chosen.shape[0] * num_devices
    factor = options.capacity_factor
    capacity = worst if factor is None else min(worst, math.ceil(factor * chosen.shape[0]))
    me = jax.lax.axis_index(axes) if axes else 0
    if options.kind == "exchange" and axes:
        return _plan_exchange(chosen, num_own, num_devices, me, capacity)
    own = (jax.lax.all_gather(chosen, axes, tiled=True) if axes else chosen) - me * num_own
    own = jnp.where((own >= 0) & (own < num_own), own, num_own)
    order, place = _sort(own)
    wanted = _count(own, num_own)
    sizes = _fit(wanted, capacity)
    if capacity < worst:  # choices that find no row join those of other devices, at the end
        its = jnp.minimum(own, num_own - 1)
        rank = place - (jnp.cumsum(wanted) - wanted)[its]
        order, place = _sort(jnp.where(rank < sizes[its], own, num_own))
    return Gather(sizes, order[:capacity], place), (wanted - sizes).sum()


def _plan_exchange(
    chosen: jax.Array, num_own: int, num_devices: int, me: jax.Array | int, capacity: int
) -> tuple["Exchange", jax.Array]:
    order, place = _sort(chosen)
    counts = jax.lax.all_gather(_count(chosen, num_own * num_devices), manual_axes("E"), tiled=True)
    by_source = counts.reshape(num_devices, -1)  # [source, expert]
    first = jnp.cumsum(by_source, 1) - by_source  # start of each expert's slice in a source's order
    wanted = by_source.reshape(num_devices, num_devices, num_own).transpose(1, 2, 0)  # [device, own expert, source]
    sizes = _fit(wanted.sum(2), capacity)
    ends = jnp.minimum(jnp.cumsum(wanted, 2), sizes[..., None])  # of slices, among the rows of their expert
    kept = jnp.diff(ends, axis=2, prepend=0)
    starts = ends - kept + (jnp.cumsum(sizes, 1) - sizes)[..., None]
    mine = lambda table: jnp.take(table, me, axis=0)  # noqa: E731
    to_me = lambda table: jnp.take(table, me, axis=-1).reshape(-1)  # noqa: E731
    plan = Exchange(
        sizes=mine(sizes),
        order=order,
        place=place,
        here=mine(first),
        there=to_me(starts),
        sent=to_me(kept),
        filled=mine(starts).T.reshape(-1),
        home=jnp.take(first.reshape(num_devices, num_devices, num_own), me, axis=1).reshape(-1),
        received=mine(kept).T.reshape(-1),
        capacity=capacity,
    )
    return plan, (mine(wanted) - mine(kept)).sum()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gather:
    """Who sits where, when all tokens are gathered.

    Attributes:
        sizes: rows of each expert of this device.
        order: the gathered choice in each row [C].
        place: row of each gathered choice; from sum(sizes) on it has none.
    """

    sizes: jax.Array
    order: jax.Array
    place: jax.Array

    def send(self, x: jax.Array, each: int) -> jax.Array:
        """[n, ...] values, of which `each` choices share one, to rows [C, ...]; those after the last hold anything."""
        axes, n = manual_axes("E"), x.shape[0]
        everyone = jax.lax.all_gather(x, axes, tiled=True) if axes else x
        return everyone[self.order // (each * n) * n + self.order % n]

    def receive(self, rows: jax.Array, each: int) -> jax.Array:
        """Rows [C, ...] to sums over `each` choices [n, ...]."""
        axes, mine = manual_axes("E"), self.place < self.sizes.sum()
        picked = rows[jnp.minimum(self.place, rows.shape[0] - 1)]
        picked = jnp.where(mine.reshape(-1, *[1] * (rows.ndim - 1)), picked, jnp.zeros((), rows.dtype))
        sums = _sum_each(picked, each, jax.lax.axis_size(axes) if axes else 1)
        return jax.lax.psum_scatter(sums, axes, tiled=True) if axes else sums


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Exchange:
    """Who sits where, when each choice is sent to its expert.

    The choices of one device for one expert are a slice of that device's choices, sorted by expert, and a slice of the
    expert's rows. Tables of slices have an entry per expert (all experts, in order) on the side of the tokens; on the
    side of the rows one per device and own expert.

    Attributes:
        sizes: rows of each expert of this device.
        order: own choices sorted by expert [n * a].
        place: their places in that order.
        here: start of each expert's slice in `order`.
        there: its start in the expert's rows.
        sent: its size.
        filled: start in own rows of the slice from each device for each own expert.
        home: its start in that device's order.
        received: its size.
        capacity: number of rows C.
    """

    sizes: jax.Array
    order: jax.Array
    place: jax.Array
    here: jax.Array
    there: jax.Array
    sent: jax.Array
    filled: jax.Array
    home: jax.Array
    received: jax.Array
    capacity: int = field(metadata={"static": True})

    def send(self, x: jax.Array, each: int) -> jax.Array:
        """As Gather.send."""
        room = jax.lax.empty((self.capacity, *x.shape[1:]), x.dtype)
        return _exchange(x[self.order % x.shape[0]], room, self.here, self.sent, self.there, self.received)

    def receive(self, rows: jax.Array, each: int) -> jax.Array:
        """As Gather.receive."""
        num_choices = self.order.shape[0]
        may_drop = self.capacity < num_choices * jax.lax.axis_size(manual_axes("E"))
        room = (jnp.zeros if may_drop else jax.lax.empty)((num_choices, *rows.shape[1:]), rows.dtype)
        results = _exchange(rows, room, self.filled, self.received, self.home, self.sent)
        return _sum_each(results[self.place], each, 1)


def _fit(wanted: jax.Array, capacity: int) -> jax.Array:
    """Rows that each expert gets of those it wants [..., E], at most `capacity` together: the fullest are cut first."""
    rising, others = jnp.sort(wanted, axis=-1), jnp.broadcast_to(jnp.arange(wanted.shape[-1], 0, -1), wanted.shape)
    # were the i smallest served whole, the others could have this many each; the truth is the best of these
    limits = (capacity - jnp.cumsum(rising, -1) + rising) // others
    return jnp.minimum(wanted, limits.max(-1, keepdims=True))


def _sort(experts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Order of choices by expert, and the place of each choice in it."""
    order = jnp.argsort(experts, stable=True)
    return order, jnp.argsort(order)


def _count(experts: jax.Array, num_experts: int) -> jax.Array:
    """How often each of the first experts occurs; a sum of comparisons, since scattered additions are slow on TPU."""
    return (experts[:, None] == jnp.arange(num_experts)[None]).sum(0, dtype=jnp.int32)


def _exchange(x: jax.Array, room: jax.Array, *slices: jax.Array) -> jax.Array:
    return jax.lax.ragged_all_to_all(x, vary_like(room, x), *slices, axis_name=manual_axes("E"))


def _sum_each(x: jax.Array, each: int, num_devices: int) -> jax.Array:
    """Sums over `each` choices, in float32: [devices * each * n, ...] -> [devices * n, ...]."""
    blocks = x.reshape(num_devices, each, -1, *x.shape[1:])
    return blocks.sum(1, dtype=jnp.float32).astype(x.dtype).reshape(-1, *x.shape[1:])
