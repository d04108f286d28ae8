"""Collectives of every form of parallelism, in programs of the real TPU compiler: those declared, and no others.

A table per mesh names what may run inside loops over layers or ticks: kind, mesh axes, and the largest array. What is
not in the table fails the test, so that a weight whose sharding was forgotten, or a larger exchange, is noticed.
"""

import functools
import importlib.util
import math
from pathlib import Path

import jax
import pytest
from helpers import QUICK_TO_COMPILE, small_config

from maxlm import hlo
from maxlm.config import MeshConfig
from maxlm.mesh import make_mesh
from maxlm.step import build_program

pytestmark = [pytest.mark.tpu, pytest.mark.xdist_group("tpu"), pytest.mark.long]

L, D, F, V, H, N, B, T = 4, 2048, 5632, 8192, 128, 16, 16, 1024
MODEL = {
    "vocab_size": V,
    "num_layers": L,
    "d_model": D,
    "d_ff": F,
    "num_heads": N,
    "num_kv_heads": 8,
    "head_dim": H,
    "dtype": "bfloat16",
}
SMALL = 1 << 20
"""Bytes below which a collective is bookkeeping: norms' gradients, sums, row statistics."""


def compile_gradients(topology: str, num_slices: int, model: dict, train: dict, mesh: dict):
    from jax.experimental import topologies

    config = small_config(model=model, train={**train, **QUICK_TO_COMPILE})
    devices = topologies.get_topology_desc(topology, "tpu", num_slices=num_slices).devices
    sizes = MeshConfig(**mesh)
    program = build_program(config.model_copy(update={"mesh": sizes}), make_mesh(sizes, devices))
    with jax.set_mesh(program.mesh):
        lowered = program.grads.lower(program.state_shapes["params"], program.batch_shapes)
    return program, hlo.collectives(lowered.compile().as_text())


@functools.cache
def compiled(topology: str, num_slices: int = 1, **mesh):
    return compile_gradients(topology, num_slices, MODEL, {"batch_size": B, "seq_len": T}, mesh)


def undeclared(program, found, declared: dict[tuple[str, str], int], small: int = SMALL) -> list[str]:
    """Collectives in loops, of more than `small` bytes, that the table does not name, or names with fewer bytes."""
    wrong = []
    for c in found:
        if not c.loops or c.bytes <= small:
            continue
        axes = axes_of(program, c)
        if c.bytes > declared.get((c.kind, axes), 0):
            wrong.append(f"{c.kind} over {axes}: {c.dtype}{list(c.shape)}, {c.bytes} bytes, {c.times} times")
    return wrong


def axes_of(program, c: hlo.Collective) -> str:
    return "+".join(sorted(n.rstrip("0123456789") for n in c.axes(program.mesh.shape)))


