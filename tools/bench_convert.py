"""What conversion costs beside copying the files: speed and memory, Hugging Face to maxlm and back.

    python tools/bench_convert.py                     # a Llama of 1.1 billion parameters in bf16, 2.2 GB
    python tools/bench_convert.py --layers 2 --width 512 --folder /mnt/disk

A model of random weights is written in files of at most 1 GB. Then, in turns, --rounds times: `cp -r` with the copy
flushed to the disk, `maxlm convert from-hf` and `maxlm convert to-hf`, each a process of its own whose start counts.
Speeds are of medians; memory is the largest resident set of the process. Wanted: half the speed of cp, and at most the
largest tensor times four and 1 GB of memory. Exit code 1 says that one of them was missed.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from maxlm import units
from maxlm.config import ModelConfig
from maxlm.convert.families import FAMILIES
from maxlm.convert.mapping import entries
from maxlm.convert.safetensors import Folder
from maxlm.convert.safetensors_writer import Writer

ROOT = Path(__file__).resolve().parent.parent
SPEED, MORE_BYTES = 0.5, 10**9
SHARD_BYTES = 10**9


def write_model(folder: Path, layers: int, width: int) -> tuple[int, int]:
    """Writes a Llama of random bf16 weights. Returns its size and that of its largest tensor, in bytes."""
    heads = width // 64
    model = ModelConfig(
        vocab_size=32_000,
        num_layers=layers,
        d_model=width,
        d_ff=width * 11 // 4,
        num_heads=heads,
        num_kv_heads=max(1, heads // 8),
    )
    family, dtype, rng = FAMILIES["llama"], np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    shapes = {entry.name: (dtype, entry.shape) for entry in entries(family, model)}
    folder.mkdir()
    with Writer(str(folder), shapes, SHARD_BYTES) as writer:
        for name, (_, shape) in shapes.items():
            writer.write(name, rng.standard_normal(shape, np.float32).astype(dtype))
    (folder / "config.json").write_text(json.dumps(family.write_config(model)))
    sizes = [2 * int(np.prod(shape)) for _, shape in shapes.values()]
    return sum(sizes), max(sizes)


def copy(source: Path, target: Path) -> float:
    """Seconds of cp until the copy is on the disk."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def convert(*arguments: str) -> tuple[float, int]:
    """Seconds and largest resident set, in bytes, of `maxlm convert`."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "maxlm", "convert", *arguments, "--json"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"maxlm convert {arguments[0]} failed: {said[-500:]}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each tensor."""
    source = Folder(str(folder))
    try:
        return {name: hashlib.sha256(source.read(name).tobytes()).hexdigest() for name in source.tensors}
    finally:
        source.close()


def measure(folder: Path, layers: int, width: int, rounds: int) -> dict[str, Any]:
    """All figures, as printed with --json."""
    theirs, ours, back, copied = (folder / name for name in ("theirs", "ours", "back", "copied"))
    size, largest = write_model(theirs, layers, width)
    times: dict[str, list[float]] = {"cp": [], "from-hf": [], "to-hf": []}
    peaks = dict.fromkeys(("from-hf", "to-hf"), 0)
    for _ in range(rounds):
        # each finds as much memory just freed: a virtual machine's first use of memory can take longer than the work
        shutil.rmtree(copied, ignore_errors=True)
        times["cp"].append(copy(theirs, copied))
        for name, source, target in (("from-hf", theirs, ours), ("to-hf", ours, back)):
            shutil.rmtree(target, ignore_errors=True)
            seconds, peak = convert(name, str(source), str(target))
            times[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "bytes": size,
        "largest_tensor_bytes": largest,
        "memory_limit_bytes": 4 * largest + MORE_BYTES,
        "seconds": medians,
        "speed_to_cp": {name: medians["cp"] / medians[name] for name in peaks},
        "peak_bytes": peaks,
        "same_tensors": hashes(theirs) == hashes(back),
    }


def show(result: dict[str, Any]) -> str:
    """A table."""
    size, limit = result["bytes"], result["memory_limit_bytes"]
    lines = [f"{units.size(size)}, largest tensor {units.size(result['largest_tensor_bytes'])}"]
    lines.append(f"{'':10}{'seconds':>9}{'MB/s':>8}{'of cp':>8}{'memory':>12}{'allowed':>12}")
    for name, seconds in result["seconds"].items():
        line = f"{name:10}{seconds:9.2f}{size / seconds / 1e6:8.0f}"
        if name in result["peak_bytes"]:
            line += f"{result['speed_to_cp'][name]:8.0%}{units.size(result['peak_bytes'][name]):>12}"
            line += f"{units.size(limit):>12}"
        lines.append(line)
    lines.append(
        "there and back: " + ("every tensor has the same hash" if result["same_tensors"] else "TENSORS DIFFER")
    )
    return "\n".join(lines)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", default=None, help="on the disk that is to be measured (temporary files' folder)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = measure(Path(folder), args.layers, args.width, args.rounds)
    print(json.dumps(result) if args.json else show(result))
    slow = min(result["speed_to_cp"].values()) < SPEED
    large = max(result["peak_bytes"].values()) > result["memory_limit_bytes"]
    return int(slow or large or not result["same_tensors"])


if __name__ == "__main__":
    sys.exit(main())
