"""Gradients of experts' matrices on TPU, in Pallas: for each expert, the product of its rows with its rows.

XLA's TPU compiler has a kernel for grouped products whose groups are rows of the result. Where the groups are summed
over, it multiplies all rows, masked, for every expert: num_experts times the work. This kernel does the work once.

References:
    Gale et al., MegaBlocks, arXiv:2211.15841, section 5.1.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

ROW_BYTES, TILE_BYTES = 2**10, 2**21
"""Rows per step, and numbers of the result per step, times the bytes of a number: what fits into 16 MiB of VMEM."""


def grouped_outer(a_CD: jax.Array, b_CF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """a[rows of e].T @ b[rows of e] for every expert e, summed in float32.

    Args:
        a_CD: rows sorted by expert.
        b_CF: the same rows of the other matrix.
        sizes_E: int32 rows of each expert; rows after the last group may hold anything.
        interpret: run on any machine, slowly.

    Returns:
        [E, D, F] in a's dtype; zeros for experts without rows.
    """
    (C, D), F, E = a_CD.shape, b_CF.shape[1], sizes_E.shape[0]
    width = a_CD.dtype.itemsize
    rows = min(ROW_BYTES // width, -(-C // 16) * 16)
    f_tile = _tile(F, 1536)
    d_tile = _tile(D, TILE_BYTES // width // f_tile)
    starts, expert, tile, num_visits = _visits(sizes_E, C, rows)
    varying = jax.typeof(a_CD).mat.varying | jax.typeof(b_CF).mat.varying
    return pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct(
            (E, D, F), a_CD.dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying)
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(-(-D // d_tile), -(-F // f_tile), num_visits),
            in_specs=[
                pl.BlockSpec((rows, d_tile), lambda d, f, v, starts, sizes, expert, tile: (tile[v], d)),
                pl.BlockSpec((rows, f_tile), lambda d, f, v, starts, sizes, expert, tile: (tile[v], f)),
            ],
            out_specs=pl.BlockSpec(
                (None, d_tile, f_tile), lambda d, f, v, starts, sizes, expert, tile: (expert[v], d, f)
            ),
            scratch_shapes=[pltpu.VMEM((d_tile, f_tile), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * C * D * F,
            bytes_accessed=(a_CD.size * (F // f_tile) + b_CF.size * (D // d_tile) + E * D * F) * width,
            transcendentals=0,
        ),
        interpret=interpret,
    )(starts, sizes_E, expert, tile, a_CD, b_CF)


def _visits(sizes_E: jax.Array, num_rows: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Which expert meets which tile of `rows` rows, visit by visit.

    An expert visits the tiles that hold rows of it; one without rows the tile where they would be, since it has zeros
    to write. Neighbours may share a tile.

    Returns:
        First row of each expert; expert and tile of each visit; number of visits, at most as many as the arrays hold.
    """
    num_tiles, num_experts = -(-num_rows // rows), sizes_E.shape[0]
    starts = jnp.cumsum(sizes_E) - sizes_E
    first = jnp.minimum(starts, num_rows - 1) // rows
    visits = jnp.maximum((starts + sizes_E - 1) // rows, first) - first + 1
    ends = jnp.cumsum(visits)
    visit = jnp.arange(num_tiles + 2 * num_experts, dtype=jnp.int32)
    expert = jnp.minimum((visit[:, None] >= ends[None]).sum(1, dtype=jnp.int32), num_experts - 1)
    tile = jnp.minimum(first[expert] + visit - (ends - visits)[expert], num_tiles - 1)
    return starts, expert, tile, ends[-1]


def _kernel(starts, sizes, expert, tile, a, b, out, total):
    v = pl.program_id(2)
    e, last = expert[v], pl.num_programs(2) - 1

    @pl.when((v == 0) | (expert[jnp.maximum(v - 1, 0)] != e))
    def _():
        total[...] = jnp.zeros_like(total)

    def own(x):  # a tile may hold rows of other experts, and rows after the last that were never written
        row = tile[v] * x.shape[0] + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        mine = (row >= starts[e]) & (row < starts[e] + sizes[e])
        return jnp.where(mine, x[...].astype(jnp.float32), 0.0).astype(x.dtype)

    total[...] += jax.lax.dot_general(own(a), own(b), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    @pl.when((v == last) | (expert[jnp.minimum(v + 1, last)] != e))
    def _():
        out[...] = total[...].astype(out.dtype)


def _tile(size: int, limit: int) -> int:
    """Largest multiple of 128 up to the limit that divides a dimension; where none does, the last tile stands out."""
    dividing = (t for t in range(limit // 128 * 128, 0, -128) if size % t == 0)
    return next(dividing, min(size, limit // 128 * 128))
