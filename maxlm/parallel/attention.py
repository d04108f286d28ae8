"""Attention on sharded arrays: each device computes with its own heads, sequences and, over the context axis, tokens.

What a device computes is one of three kernels: plain XLA, or one that holds no logits: splash (TPU), or cuDNN's (GPU,
and not over the context axis: its backward pass takes no log-sum-exp from outside). Where tokens are split over the
context axis, keys and values of other shards come around a ring, or are gathered first.

Tokens lie in zigzag order there: of 2 n chunks, context shard i holds chunks i and 2 n - 1 - i. Under a causal mask
every shard then has the same work in each round of the ring (Liu et al., Ring Attention, arXiv:2310.01889; the order is
that of Llama 3, arXiv:2407.21783, section 3.3.2). In a round, keys of an earlier shard are seen by both own chunks but
only in their first half, keys of a later shard by the second own chunk alone: half the products are skipped.

The backward pass runs the ring again: only output and log-sum-exp are kept, gradients of keys and values travel with
them and are home after n rounds.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels import fused, splash, splash_blocks
from maxlm.kernels.attention import attention, chunk_backward, chunk_forward
from maxlm.parallel.island import island
from maxlm.sharding import compute_spec

AXIS = "context"


@dataclass(frozen=True)
class Options:
    """What is fixed at compile time.

    Attributes:
        kind: "ring" or "gather", over the context axis.
        local: "plain", "splash" or "cudnn", on a device.
        scale: multiplies the logits.
        window: keys that a query sees, itself included; None is all before it.
        softcap: bound of the logits.
        interpret: run splash on any machine, slowly, and plain XLA in cuDNN's place.
        packed: rows may hold several documents.
        chip: hardware.Chip.name of the devices, for splash's block sizes.
        causal: a query sees keys at its place and before; else all.
    """

    kind: str
    local: str
    scale: float
    window: int | None
    softcap: float | None
    interpret: bool = False
    packed: bool = True
    chip: str | None = None
    causal: bool = True


class Tokens(NamedTuple):
    """Where tokens are.

    Attributes:
        places: in the row, int32 [t].
        segments: document numbers, int32 [b, t].
    """

    places: jax.Array
    segments: jax.Array

    def cut(self, at: slice) -> "Tokens":
        """Some of them."""
        return Tokens(self.places[at], self.segments[:, at])


class Keys(NamedTuple):
    """Keys and values [b, s, k, h], and where they are."""

    k: jax.Array
    v: jax.Array
    tokens: Tokens

    def cut(self, at: slice) -> "Keys":
        """Some of them."""
        return Keys(self.k[:, at], self.v[:, at], self.tokens.cut(at))


def zigzag_order(num_tokens: int, num_shards: int) -> np.ndarray:
    """Place in the row of every token, int32 [T], in the order in which context shards hold them."""
    chunks = np.arange(num_tokens, dtype=np.int32).reshape(2 * num_shards, -1)
    pairs = [(chunks[i], chunks[-1 - i]) for i in range(num_shards)]
    return np.concatenate([part for pair in pairs for part in pair])


def sharded_attention(
    kind: str,
    local: str,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    interpret: bool = False,
    packed: bool = True,
    chip: str | None = None,
) -> jax.Array:
    """As kernels.attention.attention; arrays that are split over context are in zigzag order.

    Args:
        kind: "ring" or "gather".
        local: "plain", or "splash" or "cudnn" where they can.
        q_BTNH: queries.
        k_BTKH: keys.
        v_BTKH: values.
        segments_BT: int32 document numbers.
        scale: multiplies the logits.
        window: keys a query sees, itself included.
        softcap: bound of the logits.
        causal: a query sees keys at its place and before; else all.
        interpret: run splash on any machine, slowly, and plain XLA in cuDNN's place.
        packed: rows may hold several documents.
        chip: hardware.Chip.name of the devices, for splash's block sizes.
    """
    shards = _num_shards()
    blocks = q_BTNH.shape[1] // (shards if shards == 1 else 2 * shards)
    if local == "splash" and (not splash_blocks.fits(blocks) or (window is not None and shards > 1)):
        local = "plain"  # over context, windows would differ from round to round
    if local == "cudnn" and (shards > 1 or not fused.takes(q_BTNH.dtype, q_BTNH.shape[1], q_BTNH.shape[3], softcap)):
        local = "plain"
    if local == "plain" and shards == 1:
        options = {"scale": scale, "window": window, "softcap": softcap, "causal": causal}
        return attention(q_BTNH, k_BTKH, v_BTKH, segments_BT, **options)
    options = Options(kind, local, scale, window, softcap, interpret, packed, chip, causal)
    if local == "cudnn":
        return _fused_attention(options, q_BTNH, k_BTKH, v_BTKH, segments_BT)
    return _attention(options, q_BTNH, k_BTKH, v_BTKH, segments_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    return _attention_fwd(options, q, k, v, segments)[0]


def _attention_fwd(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> Any:
    out = (compute_spec("BTNH"), compute_spec("BNT"))
    o, log_z = _island(options, _forward, (q, k, v, segments), out)
    # for remat policies that keep what attention gives
    o, log_z = checkpoint_name(o, "attention_out"), checkpoint_name(log_z, "attention_out")
    return o, (q, k, v, segments, o, log_z)


def _attention_bwd(options: Options, saved: Any, do: jax.Array) -> Any:
    out = (compute_spec("BTNH"), compute_spec("BTKH"), compute_spec("BTKH"))
    return *_island(options, _backward, (*saved, do), out), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _fused(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    seen = segments if options.packed else None
    return fused.fused_attention(
        q,
        k,
        v,
        seen,
        scale=options.scale,
        window=options.window,
        causal=options.causal,
        on_gpu=not options.interpret,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused_attention(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    return island(partial(_fused, options), (q, k, v, segments), compute_spec("BTNH"), checked=False)


def _fused_bwd(options: Options, saved: Any, do: jax.Array) -> Any:
    def pull(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, do: jax.Array) -> Any:
        return jax.vjp(lambda q, k, v: _fused(options, q, k, v, segments), q, k, v)[1](do)

    out = (compute_spec("BTNH"), compute_spec("BTKH"), compute_spec("BTKH"))
    return *island(pull, (*saved, do), out, checked=False), None


_fused_attention.defvjp(lambda options, *arrays: (_fused_attention(options, *arrays), arrays), _fused_bwd)


def _island(options: Options, function: Any, arguments: Any, out: Any) -> Any:
    # splash does not say how its results vary over devices, so nobody can check it
    return island(partial(function, options), arguments, out, checked=options.local != "splash")


# ---- on one shard: b sequences, t tokens in two chunks, n heads


def _forward(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array
) -> tuple[jax.Array, jax.Array]:
    own = Keys(k, v, Tokens(_places(q.shape[1]), segments))
    o, log_z = _attend(options, True, q, own.tokens, own)
    if _num_shards() == 1:
        return o.astype(q.dtype), log_z

    def see(rows: slice, keys: slice, kv: Keys, state: Any) -> Any:
        old, old_z = state[0][:, rows], state[1][:, :, rows]
        new, new_z = _attend(options, False, q[:, rows], own.tokens.cut(rows), kv.cut(keys))
        log_z = jnp.logaddexp(old_z, new_z)
        share = lambda z: jnp.exp(z - log_z).swapaxes(1, 2)[..., None]  # noqa: E731
        o = old * share(old_z) + new.astype(jnp.float32) * share(new_z)
        return state[0].at[:, rows].set(o), state[1].at[:, :, rows].set(log_z)

    (o, log_z), _ = _rounds(options, own, (o.astype(jnp.float32), log_z), (), see)
    return o.astype(q.dtype), log_z


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
    own = Keys(k, v, Tokens(_places(q.shape[1]), segments))
    grads = _attend_back(options, True, (q, o, log_z, do), own.tokens, own)
    if _num_shards() > 1:

        def see(rows: slice, keys: slice, kv: Keys, state: Any) -> Any:
            queries = (q[:, rows], o[:, rows], log_z[:, :, rows], do[:, rows])
            new = _attend_back(options, False, queries, own.tokens.cut(rows), kv.cut(keys))
            places = (rows, keys, keys)
            add = lambda total, at, x: total.at[:, at].add(x.astype(jnp.float32))  # noqa: E731
            return tuple(map(add, state, places, new))

        dq, *travel = (x.astype(jnp.float32) for x in grads)
        (dq,), (dk, dv) = _rounds(options, own, (dq,), tuple(travel), see)
        grads = dq, dk, dv
    return tuple(g.astype(x.dtype) for g, x in zip(grads, (q, k, v), strict=True))


def _rounds(options: Options, own: Keys, stay: Any, travel: Any, see: Any) -> tuple[Any, Any]:
    """Shows the keys of all other shards to `see(rows, keys, kv, state)`, which updates state = (*stay, *travel).

    Args:
        options: ring or gather.
        own: keys of this shard.
        stay: what belongs to own queries.
        travel: what belongs to own keys (gradients): it goes where they go, and comes home.
        see: called with the query rows and the keys that may see each other.
    """
    t, count, everything, num_stay = own.k.shape[1], _num_shards(), slice(None), len(stay)
    low, high, me = slice(t // 2), slice(t // 2, None), jax.lax.axis_index(AXIS)

    def meet(step: jax.Array, kv: Keys, state: Any) -> Any:
        if not options.causal:
            return see(everything, everything, kv, state)
        earlier = (me - step) % count < me
        return jax.lax.cond(
            earlier,
            lambda state: see(everything, low, kv, state),
            lambda state: see(high, everything, kv, state),
            state,
        )

    if options.kind == "gather":
        return _gathered(own, stay, travel, meet)
    ring = [(i, (i + 1) % count) for i in range(count)]
    send = lambda x: jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), x)  # noqa: E731

    def turn(carry: Any, step: jax.Array) -> tuple[Any, None]:
        kv, state = carry
        arrived = meet(step, kv, state)
        # the keys are sent unseen: they travel while this round computes
        return (send(kv), (*arrived[:num_stay], *send(arrived[num_stay:]))), None

    (_, state), _ = jax.lax.scan(turn, (send(own), (*stay, *send(travel))), jnp.arange(1, count))
    return state[:num_stay], state[num_stay:]


def _gathered(own: Keys, stay: Any, travel: Any, meet: Any) -> tuple[Any, Any]:
    """As _rounds: keys of all shards are here, and gradients go home when all have been met."""
    count, me, num_stay = _num_shards(), jax.lax.axis_index(AXIS), len(stay)
    everyone = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS), own)

    def turn(stay: Any, step: jax.Array) -> tuple[Any, Any]:
        kv = jax.tree.map(lambda x: jnp.take(x, (me - step) % count, axis=0), everyone)
        state = meet(step, kv, (*stay, *jax.tree.map(jnp.zeros_like, travel)))
        return state[:num_stay], state[num_stay:]

    stay, found = jax.lax.scan(turn, stay, jnp.arange(1, count))

    def home(own: jax.Array, others: jax.Array) -> jax.Array:
        # others[i] belongs to the shard i + 1 before this one
        by_shard = jnp.concatenate([own[None], others])[(me - jnp.arange(count)) % count]
        return jax.lax.psum_scatter(by_shard, AXIS, scatter_dimension=0)

    return stay, tuple(map(home, travel, found))


def _attend(options: Options, own: bool, q: jax.Array, tokens: Tokens, kv: Keys) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, n, h] and log-sum-exp [b, n, t] of queries that see these keys alone; own keys are theirs."""
    if options.local == "splash":
        return _splash(options, own).forward(q, kv.k, kv.v, _segments(options, tokens, kv))
    seen = _seen(options, tokens, kv.tokens)
    return chunk_forward(q, kv.k, kv.v, seen, options.scale, options.softcap)


