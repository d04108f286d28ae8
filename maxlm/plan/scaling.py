"""What small runs say of a large one: scaling laws fitted to run folders, and the loss that a budget buys."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from maxlm import storage
from maxlm.plan.laws import COVERAGE, PUBLISHED, Fit, Law, fit, interval, optimal_params
from maxlm.report.data import Run, facts, load_runs, tokens_per_step

FAR = 10.0
"""Times the largest run beyond which a forecast is called far."""
SAME = 1.1
"""Sizes that differ by less than this factor count as one."""
MIN_RUNS = 3
MIN_RUNS_ND = 6
"""Of L(C), and of L(N, D): one more than its constants, so that something tells how far off they are."""
NATS, BITS = "nats per token", "bits per byte"


@dataclasses.dataclass(frozen=True)
class Point:
    """One run as the fits see it.

    Attributes:
        name: of the run.
        params: parameters that a token visits: flops.num_params "active", embeddings included.
        tokens: trained on until the loss was measured, repeated ones counted each time.
        flops: model FLOPs until then (maxlm/flops.py).
        loss: in the report's unit.
    """

    name: str
    params: int
    tokens: int
    flops: float
    loss: float


@dataclasses.dataclass(frozen=True)
class Points:
    """Runs whose losses may be compared.

    Attributes:
        points: one per run.
        unit: of their losses.
        source: "held-out loss" or "training loss".
        notes: sentences on what weakens the comparison.
    """

    points: list[Point]
    unit: str
    source: str
    notes: list[str]


def read_points(run_dirs: Sequence[str]) -> Points:
    """Reads model size, tokens, FLOPs and loss of runs, finished or not.

    Args:
        run_dirs: run folders or bucket urls.

    Raises:
        ValueError: a folder holds no run, a run has no steps, has diverged or began with trained weights, there are
            fewer than three, all have one size, or their losses cannot be compared.
    """
    runs = load_runs(list(dict.fromkeys(run_dirs)))
    if len(runs) < MIN_RUNS:
        raise ValueError(f"a scaling law needs at least {MIN_RUNS} runs of different sizes, got {len(runs)}")
    known = [facts(run) for run in runs]
    for run, row in zip(runs, known, strict=True):
        _check(run, row)
    notes = [
        f"{row['name']} is {row['status']}: its learning rate may not have come down, so its loss is too high"
        for row in known
        if row["status"] != "complete"
    ]
    unit, source, more = _comparable(runs, known)
    points = [_point(run, row, unit, source) for run, row in zip(runs, known, strict=True)]
    if num_distinct([p.params for p in points]) < 2:
        raise ValueError(
            f"all {len(points)} runs have {points[0].params:,} parameters or nearly so; "
            "a scaling law needs runs of different sizes"
        )
    return Points(points, unit, source, notes + more)


def scaling_report(
    run_dirs: Sequence[str] = (), budget_flops: float | None = None, law: str | None = None
) -> dict[str, Any]:
    """Fits scaling laws to runs and forecasts what a budget buys; or forecasts by a published law.

    Args:
        run_dirs: run folders or bucket urls.
        budget_flops: training FLOPs of the forecast; None makes none.
        law: a name of laws.PUBLISHED, instead of runs.

    Returns:
        JSON: unit, loss (what it is), runs (dicts of Point), compute_law and size_law (constants as {"value",
        "interval"}, rms, num_runs; or {"refused": why}), forecast (None without a budget) and notes. Intervals are
        [low, high] with COVERAGE of the cases, or None where there are not more runs than constants.

    Raises:
        ValueError: as read_points, or the budget is no number of FLOPs, or both runs and a law are given.
    """
    if budget_flops is not None and not (math.isfinite(budget_flops) and budget_flops > 0):
        raise ValueError(f"a budget of {budget_flops} FLOPs cannot be spent; give a positive number, such as 1e21")
    if law is not None:
        return _published_report(law, run_dirs, budget_flops)
    found = read_points(run_dirs)
    points = found.points
    by_compute, by_size = fit_compute(points), fit_size(points, found.unit)
    per_token_param = flops_per_token_param(points)
    notes = [*found.notes, *_no_end(points, by_compute, by_size)]
    forecast = None
    if budget_flops is not None:
        forecast = _forecast(points, by_compute, by_size, budget_flops, per_token_param)
        notes += _far(forecast)
    return {
        "unit": found.unit,
        "loss": found.source,
        "coverage": COVERAGE,
        "runs": [dataclasses.asdict(p) for p in points],
        "compute_law": _constants(by_compute, ("E", "A", "a"), len(frontier(points))),
        "size_law": _constants(by_size, ("E", "A", "B", "alpha", "beta"), len(points)),
        "flops_per_token_param": per_token_param,
        "forecast": forecast,
        "notes": notes,
    }


def fitted_law(run_dirs: Sequence[str]) -> Law:
    """The law L(N, D) of runs.

    Raises:
        ValueError: as read_points, or the runs are too few or too alike for it.
    """
    found = read_points(run_dirs)
    fitted = fit_size(found.points, found.unit)
    if isinstance(fitted, str):
        raise ValueError(fitted)
    E, A, B, alpha, beta = map(float, fitted.constants)
    source = f"fitted to {len(found.points)} runs"
    return Law(E, A, B, alpha, beta, source, flops_per_token_param(found.points))


def frontier(points: Sequence[Point]) -> list[Point]:
    """Runs that no other one beats with as much compute or less, by compute."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.flops, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def fit_compute(points: Sequence[Point]) -> Fit | str:
    """Fits L(C) = E + A / C^a to the frontier, or says why not."""
    best = frontier(points)
    if num_distinct([p.flops for p in best]) < MIN_RUNS:
        return (
            f"L(C) needs {MIN_RUNS} runs of different compute of which each beats all cheaper ones, found {len(best)}"
        )
    return fit(np.array([[p.flops] for p in best], float), np.array([p.loss for p in best]))


