"""Stopping early: Ctrl-C and SIGTERM ask for a save; a second Ctrl-C ends at once."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

_IMPORTED = time.monotonic()


class StopSignals:
    """While entered, the first SIGINT or SIGTERM asks for a stop; the second SIGINT ends the process.

    Python runs signal handlers between two bytecodes of the main thread, which may sit in a device's step for minutes.
    So a thread reads the signals as they arrive (signal.set_wakeup_fd), and the second Ctrl-C works at any moment.
    Outside the main thread (a notebook's worker, say) signals cannot be caught, and nothing is changed.
    """

    def __init__(self, on_first: Callable[[str], None], on_second: Callable[[], None]):
        """Args: on_first: called with what was pressed. on_second: called before the process ends with 130."""
        self._numbers: list[int] = []
        self._on_first, self._on_second = on_first, on_second
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, name="maxlm-signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        self._writer.close()  # ends the thread

    def _listen(self) -> None:
        with self._reader:
            while data := self._reader.recv(1):
                if data[0] in self._before:
                    self._received(data[0])

    def _received(self, number: int) -> None:
        before, self._numbers = self._numbers, [*self._numbers, number]
        if not before:
            with contextlib.suppress(BaseException):  # such as of a terminal that is gone; later signals count
                self._on_first("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        elif number == signal.SIGINT and signal.SIGINT in before:
            with contextlib.suppress(BaseException):
                self._on_second()
            os._exit(130)  # not sys.exit: background saves and device work must not hold the process


def process_age_s() -> float:
    """Seconds since this process started, imports included; without /proc, since this module was imported."""
    if not os.path.exists("/proc/self/stat"):
        return time.monotonic() - _IMPORTED
    with open("/proc/self/stat") as file:
        started_ticks = int(file.read().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")
