"""The TPU's attention kernel, interpreted, against the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from maxlm.config import MeshConfig
from maxlm.kernels.attention import attention
from maxlm.kernels.splash import Splash
from maxlm.kernels.splash_blocks import KERNELS, Cost, Mask, choose, cycles
from maxlm.mesh import make_mesh
from maxlm.parallel.attention import sharded_attention, zigzag_order
from maxlm.sharding import compute_spec


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "window", "softcap", "packed", "blocks"),
    [
        (4, 2, 128, None, None, True, None),
        (2, 2, 64, 100, None, True, (128, 384, 128)),
        (4, 1, 256, None, 5.0, True, None),
        (2, 1, 128, None, None, False, (384, 128, 128)),
    ],
)
def test_equals_the_reference(num_heads, num_kv_heads, head_size, window, softcap, packed, blocks):
    rng = np.random.default_rng(0)
    B, T = 2, 384
    q, do = (rng.standard_normal((B, T, num_heads, head_size)).astype(np.float32) for _ in range(2))
    k, v = (rng.standard_normal((B, T, num_kv_heads, head_size)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(0, 4, (B, T)), 1).astype(np.int32) if packed else np.ones((B, T), np.int32)
    options = {"scale": head_size**-0.5, "window": window, "softcap": softcap}
    kernel = Splash(**options, interpret=True, blocks=blocks)
    documents = (segments, segments) if packed else None
    o, log_z = jax.jit(kernel.forward)(q, k, v, documents)
    grads = jax.jit(kernel.backward)(q, k, v, documents, o, log_z, do)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        want, pull = jax.vjp(
            lambda q, k, v: attention(q, k, v, jnp.asarray(segments), **options), *map(jnp.asarray, (q, k, v))
        )
        want_grads = pull(jnp.asarray(do))
    for got, wanted in zip((o, *grads), (want, *want_grads), strict=True):
        assert got.shape == wanted.shape
        assert np.abs(np.asarray(got) - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("mask", [Mask(1024, 1024), Mask(1024, 1024, window=200), Mask(512, 1024, causal=False)])
@pytest.mark.parametrize("kernel", ["fwd", "dkv"])
def test_a_kernel_costs_what_its_steps_do(mask, kernel):
    q, kv = np.arange(mask.num_queries)[:, None], np.arange(mask.num_keys)[None]
    seen = np.ones((mask.num_queries, mask.num_keys), bool)
    if mask.causal:
        seen = (kv <= q) & (q - kv < (mask.window or 10**9))
    blocks = seen.reshape(mask.num_queries // 128, 128, mask.num_keys // 256, 256).any((1, 3))
    blocks = blocks.T if kernel == "dkv" else blocks
    width = blocks.sum(1).max()
    want = 100 * blocks.sum() + 10 * (len(blocks) * width - blocks.sum()) + len(blocks)
    assert Cost((128, 256, 128), seen=100, hidden=10, ends=1).cycles(kernel, mask) == want


@pytest.mark.parametrize("chip", ["TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_blocks_are_chosen_by_their_cost(chip, head_size, kernel):
    for length in (1280, 8192):
        q, kv, compute = choose(chip, head_size, kernel, Mask(length, length))
        assert length % q == length % kv == kv % compute == 0
    assert choose(chip, head_size, kernel, Mask(8192, 8192))[1] >= 512
    assert cycles(chip, head_size, kernel, Mask(8192, 8192, window=512)) < 0.5 * cycles(
        chip, head_size, kernel, Mask(8192, 8192)
    )
    assert choose(chip, head_size, kernel, Mask(384, 384))[0] in (384, 128), "no measured block divides it"
    assert choose(chip, head_size, kernel, Mask(2304, 2304))[0] == (384 if head_size <= 128 else 256)
    assert choose("TPU v9", head_size, kernel, Mask(8192, 8192))[0] == (512 if head_size <= 128 else 256)


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
