"""Compiles a config's train step for a TPU slice that is not there, and prints what it needs and does.

    python tools/compile_step.py configs/llama3_8b.yaml --topology v5p:4x4x4
    python tools/compile_step.py configs/1b.yaml --topology v5e:2x4 train.batch_size=16 --json

Needs libtpu (pip install 'maxlm[plan]'), no TPU. Bytes are per device. Loops are counted: a collective in the layer
scan counts once per layer. `peak` is the compiler's own peak of arguments, outputs and temporaries together.
"""

import argparse
import collections
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")

from jax.experimental import topologies

from maxlm import hlo, units
from maxlm.config_file import load_config
from maxlm.ending import bytes_per_device
from maxlm.hardware import detect
from maxlm.mesh import axis_sizes, check_fit, make_mesh
from maxlm.step import build_program


def figures(config_path: str, overrides: list[str], topology: str) -> dict[str, Any]:
    """Memory and collectives of a config's compiled step, per device.

    Args:
        config_path: YAML file.
        overrides: dotted settings.
        topology: TPU slice such as v5e:4x4, as jax names it.
    """
    config = load_config(config_path, overrides)
    single = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}
    devices = topologies.get_topology_desc(topology, "tpu", num_slices=config.mesh.slices, **single).devices
    sizes = axis_sizes(config.mesh, len(devices))
    check_fit(config, sizes)
    program = build_program(config, make_mesh(config.mesh, devices))
    started = time.perf_counter()
    compiled = program.lower_step().compile()
    memory, chip = compiled.memory_analysis(), detect(devices[0])
    moved: dict[str, dict[str, int]] = collections.defaultdict(lambda: {"times": 0, "bytes": 0})
    for c in hlo.collectives(compiled.as_text()):
        axes = sorted({name.rstrip("0123456789") for name in c.axes(program.mesh.shape)})
        total = moved[f"{c.kind} over {' and '.join(axes) or 'nothing'}"]
        total["times"] += c.times
        total["bytes"] += c.times * c.bytes
    return {
        "topology": topology,
        "mesh": sizes,
        "mesh_axes": dict(program.mesh.shape),
        "compile_s": round(time.perf_counter() - started, 1),
        "hbm_bytes": chip.hbm_bytes if chip else None,
        "peak_bytes": memory.peak_memory_in_bytes,
        "state_bytes": bytes_per_device(program.state_shapes),
        "temporary_bytes": memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        "donated_bytes": memory.alias_size_in_bytes,
        "collectives": dict(sorted(moved.items(), key=lambda item: -item[1]["bytes"])),
    }


def main() -> int:
    """Prints the figures of one compile; exit code 1 when the step does not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    parser.add_argument("--topology", default="v5e:4x4", help="TPU slice (default: v5e:4x4)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_intermixed_args()
    try:
        result = figures(args.config, args.overrides, args.topology)
    except Exception as error:
        print(f"error: {str(error).splitlines()[0][:500]}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    for key, value in result.items():
        if key == "collectives":
            for kind, total in value.items():
                print(f"{kind:<40} {total['times']:>6} times, {units.size(total['bytes'])}")
        else:
            print(f"{key:<18} {units.size(value) if key.endswith('_bytes') and value else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
