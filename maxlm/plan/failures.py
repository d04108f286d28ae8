"""Simulates a long run on many chips: failures, slices that go and come back, and what checkpoints save of the work.

Failures of a fleet are a Poisson process, so that the next one is drawn for all chips at once, and what happens between
two of them (steps and saves in turn) is a formula: months of 10,000 chips take a fraction of a second.
"""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maxlm.config_file import ConfigError

WORK, FEWER, SAVES, LOST, RESTARTS, WAITING = "work", "fewer_slices", "saves", "lost", "restarts", "waiting"
PHASES = {
    WORK: "steps that count",
    FEWER: "speed that missing slices cost",
    SAVES: "steps stopped for a save",
    LOST: "steps done again",
    RESTARTS: "restarts",
    WAITING: "waiting for slices",
}
"""What the wall clock is spent on."""
MAX_EVENTS = 20_000
"""Failures, departures and returns of one simulated run; one that is not done by then has shown its goodput."""
MAX_SLICES = 100_000


@dataclass(frozen=True)
class Fleet:
    """The machines of a run, all there at its beginning.

    Attributes:
        num_slices: slices (or islands of GPUs, or nodes) that come and go as a whole.
        chips_per_slice: chips of each.
        allowed: numbers of slices on which the run goes on, at a speed in proportion (mesh.allowed); empty is only all.
    """

    num_slices: int
    chips_per_slice: int
    allowed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_slices", "chips_per_slice"):
            if not 1 <= getattr(self, name) <= MAX_SLICES:
                raise ConfigError(f"{name}={getattr(self, name)} is to be a number from 1 to {MAX_SLICES:,}")
        if wrong := [n for n in self.allowed if not 1 <= n <= self.num_slices]:
            raise ConfigError(f"allowed={wrong[0]} is to be a number of slices from 1 to {self.num_slices}")

    def usable(self) -> list[int]:
        """How many slices a run uses of 0, 1, ... num_slices that are there."""
        allowed, found = set(self.allowed or (self.num_slices,)), [0]
        for there in range(1, self.num_slices + 1):
            found.append(there if there in allowed else found[-1])
        return found


@dataclass(frozen=True)
class Failures:
    """How often something happens: exponential, independent, means in seconds; infinity is never.

    Attributes:
        chip_mtbf_s: between failures of one chip and all that it needs, after which the run restarts on all slices.
        slice_mtbf_s: between failures of one slice as a whole (its network, its power), the same way.
        preempted_every_s: between preemptions of one slice, which is then gone.
        away_s: until a preempted slice is back.
        notice_s: warning of a preemption; where it is enough for a save, nothing is lost.
    """

    chip_mtbf_s: float = math.inf
    slice_mtbf_s: float = math.inf
    preempted_every_s: float = math.inf
    away_s: float = 0.0
    notice_s: float = 0.0

    def __post_init__(self) -> None:
        _check(self, above_zero=("chip_mtbf_s", "slice_mtbf_s", "preempted_every_s"), finite=("away_s", "notice_s"))

    def rates(self, fleet: Fleet) -> tuple[float, float]:
        """Failures and preemptions of one slice, per second."""
        return fleet.chips_per_slice / self.chip_mtbf_s + 1 / self.slice_mtbf_s, 1 / self.preempted_every_s


@dataclass(frozen=True)
class Recovery:
    """What saving and starting again take, in seconds.

    Attributes:
        blocking_s: steps stand still for so long at each save.
        write_s: from then until the checkpoint is complete, while steps go on.
        detect_s: until a failure is noticed.
        reschedule_s: until the processes run again, on chips that work.
        restore_s: reading the checkpoint.
        compile_s: compiling, up to the first step.
    """

    blocking_s: float
    write_s: float = 0.0
    detect_s: float = 0.0
    reschedule_s: float = 0.0
    restore_s: float = 0.0
    compile_s: float = 0.0

    def __post_init__(self) -> None:
        finite = ("blocking_s", "write_s", "detect_s", "reschedule_s", "restore_s", "compile_s")
        _check(self, above_zero=("blocking_s",), finite=finite)

    @property
    def start_s(self) -> float:
        """From processes that have ended to the first step."""
        return self.reschedule_s + self.restore_s + self.compile_s


