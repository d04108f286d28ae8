"""Reads run folders and works out the numbers that a report shows."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml

from maxlm import flops, goodput, storage
from maxlm.config import ModelConfig
from maxlm.metrics import FILE, Metrics, read_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """One run folder, as far as it is there.

    Attributes:
        name: unique among the runs of a report.
        path: run folder or bucket url.
        config: resolved configuration as plain values; empty if missing.
        config_text: config.yaml as it is.
        metrics: rows of metrics.jsonl.
        summary: summary.json; empty while the run goes on.
        time: from goodput.json; None where that is missing or damaged.
    """

    name: str
    path: str
    config: dict[str, Any]
    config_text: str
    metrics: Metrics
    summary: dict[str, Any]
    time: goodput.Goodput | None

    def column(self, name: str, steady: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the training rows that have a value called name; steady ones only, if asked for."""
        rows = [row for row in (self.steady_rows() if steady else self.metrics.train) if name in row]
        return np.array([r["step"] for r in rows], float), np.array([r[name] for r in rows], float)

    def steady_rows(self) -> list[dict[str, Any]]:
        """Training rows but those right after a start, whose step compiles; all if there are no others."""
        starts = sorted({0, *self.metrics.restarts})
        rows, after_start = [], False
        for row in self.metrics.train:
            while starts and row["step"] > starts[0]:
                starts.pop(0)
                after_start = True
            if not after_start:
                rows.append(row)
            after_start = False
        return rows or self.metrics.train


def load_runs(run_dirs: Sequence[str]) -> list[Run]:
    """Reads run folders.

    Raises:
        ValueError: there are none, or one is missing or holds no run.
    """
    if not run_dirs:
        raise ValueError("a report needs at least one run folder")
    runs = [_load_run(path) for path in run_dirs]
    names = [run.name for run in runs]
    # two runs of one name are told apart by their folders
    return [dataclasses.replace(r, name=r.path.rstrip("/")) if names.count(r.name) > 1 else r for r in runs]


def facts(run: Run) -> dict[str, Any]:
    """What is known about a run, by name; what is not known is left out.

    Losses are in nats per token, baselines in bits per byte of held-out text. train_loss is the mean over the last
    twentieth of the rows (100 at most), since a single batch is noisy; tokens_per_s, step_time_s and mfu are medians
    without the rows that follow a start. goodput is a share from 0 to 1 of the time that seconds_by_phase adds up to.
    """
    summary, train, heldout = run.summary, run.metrics.train, run.metrics.heldout
    final = summary.get("final") or {}
    steady = run.steady_rows()
    last_heldout = heldout[-1] if heldout else final
    known: dict[str, Any] = {
        "name": run.name,
        "path": run.path,
        "status": _status(run),
        "step": train[-1]["step"] if train else summary.get("step"),
        "total_steps": _total_steps(run.config),
        "train_loss": _mean_of_last(train),
        "heldout_loss": last_heldout.get("heldout_loss"),
        "heldout_bits_per_byte": last_heldout.get("heldout_bits_per_byte"),
        "baselines": summary.get("baselines"),
        "tokens_per_s": _median(steady, "tokens_per_s", final),
        "step_time_s": _median(steady, "step_time_s", final),
        "mfu": _median(steady, "mfu", final),
        "first_step_s": summary.get("first_step_s"),
        "wall_s": summary.get("wall_s", train[-1].get("time", 0) - train[0].get("time", 0) if train else None),
        "goodput": run.time and run.time.fraction,
        "seconds_by_phase": run.time and run.time.seconds,
        "lost_steps": run.time and run.time.lost_steps,
        "device_hours": run.time and run.time.device_hours,
        "num_devices": summary.get("num_devices"),
        "device_kind": summary.get("device_kind"),
        "mesh": summary.get("mesh"),
        "bytes_per_device": summary.get("bytes_per_device"),
        "restarts": run.metrics.restarts,
        "not_finite_since": _not_finite_since(run),
        "checkpoint": summary.get("checkpoint"),
        **_model_facts(run),
    }
    if (tokens := tokens_per_step(run)) and known["step"] is not None:
        known["tokens"] = tokens * known["step"]
    return {name: value for name, value in known.items() if value is not None and value != {} and value != []}


