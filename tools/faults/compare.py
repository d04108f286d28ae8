"""Whether two runs are the same: losses, states bit for bit, and the batches that they read."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tools.faults.outcome import Broken, need


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, of a run's metrics.jsonl; Broken where a step is there twice."""
    found: dict[int, float] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            need(row["step"] not in found, f"step {row['step']} is twice in {folder}/metrics.jsonl")
            found[row["step"]] = row["loss"]
    return found


def last_step(folder: Path) -> int:
    """Newest step in the metrics of a run that goes on; 0 of none."""
    with contextlib.suppress(FileNotFoundError):
        for line in reversed((folder / "metrics.jsonl").read_bytes().splitlines()):
            with contextlib.suppress(ValueError):
                return int(json.loads(line)["step"])
    return 0


def wrong_losses(folder: Path, straight: Path, steps: int) -> list[int]:
    """Steps up to `steps` that are missing or have another loss than in the undisturbed run, which may be longer."""
    here = losses(folder)
    there = {step: loss for step, loss in losses(straight).items() if step <= steps}
    need(set(there) == set(range(1, steps + 1)), f"{straight} has not all of the steps 1 to {steps}")
    extra = set(here) - set(there)
    return sorted({step for step in there if here.get(step) != there[step]} | extra)


def latest(folder: Path) -> int | None:
    """Newest complete checkpoint, from the files alone."""
    return max((int(p.parent.name) for p in (folder / "checkpoints").glob("[0-9]*/MANIFEST.json")), default=None)


def restored(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Arrays of a checkpoint by path, verified."""
    import jax
    from jax.sharding import SingleDeviceSharding

    from maxlm.checkpoint import Checkpoints
    from maxlm.config import CheckpointConfig
    from maxlm.leaves import named_leaves

    with contextlib.closing(Checkpoints(str(folder), CheckpointConfig(), read_only=True)) as checkpoints:
        state = checkpoints.restore(step, shapes(folder, step, SingleDeviceSharding(jax.devices()[0])))
    return {path: np.asarray(x) for path, x in named_leaves(state).items()}


def shapes(folder: Path, step: int, sharding: Any) -> Any:
    """The tree of a checkpoint, as ShapeDtypeStructs on one sharding."""
    import jax
    import orbax.checkpoint as ocp

    with contextlib.closing(ocp.StandardCheckpointer()) as reader:
        found = reader.metadata((folder / "checkpoints" / str(step)).absolute()).item_metadata
    need(found is not None, f"Orbax knows nothing of step {step} in {folder}")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), dict(found or {}))


def different(a: dict[str, np.ndarray], b: dict[str, np.ndarray], without: tuple[str, ...] = ()) -> list[str]:
    """Paths of arrays that are not bit-equal."""
    paths = sorted((set(a) | set(b)) - set(without))
    return [
        path
        for path in paths
        if path not in a or path not in b or a[path].dtype != b[path].dtype or a[path].tobytes() != b[path].tobytes()
    ]


def same_end(folder: Path, straight: Path, steps: int) -> int:
    """Broken unless a run of so many steps and an undisturbed one are bit-equal: that checkpoint, and every loss.

    Returns:
        Bytes of the state.
    """
    if wrong := wrong_losses(folder, straight, steps):
        raise Broken(
            f"{len(wrong)} steps of {folder} have other losses than the undisturbed run, step {wrong[0]} first"
        )
    here, there = restored(folder, steps), restored(straight, steps)
    if wrong := different(here, there):
        raise Broken(f"{len(wrong)} arrays of {folder} are not those of the undisturbed run, {wrong[0]} first")
    return sum(x.nbytes for x in here.values())


# ---- batches


def row_hash(batch: dict[str, np.ndarray], row: int) -> str:
    """Of all that a row of a batch holds."""
    digest = hashlib.sha256()
    for key in sorted(batch):
        digest.update(key.encode() + np.ascontiguousarray(batch[key][row]).tobytes())
    return digest.hexdigest()


def read_hashes(*files: Path) -> dict[int, list[str]]:
    """Hash of each global row, by its index in the run, each time that it was read; written by tools.faults.child."""
    found: dict[int, list[str]] = {}
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else ():
            with contextlib.suppress(ValueError):  # a line that a kill cut off
                for index, text in json.loads(line).items():
                    found.setdefault(int(index), []).append(text)
    return found


def wrong_batches(
    found: dict[int, list[str]], straight: dict[int, list[str]], steps: int, batch_size: int
) -> list[int]:
    """Steps from 1 whose rows are missing or were not always those of the undisturbed run."""
    wrong = set()
    for index in range(steps * batch_size):
        want = set(straight.get(index, ()))
        if len(want) != 1 or set(found.get(index, ())) != want:
            wrong.add(index // batch_size + 1)
    return sorted(wrong)
