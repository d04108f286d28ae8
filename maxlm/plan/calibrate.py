"""What runs have measured, in the planner's formulas: factors per part of a step, for each kind of hardware.

A step takes, by the formulas (step_time.py), so many seconds of products, attention, memory traffic and wires. Runs say
how many it took. Factors between the two are fitted by non-negative least squares with relative weights:

    minimize  sum over runs ((x . f - y) / y)**2 + RIDGE * sum over parts (f / g - 1)**2

with x a run's parts by the formulas, y its measured step time, f the factors and g what one factor for all would be. So
one run gives that one factor, and the more runs there are, and the more they differ, the more the parts' own factors
follow them. The last part is the time of launching and waiting that comes with each layer of each microbatch; the
formulas have none, and the ridge is towards none.
"""

import dataclasses
import datetime
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxlm import hardware, receipt, storage, units
from maxlm.config import Config
from maxlm.config_file import ConfigError, parse_config, read_yaml
from maxlm.hardware import Chip
from maxlm.mesh import axis_sizes, check_fit
from maxlm.metrics import read_metrics
from maxlm.plan import factors
from maxlm.plan.factors import SPREAD, Factors, chip_of, predict, products_type, visits
from maxlm.plan.step_time import StepTime
from maxlm.plan.table import aligned

PARTS = ("products", "attention", "memory", "wires", "overhead")
RIDGE = 0.01
"""Square of a run's relative error, about 0.1, over that of a part's factor, about 1."""
OVERHEAD_S = 1e-4
"""What overhead is counted in: of a layer and microbatch, its factor may well be 1 and may well be 0."""
LEAST_SPREAD = 0.05
"""How far a prediction may be off, relatively, at least."""
TO_LEAVE_ONE_OUT = 3
"""Runs, at least, of which each is predicted from the others."""
LEAST_STEPS = 3
"""Measured steps that a run is to have."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A run, as far as calibration looks at it.

    Attributes:
        name: its folder.
        hardware: what it ran on, see chip_of.
        dtype: of its products, see products_type.
        work: seconds by the formulas, by PARTS; of the overhead, layers and microbatches in OVERHEAD_S.
        step_time_s: measured.
    """

    name: str
    hardware: str
    dtype: str
    work: Mapping[str, float]
    step_time_s: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """Factors, and how well they do.

    Attributes:
        hardware: of the runs; so is dtype.
        factors: what was fitted.
        names: of the runs; so go the others.
        before: predicted over measured, by the formulas; None where their unit is arbitrary.
        after: the same with the factors.
        left_out: the same where the factors are those of the other runs; None where they are too few.
    """

    hardware: str
    dtype: str
    factors: Factors
    names: tuple[str, ...]
    before: tuple[float, ...] | None
    after: tuple[float, ...]
    left_out: tuple[float, ...] | None


def measured(run_dir: str) -> Measured:
    """What calibration takes from a run: from its plan.json, config.yaml and metrics.jsonl.

    Raises:
        ConfigError: it has not what it takes; says what that is.
    """
    try:
        plan, times = receipt.read(run_dir), read_metrics(run_dir)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if plan is None:
        raise ConfigError(f"{run_dir} has no {receipt.FILE}: it is no run, or one of before there were predictions")
    steps = receipt.step_times(times, plan.since_step)
    if len(steps) < LEAST_STEPS:
        raise ConfigError(f"{run_dir} has the times of {len(steps)} steps; {LEAST_STEPS} are needed, after the first")
    config, sizes = _config(run_dir, plan.num_devices)
    chip, known = chip_of(plan.hardware, plan.share)
    time = predict(config, sizes, chip, known, plan.torus)
    if not time.known:
        raise ConfigError(f"{run_dir} crosses a network of unknown speed, which would count as nothing: leave it out")
    work = work_of(time, config, sizes, chip)
    return Measured(run_dir, plan.hardware, products_type(config), work, statistics.median(steps))


def _config(run_dir: str, num_devices: int) -> tuple[Config, dict[str, int]]:
    """A run's config and the sizes of its mesh, from its folder, which may be in a bucket."""
    path = storage.join(run_dir, "config.yaml")
    try:
        tree = read_yaml(storage.read_bytes(path))
        if not isinstance(tree, dict):
            raise ConfigError("it is to hold keys such as 'model:' and 'train:'")
        config = parse_config(tree)
        sizes = axis_sizes(config.mesh, num_devices)
        check_fit(config, sizes)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: the run is not whole") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from None
    return config, sizes


def work_of(time: StepTime, config: Config, sizes: Mapping[str, int], chip: Chip) -> dict[str, float]:
    """Measured.work of a step's time by the formulas. Args as predict's."""
    core = time.products + time.attention + time.memory
    longer = 1 + time.bubble / core if core else 1.0
    return {
        **{name: longer * getattr(time, name) for name in ("products", "attention", "memory")},
        "wires": sum(seconds or 0.0 for seconds in time.wires.values()),
        "overhead": OVERHEAD_S * visits(config, sizes, chip),
    }


# ---- the fit


