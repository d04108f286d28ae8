"""The live view of a run: a moving line in a terminal, plain lines everywhere else."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as LiveBar

from maxlm import flops, units

PLAIN_EVERY_S = 10.0
"""Seconds between plain lines, at least."""
FIRST_STEPS = 3
"""Steps that always get a plain line: they show that a run has started well."""


class Progress:
    """Shows where a training run is.

    Example:
        with Progress(config.train.num_steps, start_step=0) as progress:
            progress.update(step, loss=3.2, tokens_per_s=1.2e6, step_time_s=0.4)
            progress.note("checkpoint saved")
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        peak_flops: float | None = None,
        flops_per_token: float | None = None,
        console: Console | None = None,
        log_file: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares the view; entering it as a context manager starts it.

        Args:
            total_steps: last step of the run.
            start_step: steps done before (of a resumed run).
            peak_flops: FLOP/s of all devices together, for MFU; None leaves MFU out.
            flops_per_token: model FLOPs per token, for MFU.
            console: where to; None is standard output.
            log_file: text file that gets all notes and plain lines, terminal or not.
            clock: seconds that only grow.
        """
        self.total_steps, self.start_step = total_steps, start_step
        self._peak_flops, self._flops_per_token = peak_flops, flops_per_token
        self.console = console or Console()
        self._log_file, self._clock = log_file, clock
        self._bar: LiveBar | None = None
        self._task: TaskID | None = None
        self._pace: tuple[int, float] | None = None  # step and time that the pace is counted from
        self._last_line = -math.inf

    def __enter__(self) -> "Progress":
        if self.console.is_interactive:
            text = TextColumn("{task.fields[text]}", markup=False)
            self._bar = LiveBar(BarColumn(bar_width=_bar_width(self.console.width)), text, console=self.console)
            self._task = self._bar.add_task("", total=self.total_steps, completed=self.start_step, text="starting")
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the live line and gives the terminal its cursor back."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, **values: float | None) -> None:
        """Shows a finished step.

        Args:
            step: steps done, 1 after the first.
            **values: host numbers; "loss", "tokens_per_s", "step_time_s" and "usd" (so far) are shown in their units,
                others as `name value`. None is left out.
        """
        fields = self._fields(step, values)
        if self._bar is not None and self._task is not None:
            room = self.console.width - _bar_width(self.console.width) - 2
            self._bar.update(self._task, completed=step, text=_fit(fields, room))
        now = self._clock()
        first, last = step - self.start_step <= FIRST_STEPS, step >= self.total_steps
        if first or last or now - self._last_line >= PLAIN_EVERY_S:
            self._last_line = now
            self._line("   ".join(fields), to_console=self._bar is None)

    def note(self, text: str) -> None:
        """Prints a line of text, above the live one."""
        self._line(text, to_console=True)

    def _line(self, text: str, to_console: bool) -> None:
        if to_console:
            # soft_wrap: a file or a pipe has no width to break lines at
            self.console.print(text, markup=False, highlight=False, soft_wrap=not self.console.is_interactive)
        if self._log_file is not None:
            with contextlib.suppress(OSError):  # a full disk must not end a run for the sake of its log
                self._log_file.write(text + "\n")
                self._log_file.flush()

    def _fields(self, step: int, values: Mapping[str, float | None]) -> list[str]:
        """What is shown, most important first."""
        known = {k: float(v) for k, v in values.items() if v is not None}
        fields = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"]
        if "loss" in known:
            fields.append(f"loss {known.pop('loss'):.4f}")
        remaining = self._remaining_s(step, known.get("step_time_s"))
        rate, step_time, given = known.pop("tokens_per_s", None), known.pop("step_time_s", None), known.pop("mfu", None)
        if rate is not None:
            fields.append(f"{units.count(rate)} tokens/s")
        if remaining is not None:
            fields.append(f"ETA {units.duration(remaining)}")
        if (utilization := self._mfu(rate, given)) is not None:
            fields.append(f"MFU {utilization:.1%}")
        if step_time is not None:
            fields.append(f"{units.duration(step_time)}/step")
        if "usd" in known:
            fields.append(f"{units.dollars(known.pop('usd'))} so far")
        return fields + [f"{name} {value:.4g}" for name, value in known.items()]

    def _mfu(self, rate: float | None, given: float | None) -> float | None:
        if given is not None or rate is None or not self._peak_flops or not self._flops_per_token:
            return given
        return flops.mfu(rate, self._flops_per_token, self._peak_flops)

    def _remaining_s(self, step: int, step_time_s: float | None) -> float | None:
        """Seconds to the end at the pace so far, evaluations and saves included."""
        now = self._clock()
        if self._pace is None:
            self._pace = (step, now)  # the first step compiles and says nothing about the pace
            return None
        if step >= self.total_steps:
            return None
        since_step, since = self._pace
        done = step - since_step
        pace = (now - since) / done if done > 0 else step_time_s
        return None if pace is None else pace * (self.total_steps - step)


def summary_table(rows: Mapping[str, Any]) -> str:
    """Text of two columns, names and values, such as a run shows at its start. Values of None are left out."""
    shown = {name: value for name, value in rows.items() if value is not None}
    width = max(map(len, shown), default=0)
    return "\n".join(f"{name:<{width}}   {value}" for name, value in shown.items())


@contextlib.contextmanager
def track(
    label: str,
    total: int | None = None,
    unit: str = "bytes",
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Shows the progress of other long work: amount, rate and time left.

    Args:
        label: what is being done.
        total: size of the work, in units; None if it is not known.
        unit: "bytes", or what is counted, such as "documents".
        console: where to; None is standard output.
        clock: seconds that only grow.

    Yields:
        A function to call with the amount done since the last call.
    """
    console = console or Console()
    if console.is_interactive:
        in_bytes = (DownloadColumn(), TransferSpeedColumn())
        amount = in_bytes if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit, markup=False))
        columns = (TextColumn(label, markup=False), BarColumn(), *amount, TimeRemainingColumn())
        with LiveBar(*columns, console=console) as bar:
            task = bar.add_task(label, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    plain = _PlainTrack(label, total, unit, console, clock)
    yield plain.advance
    plain.show()


class _PlainTrack:
    """Lines such as `copy: 1.50 GiB of 3.00 GiB, 210 MiB/s, 7.30 s left`."""

    def __init__(self, label: str, total: int | None, unit: str, console: Console, clock: Callable[[], float]):
        self._label, self._total, self._console, self._clock = label, total, console, clock
        self._amount = units.size if unit == "bytes" else units.count
        self._unit = "" if unit == "bytes" else f" {unit}"
        self._done = 0
        self._start = self._last = clock()

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._clock() - self._last >= PLAIN_EVERY_S:
            self._last = self._clock()
            self.show()

    def show(self) -> None:
        elapsed = self._clock() - self._start
        text = self._amount(self._done) + (f" of {self._amount(self._total)}" if self._total else "") + self._unit
        if elapsed > 0 and self._done:
            text += f", {self._amount(self._done / elapsed)}{self._unit}/s"
            left = (self._total or 0) - self._done
            if left > 0:
                text += f", {units.duration(elapsed / self._done * left)} left"
        self._console.print(f"{self._label}: {text}", markup=False, highlight=False, soft_wrap=True)


def _bar_width(width: int) -> int:
    return max(6, min(30, width // 5))


def _fit(fields: list[str], room: int) -> str:
    """As many fields as one line holds."""
    text = fields[0]
    for field in fields[1:]:
        if len(text) + len(field) + 2 > room:
            break
        text += f"  {field}"
    return text[: max(room, 0)]
