"""SIGKILL at random moments, many of them while a checkpoint is written."""

import os
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.faults import compare
from tools.faults.outcome import Broken, Outcome, need
from tools.faults.work import LARGE, SMALL, Work, ended, wait_until

EVERY = 5
"""Steps between saves."""
KEPT = 2
STRAIGHT_S = 1800.0
"""For the undisturbed run: hundreds of steps with a save of 200 MB every few."""
TAIL = 10
"""Steps after the last kill."""
INSIDE = 0.4
"""Share of the kills that are to meet a save."""
STATES = {"orbax": "while Orbax wrote", "manifest": "between Orbax and MANIFEST.json"}


@dataclass
class Tally:
    """What the kills met.

    Attributes:
        lost: steps that each kill cost.
        inside: how many came in each part of a save.
        starts: how many came before the first step of a start.
        bytes: largest size of the run folder.
    """

    lost: list[int] = field(default_factory=list)
    inside: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATES, 0))
    starts: int = 0
    bytes: int = 0


def run(work: Work) -> list[Outcome]:
    """Kills one run many times, and compares it with an undisturbed one."""
    kills = 5 if work.short else 50
    outcome = Outcome(f"SIGKILL at a random moment, saves every {EVERY} steps")
    model = SMALL if work.short else LARGE
    rng, tally = work.random("kills"), Tally()
    fields: dict[str, Any] = {
        "model": model,
        "train": {"steps": 10**6, "seq_len": 16},
        "checkpoint": {"every": EVERY, "keep_last": KEPT},
    }
    config = work.config("kills", **fields)
    folder = work.run_folder(config)
    with outcome.attempt("kills", kills):
        for number in range(kills):
            _kill_once(work, config, rng, number, kills, tally)
        steps = (compare.last_step(folder) // EVERY + 1) * EVERY + TAIL
        work.finish(config, f"train.steps={steps}")
        straight = work.config("kills_straight", **fields)
        work.finish(straight, f"train.steps={steps}", patience_s=STRAIGHT_S)
        size = compare.same_end(folder, work.run_folder(straight), steps)
        _check_folder(folder, work.run_folder(straight), tally)
        outcome.notes += _notes(tally, size, steps, straight, work)
        outcome.lost_batches = 0  # every step once, with the loss of the undisturbed run: same_end
        inside = sum(tally.inside.values())
        need(work.short or inside >= 0.3 * kills, f"only {tally.inside} of {kills} kills came inside a save")
        work.remove(config)
        work.remove(straight)
    outcome.lost_steps = sum(tally.lost)
    return [outcome]


def _kill_once(work: Work, config: Path, rng: random.Random, number: int, total: int, tally: Tally) -> None:
    folder = work.run_folder(config)
    before, known = compare.last_step(folder), unfinished(folder)
    moment = rng.choices(("save", "anywhere", "start"), (5, 4, 1))[0]
    if sum(tally.inside.values()) < INSIDE * (number + 1):  # a save is over sooner than it was meant to be met
        moment = "save"
    process = work.start(config)
    with ended(process):
        if moment == "save":
            _wait_for_save(folder, rng.randint(1, 2), rng.random() < 0.4, process)
            delay = rng.uniform(0, 0.1 if work.short else 0.5)
        elif moment == "anywhere":
            wait_until(lambda: compare.last_step(folder) > before or _restarted(folder, process), process, "a step")
            delay = rng.uniform(0, 6)
        else:
            delay = rng.uniform(0.5, 8)
        time.sleep(delay)
        need(process.poll() is None, f"the run ended by itself with exit code {process.poll()}")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last, saved = compare.last_step(folder), compare.latest(folder) or 0
    fresh = {key: state for key, state in unfinished(folder).items() if key not in known}
    for state in fresh.values():
        tally.inside[state] += 1
    tally.lost.append(max(0, last - saved))
    tally.starts += moment == "start"
    tally.bytes = max(tally.bytes, _bytes(folder))
    where = ", ".join(STATES[state] for state in fresh.values()) or "outside a save"
    work.say(f"kill {number + 1} of {total}: {moment} + {delay:.2f} s, after step {last}, {where}; saved is {saved}")


def unfinished(folder: Path) -> dict[tuple[str, int], str]:
    """Saves that are not complete: {(name, inode): state}."""
    found, newest = {}, compare.latest(folder) or 0  # older ones without a manifest are being removed
    for path in (folder / "checkpoints").glob("*"):
        try:
            key = path.name, path.stat().st_ino
            if "orbax-checkpoint-tmp" in path.name:
                found[key] = "orbax"
            elif path.name.isdigit() and int(path.name) > newest and not (path / "MANIFEST.json").exists():
                found[key] = "manifest"
        except OSError:
            continue  # it was renamed
    return found


def _wait_for_save(folder: Path, nth: int, written: bool, process: subprocess.Popen[bytes]) -> None:
    """Waits until the n-th save of this start has begun, or until Orbax has written it."""
    seen = set(unfinished(folder))

    def fresh(state: str | None = None) -> set[tuple[str, int]]:
        # what an earlier kill left is removed when the run opens the folder; a new save has a new inode
        return {key for key, now in unfinished(folder).items() if key not in seen and state in (None, now)}

    for i in range(nth):
        wait_until(fresh, process, "a save")
        if i + 1 < nth:
            wait_until(lambda: not fresh(), process, "the end of a save")
    if written:
        wait_until(lambda: fresh("manifest") or not fresh(), process, "the end of Orbax's part")


def _restarted(folder: Path, process: subprocess.Popen[bytes]) -> bool:
    """Whether this process has finished a step: the one that a killed one had reached may be further."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return False
    started = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + _started(process.pid)
    lines = path.read_text().splitlines()
    return bool(lines) and path.stat().st_mtime > started + 1 and '"loss"' in lines[-1]


def _started(pid: int) -> float:
    """Seconds from the machine's start to that of a process."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check_folder(folder: Path, straight: Path, tally: Tally) -> None:
    """Nothing of the saves that were cut off is left."""
    need(not unfinished(folder), f"left in {folder}/checkpoints: {sorted(name for name, _ in unfinished(folder))}")
    names = [sorted(p.name for p in (f / "checkpoints").iterdir()) for f in (folder, straight)]
    need(names[0] == names[1], f"{folder} keeps the checkpoints {names[0]}, the undisturbed run {names[1]}")
    here, there = _bytes(folder / "checkpoints"), _bytes(straight / "checkpoints")
    need(here <= 1.02 * there, f"checkpoints hold {here:,} bytes, those of the undisturbed run {there:,}")
    if tally.bytes > (KEPT + 2) / KEPT * 1.1 * there:
        raise Broken(f"the run folder grew to {tally.bytes:,} bytes, with {KEPT} checkpoints of {there // KEPT:,} each")


def _notes(tally: Tally, size: int, steps: int, straight: Path, work: Work) -> list[str]:
    kept = _bytes(work.run_folder(straight) / "checkpoints")
    inside = ", ".join(f"{count} {STATES[state]}" for state, count in tally.inside.items())
    return [
        f"{inside}, {tally.starts} before the first step",
        f"{sum(tally.lost) / len(tally.lost):.1f} steps lost per kill, {max(tally.lost)} at most",
        f"{size / 1e6:.0f} MB of state, {steps} steps; weights, moments and every loss bit-equal",
        f"run folder at most {tally.bytes / 1e6:.0f} MB, {kept / 1e6:.0f} MB at the end",
    ]
