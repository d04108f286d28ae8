"""What verified checkpoints cost beside plain Orbax: saves, restores, and the hash's share, against the train step.

    python tools/bench_checkpoint.py                  # 22M parameters with AdamW: 256 MiB of state
    python tools/bench_checkpoint.py --params 200 --tokens 8192 --folder /mnt/disk

A Llama trains on random tokens on all devices here, and both ways save and restore its state in turns; medians of
--times. Columns:

    blocking   until the call returns and training goes on, and as a share of a step
    beside     the step that runs while the rest is written, over a step alone
    complete   until the checkpoint is on the disk, ours with its manifest
    restore    until the arrays are on the device, ours verified: files and arrays

Then what the parts of ours take: reading all files, hashing them while they are read, and fingerprints of the arrays.
"""

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from maxlm import manifest, units
from maxlm.checkpoint import Checkpoints
from maxlm.config import CheckpointConfig
from maxlm.config_file import parse_config
from maxlm.fingerprint import fingerprints
from maxlm.leaves import named_leaves
from maxlm.mesh import make_mesh
from maxlm.step import Program, build_program

WIDTH, SEQ_LEN = 512, 256
PER_LAYER = 4 * WIDTH**2 + 3 * WIDTH * 4 * WIDTH


def make_program(params: float, tokens: int) -> Program:
    """A Llama of about so many million parameters, and tokens per step."""
    model = {
        "vocab_size": 8192,
        "num_layers": max(1, round((params * 1e6 - 8192 * WIDTH) / PER_LAYER)),
        "d_model": WIDTH,
        "d_ff": 4 * WIDTH,
        "num_heads": 8,
        "tie_embeddings": True,
        "dtype": "float32",
    }
    train = {"steps": 10**6, "batch_size": max(1, tokens // SEQ_LEN), "seq_len": SEQ_LEN}
    config = parse_config({"model": model, "data": {"stores": [{"path": "unused"}]}, "train": train})
    return build_program(config, make_mesh(config.mesh, jax.devices()))


def random_batch(program: Program) -> dict[str, jax.Array]:
    """Random tokens; every row is one document."""
    shapes, rng = program.batch_shapes, np.random.default_rng(0)
    shape, vocab = shapes["tokens"].shape, program.config.model.vocab_size
    rows = {
        **{key: rng.integers(0, vocab, shape) for key in ("tokens", "targets")},
        "segments": np.ones(shape),
        "positions": np.broadcast_to(np.arange(shape[-1]), shape),
        "mask": np.ones(shape),
    }
    return {key: jax.device_put(rows[key].astype(s.dtype), s.sharding) for key, s in shapes.items()}


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


class Trainer:
    """A run on one random batch."""

    def __init__(self, program: Program):
        self._program, self._batch = program, random_batch(program)
        self.state = program.init(jax.random.key(0))

    def step(self) -> None:
        """One step, to its end."""
        self.state, _ = jax.block_until_ready(self._program.step(self.state, self._batch))


def measure(program: Program, times: int, folder: Path) -> dict[str, float]:
    """Median seconds of each part, by name."""
    trainer = Trainer(program)
    checkpoints = Checkpoints(str(folder / "ours"), CheckpointConfig(keep_last=1))
    found: dict[str, list[float]] = {}
    for count in range(times + 1):
        row: dict[str, float] = {}
        for name, way in (("orbax", Plain(folder)), ("maxlm", checkpoints)):
            parts = one_way(trainer, way, count, program.state_shapes)
            row |= {f"{name} {part}": seconds for part, seconds in parts.items()}
        row["step"] = statistics.mean([row.pop("orbax step"), row.pop("maxlm step")])
        path = checkpoints.step_path(count)
        names = manifest.saved_files(path)
        files = [Path(path, name) for name in names]
        row["reading"], _ = timed(lambda files=files: [len(file.read_bytes()) for file in files])
        row["reading and hashing"], _ = timed(lambda path=path, names=names: len(manifest.hash_files(path, names)))
        row["fingerprints"], _ = timed(lambda: fingerprints(named_leaves(trainer.state))())
        shutil.rmtree(folder / "plain")
        for name, seconds in row.items():
            if count:  # the first one compiles
                found.setdefault(name, []).append(seconds)
    checkpoints.close()
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def one_way(trainer: Trainer, way: Any, count: int, shapes: Any) -> dict[str, float]:
    """Seconds of a step, of a save, of the step beside it, and of a restore."""
    found = {"step": timed(trainer.step)[0]}
    started = time.perf_counter()
    way.save(count, trainer.state)
    found["blocking"] = time.perf_counter() - started
    found["beside"], _ = timed(trainer.step)
    way.wait()
    found["complete"] = time.perf_counter() - started
    found["restore"], _ = timed(lambda: way.restore(count, shapes))
    return found


def show(found: dict[str, float]) -> None:
    """Prints what was measured."""
    print(f"a step takes {units.duration(found['step'])}")
    print(f"{'':8}{'blocking':>12}{'of a step':>12}{'beside':>12}{'complete':>12}{'restore':>12}")
    for name in ("orbax", "maxlm"):
        blocking, beside, complete, restore = (
            found[f"{name} {part}"] for part in ("blocking", "beside", "complete", "restore")
        )
        cells = [units.duration(blocking), f"{blocking / found['step']:.2%}", f"{beside / found['step']:.2f}"]
        cells += [units.duration(complete), units.duration(restore)]
        print(f"{name:8}" + "".join(f"{cell:>12}" for cell in cells))
    for name in ("reading", "reading and hashing", "fingerprints"):
        print(f"{name}: {units.duration(found[name])}, {found[name] / found['step']:.2%} of a step")


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=float, default=22, metavar="M", help="million parameters, about (22)")
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens of a step (2048)")
    parser.add_argument("--times", type=int, default=5, help="saves that count (5)")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, in seconds")
    args = parser.parse_args()
    if args.params <= 0 or args.tokens < 1 or args.times < 1:
        parser.error("--params, --tokens and --times are positive")
    program = make_program(args.params, args.tokens)
    with jax.set_mesh(program.mesh), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(program, args.times, Path(folder))
    if args.json:
        print(json.dumps(found))
        return 0
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(program.state_shapes))
    print(f"{units.size(size)} of state on {jax.devices()[0].device_kind}, medians of {args.times}")
    show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
