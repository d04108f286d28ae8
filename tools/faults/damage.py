"""Every file of the newest checkpoint changed, cut off or deleted."""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tools.faults import compare
from tools.faults.outcome import Outcome, need
from tools.faults.work import Work

STEPS = 10
NEWEST, BEFORE = 10, 5


def flip(path: Path, rng: random.Random) -> None:
    """Changes one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Truncates it at a random place."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def delete(path: Path, _: random.Random) -> None:
    """Removes it."""
    path.unlink()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "a byte changed": flip,
    "truncated": cut,
    "deleted": delete,
}


def run(work: Work) -> list[Outcome]:
    """Damages one file at a time, and resumes."""
    config = work.config("damage", checkpoint={"every": BEFORE, "keep_last": 2}, train={"steps": STEPS})
    work.finish(config)
    folder = work.run_folder(config)
    rng, found = work.random("damage"), []
    files = sorted(p for p in (folder / "checkpoints" / str(NEWEST)).rglob("*") if p.is_file())
    want = compare.restored(folder, BEFORE)
    for name, damage in DAMAGES.items():
        outcome = Outcome(f"newest checkpoint: each file {name}")
        times = 1 if work.short or damage is delete else 3
        own = [path for path in files if damage is delete or path.stat().st_size]
        for path in own * times:
            with outcome.attempt(f"{path.relative_to(folder)} {name}"), _restored_afterwards(path):
                damage(path, rng)
                _falls_back(folder, path, want)
        kinds = sorted({path.name for path in own if len(path.name) < 30})
        outcome.notes.append(f"{len(own)} files, {', '.join(kinds)} and data; {times} times each, in one process")
        work.say(f"damage: {outcome.fault}: {outcome.survived} of {outcome.tried}")
        found.append(outcome)
    return [*found, _by_command(work, config, files, rng)]


@contextlib.contextmanager
def _restored_afterwards(path: Path):
    data = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(data)
        step = next(parent for parent in path.parents if parent.parent.name == "checkpoints")
        (step / "DAMAGED.json").unlink(missing_ok=True)


def _falls_back(folder: Path, path: Path, want: dict) -> None:
    """What a resume does: the step before, and a message that names the file."""
    import jax
    import numpy as np
    from jax.sharding import SingleDeviceSharding

    from maxlm.checkpoint import Checkpoints
    from maxlm.config import CheckpointConfig
    from maxlm.leaves import named_leaves

    told: list[str] = []
    shapes = compare.shapes(folder, BEFORE, SingleDeviceSharding(jax.devices()[0]))
    with contextlib.closing(Checkpoints(str(folder), CheckpointConfig(), tell=told.append)) as checkpoints:
        found = checkpoints.restore_newest(shapes)
    assert found is not None
    need(found[1] == BEFORE, f"step {found[1]} was taken")
    need(not compare.different({k: np.asarray(v) for k, v in named_leaves(found[0]).items()}, want), "other arrays")
    name = str(path.relative_to(folder / "checkpoints" / str(NEWEST)))
    need(any(name in text for text in told), f"no message names the file: {told}")


def _by_command(work: Work, config: Path, files: list[Path], rng: random.Random) -> Outcome:
    """The same through the command line: the run has to end as the undisturbed one."""
    outcome = Outcome("the same, through `maxlm train`", lost_steps=0)
    straight = work.run_folder(config)
    manifest = next(path for path in files if path.name == "MANIFEST.json")
    count = 1 if work.short else 6
    for i, path in enumerate([manifest, *rng.sample(files, count - 1)]):
        name, damage = list(DAMAGES.items())[i % 3]
        copy = work.config(f"damage{i}", checkpoint={"every": BEFORE, "keep_last": 2}, train={"steps": STEPS})
        folder = work.run_folder(copy)
        shutil.copytree(straight, folder)
        inner = path.relative_to(straight)
        (folder / "summary.json").unlink()
        with outcome.attempt(f"{inner} {name}"):
            damage(folder / inner, rng)
            said = work.finish(copy)
            need(path.name in said, f"no message names {path.name}")
            compare.same_end(folder, straight, STEPS)
            outcome.lost_steps = (outcome.lost_steps or 0) + NEWEST - BEFORE
        work.say(f"damage: `maxlm train` with {inner} {name}: {outcome.survived} of {outcome.tried}")
    outcome.notes.append("bit-equal in the end; what is lost is the way from the step before")
    return outcome
