"""The TPU's attention kernel, interpreted, against the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from maxlm.config import MeshConfig
from maxlm.kernels.attention import attention
from maxlm.kernels.splash import Splash
from maxlm.mesh import make_mesh
from maxlm.parallel.attention import sharded_attention, zigzag_order
from maxlm.sharding import compute_spec


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "window", "softcap"),
    [(4, 2, 128, None, None), (2, 2, 64, 100, None), (4, 1, 256, None, 5.0)],
)
def test_equals_the_reference(num_heads, num_kv_heads, head_size, window, softcap):
    rng = np.random.default_rng(0)
    B, T = 2, 384
    q, do = (rng.standard_normal((B, T, num_heads, head_size)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((B, T, num_kv_heads, head_size)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(0, 4, (B, T)), 1).astype(np.int32)
    options = {"scale": head_size**-0.5, "window": window, "softcap": softcap}
    kernel = Splash(**options, interpret=True)
    o, log_z = kernel.forward(q, k, v, segments, segments)
    grads = kernel.backward(q, k, v, segments, segments, o, log_z, do)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        want, pull = jax.vjp(
            lambda q, k, v: attention(q, k, v, jnp.asarray(segments), **options), *map(jnp.asarray, (q, k, v))
        )
        want_grads = pull(jnp.asarray(do))
    for got, wanted in zip((o, *grads), (want, *want_grads), strict=True):
        assert got.shape == wanted.shape
        assert np.abs(np.asarray(got) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "gather"])
@pytest.mark.parametrize("context", [1, 2])
def test_on_a_mesh_equals_the_reference(context, kind):
    rng = np.random.default_rng(0)
    B, T, N, K, H = 2, 256 * context, 4, 2, 128
    q, do = (rng.standard_normal((B, T, N, H)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((B, T, K, H)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(0, 4, (B, T)), 1).astype(np.int32)
    order = zigzag_order(T, context) if context > 1 else np.arange(T)

    def run(function, *arrays):
        o, pull = jax.vjp(function, *arrays[:3])
        return o, *pull(arrays[3])

    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(one), jax.default_matmul_precision("highest"):
        plain = lambda q, k, v: attention(q, k, v, jnp.asarray(segments), scale=0.1, softcap=5.0)  # noqa: E731
        want = run(plain, *map(jnp.asarray, (q, k, v, do)))
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, context=context, tensor=2), jax.devices()[: 4 * context])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        put = lambda x, dims: jax.device_put(x[:, order], compute_spec(dims))  # noqa: E731
        arrays = put(q, "BTNH"), put(k, "BTKH"), put(v, "BTKH"), put(do, "BTNH")
        where = put(segments, "BT")
        options = {"scale": 0.1, "softcap": 5.0, "interpret": True}
        fused = lambda q, k, v: sharded_attention(kind, "splash", q, k, v, where, **options)  # noqa: E731
        got = jax.jit(lambda *arrays: run(fused, *arrays))(*arrays)
    for g, w in zip(got, want, strict=True):
        assert np.abs(np.asarray(g)[:, np.argsort(order)] - w).max() <= 1e-5 * np.abs(w).max()