def tokens_per_step(run: Run) -> int | None:
    """Tokens of one optimizer step, or None without a configuration."""
    train = run.config.get("train") or {}
    batch, length = train.get("batch_size"), train.get("seq_len")
    return batch * length if batch and length else None


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Configuration values that are not the same in all runs: {dotted key: value per run}; the name is left out."""
    flat = [_flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = {key: [values.get(key) for values in flat] for key in keys if key != "run.name"}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values[1:])}


def plain(value: Any) -> Any:
    """The value with everything that JSON lacks replaced: NaN and infinity by None, tuples by lists."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Generated text without control characters, which could move a terminal's cursor or hide text."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _load_run(path: str) -> Run:
    config_text, summary_text = _read(path, "config.yaml"), _read(path, "summary.json")
    metrics = read_metrics(path)
    if not (config_text or summary_text or metrics.train or metrics.heldout):
        if not storage.exists(path):
            raise ValueError(f"run folder {path} does not exist")
        raise ValueError(f"{path} holds no run: it has none of config.yaml, {FILE} and summary.json")
    config = _parse(path, "config.yaml", config_text, yaml.safe_load)
    name = (config.get("run") or {}).get("name") or path.rstrip("/").rsplit("/", 1)[-1]
    summary = _parse(path, "summary.json", summary_text, json.loads)
    return Run(name, path, config, config_text, metrics, summary, _time(path))


def _time(path: str) -> goodput.Goodput | None:
    try:
        starts = goodput.read(path)
    except (ValueError, OSError):  # the rest is worth a report without it
        return None
    return goodput.summarize(starts) if starts else None


def _read(path: str, name: str) -> str:
    try:
        return storage.read_bytes(storage.join(path, name)).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ValueError(str(error)) from None


def _parse(path: str, name: str, text: str, parse: Any) -> dict[str, Any]:
    try:
        value = parse(text) if text else {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{storage.join(path, name)} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{storage.join(path, name)} must hold names and values, found {type(value).__name__}")
    return value


def _status(run: Run) -> str:
    """As the summary says; a run that has gone on since it was written is unfinished."""
    train, summary = run.metrics.train, run.summary
    behind = bool(train) and train[-1]["step"] > summary.get("step", math.inf)
    return "unfinished" if behind else summary.get("status", "unfinished")


def _median(rows: list[dict[str, Any]], name: str, final: dict[str, Any]) -> float | None:
    values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return float(np.median(values)) if values else final.get(name)


def _mean_of_last(train: list[dict[str, Any]]) -> float | None:
    count = min(100, max(1, len(train) // 20))
    return float(np.mean([row["loss"] for row in train[-count:]])) if train else None


def _not_finite_since(run: Run) -> int | None:
    """First step of the run of bad losses that the metrics end with."""
    since = None
    for row in reversed(run.metrics.train):
        if math.isfinite(row["loss"]):
            break
        since = row["step"]
    return since


def _total_steps(config: dict[str, Any]) -> int | None:
    train = config.get("train") or {}
    if train.get("steps"):
        return train["steps"]
    if train.get("tokens") and train.get("batch_size") and train.get("seq_len"):
        return math.ceil(train["tokens"] / (train["batch_size"] * train["seq_len"]))
    return None


def _model_facts(run: Run) -> dict[str, Any]:
    """Parameters and FLOPs: as the run recorded them, else counted from its configuration."""
    params, per_token = run.summary.get("params"), run.summary.get("flops_per_token")
    parts: dict[str, int] = {}
    try:
        model = ModelConfig.model_validate(run.config["model"])
        parts = flops.num_params(model)
        params = params or parts["total_unpadded"]
        per_token = per_token or flops.train_flops_per_token(model, run.config["train"]["seq_len"])
    except (KeyError, ValueError):
        pass  # no configuration, or one of another version: then only what the run recorded
    return {"params": params, "params_by_part": parts, "flops_per_token": per_token}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
