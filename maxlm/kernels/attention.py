"""Attention over packed rows. One signature; this is the plain XLA implementation, the reference of all others."""

import jax
import jax.numpy as jnp

from maxlm.sharding import compute_spec, constrain, einsum


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Causal grouped-query attention within segments, softmax in float32.

    Args:
        q_BTNH: queries; N is a multiple of K, and query head n uses key/value head n // (N / K).
        k_BSKH: keys, S == T.
        v_BSKH: values.
        segments_BT: int32 document numbers; a query sees keys of its own segment only.
        scale: multiplies the logits.
        window: keys a query sees, itself included; None means all before it.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118, 2.1).

    Returns:
        [B, T, N, H] in q's dtype.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = jax.lax.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=compute_spec("BTKGH"))
    logits = einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    seen = _seen_BTS(segments_BT, window)[:, None, None]
    logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    o_BTKGH = einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return jax.lax.reshape(o_BTKGH, (B, T, N, H), out_sharding=compute_spec("BTNH"))


def _seen_BTS(segments_BT: jax.Array, window: int | None) -> jax.Array:
    T = segments_BT.shape[1]
    distance = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    return constrain(same & near[None], "BTS")
