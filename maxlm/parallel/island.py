"""Islands: functions on local blocks, inside a program whose shardings live in types.

Autodiff through a shard_map that has other live axes makes residuals lose their sharding, so what runs in an island
brings its own backward pass (jax.custom_vjp around it), and nothing but its inputs and outputs crosses the shore.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def island(function: Callable[..., Any], arguments: Any, out_specs: Any, checked: bool = True) -> Any:
    """Calls a function on the local blocks of its arguments, manual over every axis that is not manual already.

    A weight whose type says that its gradient is summed over devices (reduced) is inside just different on each of
    them; a gradient whose out_spec says unreduced leaves as one term of that sum.

    Args:
        function: local arrays -> local arrays. It may use collectives over any mesh axis.
        arguments: a sequence of trees of arrays; each array is cut as its type says.
        out_specs: PartitionSpecs of what the function returns, as a tree prefix.
        checked: JAX checks that what leaves without an axis in its spec is the same along it. Without, results count as
            varying along all manual axes around that an argument varies along.
    """
    live = live_axes()
    if not live:
        return function(*arguments)
    in_specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tuple(arguments))

    def inside(*blocks: Any) -> Any:
        enter = lambda x, s: vary(x, tuple(s.reduced))  # noqa: E731
        blocks = jax.tree.map(enter, blocks, in_specs)
        leave = lambda s, tree: jax.tree.map(lambda x: _open(x, tuple(s.unreduced)), tree)  # noqa: E731
        return jax.tree.map(leave, out_specs, function(*blocks), is_leaf=lambda s: isinstance(s, P))

    run = jax.shard_map(inside, in_specs=in_specs, out_specs=out_specs, axis_names=live, check_vma=checked)
    results = run(*arguments)
    if checked:
        return results
    varying = [jax.typeof(x).mat.varying for x in jax.tree.leaves(arguments)]
    return vary(results, tuple(frozenset().union(*varying)))


def live_axes() -> frozenset[str]:
    """Axes of the current mesh that are not manual."""
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual)


def vary(tree: Any, axes: Sequence[str]) -> Any:
    """Marks arrays as different on each device along manual axes, which the carry of a scan has to say at its start."""

    def mark(x: jax.Array) -> jax.Array:
        for axis in axes:  # one by one: a weight may be reduced over one and the same along another
            if axis not in jax.typeof(x).mat.varying:
                x = jax.lax.pcast(x, axis, to="varying")
        return x

    return jax.tree.map(mark, tree)


def vary_like(tree: Any, like: jax.Array) -> Any:
    """As vary, with the axes along which `like` varies."""
    return vary(tree, tuple(jax.typeof(like).mat.varying))


def _open(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pcast(vary(x, axes), axes, to="unreduced") if axes else x
