"""What verified checkpoints cost beside plain Orbax: saves, restores, and the hash's share.

    python tools/bench_checkpoint.py                  # 256 MiB of state
    python tools/bench_checkpoint.py --mib 2048 --folder /mnt/disk

Both save and restore the same float32 state of random numbers in turns, on one device; medians of --times. Columns:

    blocking   until the call returns and training goes on
    complete   until the checkpoint is on the disk, ours with its manifest
    restore    until the arrays are on the device, ours verified: files and arrays

Then what the parts of ours take: reading all files, hashing them while they are read, and fingerprints of the arrays.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from maxlm import manifest, units
from maxlm.checkpoint import Checkpoints
from maxlm.config import CheckpointConfig
from maxlm.fingerprint import fingerprints

ARRAYS = 16


def make_state(mib: int) -> dict[str, jax.Array]:
    """Random float32 arrays."""
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    return {f"w{i}": jax.random.normal(key, (mib * 2**20 // 4 // ARRAYS // 1024, 1024)) for i, key in enumerate(keys)}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returns."""
    started = time.perf_counter()
    found = jax.block_until_ready(function())
    return time.perf_counter() - started, found


class Plain:
    """Orbax alone."""

    def __init__(self, folder: Path):
        self._path = (folder / "plain").resolve()
        self._checkpointer = ocp.StandardCheckpointer()

    def save(self, step: int, state: Any) -> None:
        """Begins a save."""
        self._checkpointer.save(self._path / str(step), state)

    def wait(self) -> None:
        """Ends it."""
        self._checkpointer.wait_until_finished()

    def restore(self, step: int, shapes: Any) -> Any:
        """Reads it."""
        return self._checkpointer.restore(self._path / str(step), shapes)


def measure(mib: int, times: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of each part, by name."""
    state = make_state(mib)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = Checkpoints(str(folder / "ours"), CheckpointConfig(keep_last=1))
    found: dict[str, list[float]] = {}
    for step in range(times + 1):
        state = jax.tree.map(lambda x: x + jnp.float32(1), state)
        jax.block_until_ready(state)
        row: dict[str, float] = {}
        for name, way in (("orbax", Plain(folder)), ("maxlm", checkpoints)):
            row[f"{name} blocking"], _ = timed(lambda way=way, step=step, state=state: way.save(step, state))
            rest, _ = timed(way.wait)
            row[f"{name} complete"] = row[f"{name} blocking"] + rest
            row[f"{name} restore"], _ = timed(lambda way=way, step=step: way.restore(step, shapes))
        path = checkpoints.step_path(step)
        files = [Path(path) / name for name in manifest.saved_files(path)]
        names = [str(file.relative_to(path)) for file in files]
        row["reading"], _ = timed(lambda files=files: [len(file.read_bytes()) for file in files])
        row["reading and hashing"], _ = timed(lambda path=path, names=names: len(manifest.hash_files(path, names)))
        row["fingerprints"], _ = timed(lambda state=state: fingerprints(state)())
        shutil.rmtree(folder / "plain")
        for name, seconds in row.items():
            if step:  # the first one compiles
                found.setdefault(name, []).append(seconds)
    checkpoints.close()
    return found


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=256, help="size of the state (256)")
    parser.add_argument("--times", type=int, default=5, help="saves that count (5)")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, in seconds")
    args = parser.parse_args()
    if args.mib < 1 or args.times < 1:
        parser.error("--mib and --times are counts from 1")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = {k: statistics.median(v) for k, v in measure(args.mib, args.times, Path(folder)).items()}
    if args.json:
        print(json.dumps(found))
        return 0
    print(f"{args.mib} MiB of state on {jax.devices()[0].device_kind}, median of {args.times}")
    print(f"{'':8}" + "".join(f"{part:>12}" for part in ("blocking", "complete", "restore")))
    for name in ("orbax", "maxlm"):
        cells = [units.duration(found[f"{name} {part}"]) for part in ("blocking", "complete", "restore")]
        print(f"{name:8}" + "".join(f"{cell:>12}" for cell in cells))
    for name in ("reading", "reading and hashing", "fingerprints"):
        print(f"{name}: {units.duration(found[name])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
