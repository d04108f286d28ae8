"""Makes maxlm/kernels/splash_blocks.csv: what the TPU compiler schedules for splash attention with many block sizes.

    python tools/splash_blocks.py --write                        # all chips and head sizes: about 20 minutes
    python tools/splash_blocks.py --chip v6e --head-size 128     # what is best for some lengths, and what it gains

A kernel is compiled for a chip that is not there, and the bundles of its parts are counted in the schedule that the
compiler writes: the step of the grid, its conditional parts (the first step of a row, the block's logits, the last
step). A bundle is issued in a cycle; a step takes no less than the time in which its arrays come from HBM. Waits that
the schedule does not know are not counted. The file keeps the rows that are best for some length and window.
Needs libtpu (pip install 'maxlm[plan]'), no TPU.
"""

import argparse
import csv
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

FOLDER = tempfile.TemporaryDirectory()  # libtpu reads its flags once, when it is loaded
os.environ["LIBTPU_INIT_ARGS"] = (
    f"--xla_jf_dump_to={FOLDER.name} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from maxlm.hardware import Chip, detect  # noqa: E402
from maxlm.kernels.splash import Splash  # noqa: E402
from maxlm.kernels.splash_blocks import KERNELS, Blocks, Cost, Mask, by_rule  # noqa: E402
from maxlm.topology import topology_devices  # noqa: E402

OUT = Path(__file__).parent.parent / "maxlm/kernels/splash_blocks.csv"
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
HEAD_SIZES = (64, 128, 256)
BLOCKS: list[Blocks] = [
    (q, kv, compute)
    for q in (256, 512, 1024, 2048)
    for kv, compute in ((256, 256), (512, 512), (1024, 512), (1024, 1024), (2048, 512), (2048, 1024))
]
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 32768, 131072)
WINDOWS = (None, 128, 1024, 4096)


def main() -> int:
    """Measures, and prints or writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=TOPOLOGIES, help="default: all")
    parser.add_argument("--head-size", type=int, choices=HEAD_SIZES, help="default: all")
    parser.add_argument(
        "--blocks", type=lambda text: [tuple(map(int, text.split(",")))], default=BLOCKS, metavar="Q,KV,C"
    )
    parser.add_argument("--write", action="store_true", help=f"write {OUT.name}, of all chips and head sizes")
    args = parser.parse_args()
    if args.write and (args.chip or args.head_size or args.blocks is not BLOCKS):
        parser.error("--write is of all chips, head sizes and blocks")
    rows: list[dict[str, Any]] = []
    for chip in [args.chip] if args.chip else TOPOLOGIES:
        for head_size in [args.head_size] if args.head_size else HEAD_SIZES:
            device = topology_devices(TOPOLOGIES[chip])[0]
            found = [measure(device, head_size, blocks) for blocks in args.blocks]
            for kernel in KERNELS:
                costs = [row[kernel] for row in found if row]
                _show(chip, head_size, kernel, costs)
                best = _best(kernel, costs) if args.blocks is BLOCKS else costs
                rows += [_row(detect(device), head_size, kernel, cost) for cost in costs if cost in best]
    if args.write:
        with OUT.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    elif rows:
        csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n").writerows(rows)
    return 0


def measure(device: Any, head_size: int, blocks: Blocks) -> dict[str, Cost] | None:
    """Cost of each kernel with these blocks; None if the compiler refuses one of them."""
    q, kv, _ = blocks
    B, T, N, K = 16, 2 * max(q, kv), 32, 8  # too much for the chip's own memory, as in a model
    place = SingleDeviceSharding(device)
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)  # noqa: E731
    heads, keys = (array(jnp.bfloat16, B, T, count, head_size) for count in (N, K))
    segments, log_z = array(jnp.int32, B, T), array(jnp.float32, B, N, T)
    rows, kernels = (heads, keys, keys, (segments, segments)), Splash(scale=1.0, blocks=blocks)
    for file in Path(FOLDER.name).iterdir():
        file.unlink()
    try:
        jax.jit(kernels.forward).lower(*rows).compile()
        jax.jit(kernels.backward).lower(*rows, heads, log_z, heads).compile()
    except jax.errors.JaxRuntimeError as error:
        if "vmem" not in str(error).lower():
            raise
        return None
    chip, found = detect(device), {}
    for name in KERNELS:
        (file,) = (f for f in Path(FOLDER.name).glob(f"*mqa_{name}*final_bundles.txt") if "analysis" not in f.name)
        # forward and dq fetch keys and values for a step, dkv queries and gradients of outputs, in two bytes each
        arrive = 4 * head_size * (q if name == "dkv" else kv) / _bytes_per_cycle(chip)
        found[name] = _cost(blocks, file.read_text(), arrive)
    return found


def _bytes_per_cycle(chip: Chip | None) -> float:
    assert chip
    assert chip.flops_per_cycle
    return chip.hbm_bytes_per_s * chip.flops_per_cycle / chip.bf16_flops


def _cost(blocks: Blocks, schedule: str, arrive: float) -> Cost:
    """Sums up a schedule: the loop over steps is its longest region, the logits' part the longest without branches."""
    regions = sorted(_regions(schedule), key=lambda region: region[0] - region[1])
    (start, stop), *inner = regions
    run = next(region for region in inner if not any(_holds(region, other) for other in inner))
    before = [region for region in inner if region[1] <= run[0]]
    after = [region for region in inner if region[0] >= run[1]]
    ends = sum(max((b - a for a, b in side), default=0) for side in (before, after))
    hidden = stop - start - (run[1] - run[0]) - ends
    return Cost(blocks, round(max(stop - start - ends, arrive)), hidden, ends)


