"""What a run measures, written where people look: metrics.jsonl always, TensorBoard and Weights & Biases on request.

metrics.jsonl has one JSON object per line, in order of writing:
- training:  {"step", "time", "loss", "grad_norm", "learning_rate", "tokens_per_s", "step_time_s", "mfu"?, ...}
- held-out:  {"step", "time", "heldout_loss", "heldout_bits_per_byte", ...}
- a restart: {"step", "time", "restart": true}, where step is the checkpoint that the run continued from.
- at the end: {"step", "time", "receipt": true, ...}, what was measured beside what was predicted (receipt.py).
`time` is in seconds since 1970. JSON has no NaN or infinity: a value that is not finite is written as null and read
back as NaN.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from maxlm import storage
from maxlm.config import LogConfig

FILE = "metrics.jsonl"
UPLOAD_EVERY_S = 30.0
"""Objects in buckets cannot be appended to: metrics.jsonl is written anew, at most this often."""

DAMAGED = "metrics.damaged.jsonl"
"""Copy of a metrics.jsonl in which a resume found lines that are no rows."""
LARGEST = 1e39
"""Beyond float32: as good as infinite, and safe to compute with."""

Row = dict[str, Any]
_Value = bool | Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | None
_ROW = TypeAdapter(dict[str, _Value], config=ConfigDict(strict=True))


@dataclasses.dataclass(frozen=True)
class Metrics:
    """A run's rows, each list in order of steps.

    Attributes:
        train: training rows.
        heldout: held-out evaluations.
        restarts: steps of the checkpoints that the run was continued from.
    """

    train: list[Row]
    heldout: list[Row]
    restarts: list[int]


def read_metrics(run_dir: str) -> Metrics:
    """Reads metrics.jsonl of a run that is finished, running or was cut off.

    Args:
        run_dir: run folder or bucket url.

    Returns:
        The rows; all empty if there is no metrics.jsonl. A last line that was cut off is left out.

    Raises:
        ValueError: a line before the last is not a row.
    """
    found, damaged = _read_rows(run_dir)
    if damaged:
        number, line = damaged[0]
        path = storage.join(run_dir, FILE)
        raise ValueError(f"{path}, line {number} is not a row of metrics: {line[:60]!r}")
    rows = [{k: _known(v) for k, v in row.items()} for row in found]
    return Metrics(
        train=[row for row in rows if "loss" in row],
        heldout=[row for row in rows if "heldout_loss" in row],
        restarts=sorted({int(row["step"]) for row in rows if row.get("restart")}),
    )


class MetricsWriter:
    """Writes a run's metrics. One process of a run has one (process 0).

    Use as a context manager, or call close.
    """

    def __init__(self, run_dir: str, log: LogConfig, config_dict: Mapping[str, Any], resume_step: int | None = None):
        """Opens the run's metrics and starts the trackers that are asked for.

        Args:
            run_dir: run folder (made if missing) or bucket url.
            log: which trackers to use.
            config_dict: the resolved configuration as plain values, for the trackers.
            resume_step: step of the checkpoint that the run continues from: rows of later steps are dropped, they
                will be written again. None starts over: all earlier rows are dropped.

        Raises:
            ValueError: a tracker is asked for whose package is not installed.
        """
        trackers = _check_trackers(log)
        kept = [] if resume_step is None else [r for r in _salvaged_rows(run_dir) if r["step"] <= resume_step]
        self._trackers = [start(run_dir, log, config_dict, resume_step) for start in trackers]
        self._file = (_BucketLines if storage.is_bucket(run_dir) else _LocalLines)(storage.join(run_dir, FILE), kept)
        if resume_step is not None:
            self._write({"step": resume_step, "restart": True})

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a training row.

        Args:
            step: optimizer steps done, 1 after the first.
            values: host numbers by name, "loss" among them.
        """
        assert "loss" in values
        self._write({"step": step, **values})
        for tracker in self._trackers:
            tracker.log(step, {f"train/{k}": float(v) for k, v in values.items()})

    def heldout(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a held-out row.

        Args:
            step: optimizer steps done when it was measured.
            values: host numbers by name, "heldout_loss" among them.
        """
        assert "heldout_loss" in values
        self._write({"step": step, **values})
        for tracker in self._trackers:
            tracker.log(step, {f"heldout/{k.removeprefix('heldout_')}": float(v) for k, v in values.items()})

    def receipt(self, step: int, values: Mapping[str, float]) -> None:
        """Writes a run's last row.

        Args:
            step: optimizer steps done.
            values: host numbers by name, see receipt.compare.
        """
        self._write({"step": step, "receipt": True, **values})
        for tracker in self._trackers:
            tracker.log(step, {f"receipt/{k}": float(v) for k, v in values.items()})

    def flush(self) -> None:
        """Makes what was written durable: called when a checkpoint is saved.

        Raises:
            StorageError: the file or bucket does not take it.
        """
        self._file.flush()

    def close(self) -> None:
        """Finishes all files and trackers.

        Raises:
            StorageError: the bucket did not take the last rows.
        """
        with contextlib.ExitStack() as stack:  # closes all of them, whichever fails
            for tracker in self._trackers:
                stack.callback(tracker.close)
            stack.callback(self._file.close)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, row: Row) -> None:
        self._file.append(_to_line({**row, "time": round(time.time(), 3)}))


class _LocalLines:
    """Lines of a local file, complete after every append."""

    def __init__(self, path: str, kept: list[Row]):
        storage.write_bytes(path, _to_bytes(kept))
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def append(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise storage.StorageError(f"cannot write {self._file.name}: {error.strerror}") from None

    def flush(self) -> None:
        with contextlib.suppress(OSError):  # some file systems cannot
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been reported by append
            self._file.close()


class _BucketLines:
    """Lines of an object, kept in memory and uploaded by a thread, so that a slow bucket does not hold up the run."""

    def __init__(self, path: str, kept: list[Row]):
        self._path, self._data = path, bytearray(_to_bytes(kept))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._last: Future[None] | None = None
        self._uploaded_at = time.monotonic()
        # A bucket that cannot be written must show at once and not after the first hour.
        storage.write_bytes(path, bytes(self._data))

    def append(self, line: str) -> None:
        self._data += line.encode()
        due = time.monotonic() - self._uploaded_at >= UPLOAD_EVERY_S
        # A failed upload is not worth a run: everything is still in memory, and the next one tries again.
        if due and (self._last is None or self._last.done()):
            self._uploaded_at = time.monotonic()
            self._last = self._pool.submit(storage.write_bytes, self._path, bytes(self._data))

    def flush(self) -> None:
        if self._last is not None:
            self._last.exception()  # waits: an older upload must not come after this one
        storage.write_bytes(self._path, bytes(self._data))

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        storage.write_bytes(self._path, bytes(self._data))


class _TensorBoard:
    """TensorBoard events in the run's folder `tensorboard`."""

    def __init__(self, run_dir: str, log: LogConfig, config_dict: Mapping[str, Any], resume_step: int | None):
        from tensorboardX import SummaryWriter

        self._bucket = storage.join(run_dir, "tensorboard") if storage.is_bucket(run_dir) else None
        # Event files are appended to, which objects cannot be: they grow on disk and are copied.
        self._dir = tempfile.mkdtemp(prefix="maxlm-") if self._bucket else storage.join(run_dir, "tensorboard")
        if resume_step is None and self._bucket is None:
            shutil.rmtree(self._dir, ignore_errors=True)
        # purge_step hides what an interrupted run wrote after its checkpoint
        purge = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(self._dir, purge_step=purge, flush_secs=30)
        self._copied_at = time.monotonic()

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if self._bucket and time.monotonic() - self._copied_at >= 10 * UPLOAD_EVERY_S:
            with contextlib.suppress(storage.StorageError):  # close tries again
                self._copy()

    def close(self) -> None:
        self._writer.close()
        if self._bucket:
            self._copy()
            shutil.rmtree(self._dir, ignore_errors=True)

    def _copy(self) -> None:
        assert self._bucket
        self._copied_at = time.monotonic()
        self._writer.flush()
        for name in os.listdir(self._dir):
            storage.write_bytes(storage.join(self._bucket, name), storage.read_bytes(os.path.join(self._dir, name)))


class _Wandb:
    """A Weights & Biases run, continued under its id when the run resumes."""

    def __init__(self, run_dir: str, log: LogConfig, config_dict: Mapping[str, Any], resume_step: int | None):
        import wandb

        id_file = storage.join(run_dir, "wandb_id.txt")
        if resume_step is not None and storage.exists(id_file):
            run_id = storage.read_bytes(id_file).decode().strip()
        else:
            run_id = uuid.uuid4().hex[:12]
            storage.write_bytes(id_file, run_id.encode())
        self._run = wandb.init(
            project=log.wandb_project,
            name=run_dir.rstrip("/").rsplit("/", 1)[-1],
            id=run_id,
            resume="allow",
            config=dict(config_dict),
            dir=None if storage.is_bucket(run_dir) else run_dir,
        )
        # W&B's own step must only grow, which a resumed run cannot promise; ours is a value like the others.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def _check_trackers(log: LogConfig) -> list[type[_TensorBoard] | type[_Wandb]]:
    """The trackers to start, all of them importable."""
    trackers: list[type[_TensorBoard] | type[_Wandb]] = []
    if log.tensorboard:
        _need("tensorboardX", "log.tensorboard=true", "tensorboard")
        trackers.append(_TensorBoard)
    if log.wandb_project:
        _need("wandb", f"log.wandb_project={log.wandb_project}", "wandb")
        trackers.append(_Wandb)
    return trackers


def _need(module: str, setting: str, extra: str) -> None:
    try:
        __import__(module)
    except ImportError:
        raise ValueError(f"{setting} needs the package {module}: pip install 'maxlm[{extra}]'") from None


def _read_rows(run_dir: str) -> tuple[list[Row], list[tuple[int, str]]]:
    """The rows, and number and text of lines that are none; of the last one nothing is said, it may be torn."""
    try:
        lines = storage.read_bytes(storage.join(run_dir, FILE)).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return [], []
    rows: list[Row] = []
    damaged = []
    for number, line in enumerate(lines, 1):
        try:
            row = _ROW.validate_json(line)
        except ValidationError:
            row = {}
        step = row.get("step")
        if type(step) is int and step >= 0:
            rows.append(row)
        elif number < len(lines):  # a run that is killed while it writes tears the last line
            damaged.append((number, line))
    return rows, damaged


def _salvaged_rows(run_dir: str) -> list[Row]:
    """What a resume keeps: metrics are a record, and damage to it must not stop a run."""
    rows, damaged = _read_rows(run_dir)
    if damaged:
        copy = storage.join(run_dir, DAMAGED)
        storage.write_bytes(copy, storage.read_bytes(storage.join(run_dir, FILE)))
        text = (
            f"{storage.join(run_dir, FILE)}: {len(damaged)} lines, the first in line {damaged[0][0]}, are no rows of "
        )
        print(f"{text}metrics and are left out; {copy} is the file as it was", file=sys.stderr, flush=True)
    return rows


def _known(value: Any) -> Any:
    """A row's value to compute with."""
    if value is None:
        return math.nan
    return value if abs(value) <= LARGEST or math.isnan(value) else math.copysign(math.inf, value)


def _to_bytes(rows: list[Row]) -> bytes:
    return "".join(map(_to_line, rows)).encode()


def _to_line(row: Row) -> str:
    return json.dumps({k: _finite(v) for k, v in row.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
