"""What a train step costs on TPU slices that are not there, by the TPU compiler: memory, cycles, collectives.

    python tools/bench_aot.py                          # all cases, 2 to 5 minutes each
    python tools/bench_aot.py 8b-v6e --top 20 train.remat=offload

Llama models with fsdp over all chips, AdamW, full remat, as in MaxText's published configurations. Needs libtpu (pip
install 'maxlm[plan]'), no TPU. Columns:

    heap     peak memory without arguments, per chip
    cycles   the compiler's estimates, summed through loops; Pallas kernels (attention) carry none and are left out
    roofline 8 FLOPs per parameter of a product and token (one recomputation) at the chip's peak; attention left out
    wire     bytes that a chip sends, over what one gather forward, one backward and one scatter of all weights send
"""

import argparse
import collections
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")

import jax
from jax.experimental import topologies

from maxlm import hlo
from maxlm.config import Config
from maxlm.config_file import parse_config
from maxlm.mesh import make_mesh
from maxlm.step import Program, build_program

LLAMA3_8B = {
    "vocab_size": 128256,
    "num_layers": 32,
    "d_model": 4096,
    "d_ff": 14336,
    "num_heads": 32,
    "num_kv_heads": 8,
    "rope_theta": 500000.0,
}
LLAMA2_7B = {"vocab_size": 32000, "num_layers": 32, "d_model": 4096, "d_ff": 11008, "num_heads": 32}


@dataclass(frozen=True)
class Case:
    """A model on a slice.

    Attributes:
        topology: as jax names it.
        model: the config's section.
        rows: sequences per chip.
        seq_len: tokens per sequence.
        flops_per_cycle: bfloat16 FLOPs of a chip's matrix units in a cycle of the compiler's estimates.
    """

    topology: str
    model: dict[str, Any]
    rows: int
    seq_len: int
    flops_per_cycle: int


CASES = {
    "8b-v6e": Case("v6e:4x4", LLAMA3_8B, 2, 8192, 524288),
    "7b-v5p": Case("v5p:2x2x2", LLAMA2_7B, 4, 4096, 262144),
    "7b-v5e": Case("v5e:4x4", LLAMA2_7B, 1, 2048, 131072),
}


def make_program(case: Case, overrides: list[str]) -> Program:
    """The case's train step on its slice."""
    devices = topologies.get_topology_desc(case.topology, "tpu").devices
    tree = {
        "model": case.model,
        "data": {"stores": [{"path": "none"}]},
        "train": {"steps": 1, "batch_size": case.rows * len(devices), "seq_len": case.seq_len},
    }
    config = parse_config(tree, overrides)
    return build_program(config, make_mesh(config.mesh, devices))


def roofline_cycles(config: Config, case: Case) -> float:
    """Cycles of all products with weights at the chip's peak: forward, forward again, and twice that backward."""
    model = config.model
    heads = 2 * model.num_heads + 2 * model.kv_heads
    layer = model.d_model * (model.head_size * heads + 3 * model.d_ff)
    weights = model.num_layers * layer + 2 * model.d_model * model.vocab_size
    return 8 * weights * case.rows * case.seq_len / case.flops_per_cycle


def wire_bytes(program: Program, collectives: list[hlo.Collective]) -> tuple[float, float]:
    """Bytes that a chip sends in a step, and the least that fsdp has to send."""
    sent = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}
    total = 0.0
    for c in collectives:
        others = 1.0 if c.kind == "collective-permute" else (len(c.groups[0]) - 1) / len(c.groups[0])
        total += sent.get(c.kind, 1) * c.times * c.bytes * others
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(program.state_shapes["params"])]
    chips = program.mesh.devices.size
    return total, 3 * 2 * sum(sizes) * (chips - 1) / chips


def figures(name: str, overrides: list[str], hlo_file: str | None) -> tuple[dict[str, Any], list[hlo.Operation]]:
    """One case's figures, and its operations."""
    case = CASES[name]
    program = make_program(case, overrides)
    started = time.perf_counter()
    compiled = program.lower_step().compile()
    seconds = time.perf_counter() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if hlo_file:
        Path(hlo_file).write_text(text)
    operations, collectives = hlo.operations(text), hlo.collectives(text)
    cycles = sum((op.cycles or 0) * op.times for op in operations)
    roofline = roofline_cycles(program.config, case)
    moved: dict[str, float] = collections.defaultdict(float)
    for c in collectives:
        moved[f"{c.kind} {c.dtype}"] += c.times * c.bytes / 1e9
    wire, least = wire_bytes(program, collectives)
    return {
        "case": name,
        "overrides": overrides,
        "heap_gb": (memory.peak_memory_in_bytes - memory.argument_size_in_bytes) / 1e9,
        "arguments_gb": memory.argument_size_in_bytes / 1e9,
        "mcycles": cycles / 1e6,
        "over_roofline": cycles / roofline,
        "wire_over_least": wire / least,
        "collectives_gb": {kind: round(size, 3) for kind, size in moved.items() if size > 1e-3},
        "num_pallas_calls": sum(op.times for op in operations if op.cycles is None),
        "compile_s": seconds,
    }, operations


def main() -> int:
    """Prints a line per case, and its costliest operations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", choices=CASES, help="default: all")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also the N costliest operations")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    parser.add_argument("--hlo", metavar="FILE", help="write the compiled program to a file")
    args = parser.parse_intermixed_args()
    for name in [args.case] if args.case else CASES:
        row, operations = figures(name, args.overrides, args.hlo)
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{name}: heap {row['heap_gb']:.2f} GB, {row['mcycles']:,.0f} M cycles ({row['over_roofline']:.2f} x "
                f"roofline), wire {row['wire_over_least']:.2f} x the least, compiled in {row['compile_s']:.0f} s",
                flush=True,
            )
        for op in sorted(operations, key=lambda op: -(op.cycles or 0) * op.times)[: args.top]:
            print(f"{(op.cycles or 0) * op.times / 1e6:10.2f} M  x {op.times:<4} {op.name:36} {op.source[-90:]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
