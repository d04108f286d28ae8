"""Dropout that is the same on every mesh: what is dropped hangs on the token, not on the device that holds it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Drop = Callable[[jax.Array, jax.Array | int], jax.Array]
"""(x [..., D], number of the place in the model) -> x, some of it dropped."""

GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: its multiples are far apart


def keep_all(x: jax.Array, place: jax.Array | int) -> jax.Array:
    """A Drop that drops nothing: evaluation, and training without dropout."""
    del place
    return x


def dropout(rate: float, noise: jax.Array, x: jax.Array, place: jax.Array | int) -> jax.Array:
    """Zeroes features of each token with a probability, and scales up the others (Srivastava et al., 2014).

    Whether one is kept is a hash of its token's random word, the place and its index: no generator's state, no key per
    device, and the backward pass finds the same ones again.

    Args:
        rate: the probability.
        noise: uint32 [...], a random word for each token of this step.
        x: [..., D].
        place: number of the place in the model: others there, other features.
    """
    word = mix_bits(noise ^ mix_bits(jnp.asarray(place, jnp.uint32) + np.uint32(1)))
    features = jax.lax.broadcasted_iota(jnp.uint32, (*[1] * noise.ndim, x.shape[-1]), noise.ndim) * np.uint32(GOLDEN)
    kept = mix_bits(word[..., None] + features) >= np.uint32(rate * 2**32)
    return jnp.where(kept, x.astype(jnp.float32) * np.float32(1 / (1 - rate)), 0.0).astype(x.dtype)


def mix_bits(x: jax.Array) -> jax.Array:
    """Every bit of a uint32 changes every other with probability 1/2 (finalizer of MurmurHash3, A. Appleby)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
