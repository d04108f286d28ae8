"""Runs in two halves, and runs whose number of hosts falls."""

import socket
import subprocess
from pathlib import Path
from typing import Any

from tools.faults import compare
from tools.faults.outcome import Outcome, need
from tools.faults.work import STEPS, TOOLS, Work, ended, fault, last_line, wait

CHILD = (str(TOOLS / "faults" / "child.py"),)
HALF = STEPS // 2
"""An odd number of steps: neither a multiple of the saves nor the end of an epoch."""
MESHES: dict[str, tuple[int, dict[str, Any]]] = {
    "1 device": (1, {}),
    "data 2 x fsdp 2 x tensor 2": (8, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}),
    "stage 2 x fsdp 2": (4, {"mesh": {"stage": 2, "fsdp": 2}, "train": {"grad_accum": 2}}),
}


def epochs(work: Work, config: Path, steps: int) -> list[float]:
    """How often a run of so many steps sees each store."""
    from maxlm.config_file import load_config
    from maxlm.data.loader import Loader

    cfg = load_config(config)
    loader = Loader(cfg.data, cfg.train, cfg.model.vocab_size)
    weights = [store.weight for store in cfg.data.stores]
    rows = [steps * cfg.train.batch_size * weight / sum(weights) for weight in weights]
    found = [count / per_epoch for count, per_epoch in zip(rows, loader.rows_per_epoch, strict=True)]
    loader.close()
    return found


def twice(work: Work) -> list[Outcome]:
    """2 N steps against N and N steps more."""
    outcome = Outcome("2 N steps = N + N steps", lost_batches=0)
    seen = []
    for name, (devices, sections) in list(MESHES.items())[: 1 if work.short else None]:
        work.say(f"twice: {name}")
        straight, halves = (work.config(f"twice{devices}_{kind}", **sections) for kind in ("straight", "halves"))
        with outcome.attempt(name):
            seen = epochs(work, straight, 2 * HALF)
            need(min(seen) > 1.2, f"{2 * HALF} steps see the stores {seen} times: no epoch ends")
            if sections:
                work.finish(straight, f"train.steps={2 * HALF}", devices=devices)
            for steps in (HALF, 2 * HALF):
                work.finish(halves, f"train.steps={steps}", devices=devices)
            undisturbed = work.run_folder(straight) if sections else work.straight()
            compare.same_end(work.run_folder(halves), undisturbed, 2 * HALF)
    outcome.notes.append(f"N = {HALF}; {', '.join(MESHES) if not work.short else '1 device'}")
    outcome.notes.append(f"stores seen {' and '.join(f'{x:.1f}' for x in seen)} times; packed, mixed, read ahead")
    return [outcome]


# ---- hosts


def start_hosts(
    work: Work, config: Path, count: int, *overrides: str, total: int = 4, program: tuple[str, ...] = CHILD, **env: str
) -> list[subprocess.Popen[bytes]]:
    """Starts a run in `count` processes that share `total` fake devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for i in range(count):
        own = {key: value.replace("{host}", str(i)) for key, value in env.items()}
        if count > 1:
            own |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_COORDINATOR_PORT": port}
            own |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
        found.append(work.start(config, *overrides, devices=total // count, program=program, env=own))
    return found


def fewer_hosts(work: Work) -> list[Outcome]:
    """4, 2 and 1 hosts read the same global batches, and a run goes on over them."""
    part, counts = 4, [2, 1] if work.short else [4, 2, 1]
    total = part * len(counts)
    outcome = Outcome(f"hosts {' → '.join(map(str, counts))}", lost_batches=0)
    sections = {"mesh": {"data": 1, "fsdp": 2, "tensor": 2}, "train": {"steps": total}}
    with outcome.attempt(outcome.fault):
        straight, run = work.config("hosts_straight", **sections), work.config("hosts_fewer", **sections)
        files: dict[str, list[Path]] = {"straight": [], "fewer": []}
        for kind, config, host_counts in (("straight", straight, [1]), ("fewer", run, counts)):
            for i, count in enumerate(host_counts):
                steps = part * (i + 1) if kind == "fewer" else total
                work.say(f"fewer-hosts: {kind}, {count} hosts to step {steps}")
                names = work.folder / f"hashes_{kind}_{count}_{{host}}"
                files[kind] += [Path(str(names).replace("{host}", str(host))) for host in range(count)]
                processes = start_hosts(work, config, count, f"train.steps={steps}", CHAOS=fault(hashes=str(names)))
                with ended(*processes):
                    codes = [wait(process) for process in processes]
                need(not any(codes), f"exit codes {codes}; {last_line(work.log_path(config).read_text())}")
        found = {kind: compare.read_hashes(*paths) for kind, paths in files.items()}
        wrong = compare.wrong_batches(found["fewer"], found["straight"], total, 8)
        outcome.lost_batches = len(wrong)
        need(not wrong, f"the batches of steps {wrong} are others")
        need(sorted(compare.losses(work.run_folder(run))) == list(range(1, total + 1)), "steps are missing")
        rows = found["fewer"]
        repeated = [index for index in range(8 * total) if len(rows[index]) != _readers(index, part, counts)]
        need(not repeated, f"{len(repeated)} rows were read by more or fewer processes than hold them")
        outcome.notes.append(f"{total} steps, {len(rows)} rows by SHA-256; real processes")
    return [outcome]


def _readers(index: int, part: int, counts: list[int]) -> int:
    """Processes that hold a row: of 4 hosts, with fsdp 2 x tensor 2, two hold each half of the batch."""
    return max(1, counts[index // (8 * part)] // 2)
