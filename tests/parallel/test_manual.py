"""Weights on their way into a manual region."""

import jax
import jax.numpy as jnp

from maxlm.config import MeshConfig
from maxlm.mesh import make_mesh
from maxlm.parallel.manual import enter, passage


def test_weights_enter_in_the_compute_dtype_and_routers_in_float32():
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])):
        types = {dims: enter(jnp.ones((4, 2)), passage(dims), jnp.bfloat16).dtype for dims in ("DF", "DX")}
    assert types == {"DF": jnp.bfloat16, "DX": jnp.float32}
