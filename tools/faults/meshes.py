"""State saved on one mesh and restored on another."""

import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np

from tools.faults.compare import different
from tools.faults.outcome import Outcome, need
from tools.faults.work import Work

AXES = ("fsdp", "tensor", "stage")
SIZES = (1, 2, 4, 8)
STEP = 7


def run(work: Work) -> list[Outcome]:
    """Saves one state on every mesh, and restores each save on every mesh."""
    names = [(axis, size) for axis in AXES for size in SIZES]
    rng = work.random("meshes")
    if work.short:  # one without stages is needed: it gives the state its canonical form
        names = [("fsdp", 2), *rng.sample([name for name in names if name != ("fsdp", 2)], 5)]
    pairs = list(itertools.product(names, names))
    if work.short:
        pairs = [(("fsdp", 2), names[1]), *rng.sample(pairs, 19)]
    outcome = Outcome("saved on one mesh, restored on another")
    config = work.config("meshes")
    programs = {name: _program(config, *name) for name in sorted({name for pair in pairs for name in pair})}
    state = _canonical_state(programs)
    seconds, saved = [], set()
    for i, (there, here) in enumerate(pairs):
        folder = work.folder / "meshes" / f"{there[0]}{there[1]}"
        with outcome.attempt(f"{there[0]} {there[1]} to {here[0]} {here[1]}"):
            if there not in saved:
                _save(folder, programs[there], state)
                saved.add(there)
            started = time.monotonic()
            found = _restore(folder, programs[here])
            seconds.append(time.monotonic() - started)
            wrong = different(found, state)
            need(not wrong, f"{len(wrong)} of {len(state)} arrays are others, {wrong[:1]} first")
        if i % 12 == 11:
            work.say(f"meshes: {i + 1} of {len(pairs)} pairs")
    outcome.notes.append(
        f"ordered pairs of {', '.join(AXES)} x {', '.join(map(str, SIZES))} devices; weights, moments and counters "
        f"bit-equal; {max(seconds, default=0):.1f} s a restore at most"
    )
    return [outcome]


def _program(config: Path, axis: str, size: int) -> Any:
    import jax

    from maxlm.config_file import load_config
    from maxlm.mesh import make_mesh
    from maxlm.step import build_program

    cfg = load_config(config, ["mesh.fsdp=1", f"mesh.{axis}={size}"])
    return build_program(cfg, make_mesh(cfg.mesh, jax.devices()[:size]))


def _canonical_state(programs: dict[tuple[str, int], Any]) -> dict[str, np.ndarray]:
    """Random arrays of a state without stages, by path: zeros and ones would hide what is swapped."""
    from maxlm.leaves import named_leaves

    program = next(program for program in programs.values() if program.stack_shape is None)
    rng = np.random.default_rng(0)

    def draw(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        if np.issubdtype(dtype, np.integer):
            return np.asarray(rng.integers(0, 1000, shape), dtype)
        return np.asarray(rng.standard_normal(shape), dtype)

    return {path: draw(leaf.shape, leaf.dtype) for path, leaf in named_leaves(program.state_shapes).items()}


def _save(folder: Path, program: Any, state: dict[str, np.ndarray]) -> None:
    import jax

    from maxlm.checkpoint import Checkpoints
    from maxlm.config import CheckpointConfig
    from maxlm.leaves import map_paths

    placed = map_paths(
        lambda path, leaf: jax.device_put(state[path].reshape(leaf.shape), leaf.sharding), program.state_shapes
    )
    with jax.set_mesh(program.mesh), contextlib.closing(Checkpoints(str(folder), CheckpointConfig())) as checkpoints:
        checkpoints.save(STEP, placed)
        checkpoints.wait()


def _restore(folder: Path, program: Any) -> dict[str, np.ndarray]:
    """Restores as a run does; arrays without stages, by path."""
    import jax

    from maxlm.checkpoint import Checkpoints
    from maxlm.config import CheckpointConfig
    from maxlm.leaves import named_leaves

    with jax.set_mesh(program.mesh), contextlib.closing(Checkpoints(str(folder), CheckpointConfig())) as checkpoints:
        found = checkpoints.restore_newest(program.state_shapes, program.stack)
    assert found is not None
    arrays = {}
    for path, leaf in named_leaves(found[0]).items():
        array = np.asarray(leaf)
        if program.stack_shape and "layers" in path.split("/"):
            array = array.reshape(-1, *array.shape[3:])
        arrays[path] = array
    return arrays
