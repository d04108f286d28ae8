"""What a pipeline costs on a TPU slice that is not there: memory, matrix products and collectives of one step.

Compiles loss and gradients of a 16-layer model (D 2048, F 8192, 16 heads of 128, vocabulary 32,768, 1,024 tokens,
microbatches of 4, bfloat16) for v5e:4x4, plain (fsdp 8 x tensor 2) and as pipelines (fsdp 2 x stage 4 x tensor 2), with
the TPU compiler (pip install 'maxlm[plan]'). FLOPs are those of the compiled program, recomputation included.

    python tools/pipeline_figures.py                      # all four pipelines, some minutes
    python tools/pipeline_figures.py --microbatches 16 --rounds 4
"""

import argparse
import json
import os
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")

import jax
from jax.experimental import topologies

from maxlm import hlo
from maxlm.config_file import parse_config
from maxlm.mesh import make_mesh
from maxlm.step import Program, build_program

TOPOLOGY = "v5e:4x4"
MICROBATCH = 4
MODEL = {
    "vocab_size": 32768,
    "num_layers": 16,
    "d_model": 2048,
    "d_ff": 8192,
    "num_heads": 16,
    "head_dim": 128,
    "mlp": "plain",
    "activation": "gelu_tanh",
    "tie_embeddings": True,
}
PIPELINE = {"fsdp": 2, "stage": 4, "tensor": 2}
PLAIN = {"fsdp": 8, "tensor": 2}


def compile_gradients(mesh: dict[str, int], num_microbatches: int) -> tuple[Program, Any]:
    """The program, and its compiled gradients, of the model on a mesh."""
    stages = mesh.get("stage", 1)
    rows = MICROBATCH * num_microbatches
    config = parse_config(
        {
            "model": MODEL,
            "mesh": mesh,
            "data": {"stores": [{"path": "none"}]},
            # without stages a microbatch has to divide over twice the devices
            "train": {
                "steps": 1,
                "batch_size": rows,
                "seq_len": 1024,
                "grad_accum": num_microbatches if stages > 1 else num_microbatches // 2,
                "attention": "plain",  # so that all products are the compiler's
            },
            "optim": {"learning_rate": 1e-3},
        }
    )
    devices = topologies.get_topology_desc(TOPOLOGY, "tpu").devices
    program = build_program(config, make_mesh(config.mesh, devices))
    with jax.set_mesh(program.mesh):
        return program, program.grads.lower(program.state_shapes["params"], program.batch_shapes).compile()


def figures(num_microbatches: int, rounds: int, plain_flops: float) -> dict[str, Any]:
    """One pipeline's memory and FLOPs per device.

    Args:
        num_microbatches: M.
        rounds: shares of layers per stage.
        plain_flops: FLOPs of the plain program with 16 microbatches.
    """
    _, compiled = compile_gradients({**PIPELINE, "rounds": rounds}, num_microbatches)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    flops = hlo.matmul_flops(text, taken=head_share(num_microbatches, rounds))
    in_loops = [c for c in hlo.collectives(text) if c.loops]
    return {
        "num_microbatches": num_microbatches,
        "rounds": rounds,
        "temporary_mib": memory.temp_size_in_bytes / 2**20,
        "flops": flops,
        "flops_over_plain": flops / (plain_flops * num_microbatches / 16) - 1,
        "largest_collective_in_loops_mib": max(c.bytes for c in in_loops) / 2**20,
    }


def head_share(num_microbatches: int, rounds: int) -> float:
    """Share of the middle loop's ticks in which the branch with the loss runs."""
    from maxlm.parallel.schedule import pipeline_schedule

    schedule = pipeline_schedule("1f1b", PIPELINE["stage"], rounds, num_microbatches)
    (middle,) = (phase for phase in schedule.phases if phase.head)
    return num_microbatches / (middle.stop - middle.start)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, help="only this many (16 and 64)")
    parser.add_argument("--rounds", type=int, help="only this many shares of layers per stage (1 and 4)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    _, plain = compile_gradients(PLAIN, 16)
    plain_flops = hlo.matmul_flops(plain.as_text())
    plain_mib = plain.memory_analysis().temp_size_in_bytes / 2**20
    rows = []
    for num_microbatches in [args.microbatches] if args.microbatches else [16, 64]:
        for rounds in [args.rounds] if args.rounds else [1, 4]:
            rows.append(figures(num_microbatches, rounds, plain_flops))
            if not args.json:
                print("{num_microbatches:3} microbatches, {rounds} rounds: ".format(**rows[-1]), end="")
                print("{temporary_mib:.0f} MiB, FLOPs {flops_over_plain:+.1%} over plain".format(**rows[-1]))
    if args.json:
        print(json.dumps({"plain": {"temporary_mib": plain_mib, "flops": plain_flops}, "pipelines": rows}))
    else:
        print(f"plain (fsdp 8 x tensor 2, 16 microbatches' tokens): {plain_mib:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
