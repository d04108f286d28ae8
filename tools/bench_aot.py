"""What a train step costs on TPU slices that are not there, by the TPU compiler: memory, cycles, collectives.

    python tools/bench_aot.py                          # all cases, 2 to 8 minutes each
    python tools/bench_aot.py 8b-v6e --top 20 train.remat=offload

Llama models with AdamW and full remat. 7B and 8B have fsdp over all chips, as in MaxText's published configurations;
the others show what fits. Needs libtpu (pip install 'maxlm[plan]'), no TPU. Columns:

    heap     peak memory without arguments, per chip
    cycles   the compiler's estimates, summed through loops; Pallas kernels (attention) carry none and are left out
    kernels  their cycles, by their schedules (maxlm/cost.py)
    roofline 8 FLOPs per parameter of a product and token (one recomputation) at the chip's peak; attention left out
    wire     bytes that a chip sends, over what one gather forward, one backward and one scatter of all weights send
"""

import argparse
import collections
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from maxlm import hlo
from maxlm.bench import fits
from maxlm.config_file import load_config, parse_config
from maxlm.cost import cost_of
from maxlm.hardware import detect
from maxlm.mesh import make_mesh
from maxlm.step import Program, build_program
from maxlm.topology import topology_devices

CONFIGS = Path(__file__).parent.parent / "configs"
LLAMA3_8B, LLAMA3_70B = (
    load_config(CONFIGS / f"llama3_{size}.yaml").model.model_dump(exclude_unset=True) for size in ("8b", "70b")
)
LLAMA3_405B = {**LLAMA3_8B, "num_layers": 126, "d_model": 16384, "d_ff": 53248, "num_heads": 128}
LLAMA2_7B = {"vocab_size": 32000, "num_layers": 32, "d_model": 4096, "d_ff": 11008, "num_heads": 32}


@dataclass(frozen=True)
class Case:
    """A model on a slice.

    Attributes:
        topology: as jax names it.
        model: the config's section.
        batch_size: sequences per step.
        seq_len: tokens per sequence.
        mesh: axes besides fsdp, which takes what is left.
        grad_accum: microbatches.
    """

    topology: str
    model: dict[str, Any]
    batch_size: int
    seq_len: int
    mesh: dict[str, int] = field(default_factory=dict)
    grad_accum: int = 1


CASES = {
    "8b-v6e": Case("v6e:4x4", LLAMA3_8B, 2 * 16, 8192),
    "7b-v5p": Case("v5p:2x2x2", LLAMA2_7B, 4 * 8, 4096),
    "7b-v5e": Case("v5e:4x4", LLAMA2_7B, 16, 2048),
    "70b-v5p": Case("v5p:4x4x8", LLAMA3_70B, 128, 8192, {"tensor": 4}),
    "70b-v5p-stage": Case("v5p:4x4x8", LLAMA3_70B, 128, 8192, {"tensor": 4, "stage": 4}, 16),
    "405b-v5p": Case("v5p:8x8x8", LLAMA3_405B, 64, 8192, {"tensor": 8}),
    "405b-v5p-stage": Case("v5p:8x8x8", LLAMA3_405B, 128, 4096, {"tensor": 8, "stage": 8}, 16),
    "8b-32k-v5p": Case("v5p:2x2x4", LLAMA3_8B, 4, 32768, {"context": 4}),
}
"""v5p:2x2x2 is v5p-16, which counts cores; 4x4x8 is v5p-256, 8x8x8 v5p-1024 and 2x2x4 v5p-32."""


def make_program(case: Case, overrides: list[str]) -> Program:
    """The case's train step on its slice."""
    devices = topology_devices(case.topology)
    tree = {
        "model": case.model,
        "data": {"stores": [{"path": "none"}]},
        "mesh": case.mesh,
        "train": {
            "steps": 1,
            "batch_size": case.batch_size,
            "seq_len": case.seq_len,
            "grad_accum": case.grad_accum,
        },
    }
    config = parse_config(tree, overrides)
    return build_program(config, make_mesh(config.mesh, devices))


def roofline_cycles(program: Program) -> float:
    """Cycles of all products with weights at the chip's peak: forward, forward again, and twice that backward."""
    model, chip = program.config.model, detect(program.mesh.devices.flat[0])
    assert chip
    assert chip.flops_per_cycle
    heads = 2 * model.num_heads + 2 * model.kv_heads
    layer = model.d_model * (model.head_size * heads + 3 * model.d_ff)
    weights = model.num_layers * layer + 2 * model.d_model * model.vocab_size
    tokens = program.config.train.tokens_per_step / program.mesh.size
    return 8 * weights * tokens / chip.flops_per_cycle


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
    program = make_program(CASES[name], overrides)
    started = time.perf_counter()
    compiled = program.lower_step().compile()
    seconds = time.perf_counter() - started
    cost, text = cost_of(program, compiled), compiled.as_text()
    if hlo_file:
        Path(hlo_file).write_text(text)
    operations, collectives = hlo.operations(text), hlo.collectives(text)
    cycles = sum((op.cycles or 0) * op.times for op in operations)
    roofline = roofline_cycles(program)
    moved: dict[str, float] = collections.defaultdict(float)
    for c in collectives:
        moved[f"{c.kind} {c.dtype}"] += c.times * c.bytes / 1e9
    wire, least = wire_bytes(program, collectives)
    return {
        "case": name,
        "overrides": overrides,
        "fits": fits(cost),
        "heap_gb": cost["heap_bytes"] / 1e9,
        "arguments_gb": cost["arguments_bytes"] / 1e9,
        "mcycles": cycles / 1e6,
        "kernel_mcycles": (cost["kernel_cycles"] or 0) / 1e6,
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
            room = "" if row["fits"] else " (does not fit)"
            print(
                f"{name}: heap {row['heap_gb']:.2f} GB{room}, {row['mcycles']:,.0f} M cycles "
                f"({row['over_roofline']:.2f} x roofline), kernels {row['kernel_mcycles']:,.0f} M, "
                f"wire {row['wire_over_least']:.2f} x the least, "
                f"compiled in {row['compile_s']:.0f} s",
                flush=True,
            )
        for op in sorted(operations, key=lambda op: -(op.cycles or 0) * op.times)[: args.top]:
            print(f"{(op.cycles or 0) * op.times / 1e6:10.2f} M  x {op.times:<4} {op.name:36} {op.source[-90:]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
