"""Layer stacks of other shapes: what one pipeline has saved, another mesh reads.

Stacked parameters, and optimizer state beside them, lead with (L,) on the plain path and with (R, P, K) in a pipeline:
R rounds, P stages, K repeats in each share. Both are the same order of layers, so that one is the reshape of the other;
a pipeline's stack may be filled up at its end.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

STACKED = "layers"
"""Name of the tree, in parameters and optimizer state, whose arrays are stacked."""


@dataclass(frozen=True)
class Stack:
    """How a program stacks its layers.

    Attributes:
        num_repeats: repeats of the layer pattern that are real.
        shape: leading dims of its stacked arrays.
    """

    num_repeats: int
    shape: tuple[int, ...]

    def fits(self, path: str, saved: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        """Whether an array on disk is an array of this program in another stack; path is such as params/layers/0."""
        if STACKED not in path.split("/"):
            return False
        own = wanted[len(self.shape) :]
        lead = saved[: len(saved) - len(own)]
        if saved[len(lead) :] != own:
            return False
        if len(lead) == 3:
            return -(-self.num_repeats // (lead[0] * lead[1])) == lead[2]
        return lead == (self.num_repeats,)

    def as_saved(self, saved: tuple[int, ...], wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Shape and place in which to read such an array; its layers are spread over the stages if they divide."""
        sharding = wanted.sharding
        assert isinstance(sharding, NamedSharding)
        own = (*sharding.spec, *(None,) * len(wanted.shape))[len(self.shape) : len(wanted.shape)]
        lead: list[str | None] = [None] * (len(saved) - len(own))
        stages = sharding.mesh.shape.get("stage", 1)
        for i in range(len(lead)):
            if stages > 1 and saved[i] % stages == 0:
                lead[i] = "stage"
                break
        place = NamedSharding(sharding.mesh, P(*lead, *own), memory_kind=sharding.memory_kind)
        return jax.ShapeDtypeStruct(saved, wanted.dtype, sharding=place)

    def restack(self, x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        """Gives an array read by as_saved the shape and place that are wanted."""
        sharding = wanted.sharding
        assert isinstance(sharding, NamedSharding)
        assert isinstance(sharding.mesh, Mesh)
        own = wanted.shape[len(self.shape) :]
        total = math.prod(self.shape)

        def run(x: jax.Array) -> jax.Array:
            flat = x.reshape(-1, *own)[:total]
            filled = jnp.concatenate([flat, jnp.zeros((total - len(flat), *own), x.dtype)])
            return filled.reshape(wanted.shape)

        here = jax.device_put(x, x.sharding.with_memory_kind("device"))  # what rests on the host, one array at a time
        with jax.set_mesh(sharding.mesh):
            auto = jax.sharding.auto_axes(run, out_sharding=sharding.spec)
            out = jax.jit(auto, out_shardings=sharding.with_memory_kind("device"))(here)
        out = jax.device_put(out, sharding)
        x.delete()  # of another shape, so it cannot be donated; the state is not held twice
        return out
