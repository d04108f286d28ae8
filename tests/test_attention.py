"""Plain attention: long rows in blocks of queries give what one block gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config
from jax.sharding import AxisType

from maxlm.config import MeshConfig
from maxlm.kernels import attention as plain
from maxlm.mesh import make_mesh
from maxlm.sharding import compute_spec

assert small_config().train.seq_len < 64 * plain.NUM_BLOCKS, "other tests see one block, this one several"


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (100, 5.0), (1, None), (300, None)])
def test_blocks_change_no_number(window, softcap, monkeypatch):
    rng = np.random.default_rng(0)
    B, T, N, K, H = 2, 64 * plain.NUM_BLOCKS, 4, 2, 8
    draw = lambda heads: jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32)  # noqa: E731
    q, k, v, do = draw(N), draw(K), draw(K), draw(N)
    segments = jnp.asarray(np.sort(rng.integers(0, 4, (B, T)), 1), jnp.int32)

    def run(q, k, v, do, segments):
        attend = lambda q, k, v: plain.attention(q, k, v, segments, scale=0.3, window=window, softcap=softcap)  # noqa: E731
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(do)

    one = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with monkeypatch.context() as patch, jax.set_mesh(one):
        patch.setattr(plain, "NUM_BLOCKS", 1)
        want = jax.jit(run)(q, k, v, do, segments)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        dims = ("BTNH", "BTKH", "BTKH", "BTNH", "BT")
        placed = [jax.device_put(x, compute_spec(d)) for x, d in zip((q, k, v, do, segments), dims, strict=True)]
        logits = str(jax.jit(run).lower(*placed).as_text()).count(f"{T}x{T}")
        got = jax.jit(run)(*placed)
    assert logits == 0, "no block sees all keys of all queries"
    for g, w in zip(got, want, strict=True):  # with window=1 gradients by q and k are zero, but for rounding
        assert np.abs(np.asarray(g) - w).max() <= 1e-5 * max(1.0, np.abs(w).max())
