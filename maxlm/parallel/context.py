"""Attention over sequences that are split over the context axis: by a ring of keys and values, or gathered.

Tokens lie in zigzag order: of 2 n chunks, context shard i holds chunks i and 2 n - 1 - i. Under a causal mask every
shard then has the same work in each round of the ring (Liu et al., Ring Attention, arXiv:2310.01889; the order is that
of Llama 3, arXiv:2407.21783, section 3.3.2). In a round, keys of an earlier shard are seen by both own chunks but only
in their first half, keys of a later shard by the second own chunk alone: half the products are skipped, not masked.

The backward pass runs the ring again: only output and log-sum-exp are kept, gradients of keys and values travel with
them and are home after n rounds.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.parallel.island import island, vary_like
from maxlm.sharding import compute_spec

AXIS = "context"
LOWEST = float(jnp.finfo(jnp.float32).min)
Keys = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
"""keys and values [B, S, K, H], places in the row [S] and document numbers [B, S] of the keys in hand."""


@dataclass(frozen=True)
class Options:
    """What is fixed at compile time: ring or gather, and the kernel's scale, window and softcap."""

    kind: str
    scale: float
    window: int | None
    softcap: float | None


def zigzag_order(num_tokens: int, num_shards: int) -> np.ndarray:
    """Place in the row of every token, int32 [T], in the order in which context shards hold them."""
    chunks = np.arange(num_tokens, dtype=np.int32).reshape(2 * num_shards, -1)
    pairs = [(chunks[i], chunks[-1 - i]) for i in range(num_shards)]
    return np.concatenate([part for pair in pairs for part in pair])