def fit_size(points: Sequence[Point], unit: str = NATS) -> Fit | str:
    """Fits L(N, D) = E + A / N^alpha + B / D^beta, or says why not."""
    sizes, tokens = [p.params for p in points], [p.tokens for p in points]
    if unit != NATS:
        return "L(N, D) needs runs of one tokenizer: tokens of several are not the same amount of text"
    if len(points) < MIN_RUNS_ND or num_distinct(sizes) < 3 or num_distinct(tokens) < 3:
        return (
            f"L(N, D) needs {MIN_RUNS_ND} runs with 3 model sizes and 3 numbers of tokens, found {len(points)} with "
            f"{num_distinct(sizes)} and {num_distinct(tokens)}"
        )
    if abs(np.corrcoef(np.log(sizes), np.log(tokens))[0, 1]) > 0.99:
        return "L(N, D) needs runs whose tokens per parameter differ; with one ratio N and D cannot be told apart"
    return fit(np.array([sizes, tokens], float).T, np.array([p.loss for p in points]))


def flops_per_token_param(points: Sequence[Point]) -> float:
    """Training FLOPs of a token for each parameter, of the largest model: about 6, more where attention is costly."""
    largest = max(points, key=lambda p: p.params)
    return largest.flops / largest.params / largest.tokens


def num_distinct(values: Sequence[float]) -> int:
    """How many values there are that differ by more than the factor SAME from the next lower one counted."""
    count, last = 0, 0.0
    for value in sorted(values):
        if value > last * SAME:
            count, last = count + 1, value
    return count


def _check(run: Run, known: dict[str, Any]) -> None:
    name, train = known["name"], run.config.get("train")
    if not known.get("step") or not tokens_per_step(run) or "active" not in known.get("params_by_part", {}):
        raise ValueError(f"{run.path} has no finished step, or no config.yaml that can be read; leave it out")
    losses = [row["heldout_loss"] for row in run.metrics.heldout[-1:]] + [known.get("train_loss", 0.0)]
    if "not_finite_since" in known or not all(map(math.isfinite, losses)):
        raise ValueError(f"{name} has diverged, its last loss is not finite; leave it out")
    if run.config.get("lora") or (isinstance(train, dict) and train.get("init_from")):
        raise ValueError(
            f"{name} began with trained weights (train.init_from), so its tokens are not all that it learned from; "
            "leave it out"
        )


def _comparable(runs: Sequence[Run], known: Sequence[dict[str, Any]]) -> tuple[str, str, list[str]]:
    """The unit and the kind of loss in which runs may be compared, and what weakens that."""
    notes: list[str] = []
    source = "held-out loss" if all(run.metrics.heldout for run in runs) else "training loss"
    if source == "training loss":
        notes.append("not every run has a held-out loss: these are smoothed training losses, which are noisier")
    of_stores = [_stores(run) for run in runs]
    if any(stores is None for stores in of_stores):
        notes.append("not every run has an identity.json: tokenizers are taken as one where vocabularies are as large")
        tokenizers = {run.config["model"].get("vocab_size") for run in runs}
    else:
        tokenizers = {frozenset(tokenizer for tokenizer, _ in stores or ()) for stores in of_stores}
        if len(tokenizers) == 1 and len({frozenset(text for _, text in stores or ()) for stores in of_stores}) > 1:
            notes.append("the runs' held-out texts are not the same, so part of the differences is that of the texts")
    if len(tokenizers) == 1:
        return NATS, source, notes
    if source == "held-out loss" and all("heldout_bits_per_byte" in row for row in known):
        notes.append("the runs have different tokenizers, so losses are compared in bits per byte")
        return BITS, source, notes
    raise ValueError(
        "the runs have different tokenizers and not all have held-out bits per byte; losses in nats per token of "
        "different tokenizers cannot be compared"
    )


