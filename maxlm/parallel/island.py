"""Islands: functions on local blocks, inside a program whose shardings live in types.

Autodiff through a shard_map that has other live axes makes residuals lose their sharding, so what runs in an island
brings its own backward pass (jax.custom_vjp around it), and nothing but its inputs and outputs crosses the shore.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def island(function: Callable[..., Any], arguments: Sequence[jax.Array], out_specs: Any) -> Any:
    """Calls a function on the local blocks of its arguments, manual over every axis that is not manual already.

    Args:
        function: local arrays -> local arrays. It may use collectives over any mesh axis.
        arguments: arrays; each is cut as its type says.
        out_specs: PartitionSpecs of what the function returns.
    """
    live = live_axes()
    if not live:
        return function(*arguments)
    in_specs = tuple(P(*jax.typeof(x).sharding.spec.partitions) for x in arguments)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=live)(*arguments)


def live_axes() -> frozenset[str]:
    """Axes of the current mesh that are not manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual)


def vary(tree: Any, axes: Sequence[str]) -> Any:
    """Marks arrays as different on each device along manual axes, which the carry of a scan has to say at its start."""

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)


def vary_like(tree: Any, like: jax.Array) -> Any:
    """As vary, with the axes along which `like` varies."""
    return vary(tree, tuple(jax.typeof(like).mat.varying))