@dataclass(frozen=True)
class Goodput:
    """What becomes of the time of a run; means over the seeds, and 5 % and 95 % quantiles.

    Attributes:
        interval_s: time between saves at full speed.
        fraction: work / wall time, where work is counted in time of the whole fleet; low and high are its quantiles.
        wall_s: from the first step to the last, with quantiles; infinite where a run gets nowhere.
        paid_fraction: the same share of the chip-hours of slices that were there: those away cost nothing.
        shares: of the wall time, by phase.
        num_failures: per run.
        num_preemptions: per run, of spare slices too.
    """

    interval_s: float
    fraction: float
    fraction_low: float
    fraction_high: float
    wall_s: float
    wall_low_s: float
    wall_high_s: float
    paid_fraction: float
    shares: dict[str, float]
    num_failures: float
    num_preemptions: float


def simulate(
    fleet: Fleet,
    failures: Failures,
    recovery: Recovery,
    work_s: float,
    interval_s: float,
    num_seeds: int = 16,
    seed: int = 0,
) -> Goodput:
    """Simulates a run several times.

    After a failure the run restarts from its newest complete checkpoint; a failure in a restart starts that over. When
    a slice in use is preempted, it restarts on the largest allowed number of slices, or waits for one; when a returned
    slice allows more, it saves and restarts with it at once (that save is taken to succeed). The first start is not
    counted.

    Args:
        fleet: its machines.
        failures: what happens to them.
        recovery: what that costs.
        work_s: length of the run if nothing happened and nothing was saved, in seconds.
        interval_s: time between saves, counted in work: with half of the slices it takes twice as long, as
            checkpoint.every does. A save waits until the one before is complete.
        num_seeds: how many runs.
        seed: of the first; the same seeds give the same failures to every interval.
    """
    for name, value in (("work_s", work_s), ("interval_s", interval_s), ("num_seeds", num_seeds)):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} is to be above 0")
    runs = [_Run(fleet, failures, recovery, work_s, interval_s, seed + i) for i in range(num_seeds)]
    for run in runs:
        run.go()
    fractions = np.array([run.spent[WORK] / run.now for run in runs])
    low, high = np.quantile(fractions, (0.05, 0.95)).tolist()
    # of runs that MAX_EVENTS cut short, the rest is taken to go on alike
    times = [work_s / run.spent[WORK] if run.spent[WORK] else math.inf for run in runs]

    def whole(so_far: Callable[[_Run], float]) -> float:
        return float(np.mean([so_far(run) and n * so_far(run) for n, run in zip(times, runs, strict=True)]))

    paid = sum(run.paid_s for run in runs) * fleet.chips_per_slice
    useful = sum(run.spent[WORK] for run in runs) * fleet.num_slices * fleet.chips_per_slice
    return Goodput(
        interval_s=interval_s,
        fraction=float(fractions.mean()),
        fraction_low=low,
        fraction_high=high,
        wall_s=whole(lambda run: run.now),
        wall_low_s=work_s / high if high else math.inf,
        wall_high_s=work_s / low if low else math.inf,
        paid_fraction=useful / paid,
        shares={phase: float(np.mean([run.spent[phase] / run.now for run in runs])) for phase in PHASES},
        num_failures=whole(lambda run: run.num_failures),
        num_preemptions=whole(lambda run: run.num_preemptions),
    )


def young_s(blocking_s: float, mtbf_s: float) -> float:
    """The best time between saves to first order, sqrt(2 δ M), in seconds.

    Args:
        blocking_s: δ, what a save costs.
        mtbf_s: M, mean time between failures of the whole run.

    References:
        Young 1974, A first order approximation to the optimum checkpoint interval.
    """
    return math.sqrt(2 * blocking_s * mtbf_s)


