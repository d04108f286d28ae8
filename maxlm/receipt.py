"""What a run was predicted to take, in RUN/plan.json, beside what it took.

The prediction is made when a run starts (plan/receipt.py), and by the formulas of `maxlm plan`. At the end summary.json
and the last row of metrics.jsonl have both. What is not known is null in the first and left out of the other two.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maxlm import storage, units
from maxlm.metrics import Metrics

FILE = "plan.json"
SHOWN = {
    "step_time_s": ("step time", units.duration),
    "hbm_peak_bytes": ("HBM peak", units.size),
    "mfu": ("MFU", "{:.1%}".format),
    "usd": ("cost", units.dollars),
}
"""What is compared: how people call it, and how it is shown."""

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Range(BaseModel):
    """A predicted figure.

    Attributes:
        predicted: by the formulas.
        low: at best; so is high at worst.
    """

    model_config = ConfigDict(strict=True)

    predicted: _Amount
    low: _Amount
    high: _Amount


class Prediction(BaseModel):
    """What plan.json holds; None is not known.

    Attributes:
        machine: what was found, as people call it.
        hardware: name of its chips, by which calibration knows them; so is dtype the type of the products.
        share: of a chip, or of a host's cores, that a device is.
        num_chips: that are paid for; hosts, where there are only CPUs.
        num_slices: joined by the data-centre network.
        torus: dimensions of a slice, in devices.
        mesh: devices per logical axis.
        since_step: the first step for which it was made, of a resumed run.
        begun: the step that the run itself began at: of a branch, that of the checkpoint it was started from.
        basis: what the time rests on.
        networks_known: whether all networks that are crossed are; if not, times are the least possible.
        step_parts_s: seconds of a step by part, of `predicted`.
        step_time_s: seconds of a step.
        memory_bytes: what makes up the peak of a device.
        hbm_peak_bytes: their sum.
        hbm_bytes: that the device has.
        mfu: share of the peak.
        tokens_per_s: of all devices.
        price: of a chip: usd_per_chip_hour, with provider, region, kind, date and source.
        usd_per_hour: of all chips.
        days: of all steps that the run does itself, and of nothing else; so is usd what these cost.
    """

    model_config = ConfigDict(strict=True)

    machine: str
    hardware: str
    dtype: str
    share: Annotated[float, Field(gt=0, le=1)]
    num_devices: Annotated[int, Field(ge=1, lt=2**31)]
    num_chips: _Count
    num_slices: _Count
    torus: list[Annotated[int, Field(ge=1, lt=2**31)]]
    mesh: dict[str, _Count]
    since_step: _Count
    begun: _Count = 0
    basis: str | None = None
    networks_known: bool | None = None
    step_parts_s: dict[str, _Amount | None] | None = None
    step_time_s: Range | None = None
    memory_bytes: dict[str, _Amount] | None = None
    hbm_peak_bytes: _Amount | None = None
    hbm_bytes: _Count | None = None
    mfu: Range | None = None
    tokens_per_s: Range | None = None
    price: dict[str, str | float] | None = None
    usd_per_hour: _Amount | None = None
    days: Range | None = None
    usd: Range | None = None


def read(run_dir: str) -> Prediction | None:
    """The prediction of a run; None where there is no plan.json.

    Args:
        run_dir: run folder or bucket url.

    Raises:
        ValueError: the file is damaged.
        StorageError: it cannot be read.
    """
    path = storage.join(run_dir, FILE)
    try:
        return Prediction.model_validate_json(storage.read_bytes(path))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise ValueError(f"{path} is damaged: {where + ': ' if where else ''}{first['msg'][:200]}") from None


def write(run_dir: str, prediction: Prediction) -> None:
    """Replaces plan.json.

    Raises:
        StorageError: the folder or bucket does not take it.
    """
    storage.write_bytes(storage.join(run_dir, FILE), prediction.model_dump_json(indent=1).encode())


def step_times(metrics: Metrics, since_step: int) -> list[float]:
    """Seconds of the steps after one, but those right after a start, whose time is that of compilation, too."""
    starts = {0, since_step, *metrics.restarts}
    rows = [row for row in metrics.train if row["step"] > since_step and row["step"] - 1 not in starts]
    times = [row.get("step_time_s", math.nan) for row in rows if not row.get("skipped")]
    return [seconds for seconds in times if 0 < seconds < math.inf]


def compare(prediction: Prediction | None, measured: Mapping[str, float | None]) -> dict[str, float]:
    """Prediction and measurement, side by side.

    Args:
        prediction: what the run was started with.
        measured: the names of SHOWN; None where the machine does not tell.

    Returns:
        For each name what was measured; as predicted_NAME, and _low and _high where it is a range, what was
        predicted; and NAME_ratio, measured / predicted. What is not known is left out.
    """
    record: dict[str, float | None] = {}
    for name in SHOWN:
        said, got = getattr(prediction, name, None), measured.get(name)
        if isinstance(said, Range):
            record |= {f"predicted_{name}_low": said.low, f"predicted_{name}_high": said.high}
            said = said.predicted
        record |= {name: got, f"predicted_{name}": said, f"{name}_ratio": got / said if got and said else None}
    return {name: value for name, value in record.items() if value is not None}


def foretold(prediction: Prediction | None) -> str | None:
    """A line for the start of a run; None where nothing is predicted."""
    if prediction is None or prediction.step_time_s is None or prediction.days is None:
        return None
    ranges = [(prediction.step_time_s, units.duration, 1.0), (prediction.days, units.duration, 86400.0)]
    ranges += [(prediction.usd, units.dollars, 1.0)] if prediction.usd else []
    texts = [f"{show(r.low * unit)} to {show(r.high * unit)}" for r, show, unit in ranges]
    least = "" if prediction.networks_known else ", at least"
    return f"{texts[0]} a step, {', '.join(texts[1:])} in all{least} (by {prediction.basis})"


def rows(record: Mapping[str, float], predicted_by: str | None) -> dict[str, str]:
    """Lines for a table of names and values, of what was measured.

    Args:
        record: from compare.
        predicted_by: Prediction.basis.
    """
    found = {}
    for name, (label, show) in SHOWN.items():
        got, said = record.get(name), record.get(f"predicted_{name}")
        if got is None:
            continue
        text = show(got)
        if said is not None:
            low, high = record.get(f"predicted_{name}_low"), record.get(f"predicted_{name}_high")
            text += f"; predicted {show(said)}"
            text += "" if low is None or high is None else f" ({show(low)} to {show(high)})"
        if (ratio := record.get(f"{name}_ratio")) is not None:
            text += f", {ratio:.2f} times that"
        found[label] = text
    return {**found, "predicted by": predicted_by} if found and predicted_by else found


def median(times: list[float]) -> float | None:
    """Of step times; None where there are none."""
    return statistics.median(times) if times else None
