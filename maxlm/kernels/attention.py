"""Attention over packed rows in plain XLA: the reference of all others, and what they are made of on a device."""

import jax
import jax.numpy as jnp

from maxlm.sharding import compute_spec, constrain, einsum

NUM_BLOCKS = 4
"""Blocks of queries in a long row, each with the keys that it may see: of the logits, 5/8 are computed."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
) -> jax.Array:
    """Grouped-query attention within segments, softmax in float32.

    Args:
        q_BTNH: queries; N is a multiple of K, and query head n uses key/value head n // (N / K).
        k_BSKH: keys, S == T.
        v_BSKH: values.
        segments_BT: int32 document numbers; a query sees keys of its own segment only.
        scale: multiplies the logits.
        window: keys a query sees, itself included; None means all before it.
        softcap: logits become softcap * tanh(logits / softcap) (Gemma 2, arXiv:2408.00118, 2.1).
        causal: a query sees keys at its place and before; else all (window is None then).

    Returns:
        [B, T, N, H] in q's dtype.
    """
    T = q_BTNH.shape[1]
    count = NUM_BLOCKS if T % NUM_BLOCKS == 0 and T >= 64 * NUM_BLOCKS else 1
    outs = []
    # blocks of queries: the keys behind a block, or too far before it, are left out
    for start in range(0, T, T // count):
        stop = start + T // count
        rows, keys = slice(start, stop), slice(0 if window is None else max(0, start - window + 1), stop)
        keys = keys if causal else slice(0, T)
        seen = _seen_BTS(segments_BT, rows, keys, window, causal)
        outs.append(attend(q_BTNH[:, rows], k_BSKH[:, keys], v_BSKH[:, keys], seen, scale, softcap))
    return outs[0] if count == 1 else jnp.concatenate(outs, axis=1)


def attend(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, seen_BTS: jax.Array, scale: float, softcap: float | None
) -> jax.Array:
    """Attention of queries to the keys that `seen_BTS` (bool) says; else as attention."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = jax.lax.reshape(q_BTNH, (B, T, K, N // K, H), out_sharding=compute_spec("BTKGH"))
    logits = _logits(q_BTKGH, k_BSKH) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(seen_BTS[:, None, None], logits, jnp.finfo(jnp.float32).min)
    return jax.lax.reshape(_mix(logits, v_BSKH), (B, T, N, H), out_sharding=compute_spec("BTNH"))


def _logits(q_BTKGH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    # in this order XLA for CPUs writes the product as it is needed, and not transposed
    return einsum("BSKH,BTKGH->BKGTS", k_BSKH, q_BTKGH, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _mix(logits_BKGTS: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Softmax of the logits times the values, [B, T, K, G, H]."""
    return _mix_forward(logits_BKGTS, v_BSKH)[0]


def _mix_forward(logits: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    o = einsum("BKGTS,BSKH->BTKGH", weights, v)
    return o, (weights, v, o)


def _mix_backward(saved: tuple[jax.Array, jax.Array, jax.Array], do: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights, v, o = saved
    dv = einsum("BKGTS,BTKGH->BSKH", weights, do)
    d_weights = _logits(do, v)
    # sum over keys of weight times gradient, by the much smaller output (FlashAttention, arXiv:2205.14135, B.2)
    drift = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1)
    return weights.astype(jnp.float32) * (d_weights - jnp.moveaxis(drift, 1, -1)[..., None]), dv


_mix.defvjp(_mix_forward, _mix_backward)


def _seen_BTS(segments_BT: jax.Array, rows: slice, keys: slice, window: int | None, causal: bool) -> jax.Array:
    distance = jnp.arange(rows.start, rows.stop)[:, None] - jnp.arange(keys.start, keys.stop)[None, :]
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = segments_BT[:, rows, None] == segments_BT[:, None, keys]
    return constrain(same & near[None] if causal else same, "BTS")


def chunk_forward(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen_BTS: jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to some keys, on one device.

    Args:
        q_BTNH: queries.
        k_BSKH: keys.
        v_BSKH: values.
        seen_BTS: bool, the keys that count for a query; none may.
        scale: multiplies the logits.
        softcap: bound of the logits.

    Returns:
        Output [B, T, N, H] and log-sum-exp of the logits [B, N, T], float32.
    """
    B, T, N, H = q_BTNH.shape
    logits, seen = _chunk_logits(q_BTNH, k_BSKH, seen_BTS, scale, softcap)
    top = logits.max(-1)
    weights = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
    total = weights.sum(-1)
    total = jnp.where(total > 0, total, 1.0)
    sums = jnp.einsum("btkgs,bskh->btkgh", weights.astype(v_BSKH.dtype), v_BSKH, preferred_element_type=jnp.float32)
    log_z = (top + jnp.log(total)).reshape(B, T, N).swapaxes(1, 2)
    return (sums / total[..., None]).reshape(B, T, N, H), log_z


def chunk_backward(
    q_BTNH: jax.Array,
    o_BTNH: jax.Array,
    log_z_BNT: jax.Array,
    do_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen_BTS: jax.Array,
    scale: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients by q, k and v, float32, of attention to all keys, as far as it goes through these.

    Args:
        q_BTNH: queries.
        o_BTNH: output over all keys.
        log_z_BNT: log-sum-exp of the logits of all keys.
        do_BTNH: gradient by the output.
        k_BSKH: keys.
        v_BSKH: values.
        seen_BTS: bool, the keys that count for a query.
        scale: multiplies the logits.
        softcap: bound of the logits.
    """
    B, T, _, _ = q_BTNH.shape
    group = lambda x: x.reshape(B, T, k_BSKH.shape[2], -1, *x.shape[3:])  # noqa: E731
    q, do, log_z = group(q_BTNH), group(do_BTNH), group(log_z_BNT.swapaxes(1, 2))
    drift = group((do_BTNH.astype(jnp.float32) * o_BTNH.astype(jnp.float32)).sum(-1))
    logits, seen = _chunk_logits(q_BTNH, k_BSKH, seen_BTS, scale, softcap)
    weights = jnp.where(seen, jnp.exp(logits - log_z[..., None]), 0.0)
    products = {"preferred_element_type": jnp.float32}
    d_logits = weights * (jnp.einsum("btkgh,bskh->btkgs", do, v_BSKH, **products) - drift[..., None])
    if softcap is not None:
        d_logits *= 1 - jnp.square(jnp.where(seen, logits, 0.0) / softcap)
    d_logits = (d_logits * scale).astype(q.dtype)
    dq = jnp.einsum("btkgs,bskh->btkgh", d_logits, k_BSKH, **products).reshape(q_BTNH.shape)
    dk = jnp.einsum("btkgs,btkgh->bskh", d_logits, q, **products)
    return dq, dk, jnp.einsum("btkgs,btkgh->bskh", weights.astype(do.dtype), do, **products)


def _chunk_logits(
    q_BTNH: jax.Array, k_BSKH: jax.Array, seen_BTS: jax.Array, scale: float, softcap: float | None
) -> tuple[jax.Array, jax.Array]:
    """float32 logits [B, T, K, G, S], and which of them count; those that do not are the lowest float."""
    B, T, _, H = q_BTNH.shape
    q = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H)
    logits = jnp.einsum("btkgh,bskh->btkgs", q, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    seen = jnp.broadcast_to(seen_BTS[:, :, None, None], logits.shape)
    return jnp.where(seen, logits, jnp.finfo(jnp.float32).min), seen
