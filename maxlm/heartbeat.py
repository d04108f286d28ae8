"""What a trainer tells its supervisor: which phase it is in, and the newest finished step. See supervise.py."""

import contextlib
import faulthandler
import os
import signal
import time
from typing import NamedTuple

FILE = "MAXLM_HEARTBEAT"
"""Environment variable: the file to write into. Without it nothing is written."""
STEP = "step"
"""Phase in which steps follow one another; others may take any time."""
STOPPED = "stopped"
"""Phase after a stop that somebody asked for, here or on another host: the run is not complete."""


class Beat(NamedTuple):
    """Phase, newest finished step, and when it was written, in seconds since 1970."""

    phase: str
    step: int
    time: float


def beat(phase: str, step: int) -> None:
    """Tells the supervisor, if there is one."""
    if path := os.environ.get(FILE):
        with contextlib.suppress(OSError), open(path, "r+b") as file:  # the supervisor may have ended
            file.write(f"{phase} {step} {time.time()}\n".encode().ljust(80))


def read_beat(path: str) -> Beat | None:
    """The newest beat; None before the first."""
    try:
        with open(path) as file:
            phase, step, seconds = file.readline().split()
        return Beat(phase, int(step), float(seconds))
    except (OSError, ValueError):
        return None


def dump_on_request() -> None:
    """Under a supervisor: SIGUSR1 prints what every thread is doing, even where the main one hangs."""
    if FILE in os.environ:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
