"""Rotary position embedding (Su et al., arXiv:2104.09864), halves layout as in Llama."""

import jax
import jax.numpy as jnp


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, fraction: float = 1.0) -> jax.Array:
    """Rotates the first `fraction` of each head's features by angles that grow with the position.

    Args:
        x_BTNH: queries or keys.
        positions_BT: int32 positions in tokens.
        theta: base wavelength.
        fraction: share of H that is rotated; an even number of features.

    Returns:
        [B, T, N, H] in x's dtype; angles and products are float32.
    """
    H = x_BTNH.shape[-1]
    half = int(H * fraction) // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x = x_BTNH.astype(jnp.float32)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x_BTNH.dtype)