def context_attention(
    kind: str,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """As kernels.attention.attention, for arrays split over context in zigzag order.

    Args:
        kind: "ring" or "gather".
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        segments_BT: int32 document numbers.
        scale: multiplies the logits.
        window: keys a query sees, itself included.
        softcap: bound of the logits.
    """
    return _attention(Options(kind, scale, window, softcap), q_BTNH, k_BTKH, v_BTKH, segments_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    return _attention_fwd(options, q, k, v, segments)[0]


def _attention_fwd(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
    out = (compute_spec("BTNH"), compute_spec("BTN"))
    o, log_z = island(partial(_forward, options), (q, k, v, segments), out)
    return o, (q, k, v, segments, o, log_z)


def _attention_bwd(options: Options, saved: Any, do: jax.Array) -> Any:
    out = (compute_spec("BTNH"), compute_spec("BTKH"), compute_spec("BTKH"))
    return *island(partial(_backward, options), (*saved, do), out), None


_attention.defvjp(_attention_fwd, _attention_bwd)


# ---- on one shard: b sequences, t tokens in two chunks, k key/value heads, g query heads for each


def _forward(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    b, t, n, h = q.shape
    grouped = q.reshape(b, t, k.shape[2], -1, h)
    own = (k, v, _places(t), segments)
    stats = jnp.full(grouped.shape[:-1], LOWEST), jnp.zeros(grouped.shape[:-1]), jnp.zeros(grouped.shape)
    start = vary_like(stats, q)

    def see(rows: slice, keys: slice, kv: Keys, state: Any) -> Any:
        logits, seen = _logits(options, grouped[:, rows], own[2][rows], segments[:, rows], _cut(kv, keys))
        top, total, sums = (x[:, rows] for x in state)
        new_top = jnp.maximum(top, logits.max(-1))
        weights = jnp.where(seen, jnp.exp(logits - new_top[..., None]), 0.0)
        shrink = jnp.exp(top - new_top)
        products = jnp.einsum(
            "btkgs,bskh->btkgh", weights.astype(v.dtype), _cut(kv, keys)[1], preferred_element_type=jnp.float32
        )
        new = new_top, total * shrink + weights.sum(-1), sums * shrink[..., None] + products
        return tuple(x.at[:, rows].set(y) for x, y in zip(state, new, strict=True))

    (top, total, sums), _ = _rounds(options, own, start, (), see)
    o = (sums / total[..., None]).astype(q.dtype)
    return o.reshape(b, t, n, h), (top + jnp.log(total)).reshape(b, t, n)


def _backward(
    options: Options,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    o: jax.Array,
    log_z: jax.Array,
    do: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    b, t = q.shape[:2]
    group = lambda x: x.reshape(b, t, k.shape[2], -1, *x.shape[3:])  # noqa: E731
    q_, do_, log_z_ = group(q), group(do), group(log_z)
    drift = group((do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1))
    own = (k, v, _places(t), segments)
    zeros = vary_like((jnp.zeros(q_.shape), jnp.zeros(k.shape), jnp.zeros(v.shape)), q)

    def see(rows: slice, keys: slice, kv: Keys, state: Any) -> Any:
        dq, dk, dv = state
        k_, v_, *_ = part = _cut(kv, keys)
        logits, seen = _logits(options, q_[:, rows], own[2][rows], segments[:, rows], part)
        weights = jnp.where(seen, jnp.exp(logits - log_z_[:, rows, ..., None]), 0.0)
        d_weights = jnp.einsum("btkgh,bskh->btkgs", do_[:, rows], v_, preferred_element_type=jnp.float32)
        d_logits = weights * (d_weights - drift[:, rows, ..., None])
        if options.softcap is not None:
            d_logits *= 1 - jnp.square(jnp.where(seen, logits, 0.0) / options.softcap)
        d_logits = (d_logits * options.scale).astype(q.dtype)
        products = {"preferred_element_type": jnp.float32}
        dq = dq.at[:, rows].add(jnp.einsum("btkgs,bskh->btkgh", d_logits, k_, **products))
        dk = dk.at[:, keys].add(jnp.einsum("btkgs,btkgh->bskh", d_logits, q_[:, rows], **products))
        dv = dv.at[:, keys].add(jnp.einsum("btkgs,btkgh->bskh", weights.astype(do.dtype), do_[:, rows], **products))
        return dq, dk, dv

    dq, (dk, dv) = _rounds(options, own, zeros[:1], zeros[1:], see)
    return dq[0].reshape(q.shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _rounds(options: Options, own: Keys, stay: Any, travel: Any, see: Any) -> tuple[Any, Any]:
    """Shows all keys to `see(rows, keys, kv, state)`, which updates state = (*stay, *travel).

    Args:
        options: ring or gather.
        own: keys of this shard.
        stay: what belongs to own queries.
        travel: what belongs to keys (gradients): it goes where they go, and comes home.
        see: called with the query rows and the keys that may see each other.
    """
    t, count, everything = own[2].shape[0], jax.lax.axis_size(AXIS), slice(None)
    if options.kind == "gather":
        return _gathered(own, stay, travel, see)
    low, high, me = slice(t // 2), slice(t // 2, None), jax.lax.axis_index(AXIS)
    ring = [(i, (i + 1) % count) for i in range(count)]
    send = lambda x: jax.lax.ppermute(x, AXIS, ring)  # noqa: E731
    num_stay = len(stay)

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        kv, state = carry
        earlier = (me - step) % count < me
        arrived = jax.lax.cond(
            earlier,
            lambda state: see(everything, low, kv, state),
            lambda state: see(high, everything, kv, state),
            state,
        )
        # the keys are sent unseen: they travel while this round computes
        return (jax.tree.map(send, kv), (*arrived[:num_stay], *jax.tree.map(send, arrived[num_stay:]))), None

    state = see(everything, everything, own, (*stay, *travel))
    state = (*state[:num_stay], *jax.tree.map(send, state[num_stay:]))
    (_, state), _ = jax.lax.scan(turn, (jax.tree.map(send, own), state), jnp.arange(1, count))
    return state[:num_stay], state[num_stay:]


def _gathered(own: Keys, stay: Any, travel: Any, see: Any) -> tuple[Any, Any]:
    gather = lambda x, axis: jax.lax.all_gather(x, AXIS, axis=axis, tiled=True)  # noqa: E731
    kv = (gather(own[0], 1), gather(own[1], 1), gather(own[2], 0), gather(own[3], 1))
    count = jax.lax.axis_size(AXIS)
    wide = tuple(jnp.concatenate([x] * count, axis=1) for x in travel)
    state = see(slice(None), slice(None), kv, (*stay, *wide))
    home = [jax.lax.psum_scatter(x, AXIS, scatter_dimension=1, tiled=True) for x in state[len(stay) :]]
    return state[: len(stay)], tuple(home)


def _places(num_tokens: int) -> jax.Array:
    """Places in the row, int32 [t], of this shard's tokens."""
    count = jax.lax.axis_size(AXIS)
    order = zigzag_order(num_tokens * count, count).reshape(count, num_tokens)
    return jax.lax.dynamic_index_in_dim(jnp.asarray(order), jax.lax.axis_index(AXIS), 0, keepdims=False)


def _cut(kv: Keys, keys: slice) -> Keys:
    return kv[0][:, keys], kv[1][:, keys], kv[2][keys], kv[3][:, keys]


def _logits(
    options: Options, q: jax.Array, places: jax.Array, segments: jax.Array, kv: Keys
) -> tuple[jax.Array, jax.Array]:
    """float32 logits [b, t, k, g, s], and which of them count; those that do not are the lowest float."""
    logits = jnp.einsum("btkgh,bskh->btkgs", q, kv[0], preferred_element_type=jnp.float32) * options.scale
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    distance = places[:, None] - kv[2][None, :]
    near = distance >= 0 if options.window is None else (distance >= 0) & (distance < options.window)
    seen = (near[None] & (segments[:, :, None] == kv[3][:, None, :]))[:, :, None, None]
    return jnp.where(seen, logits, LOWEST), jnp.broadcast_to(seen, logits.shape)
