"""Keeps the time of one start of a run while it trains, for goodput.json. See goodput.py."""

import contextlib
import itertools
import math
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

from maxlm import storage
from maxlm.goodput import COMPILE, DATA, FILE, LOST, Goodput, Start, read, summarize, to_json
from maxlm.heartbeat import STEP
from maxlm.stop import process_age_s

EVERY_S, BUCKET_EVERY_S = 10.0, 60.0
"""Seconds between two writes, at least; saves and the compilation are recorded at once."""
DAMAGED = "goodput.damaged.json"
"""Copy of a goodput.json that could not be understood."""
_NUM_STARTS = itertools.count()


def age_s(since_s: float) -> float:
    """For how long this start has been going on, in seconds: since its process began, imports included.

    Only the first run of a process may count that, and none that somebody calls at a prompt or in a notebook.

    Args:
        since_s: seconds since the run was called.
    """
    alone = next(_NUM_STARTS) == 0 and not hasattr(sys, "ps1")
    return max(since_s, process_age_s()) if alone else since_s


class Ledger:
    """Keeps the time of one start of a run, and writes it into the run's folder.

    The wall clock is in exactly one phase at a time, at first in "start". Use as a context manager: leaving it writes
    a last time, and after an error counts what was spent since the newest finished step as lost.

    Steps are sent to the devices one ahead, so most waits for data cost nothing. Of the time in phase "data" only that
    in which the devices had nothing to do counts as such; the rest is step time. With no step on its way that is all of
    it. With one, it is what comes after the shortest step of this start, measured where the devices had no other, from
    the moment they can have begun this one: the later of its dispatch and the end of the step before.
    """

    def __init__(
        self,
        run_dir: str,
        first: int,
        num_devices: int,
        age_s: float = 0.0,
        write: bool = True,
        tell: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
        resumed: bool = True,
        usd_per_hour: float | None = None,
    ):
        """Opens the ledger. A file that is missing or damaged is told and begun anew.

        Args:
            run_dir: run folder or bucket url.
            first: the step that this start resumes from.
            num_devices: devices it runs on.
            age_s: seconds since it began, see age_s.
            write: whether this host reads and writes the file; of many, one does.
            tell: is told what a person should know; default: standard error.
            clock: seconds that only grow.
            wall_clock: seconds since 1970.
            resumed: the run has been here before; a branch of another one has not.
            usd_per_hour: what the devices cost; None where nobody knows.
        """
        self._path, self._clock = storage.join(run_dir, FILE), clock
        self._tell = tell or partial(print, file=sys.stderr, flush=True)
        self._every_s = BUCKET_EVERY_S if storage.is_bucket(run_dir) else EVERY_S
        began, self._phase, self._since = wall_clock() - age_s, "start", clock() - age_s
        self._start = Start(began, first, first, began, num_devices, usd_per_hour=usd_per_hour)
        self._devices, self._unfinished_s = _Devices(first), 0.0
        self._writes, self._writer, self._problem = write, threading.Thread(), ""
        self._before = self._earlier(run_dir, first, resumed) if write else []
        self._settle()
        self._write_soon()

    def enter(self, phase: str, step: int | None = None) -> None:
        """Says what comes now.

        Args:
            phase: "start", "compile", "step", "data", "save", "evaluation", "profile" or "ending". A step is taken as
                sent to the devices when "data" is left for "step" or for "compile", and then when that is left.
            step: newest finished step, where it is known.
        """
        self._settle()
        left, self._phase = self._phase, phase
        if left == DATA and phase in (STEP, COMPILE):
            self._devices.sent(self._since)
        elif left == COMPILE:
            self._devices.began = self._since
        if step is not None and step > self._start.step:
            self._start.step, self._unfinished_s = step, 0.0
        if step is not None and phase == STEP:
            self._devices.finished(step, self._since)
        if self._since - self._written >= self._every_s or (left in ("save", COMPILE) and phase != left):
            self._write_soon()

    def goodput(self) -> Goodput:
        """What became of the time of the run until now."""
        self._settle()
        return summarize([*self._before, self._start])

    @property
    def usd(self) -> float | None:
        """What the run has cost until now; None where no start knew a price, which is told without summing up."""
        known = any(start.usd_per_hour is not None for start in (*self._before, self._start))
        return self.goodput().usd if known else None

    def write(self) -> None:
        """Brings goodput.json up to date."""
        self._settle()
        if self._writes:
            if self._writer.ident:
                self._writer.join()
            self._write(self._bytes())

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._settle()
        if error is not None:
            lost_s = min(self._unfinished_s, self._start.seconds.get(STEP, 0.0))  # rounded, it may be more
            self._add(STEP, -lost_s)
            self._add(LOST, lost_s)
        self.write()
        if self._problem:
            self._tell(f"the time of this start is not recorded: {self._problem}")

    def _earlier(self, run_dir: str, first: int, resumed: bool) -> list[Start]:
        try:
            found = read(run_dir)
        except OSError as error:
            self._tell(f"{error}; the time of this start is not recorded, {FILE} is left as it is")
            self._writes = False
            return []
        except ValueError as error:
            copy = storage.join(run_dir, DAMAGED)
            with contextlib.suppress(OSError):
                storage.write_bytes(copy, storage.read_bytes(self._path))
            self._tell(f"{error}; the time of earlier starts is not counted, {copy} is the file as it was")
            return []
        if resumed and first and not found:
            self._tell(f"no {FILE} tells of the time up to step {first}; it is not counted")
        return found

    def _settle(self) -> None:
        """Adds the time since the last call to its phase."""
        now = self._clock()
        spent_s, self._since = now - self._since, now
        if self._phase == DATA:
            idle_s = self._devices.idle_s(now, spent_s)
            self._add(DATA, idle_s)
            spent_s -= idle_s
        phase = STEP if self._phase == DATA else self._phase
        self._add(phase, spent_s)
        if phase == STEP:
            self._unfinished_s += spent_s
        self._start.updated = self._start.began + sum(self._start.seconds.values())

    def _add(self, phase: str, seconds: float) -> None:
        self._start.seconds[phase] = self._start.seconds.get(phase, 0.0) + seconds

    def _bytes(self) -> bytes:
        return to_json([*self._before, self._start])

    def _write_soon(self) -> None:
        """Writes in the background, since a disk or a bucket may take long; not while it is still at it."""
        self._written = self._since
        if self._writes and not self._writer.is_alive():
            self._writer = threading.Thread(target=self._write, args=(self._bytes(),), daemon=True)
            self._writer.start()

    def _write(self, data: bytes) -> None:
        try:
            storage.write_bytes(self._path, data)
            self._problem = ""
        except OSError as error:  # a run does not end for the sake of its ledger
            self._problem = str(error)


class _Devices:
    """What the host knows of when the devices are at work.

    Attributes:
        began: when they can have begun their newest step, in seconds.
    """

    def __init__(self, first: int):
        self.began = 0.0
        self._sent = self._done = first
        self._alone, self._shortest_s = False, math.inf

    def sent(self, now: float) -> None:
        self._alone = self._sent <= self._done
        self._sent, self.began = self._sent + 1, now

    def finished(self, step: int, now: float) -> None:
        if step <= self._done:
            return
        # Where another step was on its way, too, this one may have been finished for long, or have waited.
        if self._alone and step == self._sent:
            self._shortest_s = min(self._shortest_s, now - self.began)
        self._done, self.began = step, now

    def idle_s(self, now: float, waited_s: float) -> float:
        """How much of the last seconds they had nothing to do in."""
        if self._sent <= self._done:
            return waited_s
        return min(waited_s, max(0.0, now - self.began - self._shortest_s))