def fit(runs: Sequence[Measured], today: datetime.date) -> Fit:
    """Fits factors to runs of the same hardware and type.

    Args:
        runs: at least one.
        today: when.
    """
    work = np.array([[run.work[part] for part in PARTS] for run in runs])
    seconds = np.array([run.step_time_s for run in runs])
    best = _factors(work, seconds)
    after, left_out, spread = work @ best / seconds, None, SPREAD
    if len(runs) >= TO_LEAVE_ONE_OUT:
        others = [np.arange(len(runs)) != i for i in range(len(runs))]
        left_out = tuple(float(work[i] @ _factors(work[o], seconds[o]) / seconds[i]) for i, o in enumerate(others))
        spread = max(LEAST_SPREAD, *(abs(ratio - 1) for ratio in left_out))
    known = Factors(
        **{part: float(f) for part, f in zip(PARTS[:-1], best[:-1], strict=True)},
        overhead_s=float(best[-1]) * OVERHEAD_S,
        num_runs=len(runs),
        error=mean_error(after),
        left_out=mean_error(left_out) if left_out else None,
        spread=spread,
        date=today.isoformat(),
    )
    has_unit = hardware.named(runs[0].hardware) is not None
    before = tuple(map(float, work[:, :-1].sum(1) / seconds)) if has_unit else None
    names = tuple(run.name for run in runs)
    return Fit(runs[0].hardware, runs[0].dtype, known, names, before, tuple(map(float, after)), left_out)


def mean_error(ratios: Sequence[float] | np.ndarray) -> float:
    """Mean absolute relative error of ratios predicted / measured."""
    return statistics.mean(abs(float(ratio) - 1) for ratio in ratios)


def ratio(known: Factors, run: Measured) -> float:
    """Predicted over measured step time of a run."""
    parts = {**{part: getattr(known, part) for part in PARTS[:-1]}, "overhead": known.overhead_s / OVERHEAD_S}
    return sum(parts[part] * run.work[part] for part in PARTS) / run.step_time_s


def _factors(work: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Factors [P] of work [R, P] and measured seconds [R]."""
    relative = work / seconds[:, None]
    whole = relative[:, :-1].sum(1)
    one = float(whole.sum() / (whole @ whole))  # the factor for all parts that does best
    expected = np.array([one] * (len(PARTS) - 1) + [0.0])
    scale = np.array([one] * (len(PARTS) - 1) + [1.0])
    rows = np.vstack([relative, math.sqrt(RIDGE) * np.diag(1 / scale)])
    wanted = np.concatenate([np.ones(len(seconds)), math.sqrt(RIDGE) * expected / scale])
    return _non_negative(rows, wanted)


def _non_negative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |rows @ x - wanted|: of few unknowns, every choice of those that are 0 is tried."""
    best, least = np.zeros(rows.shape[1]), float(np.sum(wanted**2))
    for count in range(1, rows.shape[1] + 1):
        for chosen in itertools.combinations(range(rows.shape[1]), count):
            x = np.zeros(rows.shape[1])
            x[list(chosen)] = np.linalg.lstsq(rows[:, chosen], wanted, rcond=None)[0]
            left = float(np.sum((rows @ x - wanted) ** 2))
            if (x >= 0).all() and left < least:
                best, least = x, left
    return best


# ---- what a user sees


def calibrate(run_dirs: Sequence[str], today: datetime.date) -> list[Fit]:
    """Fits factors to runs, for each hardware and type among them, and keeps them in the user's file.

    Raises:
        ConfigError: a run has not what it takes, or the file is damaged.
        StorageError: a run or the file cannot be read or written.
    """
    groups = dict[tuple[str, str], list[Measured]]()
    for run_dir in dict.fromkeys(run_dirs):
        run = measured(run_dir)
        groups.setdefault((run.hardware, run.dtype), []).append(run)
    found = [fit(runs, today) for runs in groups.values()]
    factors.write({(one.hardware, one.dtype): one.factors for one in found})
    return found


def as_json(found: Fit) -> dict[str, Any]:
    """A fit, in base units."""
    return {**dataclasses.asdict(found), "factors": found.factors.model_dump()}


def show(found: Fit) -> str:
    """A fit for people: the factors, and how far the runs were off before and after."""
    known = found.factors
    units_of = "times the formulas'" if found.before else "in the formulas' unit, which is arbitrary here"
    parts = ", ".join(f"{part} {getattr(known, part):.3g}" for part in PARTS[:-1])
    overhead = f"{units.duration(known.overhead_s)} a layer and microbatch"
    lines = [
        f"{found.hardware}, {found.dtype}: {parts} {units_of}; {overhead}",
        *aligned([["run", "predicted/measured before", "after", "left out"], *_cells(found)]),
    ]
    means = [("before", found.before), ("after", found.after), ("left out of the fit", found.left_out)]
    errors = [f"{name} {mean_error(ratios):.1%}" for name, ratios in means if ratios]
    return "\n".join(
        [*lines, f"mean error: {', '.join(errors)}; predictions are taken to be within {known.spread:.0%}"]
    )


def _cells(found: Fit) -> list[list[str]]:
    """Of a table: the runs, and their ratios."""
    columns = (found.before, found.after, found.left_out)
    return [
        [name, *("?" if ratios is None else f"{ratios[i]:.3f}" for ratios in columns)]
        for i, name in enumerate(found.names)
    ]
