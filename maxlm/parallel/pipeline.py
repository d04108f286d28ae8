"""The pipeline: layers cut over the stage axis, microbatches passed along, by the timetable of schedule.py.

An alternative to model/stack.py that runs the same block function. Each stage holds R shares (rounds) of K repeats of
the layer pattern; its weights are gathered over fsdp once a step and their gradients are reduced once a step. One jit:
loops over ticks inside a shard_map that is manual over all axes but tensor, whose shardings stay in types. Forward and
backward are both in the loop, so gradients come out of it and autodiff never sees it. A stage keeps the inputs of its
blocks alone and runs each block again in the backward pass.

The tokens of the residual stream are split over the stages where it waits outside: what enters the first stage, and
what leaves it for the embedding. The loss is shared out as well: every stage does 1/P of the tokens of the last
stage's output, or the others would wait for it. So are layers that come before those of the pattern (lead.py).

All that a stage needs of its neighbours was sent in the tick before. Idle stages work on garbage, which the timetable
keeps out of every sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from maxlm.parallel.island import vary
from maxlm.parallel.lead import Block, Rows, lead_backward, lead_forward
from maxlm.parallel.manual import (
    STAGE,
    enter,
    leave,
    local,
    manual_axes,
    manual_spec,
    passage,
    zeros_of_gradient,
)
from maxlm.parallel.schedule import Phase, Schedule, Work
from maxlm.sharding import COMPUTE

Sums = dict[str, jax.Array]
OwnBlock = Callable[[Any, jax.Array, Rows], tuple[jax.Array, Sums]]
Head = Callable[[Any, jax.Array, Rows], tuple[jax.Array, Sums]]
"""(weights, x [B, T, D], rows) -> (objective, sums), over these tokens."""
Weights = dict[str, Any]
"""Trees of parameters, or of what belongs to them: "layers", "head", and "lead" if there is one."""
Carry = dict[str, Any]
OBJECTIVE = "objective"
"""Of a block's sums, the one that is differentiated."""


@dataclass(frozen=True)
class Pipeline:
    """What is fixed at compile time.

    Attributes:
        schedule: the timetable.
        num_repeats: repeats of the layer pattern that are real; the stack is filled up to R x P x K.
        block: runs one repeat; reports sums over all tokens of the microbatch.
        head: ends a microbatch.
        lead: runs one repeat of layers before those, if there are any.
        dims: dimension letters of the weights; those of layers lead with RPL.
        dtype: compute dtype.
    """

    schedule: Schedule
    num_repeats: int
    block: Block
    head: Head
    lead: Block | None
    dims: Weights
    dtype: Any

    def value_and_grad(self, weights: Weights, x_MBUD: jax.Array, rows: Rows) -> tuple[Sums, Weights, jax.Array]:
        """Runs all microbatches forward and backward.

        Args:
            weights: float32, at rest; layers [R, P, K, ...].
            x_MBUD: embedded tokens, split over tokens by the stages too.
            rows: the batch [M, B, T].

        Returns:
            sums of the head and of all blocks; gradients of the objective by weights (float32, laid out like them)
            and by x_MBUD.
        """
        return self._run(weights, x_MBUD, rows, True)

    def value(self, weights: Weights, x_MBUD: jax.Array, rows: Rows) -> Sums:
        """Runs all microbatches forward. Args as value_and_grad; returns the sums."""
        return self._run(weights, x_MBUD, rows, False)

    def _run(self, weights: Weights, x_MBUD: jax.Array, rows: Rows, train: bool) -> Any:
        ways = jax.tree.map(passage, self.dims)
        specs = jax.tree.map(lambda way: way.spec, ways)
        x_spec = manual_spec("MBUD", COMPUTE)
        row_specs = {name: manual_spec("MBT"[: x.ndim], COMPUTE) for name, x in rows.items()}

        def region(weights: Weights, x: jax.Array, rows: Rows) -> Any:
            weights = jax.tree.map(lambda w, way: enter(w, way, self.dtype), weights, ways)
            weights, x, rows = vary((weights, x, rows), manual_axes())
            led = lead_forward(self.lead, weights["lead"], x, rows) if self.lead else x
            stage = _Stage(self, weights, led, rows, train)
            carry = stage.start()
            for phase in self.schedule.phases:
                if train or phase.forward:
                    ticks = jnp.arange(phase.start, phase.stop)
                    carry, _ = lax.scan(partial(stage.tick, phase), carry, ticks)
            sums = lax.psum(carry["sums"], manual_axes())
            if not train:
                return sums
            grads, dx = {"layers": carry["d_layers"], "head": carry["d_head"]}, carry["dx"]
            if self.lead:
                grads["lead"], dx = lead_backward(self.lead, weights["lead"], x, rows, dx)
            return sums, jax.tree.map(leave, grads, ways), dx

        out = (P(), specs, x_spec) if train else P()
        run = jax.shard_map(region, in_specs=(specs, x_spec, row_specs), out_specs=out, axis_names=set(manual_axes()))
        return run(weights, x_MBUD, rows)


