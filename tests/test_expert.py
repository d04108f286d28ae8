"""Expert dispatch: both ways give the same numbers, with room for all tokens and without, on one device and on many.

XLA's CPU backend has no ragged_all_to_all, so here it is made of an all_gather (tests/ragged.py); the program that
calls the real one is compiled for TPU.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ragged
from flax import nnx
from helpers import perturbed_params, program_on, small_config, worst_error
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm import hlo
from maxlm.config import MeshConfig
from maxlm.kernels import grouped_outer as grouped_outer_file
from maxlm.kernels.attention import attention
from maxlm.kernels.grouped_mlp import ExpertWeights, grouped_mlp, grouped_mlp_grads
from maxlm.kernels.grouped_outer import grouped_outer
from maxlm.mesh import make_mesh
from maxlm.model.stack import Ops, run_repeat
from maxlm.parallel.expert import dispatch_experts
from maxlm.parallel.island import vary
from maxlm.sharding import compute_spec
from maxlm.step import build_program

B, T, A, D, E, F = 8, 6, 3, 10, 8, 12


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged.ragged_all_to_all)
    # what was never written must not matter
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))


def test_the_emulation_does_what_the_documentation_of_jax_says():
    mesh = Mesh(np.array(jax.devices()[:2]), ("expert",), axis_types=(AxisType.Explicit,))
    call = partial(ragged.ragged_all_to_all, axis_name="expert")
    data = np.array([1, 2, 2, 3, 4, 0], np.float32), np.zeros(8, np.float32)
    slices = np.array([[0, 1, 0, 1], [1, 2, 1, 1], [0, 0, 1, 2], [1, 1, 2, 1]], np.int32)
    with jax.set_mesh(mesh):
        run = jax.jit(jax.shard_map(call, in_specs=P("expert"), out_specs=P("expert")))
        got = run(*jax.device_put((*data, *slices), P("expert")))
        refused = run(*jax.device_put((*data, *slices[:3], slices[3] * 0), P("expert")))
    assert got.tolist() == [1, 3, 0, 0, 2, 2, 4, 0]
    assert np.isnan(refused).any(), "the receiver expects other sizes than are sent"


def example(seed=0, skew=2.0):
    """Tokens, choices (uneven over experts), scales, weights of the experts, and a cotangent."""
    rng = np.random.default_rng(seed)
    liking = rng.gumbel(size=(B, T, E)) - skew * np.arange(E) / E
    chosen = np.argsort(-liking, -1)[..., :A].astype(np.int32)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    weights = normal(E, D, F), normal(E, D, F), normal(E, F, D)
    return normal(B, T, D), chosen, rng.random((B, T, A), np.float32) + 0.1, weights, normal(B, T, D)


def on_mesh(kind, factor, mesh, x, chosen, scale, weights, cotangent):
    """y, number of dropped choices, and gradients by x, scale and weights."""
    sizes = MeshConfig(**{"fsdp": 1, **mesh})
    made = make_mesh(sizes, jax.devices()[: int(np.prod(list(mesh.values()) or [1]))])

    def run(x, chosen, scale, weights, cotangent):
        apply = lambda x, scale, weights: dispatch_experts(kind, factor, x, chosen, scale, weights, jax.nn.silu)  # noqa: E731
        (y, dropped), pull = jax.vjp(apply, x, scale, weights)
        return y, dropped, pull((cotangent, jnp.zeros(())))

    def whole(w, dims):  # replicas: as enter_step leaves a weight
        at = jax.device_put(w, compute_spec(dims))
        replicas = frozenset(n for n in ("data", "fsdp", "context") if made.shape.get(n, 1) > 1)
        return jax.jit(lambda w: jax.reshard(w, P(*compute_spec(dims).partitions, reduced=replicas)))(at)

    with jax.set_mesh(made):
        put = lambda a, dims: jax.device_put(a, compute_spec(dims))  # noqa: E731
        held = tuple(whole(w, dims) for w, dims in zip(weights, ("EDF", "EDF", "EFD"), strict=True))
        y, dropped, (dx, d_scale, d_weights) = jax.jit(run)(
            put(x, "BTD"), put(chosen, "BTA"), put(scale, "BTA"), held, put(cotangent, "BTD")
        )
        d_weights = jax.jit(lambda ws: tuple(jax.reshard(w, P()) for w in ws))(d_weights)
    return jax.device_get((y, dropped, (dx, d_scale, d_weights)))


def plain(keep, x, chosen, scale, weights, cotangent):
    """The same by every expert for every token, with choices that are not kept left out."""

    def run(x, scale, weights):
        up, gate, down = (jnp.asarray(w) for w in weights)
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        y = jnp.take_along_axis(jnp.einsum("btef,efd->bted", h, down), chosen[..., None], 2)
        return (y * (scale * keep)[..., None]).sum(2)

    with jax.default_matmul_precision("highest"):
        y, pull = jax.vjp(run, x, scale, weights)
        return jax.device_get((y, np.float32((1 - keep).sum()), pull(cotangent)))


def kept(chosen, groups, devices, factor):
    """1 for each choice that finds a row, 0 for others, choice by choice.

    Args:
        chosen: [B, T, A]; sequences lie over `groups` of `devices` each.
        groups: expert groups, of which each has all experts.
        devices: devices of a group, with E / devices experts each.
        factor: capacity factor.
    """
    keep = np.zeros(chosen.shape, np.float32)
    at, keep_at = chosen.reshape(groups, devices, -1, A), keep.reshape(groups, devices, -1, A)
    capacity = min(math.ceil(factor * at[0, 0].size), at[0].size)
    for group, first in itertools.product(range(groups), range(0, E, E // devices)):
        # of each expert the choices of it: by source, then a, then token
        wants = [np.argwhere(at[group].swapaxes(1, 2) == e) for e in range(first, first + E // devices)]
        limit = max(n for n in range(at[group].size + 1) if sum(min(len(w), n) for w in wants) <= capacity)
        for source, a, t in itertools.chain(*(w[:limit] for w in wants)):
            keep_at[group, source, t, a] = 1
    return keep


def assert_same(got, want, bound):
    assert got[1] == want[1]
    assert worst_error(got[0], want[0]) <= bound
    assert worst_error(got[2], want[2]) <= bound


@pytest.mark.parametrize("kind", ["gather", "exchange"])
@pytest.mark.parametrize("mesh", [{"expert": 4, "data": 2}, {"expert": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_every_token_meets_its_experts(mesh, kind, emulated):
    assert_same(on_mesh(kind, None, mesh, *example()), plain(np.ones((B, T, A), np.float32), *example()), 1e-5)


def test_on_one_device_there_is_nothing_to_exchange():
    assert_same(on_mesh("exchange", None, {}, *example()), plain(np.ones((B, T, A), np.float32), *example()), 1e-5)


@pytest.mark.parametrize("factor", [1.25, 0.5])
def test_what_overflows_is_dropped_from_the_fullest_experts_and_counted(factor, emulated):
    values, mesh = example(), {"expert": 4, "data": 2}
    keep = kept(values[1], 2, 4, factor)
    assert 0 < keep.sum() < keep.size
    want = plain(keep, *values)
    got = {kind: on_mesh(kind, factor, mesh, *values) for kind in ("gather", "exchange")}
    for kind in got:
        assert_same(got[kind], want, 1e-5)
    assert_same(got["gather"], got["exchange"], 1e-6)


def test_grouped_outer_is_the_product_of_each_group():
    rng = np.random.default_rng(0)
    for sizes, num_rows in (([300, 0, 900, 41], 1300), ([0, 0, 0, 0], 16), ([3, 0, 0, 0], 37), ([0, 0, 0, 33], 33)):
        a, b = (rng.standard_normal((num_rows, n)).astype(np.float32) for n in (24, 40))
        a[sum(sizes) :] = b[sum(sizes) :] = np.nan
        got = grouped_outer(jnp.asarray(a), jnp.asarray(b), jnp.asarray(sizes, jnp.int32), interpret=True)
        cuts = np.cumsum([0, *sizes])
        want = np.stack([a[i:j].T @ b[i:j] for i, j in itertools.pairwise(cuts)])
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_grouped_outer_over_several_tiles_of_which_the_last_stand_out(monkeypatch):
    monkeypatch.setattr(grouped_outer_file, "_tile", lambda size, limit: min(size, 128))
    rng, sizes = np.random.default_rng(0), [30, 0, 60]
    a, b = (rng.standard_normal((100, n)).astype(np.float32) for n in (200, 328))
    got = grouped_outer(jnp.asarray(a), jnp.asarray(b), jnp.asarray(sizes, jnp.int32), interpret=True)
    want = np.stack([a[i:j].T @ b[i:j] for i, j in itertools.pairwise(np.cumsum([0, *sizes]))])
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_pipeline_stage_gives_outputs_reports_and_gradients_of_one_device():
    """A stage is manual over the axes that split tokens: only tensor is left to the types."""
    model = {"num_experts": 8, "experts_per_token": 2, "expert_d_ff": 12, "num_shared_experts": 1, "num_layers": 2}
    model |= {"router_bias_rate": 0.01, "d_model": 20, "num_heads": 4, "num_kv_heads": 2}
    one = program_on(small_config(model={**small_config().model.model_dump(), **model}))
    ops = Ops(attention, partial(dispatch_experts, "gather", None))
    with jax.set_mesh(one.mesh):
        graph, state = nnx.split(nnx.merge(one.passes.graph, perturbed_params(one)).layers)
    leaves, tree = jax.tree.flatten(state)
    dims = jax.tree.leaves(one.dims["layers"])
    rng = np.random.default_rng(0)
    x, cotangent = (rng.standard_normal((2, B, T, 20)).astype(np.float32) for _ in range(2))
    places = np.tile(np.arange(T, dtype=np.int32), (B, 1)), np.ones((B, T), np.int32)

    def stage(leaves, x, cotangent, positions, segments, *manual):
        leaves = [vary(w, manual) for w in leaves]
        apply = lambda leaves, x: run_repeat(graph, jax.tree.unflatten(tree, leaves), x, positions, segments, 0, ops)  # noqa: E731
        (y, aux), pull = jax.vjp(apply, leaves, x)
        ones = jax.tree.map(lambda a: vary(jnp.ones(()), tuple(jax.typeof(a).mat.varying)), aux)
        d_leaves, dx = pull((cotangent, ones))
        if manual:
            d_leaves = [g if "E" in d else jax.lax.psum(g, "expert") for g, d in zip(d_leaves, dims, strict=True)]
        return y, aux, d_leaves, dx

    def stages(leaves, x, cotangent, *places):
        first = lambda a: a[0]  # noqa: E731
        out = stage([w[0] for w in leaves], first(x), first(cotangent), *places, "stage", "expert")
        return jax.tree.map(lambda a: a[None], out)

    devices = np.array(jax.devices()).reshape(2, 2, 2)
    mesh = Mesh(devices, ("stage", "expert", "tensor"), axis_types=(AxisType.Explicit,) * 3)
    manual = [P("stage", *("expert" if letter == "E" else None for letter in d[1:])) for d in dims]
    tokens, rows = P("stage", "expert"), P("expert")
    with jax.set_mesh(one.mesh):
        run = jax.jit(stage)
        want = [run([w[i] for w in leaves], x[i], cotangent[i], *places) for i in range(2)]
        want = jax.device_get(jax.tree.map(lambda *parts: jnp.stack(parts), *want))
    with jax.set_mesh(mesh):
        at = [P("stage", *compute_spec(d[1:]).partitions) for d in dims]
        held = [jax.device_put(w, spec) for w, spec in zip(leaves, at, strict=True)]
        run = jax.jit(
            jax.shard_map(
                stages,
                in_specs=(manual, tokens, tokens, rows, rows),
                out_specs=(tokens, P("stage"), manual, tokens),
                axis_names={"stage", "expert"},
            )
        )
        got = jax.device_get(run(held, *jax.device_put((x, cotangent), tokens), *jax.device_put(places, rows)))
    for zero in ("router_bias", "dropped_tokens"):
        assert got[1].pop(zero).tolist() == want[1].pop(zero).tolist() == [0, 0]
    assert worst_error(got, want) <= 1e-5


# ---- compiled for TPU, without one


def tpu_devices():
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:4x4", "tpu").devices


@pytest.mark.tpu
def test_on_tpu_no_expert_computes_rows_of_another():
    rows, width, hidden, count = 4096, 512, 256, 8
    mesh = Mesh(np.array(tpu_devices()), ("data",), axis_types=(AxisType.Explicit,))

    def both(x, scale, sizes, up, gate, down, cotangent):
        weights = ExpertWeights(up, gate, down)
        out, kept = grouped_mlp(jax.nn.silu, x, scale, sizes, weights)
        return out, grouped_mlp_grads(jax.nn.silu, x, scale, sizes, weights, kept, cotangent)

    shapes = [(rows, width), (rows,), (count,), (count, width, hidden), (count, width, hidden), (count, hidden, width)]
    dtypes = [jnp.bfloat16, jnp.float32, jnp.int32, *[jnp.bfloat16] * 4]
    with jax.set_mesh(mesh):
        at = NamedSharding(mesh, P("data"))
        arguments = [
            jax.ShapeDtypeStruct((16 * shape[0], *shape[1:]), dtype, sharding=at)
            for shape, dtype in zip([*shapes, shapes[0]], dtypes, strict=True)
        ]
        run = jax.jit(jax.shard_map(both, in_specs=P("data"), out_specs=P("data")))
        flops = run.lower(*arguments).compile().cost_analysis()["flops"]
    assert flops <= 1.05 * 9 * 2 * rows * width * hidden


@pytest.mark.tpu
@pytest.mark.long
def test_on_tpu_tokens_are_exchanged_and_not_gathered():
    L, width, experts = 3, 512, 16
    model = {"vocab_size": 1024, "num_layers": L, "d_model": width, "d_ff": 256, "num_heads": 8, "num_kv_heads": 8}
    model |= {"head_dim": 64, "dtype": "bfloat16", "num_experts": experts, "experts_per_token": 4, "aux_loss": 0.01}
    config = small_config(model=model, train={"batch_size": 32, "seq_len": 256})
    mesh = MeshConfig(data=2, fsdp=2, expert=4, capacity_factor=2.0)
    program = build_program(config.model_copy(update={"mesh": mesh}), make_mesh(mesh, tpu_devices()))
    text = program.lower_step().compile().as_text()
    exchanges = [line for line in text.splitlines() if " ragged-all-to-all(" in line and f",{width // 2}]" in line]
    assert len(exchanges) >= 4, "there and back, forward and backward"
    in_layers = [c for c in hlo.collectives(text) if L in c.loops]
    tokens = 32 * 256 // 16 * width * 2  # bytes of one device's
    one_layer = experts // 4 * width * 256 * 2
    assert max(c.bytes for c in in_layers if c.kind == "all-gather") == one_layer, "weights of own experts, no tokens"
    assert max((c.bytes for c in in_layers if c.kind == "all-reduce"), default=0) < tokens
