"""Which steps may change the weights: those whose loss and gradient are finite and, if asked for, no spike."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

RECENT = "recent"
"""Its place in the state."""
WINDOW = 128
"""Steps that a spike is measured by."""
LEAST = 32
"""Steps that have to be known of them."""


def no_steps() -> jax.Array:
    """What is known before the first step: float32 [2, WINDOW] of not-a-numbers."""
    return jnp.full((2, WINDOW), jnp.nan, jnp.float32)


def judge(
    step: jax.Array, loss: jax.Array, grad_norm: jax.Array, recent: jax.Array | None, sigma: float | None
) -> tuple[jax.Array, jax.Array | None]:
    """Whether a step counts.

    A spike is a loss or a gradient norm that is more than sigma standard deviations above the mean of the WINDOW - 1
    steps before. Spikes are remembered like other steps, so that a new level is not skipped forever. A step that is
    judged again is judged by the same others.

    Args:
        step: int32 scalar, finished steps; negative while nothing may change.
        loss: float32 scalar.
        grad_norm: float32 scalar.
        recent: float32 [2, WINDOW], losses and gradient norms by step modulo WINDOW, as of no_steps; None without
            sigma.
        sigma: standard deviations; None only asks for finite numbers.

    Returns:
        A bool scalar, and `recent` with this step.

    References:
        The rule is that of OLMo 2 (2025), section 3.
    """
    now = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    counts = jnp.isfinite(now).all() & (step >= 0)
    if sigma is None or recent is None:
        return counts, recent
    here = jnp.arange(WINDOW) == step % WINDOW
    others = jnp.where(here, jnp.nan, recent)
    high = now > jnp.nanmean(others, axis=1) + sigma * jnp.nanstd(others, axis=1)
    known = jnp.isfinite(others[0]).sum() >= LEAST
    return counts & ~(known & high.any()), jnp.where(here & counts, now[:, None], recent)


def as_saved(saved: Mapping[str, Any], shapes: Any) -> tuple[Any, str | None]:
    """What to read of a checkpoint where the guard is turned on (it remembers nothing) or off within a run.

    Args:
        saved: shape and dtype of the checkpoint's arrays, by path.
        shapes: the state's tree of ShapeDtypeStruct, as it is wanted.

    Returns:
        The tree to read, and the entry that has no place in the wanted one, if any.
    """
    if (RECENT in saved) == (RECENT in shapes):
        return shapes, None
    if RECENT in shapes:
        return {name: x for name, x in shapes.items() if name != RECENT}, None
    shape, dtype = saved[RECENT]
    return {**shapes, RECENT: jax.ShapeDtypeStruct(shape, dtype, sharding=shapes["step"].sharding)}, RECENT
