"""Reads run folders and works out the numbers that a report shows."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm import flops, goodput, storage, summary
from maxlm.config import ModelConfig
from maxlm.config_file import read_yaml
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
    told, train, heldout = run.summary, run.metrics.train, run.metrics.heldout
    final = told.get("final") or {}
    steady = run.steady_rows()
    last_heldout = heldout[-1] if heldout else final
    known: dict[str, Any] = {
        "name": run.name,
        "path": run.path,
        "status": _status(run),
        "step": train[-1]["step"] if train else told.get("step"),
        "total_steps": _total_steps(run.config),
        "train_loss": _mean_of_last(train),
        "heldout_loss": last_heldout.get("heldout_loss"),
        "heldout_bits_per_byte": last_heldout.get("heldout_bits_per_byte"),
        "baselines": told.get("baselines"),
        "tokens_per_s": _median(steady, "tokens_per_s", final),
        "step_time_s": _median(steady, "step_time_s", final),
        "mfu": _median(steady, "mfu", final),
        "first_step_s": told.get("first_step_s"),
        "wall_s": told.get("wall_s", train[-1].get("time", 0) - train[0].get("time", 0) if train else None),
        "goodput": run.time and run.time.fraction,
        "seconds_by_phase": run.time and run.time.seconds,
        "lost_steps": run.time and run.time.lost_steps,
        "device_hours": run.time and run.time.device_hours,
        "skipped_steps": sum(row.get("skipped") == 1 for row in train) or None,
        "num_devices": told.get("num_devices"),
        "device_kind": told.get("device_kind"),
        "mesh": told.get("mesh"),
        "bytes_per_device": told.get("bytes_per_device"),
        "receipt": told.get("receipt"),
        "predicted_by": told.get("predicted_by"),
        "restarts": run.metrics.restarts,
        "not_finite_since": _not_finite_since(run),
        "checkpoint": told.get("checkpoint"),
        **_model_facts(run),
    }
    if (tokens := tokens_per_step(run)) and known["step"] is not None:
        known["tokens"] = tokens * known["step"]
    return {name: value for name, value in known.items() if value is not None and value != {} and value != []}


def tokens_per_step(run: Run) -> int | None:
    """Tokens of one optimizer step, or None without a configuration."""
    batch, length = _count(run.config, "train", "batch_size"), _count(run.config, "train", "seq_len")
    return batch * length if batch and length else None


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Configuration values that are not the same in all runs: {dotted key: value per run}; the name is left out."""
    flat = [_flatten(run.config) for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    rows = {key: [values.get(key) for values in flat] for key in keys if key != "run.name"}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values[1:])}


def plain(value: Any) -> Any:
    """The value with everything that JSON lacks replaced: NaN and infinity by None, tuples by lists, dates by text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


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
    config = _parse(path, "config.yaml", config_text, read_yaml)
    name = _section(config, "run").get("name")
    name = printable(name) if name and isinstance(name, str) else path.rstrip("/").rsplit("/", 1)[-1]
    told = _parse(path, "summary.json", summary_text, summary.parse)
    return Run(name, path, config, config_text, metrics, told, _time(path))


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
    except ValueError as error:
        raise ValueError(f"{storage.join(path, name)} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{storage.join(path, name)} must hold names and values, found {type(value).__name__}")
    return value


def _status(run: Run) -> str:
    """As the summary says; a run that has gone on since it was written is unfinished."""
    train = run.metrics.train
    behind = bool(train) and train[-1]["step"] > run.summary.get("step", math.inf)
    return "unfinished" if behind else run.summary.get("status", "unfinished")


def _median(rows: list[dict[str, Any]], name: str, final: dict[str, Any]) -> float | None:
    values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return float(np.median(values)) if values else final.get(name)


def _mean_of_last(train: list[dict[str, Any]]) -> float | None:
    train = [row for row in train if not row.get("skipped")] or train
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
    names = ("steps", "tokens", "batch_size", "seq_len")
    steps, tokens, batch, length = (_count(config, "train", name) for name in names)
    if steps is None and tokens and batch and length:
        return math.ceil(tokens / (batch * length))
    return steps


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A section of a configuration that nobody has checked."""
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _count(config: dict[str, Any], section: str, name: str) -> int | None:
    value = _section(config, section).get(name)
    return value if type(value) is int and 0 < value < 2**63 else None


def _model_facts(run: Run) -> dict[str, Any]:
    """Parameters and FLOPs: as the run recorded them, else counted from its configuration."""
    params, per_token = run.summary.get("params"), run.summary.get("flops_per_token")
    parts: dict[str, int] = {}
    try:
        model = ModelConfig.model_validate(_section(run.config, "model"))
        parts = flops.num_params(model)
        params = params or parts["total_unpadded"]
        if seq_len := _count(run.config, "train", "seq_len"):
            per_token = per_token or flops.train_flops_per_token(model, seq_len)
    except ValueError:
        pass  # no configuration, or one of another version: then only what the run recorded
    return {"params": params, "params_by_part": parts, "flops_per_token": per_token}


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, sub in tree.items() for k, v in _flatten(sub, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): tree}
