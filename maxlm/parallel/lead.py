"""Layers ahead of a pipeline: the leading dense ones of a mixture of experts, too few to be cut over the stages.

Every stage holds their weights and takes its turn at the microbatches: P of them at a time, whose tokens wait split
over the stages, are exchanged so that each stage has one whole, run, and brought back. Backward likewise, with the
layers run again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from maxlm.parallel.manual import STAGE, local, zeros_of_gradient

Rows = dict[str, jax.Array]
Block = Callable[[Any, jax.Array, Rows, jax.Array], tuple[jax.Array, Any]]
"""(weights of a repeat of the layer pattern, x [B, T, D], rows [B, T], its number) -> x, and what is reported."""


def lead_forward(block: Block, weights: Any, x: jax.Array, rows: Rows) -> jax.Array:
    """Runs all microbatches; called inside the pipeline's region.

    Args:
        block: runs one repeat; what it reports is dropped.
        weights: in use, stacked over repeats [L, ...].
        x: this stage's part of the tokens of all microbatches [M, B, T/P, D].
        rows: the batch [M, B, T].

    Returns:
        As x.
    """

    def turn(_: None, part: jax.Array, mine: Rows) -> tuple[None, jax.Array]:
        return None, _to_parts(_run(block, weights, _to_whole(part), mine)[0])

    return _turns(turn, None, rows, x)[1]


def lead_backward(block: Block, weights: Any, x: jax.Array, rows: Rows, dx: jax.Array) -> tuple[Any, jax.Array]:
    """Gradients by weights (float32, the sum of this stage's microbatches) and by x.

    Args:
        block: as lead_forward.
        weights: as lead_forward.
        x: what lead_forward was given.
        rows: the batch.
        dx: gradient by what it returned.
    """

    def turn(grads: Any, parts: tuple[jax.Array, jax.Array], mine: Rows) -> tuple[Any, jax.Array]:
        x, dx = map(_to_whole, parts)
        inputs = _run(block, weights, x, mine)[1]

        def repeat(dx: jax.Array, now: Any) -> tuple[jax.Array, Any]:
            w, x, number = now
            _, pull = jax.vjp(lambda w, x: block(w, x, mine, number)[0], w, x)
            return pull(dx)[::-1]

        dx, dw = lax.scan(repeat, dx, (weights, inputs, _numbers(weights)), reverse=True)
        return jax.tree.map(lambda total, g: total + g.astype(total.dtype), grads, dw), _to_parts(dx)

    return _turns(turn, jax.tree.map(zeros_of_gradient, weights), rows, (x, dx))


def _run(block: Block, weights: Any, x: jax.Array, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """x after all repeats, and before each."""

    def repeat(x: jax.Array, now: Any) -> tuple[jax.Array, jax.Array]:
        return block(now[0], x, rows, now[1])[0], x

    return lax.scan(repeat, x, (weights, _numbers(weights)))


def _numbers(weights: Any) -> jax.Array:
    return jnp.arange(jax.tree.leaves(weights)[0].shape[0])


def _turns(turn: Callable[..., Any], carry: Any, rows: Rows, parts: Any) -> tuple[Any, jax.Array]:
    """Scans `turn(carry, parts [P, B, T/P, D], rows of this stage's microbatch)` over the microbatches, P at a time."""
    num_stages, count = lax.axis_size(STAGE), jax.tree.leaves(parts)[0].shape[0]
    num_turns = -(-count // num_stages)
    filled = num_turns * num_stages

    def deal(x: jax.Array) -> jax.Array:  # what fills up is zero, and so are its gradients
        x = jnp.concatenate([x, jnp.zeros_like(x, shape=(filled - count, *x.shape[1:]))]) if filled > count else x
        return x.reshape(num_turns, num_stages, *x.shape[1:])

    def step(carry: Any, now: tuple[jax.Array, Any]) -> tuple[Any, jax.Array]:
        first, parts = now
        own = jnp.minimum(first + lax.axis_index(STAGE), count - 1)
        return turn(carry, parts, jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, own, 0, keepdims=False), rows))

    carry, out = lax.scan(step, carry, (jnp.arange(num_turns) * num_stages, jax.tree.map(deal, parts)))
    return carry, out.reshape(filled, *out.shape[2:])[:count]


def _to_whole(part: jax.Array) -> jax.Array:
    """[P, B, T/P, D] parts of P microbatches -> this stage's microbatch [B, T, D]."""
    return local(lambda x: lax.all_to_all(x, STAGE, 0, 2, tiled=True), part)[0]


def _to_parts(whole: jax.Array) -> jax.Array:
    """The opposite of _to_whole."""
    return local(lambda x: lax.all_to_all(x, STAGE, 2, 0, tiled=True), whole[None])
