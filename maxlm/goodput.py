"""Where the wall-clock time of a run goes: steps that count, and everything else, over all its starts.

RUN/goodput.json, written by ledger.py, is a list of starts, each with the seconds it spent in each phase. A start that
was killed is known up to when it last wrote; what came after counts as idle.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from maxlm import storage, units
from maxlm.heartbeat import STEP

FILE = "goodput.json"
DATA, COMPILE = "data", "compile"
LOST, IDLE = "lost", "idle"
PHASES = {
    STEP: "steps",
    DATA: "waiting for data",
    COMPILE: "compilation",
    "save": "checkpoints",
    "evaluation": "evaluation",
    "start": "start",
    "profile": "profiler",
    "ending": "ending",
    LOST: "lost steps",
    IDLE: "between starts",
}
"""What the wall clock can be spent on, and how people call it. LOST and IDLE are found when the file is read."""


@dataclass
class Start:
    """One start of a run, as goodput.json holds it.

    Attributes:
        began: when its process started, in seconds since 1970.
        first: the step it resumed from; 0 in a new run.
        step: its newest finished step.
        updated: up to when its time is known: began and all its seconds.
        devices: how many it ran on.
        seconds: by phase.
        usd_per_hour: what its devices cost; None where nobody knows.
    """

    began: float
    first: int
    step: int
    updated: float
    devices: int
    seconds: dict[str, float] = field(default_factory=dict)
    usd_per_hour: float | None = None


@dataclass(frozen=True)
class Goodput:
    """What became of the time of a run.

    Attributes:
        seconds: by phase, in the order of PHASES; phases without time are left out.
        starts: how many there were.
        lost_steps: steps that were done again, since they were not saved when their start ended.
        device_hours: hours of its starts times their devices; the time between starts is not part of it.
        usd: what these cost; None where no start knew a price.
    """

    seconds: dict[str, float]
    starts: int
    lost_steps: int
    device_hours: float
    usd: float | None = None

    @property
    def total_s(self) -> float:
        """From the beginning of the first start to what is known of the newest, in seconds: the sum of all phases."""
        return sum(self.seconds.values())

    @property
    def fraction(self) -> float:
        """Goodput: the share of the total time that went into steps that count, from 0 to 1."""
        return self.seconds.get(STEP, 0.0) / self.total_s if self.total_s else 0.0

    @property
    def running(self) -> float:
        """The same share of the time without that between starts."""
        rest = self.total_s - self.seconds.get(IDLE, 0.0)
        return self.seconds.get(STEP, 0.0) / rest if rest else 0.0


def summarize(starts: Sequence[Start]) -> Goodput:
    """Adds up the starts of a run.

    A start's steps after the one that a later start resumed from were done again: their share of its step time, at its
    mean step time, is lost. The time between a start's last sign and the next one's beginning is idle; clocks that
    disagree do not make it negative.

    Args:
        starts: oldest first.
    """
    seconds = dict.fromkeys(PHASES, 0.0)
    lost_steps, resumed = 0, math.inf
    for start in reversed(starts):  # `resumed` is the lowest step that any later start resumed from
        for phase, spent_s in start.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent_s
        done = start.step - start.first
        lost = done - max(0, min(start.step, resumed) - start.first)
        share = lost / done if done else float(resumed < math.inf)
        moved_s = start.seconds.get(STEP, 0.0) * share
        seconds[STEP] -= moved_s
        seconds[LOST] += moved_s
        lost_steps, resumed = lost_steps + int(lost), min(resumed, start.first)
    seconds[IDLE] += sum(max(0.0, after.began - before.updated) for before, after in itertools.pairwise(starts))
    device_hours = sum(start.devices * sum(start.seconds.values()) for start in starts) / 3600
    kept = {k: s for k, s in seconds.items() if s > 0}
    return Goodput(kept, len(starts), lost_steps, device_hours, _usd(starts))


def _usd(starts: Sequence[Start]) -> float | None:
    """What the hours of starts cost. One that knew no price is counted at the newest known one of a device."""
    known = [start.usd_per_hour / start.devices for start in starts if start.usd_per_hour is not None and start.devices]
    if not known:
        return None
    rates = (known[-1] * s.devices if s.usd_per_hour is None else s.usd_per_hour for s in starts)
    return sum(rate * sum(s.seconds.values()) for rate, s in zip(rates, starts, strict=True)) / 3600


def rows(found: Goodput) -> dict[str, str]:
    """Lines for a table of names and values."""
    spent = {k: s for k, s in found.seconds.items() if k != STEP and s >= 0.0005 * found.total_s}
    text = f"{found.fraction:.1%} of {units.duration(found.total_s)} went into steps that count"
    if IDLE in spent:
        text += f"; {found.running:.1%} without the time between starts"
    rest = [f"{PHASES.get(k, k)} {units.duration(s)}" for k, s in sorted(spent.items(), key=lambda x: -x[1])]
    if found.lost_steps:
        rest.append(f"{found.lost_steps:,} step{'s' * (found.lost_steps > 1)} done again")
    cost = {} if found.usd is None else {"cost": f"{units.dollars(found.usd)} for the hours of its starts"}
    return {"goodput": text, **({"other time": ", ".join(rest)} if rest else {}), **cost}


def read(run_dir: str) -> list[Start]:
    """The starts of a run, oldest first; none where there is no goodput.json.

    Args:
        run_dir: run folder or bucket url.

    Raises:
        ValueError: the file is damaged.
        StorageError: it cannot be read.
    """
    path = storage.join(run_dir, FILE)
    try:
        return [_checked(Start(**entry)) for entry in json.loads(storage.read_bytes(path))]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise ValueError(f"{path} is damaged") from None


def to_json(starts: Sequence[Start]) -> bytes:
    """What goodput.json holds."""
    return json.dumps([asdict(start) for start in starts], indent=1).encode()


def _checked(start: Start) -> Start:
    numbers = [start.began, start.updated, start.first, start.step, start.devices, *start.seconds.values()]
    numbers.append(0.0 if start.usd_per_hour is None else start.usd_per_hour)
    whole = all(isinstance(n, int) for n in (start.first, start.step, start.devices))
    if not whole or not all(math.isfinite(n) and n >= 0 for n in numbers) or start.step < start.first:
        raise ValueError
    return start
