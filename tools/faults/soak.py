"""One run that goes on over many meshes and deaths."""

import os
import random
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tools.faults import compare
from tools.faults.outcome import Outcome, need
from tools.faults.resume import CHILD
from tools.faults.work import Work, ended, fault, wait, wait_until

BATCH, LENGTH, EVERY = 8, 32, 3
STAY_S = 2.0
"""From the first step of a start to its end, at most, in seconds."""
ALLOWED = ("mesh.fsdp=-1", "mesh.allowed=[8,4,2,1]")
MESHES: list[tuple[int, tuple[str, ...]]] = [
    (1, ()),
    (2, ("mesh.fsdp=2",)),
    (2, ("mesh.stage=2", "train.grad_accum=2")),
    (3, ALLOWED),
    (2, ("mesh.tensor=2",)),
    (4, ("mesh.data=2", "mesh.fsdp=2")),
    (4, ("mesh.fsdp=2", "mesh.tensor=2")),
    (4, ("mesh.stage=4", "train.grad_accum=4")),
    (5, ALLOWED),
    (8, ("mesh.fsdp=8",)),
    (8, ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")),
    (8, ("mesh.stage=2", "mesh.fsdp=2", "mesh.tensor=2", "train.grad_accum=2")),
    (8, ("mesh.stage=8", "train.grad_accum=4")),
    (8, ALLOWED),
]
"""Fake devices, and settings."""


@dataclass
class Log:
    """What happened: steps that were lost, seconds of each cycle, how many of each signal, meshes."""

    lost: int = 0
    seconds: list[float] = field(default_factory=list)
    kills: int = 0
    meshes: set[int] = field(default_factory=set)


def run(work: Work) -> list[Outcome]:
    """Starts, steps, and dies or stops; then compares with a run that did none of it."""
    cycles = 5 if work.short else 100
    outcome = Outcome("soak: shrink, grow, die, go on", lost_steps=0, lost_batches=0)
    rng, log, hashes = work.random("soak"), Log(), work.folder / "soak.hashes"
    config = work.config("soak", train={"steps": 10**6}, checkpoint={"every": EVERY})
    folder = work.run_folder(config)
    for i in range(cycles):
        choice = rng.randrange(4 if work.short else len(MESHES))
        with outcome.attempt(f"cycle {i + 1}"):
            text = _cycle(work, config, *MESHES[choice], hashes, rng, log)
            log.meshes.add(choice)
            work.say(f"soak: cycle {i + 1} of {cycles}: {text}")
    cycles_survived, outcome.survived = outcome.survived, 0
    with outcome.attempt("the end", 0):
        steps = max(compare.last_step(folder), 1) + 5
        env = {"CHAOS": fault(hashes=str(hashes))}
        work.finish(config, f"train.steps={steps}", program=CHILD, env=env)
        straight, own = work.config("soak_straight", train={"steps": steps}), work.folder / "straight.hashes"
        work.finish(straight, program=CHILD, env={"CHAOS": fault(hashes=str(own))})
        outcome.notes += _compare(work, config, straight, steps, (hashes, own), outcome)
        outcome.survived = cycles_survived
    outcome.lost_steps = log.lost
    sizes = sorted(MESHES[choice][0] for choice in log.meshes)
    outcome.notes.append(
        f"{len(log.meshes)} meshes of {min(sizes, default=0)} to {max(sizes, default=0)} devices, "
        f"{log.kills} SIGKILL, {len(log.seconds) - log.kills} SIGTERM, "
        f"{np.mean(log.seconds or [-1]):.1f} s a cycle, {100 * cycles_survived / outcome.tried:.0f} % recovered"
    )
    return [outcome]


def _cycle(
    work: Work, config: Path, devices: int, settings: tuple[str, ...], hashes: Path, rng: random.Random, log: Log
) -> str:
    """One start on one mesh, up to a signal; what happened, a phrase."""
    from maxlm.heartbeat import FILE, STEP, read_beat

    folder, started = work.run_folder(config), time.monotonic()
    beats = work.folder / "soak.beat"
    beats.write_bytes(b"")
    number = rng.choice((signal.SIGKILL, signal.SIGTERM))
    env = {"CHAOS": fault(hashes=str(hashes)), FILE: str(beats)}
    process = work.start(config, *settings, devices=devices, program=CHILD, env=env)

    def steps_on() -> bool:
        beat = read_beat(str(beats))
        return beat is not None and beat.phase == STEP

    with ended(process):
        wait_until(steps_on, process, "a step")
        time.sleep(rng.uniform(0, STAY_S))
        need(process.poll() is None, f"it ended by itself with exit code {process.returncode}")
        os.kill(process.pid, number)
        code = wait(process, 120)
    last, saved = compare.last_step(folder), compare.latest(folder) or 0
    log.lost += max(0, last - saved)
    log.kills += number == signal.SIGKILL
    log.seconds.append(time.monotonic() - started)
    need(code == (0 if number == signal.SIGTERM else -9), f"exit code {code} after {number.name}")
    mesh = " ".join(setting.partition("mesh.")[2] for setting in settings if "mesh." in setting)
    return f"{devices} devices {mesh}, {number.name} after step {last}, saved is {saved}, {log.seconds[-1]:.1f} s"


def _compare(
    work: Work, config: Path, straight: Path, steps: int, hashes: tuple[Path, Path], outcome: Outcome
) -> list[str]:
    """Each step and each batch once, and as many tokens as there have to be."""
    here, there = (compare.losses(work.run_folder(c)) for c in (config, straight))
    missing = sorted(set(range(1, steps + 1)) ^ set(here))
    own, want = (compare.read_hashes(file) for file in hashes)
    wrong = sorted({*missing, *compare.wrong_batches(own, want, steps, BATCH)})
    outcome.lost_batches = len(wrong)
    need(not wrong, f"the steps {wrong[:9]} are missing or had other batches")
    state = compare.restored(work.run_folder(config), steps)
    counts = {path: int(x) for path, x in state.items() if x.ndim == 0 and np.issubdtype(x.dtype, np.integer)}
    need(set(counts.values()) == {steps}, f"after {steps} steps the state counts {counts}")
    far = max(abs(here[step] - there[step]) / abs(there[step]) for step in there)
    need(far < 0.02, f"a loss is {far:.1%} away from the undisturbed run's")
    return [
        f"{steps} steps x {BATCH * LENGTH} = {steps * BATCH * LENGTH:,} tokens, each batch as in an undisturbed run "
        f"(SHA-256 of {steps * BATCH:,} rows)",
        f"losses within {far:.1e} of it",
    ]
