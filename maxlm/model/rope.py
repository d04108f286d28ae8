"""Rotary position embedding (Su et al., arXiv:2104.09864), halves layout as in Llama."""

import jax
import jax.numpy as jnp
import numpy as np


def rope(
    x_BTNH: jax.Array,
    positions_BT: jax.Array,
    theta: float,
    fraction: float = 1.0,
    scaling: tuple[float, float, float, int | None] | None = None,
) -> jax.Array:
    """Rotates the first `fraction` of each head's features by angles that grow with the position.

    Args:
        x_BTNH: queries or keys.
        positions_BT: int32 positions in tokens.
        theta: base wavelength.
        fraction: share of H that is rotated; an even number of features.
        scaling: the last four arguments of scaled; None leaves frequencies as they are.

    Returns:
        [B, T, N, H] in x's dtype; angles and products are float32.
    """
    H = x_BTNH.shape[-1]
    half = int(H * fraction) // 2
    features = np.arange(H)
    frequency = theta ** (-(features % half) / half)
    frequency = frequency if scaling is None else scaled(frequency, *scaling)
    frequency = np.where(features < 2 * half, frequency, 0.0).astype(np.float32)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    # The halves change places in a product with ones, which is exact: slices of less than 128 lanes cost TPUs more. Its
    # batch dim of one says to remat policies that it is no product with a weight.
    swap, lower = np.zeros((1, H, H), np.float32), np.arange(half)
    swap[0, lower + half, lower], swap[0, lower, lower + half] = -1, 1
    spec = jax.P(None, *jax.typeof(x_BTNH).sharding.spec)
    swap_ZHI = jnp.asarray(swap, x_BTNH.dtype)
    (swapped,) = jnp.einsum("ZBTNH,ZHI->ZBTNI", x_BTNH[None], swap_ZHI, precision="highest", out_sharding=spec)
    turned = x_BTNH.astype(jnp.float32) * jnp.cos(angle) + swapped.astype(jnp.float32) * jnp.sin(angle)
    return turned.astype(x_BTNH.dtype)


def scaled(frequency: np.ndarray, factor: float, low: float, high: float, positions: int | None) -> np.ndarray:
    """Frequencies for longer contexts than a model was trained on (Llama 3, arXiv:2407.21783, section 3.4).

    Args:
        frequency: in radians per token.
        factor: what the frequencies of long waves are divided by.
        low: waves that fit at most so often into `positions` are long.
        high: those that fit at least so often stay as they are; between the two it changes evenly.
        positions: context that the model was trained on, in tokens; None: all waves are long (linear scaling,
            arXiv:2306.15595).
    """
    if positions is None:
        return frequency / factor
    short = np.clip((positions * frequency / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    return frequency * (short + (1 - short) / factor)