def daly_s(blocking_s: float, mtbf_s: float) -> float:
    """The best time between saves to higher order, in seconds; arguments as young_s.

    References:
        Daly 2006, A higher order estimate of the optimum checkpoint interval for restart dumps, eq. 37.
    """
    x = blocking_s / (2 * mtbf_s)
    if x >= 1:
        return mtbf_s
    return young_s(blocking_s, mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - blocking_s


def daly_goodput(interval_s: float, blocking_s: float, restart_s: float, mtbf_s: float) -> float:
    """Expected goodput of a run whose failures are exponential and strike during saves and restarts too.

    Args:
        interval_s: work between saves, in seconds.
        blocking_s: δ, what a save costs; it is complete when it ends.
        restart_s: R, from a failure to the first step.
        mtbf_s: M, mean time between failures of the whole run.

    References:
        Daly 2006, eq. 20: wall time = M exp(R/M) (exp((τ + δ)/M) - 1) work / τ.
    """
    wall = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1((interval_s + blocking_s) / mtbf_s)
    return interval_s / wall


def mtbi_s(fleet: Fleet, failures: Failures) -> float:
    """Mean time between interruptions, failures and preemptions, of the whole fleet, in seconds."""
    rate = fleet.num_slices * sum(failures.rates(fleet))
    return 1 / rate if rate else math.inf


def best_interval_s(
    fleet: Fleet, failures: Failures, recovery: Recovery, work_s: float, num_seeds: int = 16, seed: int = 0
) -> float:
    """The time between saves with the best goodput, by simulation; arguments as simulate.

    Around a guess, wall time over interval is a + b / τ + c τ (saves and lost work); its fit over many intervals says
    where the minimum is far better than the noisy minimum itself does.
    """
    least_s, most_s = max(recovery.write_s, 1e-3), work_s
    mean_s = mtbi_s(fleet, failures)
    guess_s = most_s if mean_s == math.inf else daly_s(recovery.blocking_s, mean_s)
    for _ in range(4):
        guess_s = min(max(guess_s, least_s), most_s)
        taus = np.clip(guess_s * np.geomspace(0.5, 2, 9), least_s, most_s)
        walls = np.array([simulate(fleet, failures, recovery, work_s, t, num_seeds, seed).wall_s for t in taus])
        before_s, guess_s = guess_s, float(taus[walls.argmin()])
        if np.isfinite(walls).all() and np.ptp(taus) > 0:
            _, b, c = np.linalg.lstsq(np.stack([np.ones(9), 1 / taus, taus], 1), walls, rcond=None)[0]
            if b > 0 and c > 0:
                guess_s = float(np.clip(math.sqrt(b / c), taus[0], taus[-1]))
        if abs(guess_s / before_s - 1) < 0.1:
            break
    return guess_s


@dataclass
class _Run:
    """One run; slices are alike, so that only their numbers count."""

    fleet: Fleet
    failures: Failures
    recovery: Recovery
    work_s: float
    interval_s: float
    seed: int
    now: float = 0.0
    paid_s: float = 0.0  # summed over slices
    num_failures: int = 0
    num_preemptions: int = 0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    used: int = 0
    pause_s: float = 0.0  # of the restart that is going on
    ran_s: float = 0.0  # since the last restart

    def go(self) -> None:
        """Until all work is done."""
        rng, usable = random.Random(self.seed), self.fleet.usable()
        failing, leaving = self.failures.rates(self.fleet)
        there, self.used = self.fleet.num_slices, usable[-1]
        save_s = self.recovery.blocking_s + self.recovery.write_s
        warned, returns = self.failures.notice_s >= save_s, list[float]()
        for _ in range(MAX_EVENTS):
            rate = self.used * failing + there * leaving
            next_s = rng.expovariate(rate) if rate else math.inf
            back_s = returns[0] - self.now if returns else math.inf
            event_s, done_s = max(0.0, min(next_s, back_s)), self._left_s()
            self._pass(min(event_s, done_s), there)
            if done_s <= event_s:
                break
            worked_s, saved_s = self._worked(self.ran_s)
            if back_s <= next_s:
                heapq.heappop(returns)
                there += 1
                if usable[there] > self.used:
                    self._restart(usable[there], worked_s, save_s if worked_s else 0)
            elif rng.random() * rate < self.used * failing:
                self.num_failures += 1
                self._restart(self.used, saved_s, self.recovery.detect_s)
            else:
                self.num_preemptions += 1
                in_use = rng.random() * there < self.used
                there -= 1
                heapq.heappush(returns, self.now + rng.expovariate(1) * self.failures.away_s)
                if in_use and warned:
                    self._restart(usable[there], max(saved_s, self._worked(self.ran_s - save_s)[0]), 0)
                elif in_use:
                    self._restart(usable[there], saved_s, self.recovery.detect_s)
        self._close(self._worked(self.ran_s)[0])

    def _pass(self, seconds: float, there: int) -> None:
        self.now += seconds
        self.paid_s += seconds * there
        paused = min(seconds, self.pause_s) if self.used else seconds
        self.spent[RESTARTS if self.used else WAITING] += paused
        if self.used:
            self.pause_s -= paused
            self.ran_s += seconds - paused

    def _left_s(self) -> float:
        """Until the work is done, if nothing happens."""
        if not self.used:
            return math.inf
        worked_s = (self.work_s - self.spent[WORK]) / self._speed
        saves = max(0, math.ceil(worked_s / self._tau_s) - 1)
        wall_s = worked_s + saves * self.recovery.blocking_s + max(0, saves - 1) * self._wait_s
        return max(0.0, self.pause_s + wall_s - self.ran_s)

    @property
    def _speed(self) -> float:
        return self.used / self.fleet.num_slices

    @property
    def _tau_s(self) -> float:
        """Time between saves at this speed."""
        return self.interval_s / self._speed

    @property
    def _wait_s(self) -> float:
        """How long a save waits for the one before it to be complete."""
        return max(0.0, self.recovery.write_s - self._tau_s)

    def _worked(self, ran_s: float) -> tuple[float, float]:
        """Of a time since a restart: that of steps, and that of steps which are in a complete checkpoint."""
        if ran_s <= 0:
            return 0.0, 0.0
        tau_s, blocking_s = self._tau_s, self.recovery.blocking_s
        if ran_s < tau_s:
            return ran_s, 0.0
        cycle_s = tau_s + self._wait_s + blocking_s
        saves, since_s = divmod(ran_s - tau_s, cycle_s)  # saves before the newest, and time since that began
        complete = saves + (since_s >= blocking_s + self.recovery.write_s)
        return (saves + 1) * tau_s + min(max(since_s - blocking_s, 0.0), tau_s), complete * tau_s

    def _restart(self, used: int, kept_s: float, first_s: float) -> None:
        """Starts again, after some seconds for something else; kept_s is the time of steps that are not lost."""
        self._close(kept_s)
        self.used, self.pause_s = used, first_s + self.recovery.start_s

    def _close(self, kept_s: float) -> None:
        """Accounts for the time since the last restart."""
        worked_s, speed = self._worked(self.ran_s)[0], self._speed
        self.spent[WORK] += kept_s * speed
        self.spent[FEWER] += kept_s * (1 - speed)
        self.spent[LOST] += worked_s - kept_s
        self.spent[SAVES] += self.ran_s - worked_s
        self.ran_s = 0.0


def _check(owner: Any, above_zero: tuple[str, ...], finite: tuple[str, ...]) -> None:
    """Refuses times that are none."""
    for name in (*above_zero, *finite):
        value = getattr(owner, name)
        if not value >= 0 or (name in above_zero and value == 0) or (name in finite and value == math.inf):
            raise ConfigError(f"{name}={value} is to be a time{' above 0' if name in above_zero else ' of 0 or more'}")