def _holds(region: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether the other one is a part of a region; some of a few bundles only mark a place."""
    return region != other and region[0] <= other[0] and other[1] <= region[1] and other[1] - other[0] > 8


def _regions(schedule: str) -> list[tuple[int, int]]:
    """First and last bundle of each region of a schedule."""
    starts: dict[str, int] = {}
    found, bundle = [], 0
    for line in schedule.splitlines():
        if match := re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", line):
            bundle = int(match[1], 16)
        for event, name in re.findall(r"(Start/End empty|Start|End) region (\d+)", line):
            if event == "Start":
                starts[name] = bundle
            elif event == "End" and name in starts:
                found.append((starts[name], bundle))
    return found


def _best(kernel: str, costs: list[Cost]) -> set[Cost]:
    found = set()
    for length in LENGTHS:
        for window in WINDOWS:
            for causal in (True, False) if window is None else (True,):
                mask = Mask(length, length, causal, window)
                fitting = [cost for cost in costs if all(length % size == 0 for size in cost.blocks[:2])]
                found |= {min(fitting, key=lambda cost: cost.cycles(kernel, mask))} if fitting else set()
    return found


def _show(chip: str, head_size: int, kernel: str, costs: list[Cost]) -> None:
    """Best blocks for some lengths, and cycles over those of blocks by rule."""
    for length in (2048, 8192, 32768):
        mask = Mask(length, length)
        fitting = [cost for cost in costs if all(length % size == 0 for size in cost.blocks[:2])]
        if not fitting:
            continue
        cost = min(fitting, key=lambda cost: cost.cycles(kernel, mask))
        size = by_rule(length, head_size)
        ruled = next((other for other in costs if other.blocks == (size, size, size)), None)
        share = f", {cost.cycles(kernel, mask) / ruled.cycles(kernel, mask):.2f} of {size} x {size}" if ruled else ""
        print(
            f"{chip} head {head_size} {kernel:3} {length:6}: {'x'.join(map(str, cost.blocks)):14} "
            f"{cost.cycles(kernel, mask) / 1e3:9,.0f} k cycles a head{share}",
            file=sys.stderr,
        )


def _row(chip: Chip | None, head_size: int, kernel: str, cost: Cost) -> dict[str, Any]:
    assert chip
    block_q, block_kv, compute = cost.blocks
    sizes = {"block_q": block_q, "block_kv": block_kv, "compute": compute}
    cycles = {"seen": cost.seen, "hidden": cost.hidden, "ends": cost.ends}
    return {"chip": chip.name, "head_size": head_size, "kernel": kernel, **sizes, **cycles}


if __name__ == "__main__":
    sys.exit(main())
