"""What the next token is: the likeliest, or one that is drawn."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

LOWEST = float(jnp.finfo(jnp.float32).min)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Applied in this order, as transformers does.

    Attributes:
        temperature: divides logits; 0 takes the likeliest token, and the others do nothing.
        top_k: only so many of the likeliest tokens; 0: all.
        top_p: only the likeliest tokens whose probabilities together reach this (Holtzman et al., arXiv:1904.09751).
        min_p: only tokens with at least this share of the likeliest one's probability (arXiv:2407.01082).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Raises: ValueError: a value that says nothing."""
        if not 0 <= self.temperature < 1e6:
            raise ValueError(f"temperature={self.temperature} must be 0 (the likeliest token) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a count of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p={self.min_p} must be at least 0 and below 1")


def draw(
    logits_BV: jax.Array, sampling: Sampling, seed: jax.Array, numbers_B: jax.Array, counts_B: jax.Array
) -> jax.Array:
    """Next tokens.

    Args:
        logits_BV: float32; padding of the vocabulary is the lowest float.
        sampling: how they are drawn.
        seed: int32 scalar.
        numbers_B: int32, of the prompts.
        counts_B: int32, tokens of each row so far. What is drawn hangs on seed, number and count alone: not on the
            batch that a prompt is in.

    Returns:
        int32 [B], on all devices.
    """
    logits_BV = jax.reshard(logits_BV, jax.P(None, None))
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = kept_logits(logits_BV / sampling.temperature, sampling)
    key = jax.random.key(seed)
    keys_B = jax.vmap(lambda n, c: jax.random.fold_in(jax.random.fold_in(key, n), c))(numbers_B, counts_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def kept_logits(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of which those that are not to be drawn are the lowest float; the likeliest one always stays."""
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        last = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < last, LOWEST, logits_BV)
    if sampling.top_p < 1:
        falling = jnp.flip(jnp.sort(logits_BV, axis=-1), -1)
        chances = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(chances, axis=-1) - chances
        last = jnp.where(before < sampling.top_p, falling, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < last, LOWEST, logits_BV)
    if sampling.min_p > 0:
        least = logits_BV.max(-1, keepdims=True) + jnp.log(sampling.min_p)
        logits_BV = jnp.where(logits_BV < least, LOWEST, logits_BV)
    return logits_BV
