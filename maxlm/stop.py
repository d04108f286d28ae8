"""Stopping early: Ctrl-C and SIGTERM ask for a save; a second Ctrl-C ends at once."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType


class StopSignals:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the second SIGINT ends the process.

    Outside the main thread (a notebook's worker, say) signals cannot be caught, and nothing is changed.
    """

    def __init__(self, on_first: Callable[[str], None], on_second: Callable[[], None]):
        """Args: on_first: called with the signal's name. on_second: called before the process ends with 130."""
        self.requested: str | None = None
        self._on_first, self._on_second = on_first, on_second
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is None:
            self.requested = signal.Signals(number).name
            self._on_first("Ctrl-C" if number == signal.SIGINT else self.requested)
        elif number == signal.SIGINT:
            self._on_second()
            os._exit(130)  # not sys.exit: background saves and device work must not hold the process


def process_age_s() -> float:
    """Seconds since this process started, imports included."""
    with open("/proc/self/stat") as file:
        started_ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