def _attend_back(options: Options, own: bool, queries: Any, tokens: Tokens, kv: Keys) -> Any:
    """Gradients by queries, keys and values of what _attend gives; queries are (q, o, log_z, do)."""
    q, o, log_z, do = queries
    if options.local == "splash":
        return _splash(options, own).backward(q, kv.k, kv.v, _segments(options, tokens, kv), o, log_z, do)
    seen = _seen(options, tokens, kv.tokens)
    return chunk_backward(q, o, log_z, do, kv.k, kv.v, seen, options.scale, options.softcap)


def _splash(options: Options, own: bool) -> splash.Splash:
    causal = own and options.causal
    return splash.Splash(options.scale, causal, options.window, options.softcap, options.interpret, options.chip)


def _segments(options: Options, tokens: Tokens, kv: Keys) -> tuple[jax.Array, jax.Array] | None:
    return (tokens.segments, kv.tokens.segments) if options.packed else None


def _seen(options: Options, queries: Tokens, keys: Tokens) -> jax.Array:
    """Which keys count: bool [b, t, s]."""
    distance = queries.places[:, None] - keys.places[None, :]
    near = distance >= 0 if options.window is None else (distance >= 0) & (distance < options.window)
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    return near[None] & same if options.causal else same


def _places(num_tokens: int) -> jax.Array:
    """Places in the row, int32 [t], of this shard's tokens."""
    if (count := _num_shards()) == 1:
        return jnp.arange(num_tokens, dtype=jnp.int32)
    order = zigzag_order(num_tokens * count, count).reshape(count, num_tokens)
    return jax.lax.dynamic_index_in_dim(jnp.asarray(order), jax.lax.axis_index(AXIS), 0, keepdims=False)


def _num_shards() -> int:
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)
