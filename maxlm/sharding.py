"""Sharding as two tables, one for parameters at rest and one for activations.

Keys are the dimension letters of DESIGN (B batch, T length, S key length, U length where a pipeline's input waits, D
model, N query heads, K key/value heads, G query heads per key/value head, J key/value heads too few to split, H head
size, F feed-forward, E experts, X experts as a router sees them, A experts that a token visits, C capacity: rows that
devices keep for their experts' tokens, V vocabulary, Y token types, O model after the head's transform, L layers, R
rounds and P stages of a pipeline, M microbatches, Z rank of an adapter); values are logical mesh axes. A logical axis
may be several mesh axes (fsdp0, fsdp1: see mesh.py); axes of size one are left out.

Weights are float32 and sharded at rest. `gather` brings one into a layer: cast, then all-gathered over fsdp, with a
type that names fsdp and the axes of replicas as *reduced*, so that its gradient comes out unreduced over them and meets
exactly one reduce-scatter. `enter_step` and `leave_step` stand around all loops of a step: there the all-reduce over
replicas happens, once.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

Axes = str | tuple[str, ...] | None

PARAM: dict[str, Axes] = {
    "V": "tensor",
    "D": "fsdp",
    "O": None,
    "N": "tensor",
    "K": "tensor",
    "H": None,
    "J": None,
    "F": "tensor",
    "E": "expert",
    "X": None,
    "L": None,
    "R": None,
    "P": "stage",
    "T": None,
    "Y": None,
    "Z": None,
}
"""Where parameters rest. T is the rows of a learned position table."""

COMPUTE: dict[str, Axes] = {
    "M": None,
    "B": ("slice", "data", "fsdp", "expert"),
    "T": "context",
    "U": ("context", "stage"),
    "S": None,
    "D": None,
    "O": None,
    "N": "tensor",
    "K": "tensor",
    "J": None,
    "G": None,
    "H": None,
    "F": "tensor",
    "V": "tensor",
    "E": "expert",
    "X": None,
    "A": None,
    "Z": None,
    "C": ("slice", "data", "fsdp", "expert", "context"),
}
"""Where activations, and weights in use, live."""

REPLICAS = ("stage", "context", "expert", "data", "slice")
"""Axes over which a weight that is not split over them is a replica: its gradient is summed there once a step."""


def mesh_axes(logical: str) -> tuple[str, ...]:
    """Mesh axes of the current mesh, larger than one, that carry a logical axis, outermost first.

    Inside a shard_map its manual axes are left out: types do not speak of them.
    """
    return _axes_of_kind(logical, AxisType.Explicit)


def manual_axes(letter: str) -> tuple[str, ...]:
    """Mesh axes larger than one that split a dimension of activations and are manual here: collectives name them."""
    return tuple(n for axis in _logical(COMPUTE[letter]) for n in _axes_of_kind(axis, AxisType.Manual))


def axis_size(*logical: str) -> int:
    """Number of devices along logical axes of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[n] for axis in logical for n in mesh_axes(axis))


def num_shards(dims: str) -> int:
    """Number of devices over which an activation with these dimensions is split."""
    return math.prod(axis_size(axis) for letter in dims for axis in _logical(COMPUTE[letter]))


def replica_axes(dims: str) -> tuple[str, ...]:
    """Mesh axes over which a parameter is replicated, fastest network first."""
    own = {axis for letter in dims for axis in _logical(PARAM[letter])}
    return tuple(n for axis in REPLICAS if axis not in own for n in mesh_axes(axis))


def spec(dims: str, table: dict[str, Axes], **kinds: Any) -> P:
    """PartitionSpec of an array whose dimensions are `dims`, on the current mesh.

    Args:
        dims: one letter per dimension, such as "BTD".
        table: PARAM or COMPUTE.
        **kinds: `reduced=` or `unreduced=` sets of mesh axes.
    """
    entries: list[Axes] = []
    for letter in dims:
        names = [n for axis in _logical(table[letter]) for n in mesh_axes(axis)]
        entries.append(tuple(names) if len(names) > 1 else names[0] if names else None)
    return P(*entries, **kinds)


def param_spec(dims: str) -> P:
    """Where a parameter, its gradient and its master copy rest."""
    return spec(dims, PARAM)


def update_spec(dims: str, shape: tuple[int, ...], over_data: bool) -> P:
    """Where a parameter is updated and its optimizer state rests: as it rests, or D is split over data too.

    Over data only where D divides.
    """
    split = "D" in dims and shape[dims.index("D")] % axis_size("fsdp", "data") == 0
    return spec(dims, {**PARAM, "D": ("fsdp", "data")} if over_data and split else PARAM)


def compute_spec(dims: str) -> P:
    """Where an activation lives."""
    return spec(dims, COMPUTE)


