"""One of two hosts is killed or asked to stop; supervisors start both again."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tools.faults import compare
from tools.faults.outcome import Outcome, need
from tools.faults.resume import start_hosts
from tools.faults.work import Work, ended, last_line, trainer_of, wait, wait_until

STEPS = 60
SUPERVISE = ("-m", "maxlm", "supervise", "--retries", "5", "--", "train")
GONE_S = 150.0
"""The other host has to end within this, in seconds; jax's coordination service takes 60 at most to notice."""


def run(work: Work) -> list[Outcome]:
    """Signals to either host."""
    straight, found = pair_straight(work), []
    for number in (signal.SIGKILL,) if work.short else (signal.SIGTERM, signal.SIGKILL):
        outcome = Outcome(f"{number.name} to one of two hosts, both supervised", lost_steps=0, lost_batches=0)
        seconds = []
        for host in (1,) if work.short else (1, 0, 1, 0, 1):
            config = pair_config(work, f"pair_{number.name}_{outcome.tried}", STEPS)
            with outcome.attempt(f"{number.name} to host {host}"):
                waited, lost = _once(work, config, number, host)
                seconds.append(waited)
                outcome.lost_steps = (outcome.lost_steps or 0) + lost
                compare.same_end(work.run_folder(config), straight, STEPS)
            work.say(f"hosts: {number.name} to host {host}: the other ended after {max(seconds, default=-1):.1f} s")
        outcome.notes.append(f"the other ended within {max(seconds, default=-1):.1f} s")
        outcome.notes.append("weights, moments and every loss bit-equal to an undisturbed run of two hosts")
        found.append(outcome)
    return found


def pair_config(work: Work, name: str, steps: int, **checkpoint: Any) -> Path:
    """Config of a run of two hosts with a device each."""
    return work.config(name, mesh={"data": 1, "fsdp": 2}, train={"steps": steps}, checkpoint={"every": 5, **checkpoint})


def pair_straight(work: Work) -> Path:
    """Folder of the undisturbed run of two hosts."""
    config = pair_config(work, "pair_straight", STEPS, keep_last=None)
    if not work.run_folder(config).exists():
        work.say("the undisturbed run of two hosts")
        _finish(work, config)
    return work.run_folder(config)


def _start(work: Work, config: Path) -> list[subprocess.Popen[bytes]]:
    return start_hosts(work, config, 2, total=2, program=SUPERVISE)


def _finish(work: Work, config: Path, processes: list[subprocess.Popen[bytes]] | None = None) -> None:
    """Both supervisors end well."""
    processes = processes or _start(work, config)
    with ended(*processes):
        codes = [wait(process) for process in processes]
    need(codes == [0, 0], f"exit codes {codes}: {last_line(work.log_path(config).read_text(errors='replace'))}")


def _once(work: Work, config: Path, number: signal.Signals, host: int) -> tuple[float, int]:
    """Seconds until the other host has ended, and steps that were lost."""
    folder, processes = work.run_folder(config), _start(work, config)
    rng = work.random(config.stem)
    with ended(*processes):
        wait_until(lambda: compare.last_step(folder) > 5 and compare.latest(folder), processes[0], "step 6")
        time.sleep(rng.uniform(0, 1))
        trainers = [trainer_of(process.pid) for process in processes]
        need(all(trainers), "a trainer had ended before the signal")
        os.kill(trainers[host] or 0, number)
        sent = time.monotonic()
        wait_until(lambda: not _lives(trainers[1 - host]), None, "the end of the other host", GONE_S)
        seconds = time.monotonic() - sent
        lost = max(0, compare.last_step(folder) - (compare.latest(folder) or 0))
        _finish(work, config, processes)
    if number == signal.SIGTERM:  # both have saved and ended
        need(compare.latest(folder) == compare.last_step(folder), "the last step was not saved")
        lost = 0
        _finish(work, config)
    return seconds, lost


def _lives(pid: int | None) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
