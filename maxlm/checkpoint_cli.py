"""`maxlm checkpoint`: what checkpoints a run has, whether they are whole, and how to remove some."""

import argparse
import contextlib
import json
from collections.abc import Iterator
from typing import Any

from maxlm import storage, units
from maxlm.commands import add_command
from maxlm.config_file import ConfigError

EXAMPLES = {
    "ls": "examples:\n  maxlm checkpoint ls runs/quickstart\n  maxlm checkpoint ls gs://bucket/runs/a --json",
    "verify": "examples:\n  maxlm checkpoint verify runs/quickstart\n  maxlm checkpoint verify runs/quickstart 200 300",
    "rm": "example:\n  maxlm checkpoint rm runs/quickstart 1000 2000",
}


def add_parser(subparsers: Any) -> None:
    """Adds `checkpoint ls`, `checkpoint verify` and `checkpoint rm`; each sets `run`."""
    parser = subparsers.add_parser(
        "checkpoint",
        help="list, verify and remove the checkpoints of a run",
        description="Looks after the checkpoints of a run. A run verifies what it restores by itself.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = {
        "ls": (_ls, "list the checkpoints of a run: step, size, and whether each can be used"),
        "verify": (_verify, "read every byte of them and compare it with what was written; exit code 1 if one differs"),
        "rm": (_rm, "remove checkpoints; the newest one that is complete only with --force"),
    }
    for name, (run, text) in about.items():
        command = add_command(commands, name, run, text, EXAMPLES[name])
        command.add_argument("folder", metavar="RUN", help="folder or bucket of the run")
        if name != "ls":
            many = "+" if name == "rm" else "*"
            command.add_argument("steps", metavar="STEP", type=int, nargs=many, help="which; default: all")
        if name == "rm":
            command.add_argument("--force", action="store_true", help="even the newest complete one")
        else:
            command.add_argument("--json", action="store_true", help="print JSON")


def _ls(args: argparse.Namespace) -> int:
    with _opened(args.folder) as checkpoints:
        rows = [_row(checkpoints, step) for step in checkpoints.folders()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"{'step':>10}{'size':>12}  state")
    for row in rows:
        size = units.size(row["size"]) if row["size"] is not None else "?"
        print(f"{row['step']:>10}{size:>12}  {row['state']}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from maxlm.manifest import CheckpointError, DamagedError

    found: dict[int, str] = {}
    with _opened(args.folder) as checkpoints:
        for step in _chosen(args, checkpoints.folders()):
            try:
                known = checkpoints.verify(step)
                found[step] = ""
                text = f"verified: {len(known.files)} files" if known else "not verified: it is of an older maxlm"
            except CheckpointError as error:
                damaged = isinstance(error, DamagedError) and step in checkpoints.steps()  # or still being written
                kind = "DAMAGED" if damaged else "not verified"
                text = found[step] = f"{kind}: {error}"
            if not args.json:
                print(f"{step:>10}  {text}", flush=True)
    if args.json:
        print(json.dumps([{"step": step, "verified": not text, "reason": text} for step, text in found.items()]))
    return int(any(found.values()))


def _rm(args: argparse.Namespace) -> int:
    with _opened(args.folder) as checkpoints:
        chosen = _chosen(args, checkpoints.folders())
        if checkpoints.latest() in chosen and not args.force:
            raise ConfigError(
                f"step {checkpoints.latest()} is the newest complete checkpoint: the run continues from it; "
                "--force removes it all the same"
            )
        for step in chosen:
            checkpoints.remove(step)
            print(f"removed {checkpoints.step_path(step)}")
    return 0


def _row(checkpoints: Any, step: int) -> dict[str, Any]:
    """A checkpoint as people see it: size in bytes (None where nothing says), and "complete" or why it is not used."""
    from maxlm import manifest
    from maxlm.checkpoint import DAMAGED

    folder = checkpoints.step_path(step)
    if DAMAGED in storage.list_dir(folder):
        try:
            reason = json.loads(storage.read_bytes(storage.join(folder, DAMAGED)))["reason"]
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            reason = "nothing says what is wrong"
        return {"step": step, "size": None, "state": f"DAMAGED, not used: {reason}"}
    try:
        known = checkpoints.manifest(step)
    except manifest.CheckpointError as error:
        return {"step": step, "size": None, "state": f"not used: {error}"}
    if known is None:
        return {"step": step, "size": None, "state": "complete, of an older maxlm: it cannot be verified"}
    size = sum(file.size for file in known.files.values())
    return {"step": step, "size": size, "state": "complete" + (", until the next save" if known.temporary else "")}


def _chosen(args: argparse.Namespace, steps: list[int]) -> list[int]:
    if unknown := sorted(set(args.steps) - set(steps)):
        raise ConfigError(f"{args.folder} has no checkpoint of step {unknown[0]}; it has {steps}")
    return args.steps or steps


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[Any]:
    if not storage.exists(storage.join(folder, "checkpoints")):
        raise ConfigError(f"{folder} is not a run folder with checkpoints")
    import jax

    from maxlm.checkpoint import Checkpoints
    from maxlm.config import CheckpointConfig

    jax.config.update("jax_platforms", "cpu")  # accelerators may be busy training
    with contextlib.closing(Checkpoints(folder, CheckpointConfig(), read_only=True)) as checkpoints:
        yield checkpoints