def constrain(x: jax.Array, dims: str) -> jax.Array:
    """Gives an activation its sharding; free when it has it already."""
    return jax.reshard(x, compute_spec(dims))


def einsum(subscripts: str, *operands: jax.Array, **options: Any) -> jax.Array:
    """jnp.einsum whose letters are also the output's sharding, so a contracted sharded dim names its all-reduce.

    A weight that is no array but has an einsum of its own (parallel/quantized.py) comes last, and is asked.
    """
    if hasattr(operands[-1], "einsum"):
        return operands[-1].einsum(subscripts, *operands[:-1], **options)
    return jnp.einsum(subscripts, *operands, out_sharding=compute_spec(subscripts.split("->")[1]), **options)


def weight_dtype(dims: str, dtype: Any) -> Any:
    """Type of a weight in use: the compute dtype, but float32 for routers, whose choices must not hang on rounding."""
    return jnp.float32 if "X" in dims else dtype


def gather(w: jax.Array, dims: str, dtype: Any) -> jax.Array:
    """Brings a weight into the computation: cast, then whole over fsdp, still split over tensor.

    The cast comes first so that bytes travel, and gradients return, in the compute dtype.

    Args:
        w: float32 weight as enter_step left it, or one that is gathered already (returned as it is).
        dims: its dimension letters.
        dtype: compute dtype.
    """
    fsdp, w = frozenset(mesh_axes("fsdp")), w.astype(weight_dtype(dims, dtype))
    return w if fsdp <= _reduced(w) else _all_gather(dims, w)


def share(w: jax.Array, dims: str) -> jax.Array:
    """Lets a gathered weight meet activations split over `dims`: its gradient is summed over their mesh axes too.

    A weight per head feature, say, is used by heads that live on several tensor shards. In a region that is manual over
    other axes types cannot say this (XLA aborts), and the sum happens at once.
    """
    if AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types:
        return w
    axes = {n for letter in dims for axis in _logical(COMPUTE[letter]) for n in mesh_axes(axis)}
    if axes <= _reduced(w):
        return w
    kept = jax.typeof(w).sharding.spec.partitions
    return jax.reshard(w, P(*kept, reduced=_reduced(w) | axes))


def token_mean(x: jax.Array) -> jax.Array:
    """Mean over all tokens of the microbatch, on all devices: float32 [B, T, ...] -> [...], the same everywhere.

    The sum over axes that types speak of is in the types; over those of a shard_map around us it is a psum.
    """
    count, total, manual = x.shape[0] * x.shape[1], x.sum((0, 1)), manual_axes("C")
    if manual:
        sizes = jax.sharding.get_abstract_mesh().shape
        count *= math.prod(sizes[n] for n in manual)
        total = jax.lax.psum(total, manual)
    return total / count


def heads_letter(num_kv_heads: int) -> str:
    """K where key/value heads divide over the tensor axis, J where they are too few and each device has them all."""
    return "J" if num_kv_heads % axis_size("tensor") else "K"


