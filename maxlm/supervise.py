"""`maxlm supervise`: runs a trainer and starts it again when it crashes or hangs."""

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from maxlm import units
from maxlm.heartbeat import FILE, STEP, STOPPED, Beat, read_beat

POLL_S = 0.5
LONGEST_WAIT_S = 300.0
HANG_FACTOR = 20
"""No step for so many times the median step, and the run hangs."""
DUMP_S = 3.0
"""For writing what the threads were doing."""
GRACE_S = 30.0
"""From SIGTERM to SIGKILL, for a run that hangs."""
OWN_CTRL_C_S = 3.0
"""A trainer that has not ended so long after Ctrl-C may not have got it."""
ASKED_WRONGLY, INTERRUPTED = 2, 130
"""Exit codes with which starting again would change nothing."""


@dataclass(frozen=True)
class Limits:
    """When a run hangs, and how often it is started again.

    Attributes:
        step_s: least time without a step that is a hang, in seconds; more where steps are long.
        phase_s: the same of what is no step: start and compilation, evaluation, saving.
        retries: failures in a row at the same step before giving up.
        first_wait_s: wait before the first new start, in seconds; doubles each time.
        stopped_code: exit code of a run that was asked to stop, here or on another host, and ended well.
    """

    step_s: float = 60.0
    phase_s: float = 3600.0
    retries: int = 3
    first_wait_s: float = 1.0
    stopped_code: int = 0


def supervise(command: Sequence[str], limits: Limits) -> int:
    """Runs a command until it ends well, or fails too often at the same step.

    Args:
        command: a trainer that writes heartbeats.
        limits: what counts as a hang, and how often to try.

    Returns:
        Exit code of its last run, 1 if that was killed.
    """
    furthest, failures, stop = 0, 0, _Stop()
    with tempfile.TemporaryDirectory(prefix="maxlm-") as folder, stop:
        while True:
            run = _Run(command, os.path.join(folder, "heartbeat"), limits, stop)
            code, why = run.wait()
            # what was right once fails for other reasons: a host or a disk that is not back yet
            final = (0, INTERRUPTED) if furthest else (0, ASKED_WRONGLY, INTERRUPTED)
            if code == 0 and run.stopped:
                return limits.stopped_code
            if code in final or stop.asked is not None:
                return code if code >= 0 else 1
            if run.step > furthest:
                furthest, failures = run.step, 0
            failures += 1
            where = f"after step {run.step}" if run.step else "before its first step"
            if failures > limits.retries:
                _say(f"giving up: {why} {where}, {failures} times without getting further")
                return code if code > 0 else 1
            wait_s = min(LONGEST_WAIT_S, limits.first_wait_s * 2 ** (failures - 1))
            _say(f"{why} {where}; starting again in {units.duration(wait_s)} ({failures} of {limits.retries})")
            if stop.sleep(wait_s):
                return code if code > 0 else 1


class _Stop:
    """SIGTERM and Ctrl-C: the trainer saves and ends, and is not started again."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.child: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> "_Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def sleep(self, seconds: float) -> bool:
        """Waits, not longer than until it is asked to stop; returns whether it was."""
        end = time.monotonic() + seconds
        while self.asked is None and time.monotonic() < end:
            time.sleep(min(POLL_S, seconds))
        return self.asked is not None

    def _received(self, number: int, _: Any) -> None:
        self.asked = number
        if number == signal.SIGTERM:
            self.pass_on()
        elif self._timer is None:  # in a terminal Ctrl-C reaches the trainer as well
            self._timer = threading.Timer(OWN_CTRL_C_S, self.pass_on)
            self._timer.daemon = True
            self._timer.start()

    def pass_on(self) -> None:
        """Asks the trainer to save and end. Asked twice is asked once: only a second SIGINT ends it unsaved."""
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)


class _Run:
    """One start of the trainer."""

    def __init__(self, command: Sequence[str], path: str, limits: Limits, stop: _Stop):
        self._path, self._limits = path, limits
        open(path, "w").close()
        self._stop, self._intervals = stop, deque[float](maxlen=50)
        self._child = stop.child = subprocess.Popen(command, env={**os.environ, FILE: path})
        self._last, self._changed = Beat("start", 0, 0.0), time.monotonic()
        self.step = 0
        if stop.asked is not None:  # between two starts
            self._child.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        """Exit code (negative: the signal that ended it), and what happened, as a phrase."""
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._child.wait(POLL_S)
                self._look()
                return code, f"it was killed by {_name(-code)}" if code < 0 else f"it failed with exit code {code}"
            self._look()
            silent_s = time.monotonic() - self._changed
            if silent_s > self._limit_s() and self._stop.asked is None:
                self._end(silent_s)
                return -signal.SIGKILL, "it hung and was killed"

    @property
    def stopped(self) -> bool:
        """Whether it has told that it was asked to stop."""
        return self._last.phase == STOPPED

    def _look(self) -> None:
        beat = read_beat(self._path)
        if beat is None or beat == self._last:
            return
        before, self._last, self._changed = self._last, beat, time.monotonic()
        if beat.phase == before.phase == STEP and beat.step > before.step:
            self._intervals.append((beat.time - before.time) / (beat.step - before.step))
        self.step = max(self.step, beat.step)

    def _limit_s(self) -> float:
        if self._last.phase != STEP or not self._intervals:
            return self._limits.phase_s
        return max(self._limits.step_s, HANG_FACTOR * statistics.median(self._intervals))

    def _end(self, silent_s: float) -> None:
        """Ends a run that hangs, after it has said where."""
        _say(f"no sign of life for {units.duration(silent_s)} in phase {self._last.phase!r}; what its threads do:")
        for number, wait_s in ((signal.SIGUSR1, DUMP_S), (signal.SIGTERM, GRACE_S), (signal.SIGKILL, None)):
            self._child.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(wait_s)
                return


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


def add_parser(subparsers: Any) -> None:
    """Adds `supervise`; sets `run`."""
    parser = subparsers.add_parser(
        "supervise",
        help="train, and start again after a crash or a hang",
        description="Runs `maxlm train ...` and starts it again, from its newest checkpoint, when it crashes, is "
        "killed or hangs. A hang is no finished step for 20 times the usual step, and --step-limit at least; first "
        "every thread's stack is printed. It waits longer each time and gives up when several starts in a row do not "
        "get beyond the same step. SIGTERM and Ctrl-C are passed on: the run saves and ends. On many hosts, start one "
        "on each.",
        epilog="example:\n  maxlm supervise -- train configs/quickstart.yaml checkpoint.every=50",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Limits()
    parser.add_argument("--retries", type=int, default=default.retries, metavar="N", help="new starts at one step (3)")
    parser.add_argument(
        "--step-limit", type=float, default=default.step_s, metavar="S", help="least seconds that are a hang (60)"
    )
    parser.add_argument(
        "--phase-limit",
        type=float,
        default=default.phase_s,
        metavar="S",
        help="seconds that start, compilation, evaluation or a save may take (3600)",
    )
    parser.add_argument(
        "--stopped-code", type=int, default=0, metavar="N", help="exit code of a run that was asked to stop (0)"
    )
    parser.add_argument("command", metavar="-- COMMAND", nargs=argparse.REMAINDER, help="train CONFIG [settings]")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if command[:1] != ["train"]:
        raise ValueError("supervise what? write: maxlm supervise -- train CONFIG.yaml")
    limits = Limits(args.step_limit, args.phase_limit, args.retries, stopped_code=args.stopped_code)
    return supervise([sys.executable, "-m", "maxlm", *command], limits)
