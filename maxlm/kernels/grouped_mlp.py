"""The MLPs of several experts over rows sorted by expert, forward and backward, as grouped matrix products.

Everything here is local to one device. The backward pass is written out, so that the caller decides what is kept: the
rows and the hidden values before the nonlinearity, and nothing after it.

References:
    Gale et al., MegaBlocks, arXiv:2211.15841: experts without dropped tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.kernels.grouped import Way, grouped_product
from maxlm.kernels.grouped_outer import grouped_outer
from maxlm.kernels.grouped_rounded import RoundedExperts

Activation = Callable[[jax.Array], jax.Array]


class ExpertWeights(NamedTuple):
    """Weights of E experts: up and (for gated MLPs, else None) gate [E, D, F], down [E, F, D].

    Each is an array, or RoundedExperts.
    """

    up: Any
    gate: Any
    down: Any


def grouped_mlp(
    act: Activation, rows_CD: jax.Array, scale_C: jax.Array, sizes_E: jax.Array, weights: ExpertWeights
) -> tuple[jax.Array, list[jax.Array]]:
    """Applies to each row the MLP of its expert, and multiplies by the row's scale.

    Args:
        act: nonlinearity.
        rows_CD: rows sorted by expert; those after the last group may hold anything.
        scale_C: float32 scale of each row.
        sizes_E: int32 rows of each expert.
        weights: of the experts; F may be one device's part, then the results are one term of their sum.

    Returns:
        [C, D] in the rows' dtype, undefined after the last group; and the hidden values [C, F] that grouped_mlp_grads
        takes.
    """
    hidden = [_forward(rows_CD, w_EDF, sizes_E) for w_EDF in weights[:2] if w_EDF is not None]
    return _forward(_mix(act, sizes_E, scale_C, hidden), weights.down, sizes_E), hidden


def grouped_mlp_grads(
    act: Activation,
    rows_CD: jax.Array,
    scale_C: jax.Array,
    sizes_E: jax.Array,
    weights: ExpertWeights,
    hidden: list[jax.Array],
    d_out_CD: jax.Array,
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    """Gradients of grouped_mlp by rows [C, D], scale [C] (both undefined after the last group) and weights.

    Where F is one device's part, the first two are terms of sums. After the last group d_out_CD may hold anything, too.
    """
    mixed_CF, pull = jax.vjp(lambda scale, hidden: _mix(act, sizes_E, scale, hidden), scale_C, hidden)
    d_scale_C, d_hidden = pull(_transposed(d_out_CD, weights.down, sizes_E))
    d_first = [_outer(rows_CD, d_CF, sizes_E) for d_CF in d_hidden]
    matrices = [w_EDF for w_EDF in weights[:2] if w_EDF is not None]
    parts = [_transposed(d_CF, w_EDF, sizes_E) for d_CF, w_EDF in zip(d_hidden, matrices, strict=True)]
    d_gate = d_first[1] if weights.gate is not None else None
    return sum(parts[1:], parts[0]), d_scale_C, ExpertWeights(d_first[0], d_gate, _outer(mixed_CF, d_out_CD, sizes_E))


def _mix(act: Activation, sizes_E: jax.Array, scale_C: jax.Array, hidden: list[jax.Array]) -> jax.Array:
    """What goes into the down projection; the router's scale comes here, where its gradient needs no output kept."""
    # After the last group there is what was in memory. Masked before and after the nonlinearity, it stays out of the
    # results and, since the masks are differentiated too, out of the gradients.
    live = (jnp.arange(scale_C.shape[0]) < sizes_E.sum())[:, None]
    up, *gate = (jnp.where(live, h.astype(jnp.float32), 0.0) for h in hidden)
    mixed = act(gate[0]) * up if gate else act(up)
    return jnp.where(live, mixed * scale_C[:, None], 0.0).astype(hidden[0].dtype)


# ---- grouped products; a matrix of experts that is no array does its own (grouped_rounded.py)


def _forward(rows_CD: jax.Array, w_EDF: Any, sizes_E: jax.Array) -> jax.Array:
    if isinstance(w_EDF, RoundedExperts):
        return w_EDF.forward(rows_CD, sizes_E)
    return grouped_product(rows_CD, w_EDF, sizes_E, Way.FORWARD)


def _transposed(d_CF: jax.Array, w_EDF: Any, sizes_E: jax.Array) -> jax.Array:
    if isinstance(w_EDF, RoundedExperts):
        return w_EDF.transposed(d_CF, sizes_E)
    return grouped_product(d_CF, w_EDF, sizes_E, Way.TRANSPOSED)


def _outer(rows_CD: jax.Array, d_CF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    plain = partial(grouped_product, way=Way.OUTER)
    return jax.lax.platform_dependent(rows_CD, d_CF, sizes_E, tpu=grouped_outer, default=plain)
