"""The train step compiled by the real TPU compiler, for a slice that is not there."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from helpers import QUICK_TO_COMPILE, small_config

from maxlm import hlo
from maxlm.config import MeshConfig
from maxlm.mesh import make_mesh
from maxlm.step import build_program

pytestmark = [pytest.mark.tpu, pytest.mark.xdist_group("tpu"), pytest.mark.long]

L, D, F, V, H, B, T = 4, 2048, 5632, 8192, 128, 48, 256
MODEL = {
    "vocab_size": V,
    "num_layers": L,
    "d_model": D,
    "d_ff": F,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": H,
    "dtype": "bfloat16",
}
ARRAY = re.compile(r"\b(f32|bf16)\[([\d,]+)\]")
MESHES = {"fsdp16": {}, "data2_fsdp4_tensor2": {"data": 2, "fsdp": 4, "tensor": 2}}


@functools.cache
def compiled(name: str, grad_accum: int = 1, rules: tuple = ()):
    from jax.experimental import topologies

    train = {"batch_size": B, "seq_len": T, "grad_accum": grad_accum, "logit_parts": 2}
    if name != "fsdp16":  # which is compiled as users' programs are
        train |= QUICK_TO_COMPILE
    config = small_config(model=MODEL, train=train, quant={"rules": dict(rules)})
    devices = topologies.get_topology_desc("v5e:4x4", "tpu").devices
    program = build_program(config, make_mesh(MeshConfig(**MESHES[name]), devices))
    return program, program.lower_step().compile()


def of_kind(found: list[hlo.Collective], *kinds: str) -> list[hlo.Collective]:
    return [c for c in found if c.kind in kinds]


@pytest.mark.parametrize("name", MESHES)
def test_weights_are_gathered_one_layer_at_a_time_in_bf16(name):
    found = hlo.collectives(compiled(name)[1].as_text())
    in_layers = [c for c in of_kind(found, "all-gather") if L in c.loops]
    matrices = [c for c in in_layers if c.bytes > 2 * 8 * D]
    assert sum(c.times for c in matrices) >= 7 * L, "each of a layer's seven matrices, in each layer"
    assert {c.dtype for c in matrices} == {"bf16"}
    assert max(c.bytes for c in in_layers) <= 2 * D * F, "never more than one matrix of one layer"


@pytest.mark.parametrize("name", MESHES)
def test_gradients_are_reduce_scattered_and_never_all_reduced_whole(name):
    program, step = compiled(name)
    found = hlo.collectives(step.as_text())
    scattered = [c for c in of_kind(found, "reduce-scatter") if L in c.loops]
    assert sum(c.times for c in scattered) >= 7 * L, "each of a layer's seven matrices, in each layer"
    assert {c.dtype for c in scattered} == {"bf16"}
    matrices = whole_matrices(program)
    assert [c for c in of_kind(found, "all-reduce") if shape_of(c.shape) in matrices] == []
    in_loops = [c for c in of_kind(found, "all-reduce") if c.loops and c.dtype == "f32" and np.prod(c.shape) > 256 * 32]
    assert in_loops == [], "the sum over data, of float32 shards, is outside the loops"


def whole_matrices(program) -> set[tuple[int, ...]]:
    """Shapes of gradients that are whole over fsdp, one layer's and all layers', in any order of dims."""
    tensor = program.mesh.shape["tensor"]
    shapes = set()
    for dims, leaf in zip(jax.tree.leaves(program.dims), jax.tree.leaves(program.state_shapes["params"]), strict=True):
        split = [n // tensor if d in "NKFV" else n for d, n in zip(dims, leaf.shape, strict=True)]
        if len(dims.removeprefix("L")) > 1:
            shapes |= {shape_of(split), shape_of(split[dims.startswith("L") :])}
    return shapes


def shape_of(shape) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n > 1))


@pytest.mark.parametrize("name", MESHES)
def test_the_state_is_updated_in_place(name):
    program, step = compiled(name)
    assert hlo.num_aliased(step.as_text()) >= len(jax.tree.leaves(program.state_shapes))
    memory = step.memory_analysis()
    state = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(program.state_shapes)
    )
    assert memory.alias_size_in_bytes >= state


@pytest.mark.parametrize("name", MESHES)
def test_neither_logits_nor_attention_weights_nor_a_bf16_model_are_in_memory(name):
    program, step = compiled(name)
    arrays = {(dtype, tuple(int(n) for n in dims.split(","))) for dtype, dims in ARRAY.findall(step.as_text())}
    sizes = program.mesh.shape
    tokens = B * T // (sizes["data"] * math.prod(n for axis, n in sizes.items() if axis.startswith("fsdp")))
    vocabulary, heads = V // sizes["tensor"], 16 // sizes["tensor"]
    assert [a for _, a in arrays if vocabulary in a and math.prod(a) % (tokens * vocabulary) == 0] == []
    assert [a for _, a in arrays if a.count(T) >= 2 and math.prod(a) >= heads * T * T] == []
    layers = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(program.state_shapes["params"]["layers"])]
    matrices = {shape_of(shape) for shape in layers if math.prod(shape) > 8 * L * D}
    assert [a for dtype, a in arrays if dtype == "bf16" and shape_of(a) in matrices] == []


def test_with_microbatches_the_sum_over_data_still_happens_once_per_step():
    _, step = compiled("data2_fsdp4_tensor2", grad_accum=2)
    found = hlo.collectives(step.as_text())
    assert max(c.times for c in of_kind(found, "all-gather") if c.bytes > 2 * 8 * D) >= 2 * L
    in_loops = [c for c in of_kind(found, "all-reduce") if c.loops and c.dtype == "f32" and np.prod(c.shape) > 256 * 32]
    assert in_loops == []


def num_products(text: str) -> dict[str, int]:
    """Matrix products of a program by the type of their sums; s32 is of int8."""
    found = re.findall(r"= (\w+)\[[^\]]*\]\S* (?:convolution|dot)\(", text)
    return {kind: found.count(kind) for kind in sorted(set(found))}


MLP_IN_INT8 = ((".*mlp.*", "int8"),)


def in_int8():
    return compiled("data2_fsdp4_tensor2", rules=MLP_IN_INT8)[1].as_text()


def test_products_are_of_int8_where_the_rules_say():
    plain, counts = num_products(compiled("data2_fsdp4_tensor2")[1].as_text()), num_products(in_int8())
    assert "s32" not in plain
    # of gate, up and down: forward, the gradients by activations and by weights; the first two run again
    assert counts["s32"] == 3 + 3 + 3 + 2
    assert sum(plain.values()) == sum(counts.values())
    operands = re.findall(r"s32\[[^\]]*\]\S* (?:convolution|dot)\(([^)]*)\)", in_int8())
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", in_int8()))
    assert {types[name] for pair in operands for name in re.findall(r"%([\w.\-]+)", pair)} == {"s8"}


def test_weights_are_gathered_as_int8_half_the_bytes():
    def gathered(text):
        found = [c for c in of_kind(hlo.collectives(text), "all-gather") if L in c.loops and c.bytes > 8 * 8 * D]
        return {dtype: sum(c.times * c.bytes for c in found if c.dtype == dtype) for dtype in {c.dtype for c in found}}

    plain, mixed = gathered(compiled("data2_fsdp4_tensor2")[1].as_text()), gathered(in_int8())
    assert set(plain) == {"bf16"}
    assert set(mixed) == {"bf16", "s8"}
    assert plain["bf16"] - mixed["bf16"] == 2 * mixed["s8"] > 0


def test_partial_sums_are_reduced_in_bf16():
    found = of_kind(hlo.collectives(in_int8()), "all-reduce")
    assert not [c for c in found if c.dtype.startswith("s") and np.prod(c.shape) > 1]
    large = [c for c in found if L in c.loops and np.prod(c.shape) >= B * T * D / 8]
    assert {c.dtype for c in large} == {"bf16"}


def peak_memory(**train) -> tuple[float, float]:
    """Peak bytes of a step, and bytes of its float32 parameters, per device."""
    from jax.experimental import topologies

    model = {**MODEL, "vocab_size": 257, "num_layers": 8, "d_model": 256, "d_ff": 512, "head_dim": 64, "num_heads": 6}
    model["num_kv_heads"] = 2
    config = small_config(model=model, train={"batch_size": 16, "seq_len": 16, **QUICK_TO_COMPILE, **train})
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    program = build_program(config, make_mesh(MeshConfig(), devices))
    params = sum(4 * x.size for x in jax.tree.leaves(program.state_shapes["params"])) / 4
    return program.lower_step().compile().memory_analysis().peak_memory_in_bytes, params


def test_microbatches_need_no_second_copy_of_gradients_and_bfloat16_ones_half_the_memory():
    """On TPU: on CPU, XLA makes room for new moments beside the old ones, of which a bad step keeps the old."""
    one, params = peak_memory()
    four, _ = peak_memory(grad_accum=4)
    assert abs(four - one) < 0.1 * params
    half, _ = peak_memory(grad_accum=4, grad_dtype="bfloat16")
    assert 0.4 * params < four - half < 0.6 * params
