"""Weights on their way into a region that is manual over all mesh axes but tensor, and gradients on their way out.

What sharding.py says in types for the plain path is said here with collectives: gather over fsdp, one mesh axis at a
time, and on the way back scatter over fsdp and sum over replicas, slices last.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from maxlm.parallel.island import island, vary
from maxlm.sharding import PARAM, Axes, mesh_axes, replica_axes, spec, weight_dtype

STAGE = "stage"


def manual_axes() -> tuple[str, ...]:
    """Axes of the current mesh that such a region is manual over: all that are larger than one, but tensor."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(n for n in mesh.axis_names if n != "tensor" and mesh.shape[n] > 1)


def manual_spec(dims: str, table: dict[str, Axes]) -> P:
    """sharding.spec without the axes that stay in types. Call it outside the region."""
    manual = manual_axes()

    def kept(entry: Any) -> Any:
        names = tuple(n for n in ((entry,) if isinstance(entry, str) else entry or ()) if n in manual)
        return names if len(names) > 1 else names[0] if names else None

    return P(*(kept(entry) for entry in spec(dims, table).partitions))


@dataclass(frozen=True)
class Passage:
    """How one parameter crosses; made by `passage`.

    Attributes:
        dims: its dimension letters.
        spec: the manual axes of its resting place.
        fsdp: axes that split its D, outermost first.
        replicas: axes over which its gradient is summed, fastest network first.
    """

    dims: str
    spec: P
    fsdp: tuple[str, ...]
    replicas: tuple[str, ...]


def passage(dims: str) -> Passage:
    """The passage of a parameter with these dimension letters. Call it outside the region."""
    fsdp = mesh_axes("fsdp")
    replicas = (*(() if "D" in dims else fsdp), *replica_axes(dims))
    return Passage(dims, manual_spec(dims, PARAM), fsdp if "D" in dims else (), replicas)


def enter(w: jax.Array, way: Passage, dtype: Any) -> jax.Array:
    """Casts a parameter for use and gathers it over fsdp; the stage dim, of size one here, is dropped."""
    w = w.astype(weight_dtype(way.dims, dtype))
    for axis in reversed(way.fsdp):
        w = local(lambda x, axis=axis: lax.all_gather(x, axis, axis=way.dims.index("D"), tiled=True), w)
    return lax.squeeze(w, [way.dims.index("P")]) if "P" in way.dims else w


def leave(g: jax.Array, way: Passage) -> jax.Array:
    """Sums a float32 gradient over devices and scatters it, so that it lies as its parameter rests."""
    if "P" in way.dims:
        g = jnp.expand_dims(g, way.dims.index("P"))
    for axis in way.fsdp:
        scatter = lambda x, axis=axis: lax.psum_scatter(  # noqa: E731
            x, axis, scatter_dimension=way.dims.index("D"), tiled=True
        )
        g = local(scatter, g)
    *near, last = (None, *way.replicas)
    if last == "slice":  # alone: over the slow network goes what a slice has summed
        g = lax.psum(g, tuple(near[1:])) if near[1:] else g
        return lax.psum(g, last)
    return lax.psum(g, way.replicas) if way.replicas else g


def zeros_of_gradient(w: jax.Array) -> jax.Array:
    """Float32 zeros to which the gradients of a weight in use are added."""
    return vary(jnp.zeros(w.shape, jnp.float32, out_sharding=jax.typeof(w).sharding.spec), manual_axes())


def local(collective: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Runs a collective manual over tensor too: in a partly manual region it aborts on CPU or replicates on TPU."""
    return island(collective, [x], jax.typeof(x).sharding.spec)
