"""The yardstick of tools/bench_cpu.py: a Llama's train step in plain JAX, in one file, as one would write it by hand.

Weights are sharded over all devices (fsdp), layers run in a scan with full rematerialization, products are bfloat16,
the optimizer is AdamW behind a clipped norm. Constraints say that activations are split by rows and that a weight is
whole where it is used; the rest is left to the compiler. It reads the weights that maxlm has written, so that both
compute the same loss.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1))


def make_step(weights: dict[str, np.ndarray], heads: int, kv_heads: int) -> tuple[Mesh, Any, Any, Any]:
    """The mesh, a jitted step (params, opt_state, tokens [B, T + 1]) -> (params, opt_state, loss), its first state."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split = {"embed": 1, "unembed": 0, "o": 3, "down": 2, **dict.fromkeys(("q", "k", "v", "gate", "up"), 1)}

    def place(name: str, x: np.ndarray) -> NamedSharding:
        return NamedSharding(mesh, P(*("fsdp" if i == split.get(name) else None for i in range(x.ndim))))

    params = {name: jax.device_put(x, place(name, x)) for name, x in weights.items()}
    opt_state = OPTIMIZER.init(params)
    batch = NamedSharding(mesh, P("fsdp"))
    step = jax.jit(partial(_step, heads, kv_heads), donate_argnums=(0, 1), in_shardings=(None, None, batch))
    return mesh, step, params, opt_state


def _whole(weight: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(weight.astype(jnp.bfloat16), P())


def _rows(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, P("fsdp"))


def _norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return (y.astype(x.dtype) * weight.astype(x.dtype)).astype(x.dtype)


def _rope(x: jax.Array) -> jax.Array:
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def _layer(heads: int, kv_heads: int, x: jax.Array, w: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    x, w = _rows(x), {name: _whole(value) for name, value in w.items()}
    h = _norm(x, w["attention_norm"])
    q, k, v = (jnp.einsum("btd,dnh->btnh", h, w[name]) for name in "qkv")
    q, k = _rope(q), _rope(k)
    b, t, _, size = q.shape
    q = q.reshape(b, t, kv_heads, heads // kv_heads, size)
    logits = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * size**-0.5
    logits = jnp.where(jnp.tril(jnp.ones((t, t), bool)), logits, -1e30)
    o = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(logits, -1).astype(x.dtype), v).reshape(b, t, heads, size)
    x = x + jnp.einsum("btnh,nhd->btd", o, w["o"])
    h = _norm(x, w["mlp_norm"])
    return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None


def _loss(heads: int, kv_heads: int, params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
    outer = ("embed", "final_norm", "unembed")
    layers = {name: x for name, x in params.items() if name not in outer}
    x = _rows(_whole(params["embed"])[tokens[:, :-1]])
    layer = jax.checkpoint(partial(_layer, heads, kv_heads), policy=jax.checkpoint_policies.nothing_saveable)
    x, _ = jax.lax.scan(layer, x, layers)
    x = _norm(_rows(x), params["final_norm"])
    logits = jnp.einsum("btd,dv->btv", x, _whole(params["unembed"]), preferred_element_type=jnp.float32)
    hit = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - hit).mean()


def _step(heads: int, kv_heads: int, params: Any, opt_state: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
    loss, grads = jax.value_and_grad(partial(_loss, heads, kv_heads))(params, tokens)
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss
