"""What `maxlm train` predicts of a run when it starts: on the devices that it finds, by the formulas of `maxlm plan`.

Nothing is compiled, and nothing that is wrong here stops a run: what cannot be told is null.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from maxlm import machines, receipt
from maxlm.config import Config
from maxlm.hardware import Chip, detect
from maxlm.plan import factors, prices
from maxlm.plan.memory import predict_memory
from maxlm.plan.money import Terms, least_step_s, totals
from maxlm.plan.prices import Price
from maxlm.plan.ranges import step_range
from maxlm.receipt import Prediction, Range


def start(
    config: Config,
    devices: Sequence[Any],
    sizes: dict[str, int],
    run_dir: str,
    first: int,
    begun: int | None,
    tell: Callable[[str], None],
) -> Prediction | None:
    """Predicts a run and writes it into its folder. Called by one host.

    Args:
        config: the run.
        devices: that it runs on.
        sizes: of them per logical axis.
        run_dir: run folder or bucket url.
        first: the step that it starts from. What was predicted before holds from where it did, if it is the same.
        begun: the step that a new run begins at, which of a branch is not 0; None of one that goes on.
        tell: hears what could not be done.

    Returns:
        The prediction; None where there is none.
    """
    before = None
    try:
        before = receipt.read(run_dir) if begun is None else None
    except (OSError, ValueError) as error:
        tell(f"{error}; this run is predicted anew")
    try:
        begun = begun or (before.begun if before else 0)
        found = predict(config, devices, sizes, first, tell, begun)
    except Exception as error:  # of devices that nobody has seen; a run does not end for the sake of its receipt
        tell(f"nothing is predicted for this run: {type(error).__name__}: {error}")
        return None
    try:
        if before is not None and before.since_step <= first:
            same = before.model_copy(update={"since_step": first}) == found
            found = before if same else found
        receipt.write(run_dir, found)
    except (OSError, ValueError) as error:
        tell(f"{error}; the prediction of this run is not recorded")
    return found


def predict(
    config: Config,
    devices: Sequence[Any],
    sizes: dict[str, int],
    first: int,
    tell: Callable[[str], None],
    begun: int = 0,
) -> Prediction:
    """The prediction for a run on devices. Args as start's."""
    chip, known, num_chips = _hardware(devices)
    torus, price = _torus(devices), _price(prices.CPU if devices[0].platform == "cpu" else chip.name, tell)
    found = Prediction(
        machine=_machine(chip, num_chips, sizes["slice"], torus),
        hardware=chip.name,
        dtype=factors.products_type(config),
        share=chip.share,
        num_devices=len(devices),
        num_chips=num_chips,
        num_slices=sizes["slice"],
        torus=list(torus),
        mesh=sizes,
        since_step=first,
        begun=begun,
        hbm_bytes=chip.hbm_bytes if known else None,
        price=dataclasses.asdict(price) if price else None,
        usd_per_hour=prices.cost_usd(1, num_chips, price),
    )
    memory = predict_memory(config, sizes)
    found = found.model_copy(update={"memory_bytes": memory.parts(), "hbm_peak_bytes": memory.peak})
    fitted = _factors(chip.name, config, known, tell)
    if fitted is None and not known:
        basis = f"nothing yet: maxlm plan --calibrate RUN teaches what {chip.name} can do"
        return found.model_copy(update={"basis": basis})
    time = factors.predict(config, sizes, chip, known, torus)
    spread, basis = None, "formulas"
    if fitted is not None:
        time, spread, basis = fitted.applied(time, config, sizes, chip), fitted.spread, fitted.basis
    kind = "tpu" if chip.name.startswith("TPU") else "gpu"
    whole = factors.chip_of(chip.name, 1.0)[0]
    least_s = least_step_s(config, whole, num_chips) if known else 0.0
    low, high = step_range(time.total, time, kind, by_compiler=False, spread=spread, least_s=least_s)
    steps = [low, time.total, high]
    runs = [{"step_time_s": s, **totals(config, whole, num_chips, s, Terms(price))} for s in steps]
    own = 1 - begun / config.train.num_steps  # a branch pays for its own steps
    runs = [{k: x and x * own if k in ("days", "usd") else x for k, x in run.items()} for run in runs]
    has_peak = known and chip.peak(config.model.dtype) is not None
    names = ("step_time_s", "tokens_per_s", "days", "usd", *(("mfu",) if has_peak else ()))
    ranges = {name: _range([run[name] for run in runs]) for name in names}
    fields = {"basis": basis, "networks_known": time.known, "step_parts_s": time.parts(), **ranges}
    return found.model_copy(update=fields)


def _range(values: Sequence[float | None]) -> Range | None:
    """Of values at best, as predicted, and at worst; None where they are not known."""
    known = [value for value in values if value is not None]
    return Range(predicted=known[1], low=min(known), high=max(known)) if len(known) == len(values) else None


# ---- what there is


def _hardware(devices: Sequence[Any]) -> tuple[Chip, bool, int]:
    """What one device can do, whether that is known, and how many chips, or hosts without any, are paid for."""
    chip, first = detect(devices[0]), devices[0]
    if chip is not None:
        return chip, True, math.ceil(len(devices) * chip.share)
    if first.platform != "cpu":
        return factors.chip_of(first.device_kind, 1.0)[0], False, len(devices)
    together = sum(device.process_index == first.process_index for device in devices)  # they share a host's cores
    name = f"cpu with {_num_cores()} cores"
    return factors.chip_of(name, 1 / together)[0], False, len({device.process_index for device in devices})


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _torus(devices: Sequence[Any]) -> tuple[int, ...]:
    """Dimensions of a slice; one where devices have no places in a torus, or have not all of it."""
    first = [d for d in devices if getattr(d, "slice_index", 0) == getattr(devices[0], "slice_index", 0)]
    if not all(hasattr(d, "coords") for d in first):
        return (len(first),)
    places = [(*d.coords, getattr(d, "core_on_chip", 0)) for d in first]
    extents = tuple(n for n in (len(set(along)) for along in zip(*places, strict=True)) if n > 1)
    return extents if math.prod(extents) == len(first) and extents else (len(first),)


def _machine(chip: Chip, num_chips: int, num_slices: int, torus: Sequence[int]) -> str:
    """Its name where it is one of machines.py, else what there is and how many."""
    each = num_chips // num_slices
    names = {f"{gpu}:{each}": found for gpu, (found, *_) in machines.GPUS.items()}
    for tpu in machines.TPUS:
        own = sorted(torus)
        if tpu.devices > 1 and tpu.devices in own:
            own.remove(tpu.devices)
        for shape in tpu.shapes:
            if [n for n in sorted(map(int, shape.split("x"))) if n > 1] == [n for n in own if n > 1]:
                names[machines.name_of(tpu, shape)] = tpu.chip
    name = next((name for name, found in names.items() if found == chip.name), f"{each} x {chip.name}")
    return f"{num_slices}x{name}" if num_slices > 1 else name


def _price(name: str, tell: Callable[[str], None]) -> Price | None:
    try:
        return prices.find_price(name, extra=prices.users_prices())
    except ValueError as error:
        tell(f"{error}; this run goes on without a price")
        return None


def _factors(name: str, config: Config, known: bool, tell: Callable[[str], None]) -> factors.Factors | None:
    try:
        return factors.of_run(factors.read().get(name, {}), config, others_do=known)
    except (OSError, ValueError) as error:
        tell(f"{error}; this run is predicted without it")
        return None
