"""SIGTERM in every phase of a run."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from tools.faults import compare
from tools.faults.outcome import Outcome, need
from tools.faults.resume import CHILD
from tools.faults.work import Work, ended, fault, last_line, wait, wait_until

STEPS = 20
SHORT = ("data", "commit")


class Phase(NamedTuple):
    """Where the signal comes.

    Attributes:
        about: a phrase.
        beat: phase of the heartbeat to wait for; None: the start of the process; "": the marker of a sleep.
        slow: what sleeps how long, in seconds.
        after: step to wait for.
        delay_s: longest wait in the phase before the signal.
        overrides: settings.
    """

    about: str
    beat: str | None
    slow: dict[str, float]
    after: int
    delay_s: float
    overrides: tuple[str, ...] = ()


PHASES = {
    "start": Phase("imports and start", None, {}, 0, 3.0),
    "compile": Phase("compilation", "compile", {}, 0, 1.5, ("train.compilation_cache=null",)),
    "step": Phase("a step", "step", {"data": 0.02}, 3, 0.3),
    "evaluation": Phase(
        "an evaluation of 8 s", "evaluation", {"evaluation": 2.0}, 3, 3.0, ("eval.every=7", "eval.batches=4")
    ),
    "data": Phase("a wait of 8 s for data", "", {"data": 8.0}, 4, 1.0),
    "save": Phase("a save, before the copy (2 s)", "", {"save": 2.0}, 0, 1.0),
    "ending": Phase("the last evaluation (8 s)", "evaluation", {"evaluation": 2.0}, STEPS, 3.0, ("eval.batches=4",)),
    "commit": Phase("a save in the background (2 s)", "", {"commit": 2.0}, 0, 1.0),
}


def run(work: Work) -> list[Outcome]:
    """Signals a run in each phase, looks at what it saved, and lets it go on."""
    straight, rng = work.straight(), work.random("sigterm")
    outcome = Outcome("SIGTERM in every phase", lost_steps=0, lost_batches=0)
    for name, phase in PHASES.items():
        if work.short and name not in SHORT:
            continue
        seconds = []
        for i in range(1 if work.short else 5):
            config = work.config(f"sigterm_{name}{i}", train={"steps": STEPS})
            with outcome.attempt(phase.about):
                waited, lost = _once(work, config, phase, rng)
                seconds.append(waited)
                outcome.lost_steps = (outcome.lost_steps or 0) + lost
                work.finish(config)
                compare.same_end(work.run_folder(config), straight, STEPS)
        work.say(f"sigterm: {phase.about}: ended within {max(seconds, default=-1):.1f} s")
        outcome.notes.append(f"{phase.about} {max(seconds, default=-1):.1f} s")
    outcome.notes = [f"seconds from the signal to the exit, at most: {', '.join(outcome.notes)}"]
    return [outcome]


def _once(work: Work, config: Path, phase: Phase, rng: random.Random) -> tuple[float, int]:
    """Seconds from the signal to the exit, and steps that were lost."""
    from maxlm.heartbeat import FILE, read_beat

    folder, marker = work.run_folder(config), work.folder / f"{config.stem}.marker"
    beats = work.folder / f"{config.stem}.beat"
    beats.touch()
    what: dict[str, Any] = {"slow": phase.slow, "marker": str(marker)}
    if phase.after and "data" in phase.slow and not phase.beat:
        what["data_at"] = phase.after
    env = {"CHAOS": fault(**what), FILE: str(beats)}
    process = work.start(config, *phase.overrides, program=CHILD, env=env)

    def inside() -> bool:
        beat = read_beat(str(beats))
        if phase.beat == "":
            return marker.exists()
        return beat is not None and beat.phase == phase.beat and beat.step >= phase.after

    with ended(process):
        if phase.beat is not None:
            wait_until(inside, process, phase.about)
        time.sleep(rng.uniform(0, phase.delay_s))
        need(process.poll() is None, f"it ended by itself with exit code {process.returncode} before the signal")
        os.kill(process.pid, signal.SIGTERM)
        sent = time.monotonic()
        code = wait(process, 120)
        seconds = time.monotonic() - sent
    said = work.log_path(config).read_text(errors="replace")
    codes = (
        (0, -signal.SIGTERM) if phase.beat is None or phase.after == STEPS else (0,)
    )  # nobody listens yet, or any more
    need(code in codes, f"exit code {code}: {last_line(said)}")
    return seconds, _lost(folder, phase)


def _lost(folder: Path, phase: Phase) -> int:
    """Steps that are done and not saved; Broken if there is no checkpoint that is whole."""
    saved, last = compare.latest(folder), compare.last_step(folder)
    if saved is None:
        need(last == 0 or phase.beat is None, f"{last} steps are done and there is no checkpoint")
        return last
    compare.restored(folder, saved)  # verifies
    return max(0, last - saved)