def repeat_heads(x_BTJH: jax.Array) -> jax.Array:
    """Repeats key/value heads until they divide over the tensor axis: [B, T, J, H] -> [B, T, K, H].

    Query head n uses head n // (N / K) before and after, so each device keeps the heads that its queries use.
    """
    num_heads = x_BTJH.shape[2]
    x = jnp.repeat(x_BTJH, math.lcm(num_heads, axis_size("tensor")) // num_heads, axis=2)
    return constrain(x, "BTKH")


def enter_step(params: Any, dims: Any, dtype: Any, gather_now: bool) -> Any:
    """Prepares parameters for all microbatches of a step.

    Args:
        params: dict of float32 weights at rest.
        dims: the same tree of dimension letters.
        dtype: compute dtype of weights that are gathered now.
        gather_now: gather every weight here, once, instead of layer by layer.

    Returns:
        The same values; differentiating by them gives gradients that are not yet summed over replicas
        (and, when gathered, over fsdp): pass those to leave_step.
    """

    def enter(w: jax.Array, d: str) -> jax.Array:
        if replicas := replica_axes(d):
            w = jax.reshard(w, spec(d, PARAM, reduced=frozenset(replicas)))
        return gather(w, d, dtype) if gather_now else w

    return jax.tree.map(enter, params, dims)


def leave_step(grads: Any, dims: Any, over_data: bool = False) -> Any:
    """Sums gradients of enter_step's result over fsdp and replicas, and lays them out where parameters are updated.

    Over several slices the slow network comes last, alone: it carries what a slice has summed and scattered.
    """

    def leave(g: jax.Array, d: str) -> jax.Array:
        g, place = _reduce_scatter(g, d), update_spec(d, g.shape, over_data)
        if slices := frozenset(mesh_axes("slice")) & jax.typeof(g).sharding.spec.unreduced:
            g = jax.reshard(g, P(*place.partitions, unreduced=slices))
        return jax.reshard(g, place)

    return jax.tree.map(leave, grads, dims)


def zeros_like_gradient(w: jax.Array, dtype: Any = None) -> jax.Array:
    """Zeros with the type of w's gradient, in its dtype or another: what is reduced in w is unreduced there."""
    spec_w = jax.typeof(w).sharding.spec
    zeros = jnp.zeros(w.shape, dtype or w.dtype, out_sharding=P(*spec_w.partitions))
    return jax.reshard(zeros, P(*spec_w.partitions, unreduced=spec_w.reduced)) if spec_w.reduced else zeros


def put_layer(total: jax.Array, i: jax.Array, g: jax.Array, add: bool) -> jax.Array:
    """total with g at total[i], or added to it, in place: gradients [L, ...] and [...], of the same type otherwise."""

    def put(total: jax.Array, i: jax.Array, g: jax.Array) -> jax.Array:
        g = g.astype(total.dtype)
        if add:
            g += jax.lax.dynamic_index_in_dim(total, i, 0, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(total, g, i, 0)

    spec_g = jax.typeof(g).sharding.spec
    if not spec_g.unreduced:
        return put(total, i, g)
    # types cannot say that slices of terms of a sum are such terms; nor can shard_map's checks
    spec_t = P(None, *spec_g.partitions, unreduced=spec_g.unreduced)
    return jax.shard_map(put, in_specs=(spec_t, P(), spec_g), out_specs=spec_t, check_vma=False)(total, i, g)


def in_groups(x: jax.Array, count: int) -> jax.Array:
    """Groups of neighbouring layers: [L, ...] -> [L / count, count, ...], with the sharding and types of x."""
    spec_x = jax.typeof(x).sharding.spec
    shape = (x.shape[0] // count, count, *x.shape[1:])
    place = P(None, *spec_x.partitions, reduced=spec_x.reduced)
    return jax.lax.reshape(x, shape, out_sharding=place)


def keep_layout(w: jax.Array) -> jax.Array:
    """w, in memory with its dims in their order, whatever the layout that its consumer would like.

    The compiler gives a slice's wish to the whole array: float32 copies of all layers' queries, keys and values.
    """
    spec_w = jax.typeof(w).sharding.spec
    ordered = lambda w: with_layout_constraint(w, Layout(tuple(range(w.ndim))))  # noqa: E731
    return jax.shard_map(ordered, in_specs=(spec_w,), out_specs=spec_w, check_vma=False)(w)


def _axes_of_kind(logical: str, kind: AxisType) -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    named = [n for n, k in zip(mesh.axis_names, mesh.axis_types, strict=True) if k == kind]
    return tuple(n for n in named if n.rstrip("0123456789") == logical and mesh.shape[n] > 1)


def _logical(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


def _reduced(w: jax.Array) -> frozenset[str]:
    return frozenset(jax.typeof(w).sharding.spec.reduced)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _all_gather(dims: str, w: jax.Array) -> jax.Array:
    """One all-gather per mesh axis of fsdp, innermost first; see _reduce_scatter."""
    fsdp = mesh_axes("fsdp")
    for i in reversed(range(len(fsdp))):
        w = jax.reshard(w, _partly_gathered(dims, fsdp[:i], reduced=_reduced(w) | {fsdp[i]}))
    return w


def _all_gather_fwd(dims: str, w: jax.Array) -> tuple[jax.Array, None]:
    return _all_gather(dims, w), None


def _all_gather_bwd(dims: str, _: None, g: jax.Array) -> tuple[jax.Array]:
    return (_reduce_scatter(g, dims),)


_all_gather.defvjp(_all_gather_fwd, _all_gather_bwd)


def _partly_gathered(dims: str, fsdp: tuple[str, ...], **kinds: Any) -> P:
    """The spec of a parameter that is still split over these mesh axes of fsdp."""
    entry = None if not fsdp else fsdp if len(fsdp) > 1 else fsdp[0]
    entries = spec(dims, {**PARAM, "D": None}).partitions
    return P(*(entry if d == "D" else e for d, e in zip(dims, entries, strict=True)), **kinds)


def _reduce_scatter(g: jax.Array, dims: str) -> jax.Array:
    """One reduce-scatter per mesh axis of fsdp: over all at once, a TPU slice does a full all-reduce instead.

    (Gathers over all three dimensions of a v5p slice become all-reduces too.)
    """
    fsdp, open_axes = mesh_axes("fsdp"), frozenset(jax.typeof(g).sharding.spec.unreduced)
    if not open_axes.intersection(fsdp):
        return g
    for i in range(1, len(fsdp) + 1):
        g = jax.reshard(g, _partly_gathered(dims, fsdp[:i], unreduced=open_axes - frozenset(fsdp[:i])))
    return g