def _stores(run: Run) -> list[tuple[str, str]] | None:
    """Tokenizer and held-out text of each store of a run, as hashes; None where nothing says."""
    try:
        text = storage.read_bytes(storage.join(run.path, "identity.json"))
        return [
            (str(s["tokenizer"]), str(s["heldout"])) for s in TypeAdapter(Any).validate_json(text)["data"]["stores"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _point(run: Run, known: dict[str, Any], unit: str, source: str) -> Point:
    if source == "held-out loss":
        row = run.metrics.heldout[-1]
        step, loss = row["step"], row["heldout_loss" if unit == NATS else "heldout_bits_per_byte"]
    else:
        step, loss = known["step"], known["train_loss"]
    tokens = int(step) * (tokens_per_step(run) or 0)
    if not (tokens > 0 and 0 < loss < math.inf):
        raise ValueError(f"{known['name']} has a loss of {loss} after {tokens} tokens; leave it out")
    params = known["params_by_part"]["active"]
    return Point(known["name"], params, tokens, known["flops_per_token"] * tokens, loss)


def _constants(fitted: Fit | str, names: Sequence[str], num_runs: int) -> dict[str, Any]:
    if isinstance(fitted, str):
        return {"refused": fitted}
    columns = [None] * len(names) if fitted.draws is None else list(fitted.draws.T)
    values = {
        name: {"value": float(value), "interval": interval(column)}
        for name, value, column in zip(names, fitted.constants, columns, strict=True)
    }
    return {"constants": values, "rms": fitted.rms, "num_runs": num_runs}


def _no_end(points: Sequence[Point], *fits: Fit | str) -> list[str]:
    lowest = min(p.loss for p in points)
    if any(isinstance(fitted, Fit) and fitted.constants[0] < 0.01 * lowest for fitted in fits):
        return ["E is as good as 0: the runs do not show where the loss levels off, so far forecasts are too low"]
    return []


def _forecast(
    points: Sequence[Point], by_compute: Fit | str, by_size: Fit | str, budget_flops: float, per_token_param: float
) -> dict[str, Any]:
    found: dict[str, Any] = {"budget_flops": budget_flops, "by_compute": None, "by_size": None}
    found["factor"] = budget_flops / max(p.flops for p in points)
    if isinstance(by_compute, Fit):
        loss, losses = by_compute.losses(budget_flops)
        found["by_compute"] = {"loss": loss, "interval": interval(losses)}
    if isinstance(by_size, Fit):
        product = budget_flops / per_token_param
        params = float(optimal_params(by_size.constants, product))
        loss, losses = by_size.losses(params, product / params)
        sizes = None if by_size.draws is None else optimal_params(by_size.draws, product)
        found["by_size"] = {
            "loss": loss,
            "interval": interval(losses),
            "params": params,
            "params_interval": interval(sizes),
            "tokens": product / params,
            "tokens_interval": None if sizes is None else interval(product / sizes),
            "params_factor": params / max(p.params for p in points),
            "tokens_factor": product / params / max(p.tokens for p in points),
        }
    return found


def _far(forecast: dict[str, Any]) -> list[str]:
    by_size = forecast["by_size"] or {}
    factors = {
        "compute": forecast["factor"],
        "parameters": by_size.get("params_factor", 1.0),
        "tokens": by_size.get("tokens_factor", 1.0),
    }
    return [
        f"the forecast is {factor:,.0f} times beyond the largest {what} of the runs: far, and the interval does not "
        "know whether the law still holds there"
        for what, factor in factors.items()
        if factor > FAR
    ]


def _published_report(name: str, run_dirs: Sequence[str], budget_flops: float | None) -> dict[str, Any]:
    if run_dirs:
        raise ValueError(f"a law by name (law={name}) is for when there are no runs; leave out one of them")
    if name not in PUBLISHED:
        raise ValueError(f"law={name} is not known; it may be {' or '.join(PUBLISHED)}")
    law = PUBLISHED[name]
    forecast = None
    if budget_flops is not None:
        params, tokens = law.optimum(budget_flops)
        by_size = {"loss": law.loss(params, tokens), "interval": None, "params": params, "tokens": tokens}
        forecast = {"budget_flops": budget_flops, "by_compute": None, "by_size": by_size}
    return {
        "unit": NATS,
        "law": dataclasses.asdict(law),
        "forecast": forecast,
        "notes": [
            f"this law is of {law.source}: other data and another tokenizer than yours, so take its losses as "
            "differences and not as what your run will show; sizes and tokens are a first guess"
        ],
    }