class _Stage:
    """One stage's view, inside the region: its gathered weights [R, K, ...], its part of x and all rows."""

    def __init__(self, pipeline: Pipeline, weights: Weights, x: jax.Array, rows: Rows, train: bool):
        self.pipeline, self.schedule, self.train = pipeline, pipeline.schedule, train
        self.layers, self.head, self.x, self.rows = weights["layers"], weights["head"], x, rows
        self.index = lax.axis_index(STAGE)
        self.count, self.rounds = self.schedule.num_stages, self.schedule.num_rounds
        self.repeats = jax.tree.leaves(self.layers)[0].shape[1]
        # devices that know the same sums of a block, each of which counts its share
        self.num_shares = math.prod(lax.axis_size(axis) for axis in manual_axes() if axis != STAGE)

    def start(self) -> Carry:
        """Everything that a tick leaves to the next."""
        _, b, t, d = self.x.shape
        dtype, shape = self.pipeline.dtype, (b, t * self.count, d)
        piece = jax.ShapeDtypeStruct((b, t, d), dtype)
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, t), x.dtype), self.rows)
        sums = jax.tree.map(_zeros, jax.eval_shape(self.pipeline.head, self.head, piece, rows)[1])
        first = jnp.zeros((), jnp.int32)
        whole = jax.ShapeDtypeStruct(shape, dtype), self._rows_of(first)
        of_blocks = jax.eval_shape(self._block(first, first, first + 1), self._weights(first, first), *whole)[1]
        sums |= {name: _zeros(x) for name, x in of_blocks.items() if name not in sums}
        carry: Carry = {"arriving": jnp.zeros(shape, dtype), "sums": sums}
        if self.train:
            carry["inputs"] = jnp.zeros((self.schedule.num_slots, self.repeats, *shape), dtype)
            carry["returning"] = jnp.zeros(shape, dtype)
            carry["d_out"] = jnp.zeros((self.schedule.num_head_slots, *shape), dtype)
            carry["dx"] = jnp.zeros(self.x.shape, dtype)
            carry["d_layers"], carry["d_head"] = jax.tree.map(zeros_of_gradient, (self.layers, self.head))
        return vary(carry, manual_axes())

    def tick(self, phase: Phase, carry: Carry, t: jax.Array) -> tuple[Carry, None]:
        """One step of the timetable."""
        carry = dict(carry)
        if phase.forward:
            out = self._forward(carry, t)
            if phase.head:
                self._loss(carry, out, t, bool(self.schedule.head[phase.start : phase.stop].all()))
        if phase.backward and self.train:
            self._backward(carry, t)
        return carry, None

    # ---- forward

    def _forward(self, carry: Carry, t: jax.Array) -> jax.Array:
        work = self._work(self.schedule.forward, t)
        # the same microbatch enters on every stage's clock: its parts are gathered from all stages
        enters = _at(self.schedule.forward.microbatch[:, 0], t)
        feed = local(lambda x: lax.all_gather(x, STAGE, axis=1, tiled=True), _pick(self.x, enters))
        x = jnp.where((self.index == 0) & (work.round == 0), feed, carry["arriving"])
        rows = self._rows_of(work.microbatch)

        def repeat(x: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array | None, Sums]]:
            out, sums = self._block(work.round, k, work.active)(self._weights(work.round, k), x, rows)
            return out, (x if self.train else None, sums)

        out, (inputs, sums) = lax.scan(repeat, x, jnp.arange(self.repeats))
        carry["sums"] = _add_some(carry["sums"], {name: x.sum(0) for name, x in sums.items()})
        if self.train:
            carry["inputs"] = lax.dynamic_update_index_in_dim(carry["inputs"], inputs, work.slot, 0)
        carry["arriving"] = lax.ppermute(out, STAGE, [(i, (i + 1) % self.count) for i in range(self.count)])
        return out

    def _loss(self, carry: Carry, out: jax.Array, t: jax.Array, always: bool) -> None:
        """The head, on this stage's part of the tokens of the last stage's output."""
        microbatch = _at(self.schedule.forward.microbatch[:, -1], t)
        size = self.x.shape[2]
        totals = {name: carry[name] for name in ("sums", "d_head") if name in carry}

        def run(totals: Carry, out: jax.Array) -> tuple[Carry, Any]:
            x = jnp.where(self.index == self.count - 1, out, jnp.zeros_like(out))
            x = local(lambda x: lax.psum_scatter(x, STAGE, scatter_dimension=1, tiled=True), x)
            cut = lambda x: lax.dynamic_slice_in_dim(x, self.index * size, size, 1)  # noqa: E731
            rows = {name: cut(x) if x.ndim else x for name, x in self._rows_of(microbatch).items()}
            if not self.train:
                sums = self.pipeline.head(self.head, x, rows)[1]
                return {"sums": _add_some(totals["sums"], sums)}, ()
            grad = jax.grad(self.pipeline.head, argnums=(0, 1), has_aux=True)
            (d_head, dx), sums = grad(self.head, x, rows)
            d_out = local(lambda x: lax.all_gather(x, STAGE, axis=1, tiled=True), dx)
            d_head = jax.tree.map(_add, totals["d_head"], d_head)
            return vary(({"sums": _add_some(totals["sums"], sums), "d_head": d_head}, d_out), manual_axes())

        def skip(totals: Carry, out: jax.Array) -> tuple[Carry, Any]:
            return totals, jnp.zeros_like(out) if self.train else ()

        if always:
            totals, d_out = run(totals, out)
        else:  # the totals are inside: only where there is a loss are they added to
            totals, d_out = lax.cond(_at(self.schedule.head, t), run, skip, totals, out)
        carry.update(totals)
        if self.train:
            slot = _at(self.schedule.head_write, t)
            carry["d_out"] = lax.dynamic_update_index_in_dim(carry["d_out"], d_out, slot, 0)

    # ---- backward

    def _backward(self, carry: Carry, t: jax.Array) -> None:
        work = self._work(self.schedule.backward, t)
        ends = (self.index == self.count - 1) & (work.round == self.rounds - 1)
        d_out = jnp.where(ends, _pick(carry["d_out"], _at(self.schedule.head_read, t)), carry["returning"])
        d_out = jnp.where(work.active > 0, d_out, jnp.zeros_like(d_out))
        rows = self._rows_of(work.microbatch)
        inputs = _pick(carry["inputs"], work.slot)

        def repeat(state: Any, saved: Any) -> tuple[Any, None]:
            (dx, grads), (k, x) = state, saved
            block = self._block(work.round, k, work.active)
            (_, sums), pull = jax.vjp(lambda w, x: block(w, x, rows), self._weights(work.round, k), x)
            one = {name: jnp.full_like(x, name == OBJECTIVE) for name, x in sums.items()}
            dw, dx = pull((dx, one))
            return (dx, jax.tree.map(partial(_add_at, work.round, k), grads, dw)), None

        # Of a loop with one trip XLA hoists the maxima of the softmax, with a copy of all that leads to them (q, k and
        # their logits), before it unrolls it: both copies would run. unroll=0 makes no loop.
        unroll = 0 if self.repeats == 1 else 1
        state, repeats = (d_out, carry["d_layers"]), (jnp.arange(self.repeats), inputs)
        (dx, carry["d_layers"]), _ = lax.scan(repeat, state, repeats, reverse=True, unroll=unroll)
        carry["returning"] = lax.ppermute(dx, STAGE, [(i, (i - 1) % self.count) for i in range(self.count)])
        self._leave_first(carry, dx, t)

    def _leave_first(self, carry: Carry, dx: jax.Array, t: jax.Array) -> None:
        """What comes out of the first layers goes to its microbatch's place, shared out over the stages."""
        first = self.schedule.backward
        leaves = _at((first.active[:, 0] == 1) & (first.round[:, 0] == 0), t)
        dx = jnp.where(self.index == 0, dx, jnp.zeros_like(dx))
        part = local(lambda x: lax.psum_scatter(x, STAGE, scatter_dimension=1, tiled=True), dx)
        microbatch = _at(first.microbatch[:, 0], t)
        part = jnp.where(leaves, part, _pick(carry["dx"], microbatch))
        carry["dx"] = lax.dynamic_update_index_in_dim(carry["dx"], part, microbatch, 0)

    # ---- what a tick works with

    def _work(self, work: Work, t: jax.Array) -> "_Now":
        own = lambda table: _pick(_at(table, t), self.index)  # noqa: E731
        return _Now(own(work.microbatch), own(work.round), own(work.slot), own(work.active))

    def _rows_of(self, microbatch: jax.Array) -> Rows:
        return jax.tree.map(lambda x: _pick(x, microbatch), self.rows)

    def _weights(self, round_: jax.Array, k: jax.Array) -> Any:
        return jax.tree.map(lambda w: _pick(_pick(w, round_), k), self.layers)

    def _block(self, round_: jax.Array, k: jax.Array, active: jax.Array) -> OwnBlock:
        """The block function, whose sums are this device's share of them.

        Idle stages and repeats that fill up the stack add nothing; the latter pass x through.
        """
        index = (round_ * self.count + self.index) * self.repeats + k
        real, filled = index < self.pipeline.num_repeats, self.pipeline.num_repeats % (self.count * self.rounds) > 0
        counts = jnp.where(real & (active > 0), 1.0 / self.num_shares, 0.0)

        def run(weights: Any, x: jax.Array, rows: Rows) -> tuple[jax.Array, Sums]:
            out, sums = self.pipeline.block(weights, x, rows, index)
            mine = {name: vary(x, manual_axes()) * counts for name, x in sums.items()}
            return jnp.where(real, out, x) if filled else out, mine

        return run


class _Now(NamedTuple):
    """This stage's line of a timetable: int32 scalars."""

    microbatch: jax.Array
    round: jax.Array
    slot: jax.Array
    active: jax.Array


def _at(table: Any, t: jax.Array) -> jax.Array:
    return _pick(jnp.asarray(table), t)


def _pick(x: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _add_some(totals: Sums, some: Sums) -> Sums:
    return {**totals, **{name: totals[name] + x for name, x in some.items()}}


def _add(total: jax.Array, x: jax.Array) -> jax.Array:
    return total + x.astype(total.dtype)


def _add_at(round_: jax.Array, k: jax.Array, total: jax.Array, x: jax.Array) -> jax.Array:
    """Adds x to total[round, k] in place."""
    start = (round_, k, *(0,) * x.ndim)
    old = lax.dynamic_slice(total, start, (1, 1, *x.shape))
    return lax.dynamic_update_slice(total, old + x[None, None].astype(total.dtype), start)


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
    spec = P() if shape.sharding is None else P(*shape.sharding.spec)
    return jnp.zeros(shape.shape, shape.dtype, out_sharding=spec)
