"""The GPU's attention, as plain XLA computes the same call, against the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from maxlm.config import MeshConfig
from maxlm.kernels.attention import attention
from maxlm.kernels.fused import runs_on, takes
from maxlm.mesh import make_mesh
from maxlm.parallel.attention import sharded_attention
from maxlm.sharding import compute_spec


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [True, False])
def test_equals_the_reference(window, packed):
    rng = np.random.default_rng(0)
    B, T, N, K, H = 4, 24, 4, 2, 16
    rounded = lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32)  # noqa: E731
    q, do = (rounded(rng.standard_normal((B, T, N, H))) for _ in range(2))
    k, v = (rounded(rng.standard_normal((B, T, K, H))) for _ in range(2))
    segments = np.sort(rng.integers(0, 4, (B, T)), 1).astype(np.int32) if packed else np.ones((B, T), np.int32)

    def run(function, q, k, v, do):
        o, pull = jax.vjp(function, q, k, v)
        return o, *pull(do)

    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(one), jax.default_matmul_precision("highest"):
        plain = lambda q, k, v: attention(q, k, v, jnp.asarray(segments), scale=0.3, window=window)  # noqa: E731
        want = run(plain, q, k, v, do)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    # JAX's function mixes types, which strict promotion refuses
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):
        put = lambda x, dims: jax.device_put(x.astype(jnp.bfloat16), compute_spec(dims))  # noqa: E731
        arrays = put(q, "BTNH"), put(k, "BTKH"), put(v, "BTKH"), put(do, "BTNH")
        where = jax.device_put(segments, compute_spec("BT"))
        options = {"scale": 0.3, "window": window, "interpret": True, "packed": packed}
        fused = lambda q, k, v: sharded_attention("ring", "cudnn", q, k, v, where, **options)  # noqa: E731
        got = jax.jit(lambda *arrays: run(fused, *arrays))(*arrays)
    for g, w in zip(got, want, strict=True):
        assert np.abs(np.asarray(g, np.float32) - w).max() <= 2e-2 * np.abs(w).max()


def test_what_it_does_not_take_is_plain():
    assert takes(jnp.dtype("bfloat16"), 24, 128, None)
    assert not takes(jnp.dtype("float32"), 24, 128, None)
    assert not takes(jnp.dtype("bfloat16"), 25, 128, None)
    assert not takes(jnp.dtype("bfloat16"), 24, 256, None)
    assert not takes(jnp.dtype("bfloat16"), 24, 64, 30.0)
    assert not runs_on(jax.devices()[0]), "a CPU"