def test_fsdp_and_tensor():
    program, found = compiled("v5e:4x4", fsdp=8, tensor=2)
    residual = 2 * (B // 8) * T * D
    matrix = 2 * D * F // 2
    declared = {
        ("all-gather", "fsdp"): matrix,
        ("reduce-scatter", "fsdp"): matrix,
        ("all-reduce", "fsdp"): matrix,  # the last hop of a matrix whose shard is narrower than a tile's lanes
        ("collective-permute", "fsdp"): matrix,  # the compiler's way to line up a scatter that it pads
        ("all-reduce", "tensor"): residual,
        ("all-gather", "tensor"): residual,
        ("reduce-scatter", "tensor"): residual,
    }
    assert undeclared(program, found, declared) == []


def test_a_larger_or_another_collective_is_noticed():
    program, found = compiled("v5e:4x4", fsdp=8, tensor=2)
    assert undeclared(program, found, {})
    assert undeclared(program, found, {("all-gather", "fsdp"): 2 * D * F // 2 - 1, ("all-reduce", "tensor"): 1 << 40})


def test_slices_meet_outside_of_all_loops():
    program, found = compiled("v5e:2x4", 2, slices=2, fsdp=4, tensor=2)
    across = [c for c in found if c.kind == hlo.BETWEEN_SLICES or "slice" in c.axes(program.mesh.shape)]
    assert across, "gradients are summed over slices"
    assert [c for c in across if c.loops] == []
    own = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(program.state_shapes["params"]))
    sent = sum(c.bytes for c in across if c.bytes > SMALL)
    assert sent <= 1.1 * 4 * own, "each device sends its float32 shard of the gradients, once"


@pytest.mark.parametrize("kind", ["ring", "gather"])
def test_context_moves_keys_by_permutes_or_gathers(kind):
    program, found = compiled("v5e:4x4", context=4, fsdp=4, context_attention=kind)
    keys = 2 * (B // 4) * T * 8 * H  # of all shards
    matrix = int(1.1 * 2 * D * F)  # a scatter may be padded to whole tiles
    kinds = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute")
    weights = dict.fromkeys([(name, "fsdp") for name in kinds], matrix)
    between = {
        "ring": {("collective-permute", "context"): 2 * keys // 4},  # float32 gradients travel with the keys
        "gather": {("all-gather", "context"): keys, ("reduce-scatter", "context"): 2 * keys},
    }
    assert undeclared(program, found, {**weights, **between[kind]}) == []
    wanted = {"ring": "collective-permute", "gather": "all-gather"}[kind]
    moved = [c for c in found if c.loops and c.kind == wanted and "context" in c.axes(program.mesh.shape)]
    assert sum(c.times for c in moved) >= 2 * L


def figures_tool():
    spec = importlib.util.spec_from_file_location("f", Path(__file__).parent.parent / "tools" / "pipeline_figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_products(model, seq_len, rows):
    """FLOPs of a step's products without a pipeline: a layer runs again in the backward pass, but for its last one."""
    d, f = model["d_model"], model["d_ff"]
    forward, rope = 2 * (4 * d * d + 2 * d * f) + 4 * seq_len * d, 4 * d * model["head_dim"]
    layer = 4 * forward - 2 * d * f + 3 * rope  # which is linear and has no weights
    return rows * seq_len * (model["num_layers"] * layer + 6 * d * model["vocab_size"])


def test_pipeline():
    """Memory that does not grow with microbatches, weights gathered once a step, activations alone in the loops."""
    tool = figures_tool()
    program, step = tool.compile_gradients({**tool.PIPELINE, "rounds": 4}, 16)
    assert step.memory_analysis().temp_size_in_bytes <= 1500 * 2**20
    products = hlo.matmul_flops(step.as_text(), taken=tool.head_share(16, 4))
    assert products <= 1.046 * plain_products(tool.MODEL, 1024, tool.MICROBATCH * 16) / 16, "no more than the bubble"
    found = hlo.collectives(step.as_text())
    residual = 2 * (tool.MICROBATCH // 2) * 1024 * 2048
    declared = {
        ("collective-permute", "stage"): residual,
        ("all-gather", "stage"): residual,
        ("reduce-scatter", "stage"): residual,
        ("all-reduce", "stage"): residual,
        ("all-reduce", "tensor"): 2 * residual,
        ("collective-permute", "tensor"): residual,
    }
    assert undeclared(program, found, declared) == []
    once = [c for c in found if not c.loops and c.kind == "all-gather" and c.axes(program.mesh.shape) == {"fsdp"}]
    weights = sum(
        math.prod(x.shape) // (2 if "V" in d else 8)
        for d, x in zip(jax.tree.leaves(program.dims), jax.tree.leaves(program.state_shapes["params"]), strict=True)
    )
    gathered = sum(c.bytes * c.times for c in once)
    assert gathered <= 1.01 * 2 * (weights + 32768 * 2048 // 2), "each weight once, the embedding for both of its uses"


# ---- experts, in a smaller model: grouped products take the compiler longer, the larger they are

EL, ED, EF, EV, EN, EB, ET = 4, 1024, 512, 4096, 10, 32, 128
E, A, M = 8, 3, 4
EXPERTS = {
    "vocab_size": EV,
    "num_layers": EL,
    "d_model": ED,
    "d_ff": F,
    "num_heads": EN,
    "num_kv_heads": 2,
    "head_dim": H,
    "dtype": "bfloat16",
    "num_experts": E,
    "experts_per_token": A,
    "expert_d_ff": EF,
    "num_shared_experts": 1,
    "aux_loss": 0.01,
    "router_z_loss": 0.001,
}
VECTOR = 4 * ED
"""Bytes of a norm's gradient: in this model all that is larger is declared."""


def compile_experts(microbatches: int, **mesh):
    train = {"batch_size": EB, "seq_len": ET, "grad_accum": microbatches}
    return compile_gradients("v5e:4x4", 1, EXPERTS, train, mesh)


def assert_experts_alone_meet_in_loops(program, found, rows: int, block_runs: int) -> None:
    """Over the expert axis: tokens and their scales by ragged exchange, counts of visits, and else sums once a step.

    Args:
        rows: bytes of the tokens that one device sends to their experts in one layer.
        block_runs: how often a device runs a layer forward and backward in a step, idle or not.
    """
    over_expert = [c for c in found if "expert" in c.axes(program.mesh.shape)]
    exchanges = [c for c in over_expert if c.kind == "ragged-all-to-all"]
    # forward: tokens there, results back; backward: tokens there again, gradients of results there, of tokens back
    assert sum(c.times for c in exchanges if c.bytes == rows) == 5 * block_runs
    scales = [c for c in exchanges if c.bytes != rows]
    assert sum(c.times for c in scales) == 3 * block_runs, "scales there, twice, and their gradients back"
    assert {(c.dtype, c.bytes) for c in scales} == {("f32", rows // (2 * ED) * 128 * 4)}, "each is padded to 128 lanes"
    counts = 4 * E * program.mesh.shape["expert"]
    assert max(c.bytes for c in over_expert if c.loops and c.kind != "ragged-all-to-all") <= counts
    sums = [c for c in over_expert if not c.loops and "fsdp" not in axes_of(program, c)]
    assert {c.kind for c in sums} == {"all-reduce"}
    leaves = zip(jax.tree.leaves(program.dims), jax.tree.leaves(program.state_shapes["params"]), strict=True)
    replicated = [math.prod(x.sharding.shard_shape(x.shape)) for dims, x in leaves if "E" not in dims]
    assert sum(c.bytes for c in sums) == 4 * sum(replicated), "float32 gradients of what experts share, once"


def test_experts():
    program, found = compile_experts(1, fsdp=4, expert=4)
    rows = 2 * (EB * ET // 16) * A * ED
    matrix = 2 * ED * EN * H
    declared = {
        ("all-gather", "fsdp"): matrix,
        ("reduce-scatter", "fsdp"): matrix,
        ("ragged-all-to-all", "expert"): rows,
    }
    assert undeclared(program, found, declared, VECTOR) == []
    assert_experts_alone_meet_in_loops(program, found, rows, EL)
    of_experts = {(E // 4, ED, EF), (E // 4, EF, ED)}
    gathered = [c for c in found if c.kind == "all-gather" and c.shape in of_experts]
    assert sum(c.times for c in gathered) == 2 * 3 * EL, "each device gathers its own experts alone, twice a layer"


def test_pipeline_with_experts():
    program, found = compile_experts(M, stage=2, fsdp=2, expert=2, tensor=2)
    tokens = EB // M * ET // 4
    residual, rows = 2 * tokens * ED, 2 * tokens * A * ED
    declared = {
        ("collective-permute", "stage"): residual,
        ("all-gather", "stage"): residual,
        ("reduce-scatter", "stage"): residual // 2,
        ("all-reduce", "tensor"): residual,
        ("ragged-all-to-all", "expert"): rows,
    }
    assert undeclared(program, found, declared, VECTOR) == []
    assert_experts_alone_meet_in_loops(program, found, rows, EL // 2 * (M + 1))
    once = [c for c in found if c.kind == "all-gather" and axes_of(program, c) == "fsdp"]
    assert [c for c in once if c.loops] == [], "weights are gathered once a step"
    routers = [c for c in once if c.shape[-2:] == (ED, E)]
    assert [c.dtype for c in routers] == ["f32"], "choices do not hang on rounding"
