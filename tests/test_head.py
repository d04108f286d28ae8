"""Cross entropy in parts of the vocabulary: the plain one's numbers, and no logits in memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from maxlm.loss import cross_entropy
from maxlm.parallel.head import Options, head_cross_entropy
from maxlm.sharding import compute_spec, enter_step, leave_step, param_spec

B, T, D, V, REAL = 8, 6, 24, 1024, 1001
MESHES = [
    (),
    ("fsdp",),
    ("data", "fsdp", "tensor"),
    ("fsdp0", "fsdp1", "tensor"),
    ("context", "tensor"),
    ("expert", "fsdp"),
]


def make_mesh(axes):
    devices = np.array(jax.devices()[: 2 ** len(axes)]).reshape([2] * len(axes) or [1])
    return jax.sharding.Mesh(devices, axes or ("data",), axis_types=(AxisType.Explicit,) * max(1, len(axes)))


def objective(nll, log_z, weights):
    return (weights[0] * nll + weights[1] * log_z**2).sum()


def plain(dims, softcap, x, w, targets, weights):
    logits = jnp.einsum(f"BTD,{dims}->BTV", x, w, precision="highest")
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(jnp.arange(V)[None, None] < REAL, logits, jnp.finfo(jnp.float32).min)
    return objective(*cross_entropy(logits, targets), weights)


def data(dims):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D)).astype(np.float32)
    w = rng.standard_normal([{"D": D, "V": V}[d] for d in dims]).astype(np.float32)
    targets = rng.integers(0, REAL, (B, T)).astype(np.int32)
    return x, w, targets, rng.random((2, B, T)).astype(np.float32)


@pytest.mark.parametrize("gather_now", [False, True])
@pytest.mark.parametrize(("dims", "softcap", "num_parts"), [("DV", None, 3), ("VD", 5.0, 4), ("DV", 5.0, 1)], ids=str)
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_whole_logits(axes, dims, softcap, num_parts, gather_now):
    x, w, targets, weights = data(dims)
    with jax.set_mesh(make_mesh(())):
        want, want_grads = jax.value_and_grad(lambda x, w: plain(dims, softcap, x, w, targets, weights), (0, 1))(x, w)
    options = Options(dims, REAL, softcap, num_parts, jnp.float32)
    with jax.set_mesh(make_mesh(axes)):
        put = lambda a, d: jax.device_put(a, compute_spec(d))  # noqa: E731

        @jax.jit
        def run(x, w, targets, weights):
            held = enter_step(w, dims, jnp.float32, gather_now)

            def loss(x, w):
                nll, log_z = head_cross_entropy(options, x, w, targets)
                return objective(nll, log_z, weights)

            value, (dx, dw) = jax.value_and_grad(loss, (0, 1))(x, held)
            return value, (dx, leave_step(dw, dims))

        with jax.default_matmul_precision("highest"):
            got, got_grads = run(
                put(x, "BTD"), jax.device_put(w, param_spec(dims)), put(targets, "BT"), put(weights, "MBT")
            )
    assert float(got) == pytest.approx(float(want), rel=1e-5)
    for g, wanted in zip(got_grads, want_grads, strict=True):
        assert np.abs(np.asarray(g) - wanted).max() <= 1e-5 * np.abs(wanted).max()
