"""From host rows to global device arrays. A host reads the range of rows from its first to its last device's."""

import contextlib
import contextvars
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from maxlm.config import Config
from maxlm.data.loader import Loader
from maxlm.loss import BATCH, Batch
from maxlm.step import Program

HostBatch = dict[str, np.ndarray]
HANGS_S = 10.0
"""A read that takes so long when the run has ended hangs."""


class DataSource(Protocol):
    """What the loop reads: data.loader.Loader, or StepFunction around a function of the step."""

    def batches(self, first_step: int, start: int, stop: int) -> Iterator[HostBatch]:
        """Rows [start, stop) of each global batch from first_step on, [rows, T]."""
        ...

    def heldout(self, batch_size: int, num_batches: int, start: int, stop: int) -> Iterator[HostBatch]:
        """Rows [start, stop) of up to num_batches held-out batches; empty where there is no such text."""
        ...

    def close(self) -> None:
        """Releases files and threads."""
        ...


class StepFunction:
    """A data source made of one function: step -> global batch {"tokens", "targets": int [B, T], ...}.

    A function of the step alone, so that a resumed run sees what it would have seen. segments, positions and mask
    may be left out: then every row is one document and every target counts.
    """

    def __init__(self, function: Callable[[int], HostBatch], config: Config):
        self._function = function
        self._shape = (config.train.batch_size, config.train.seq_len)
        self._vocab_size, self._packed = config.model.vocab_size, config.data.segment_mask

    def batches(self, first_step: int, start: int, stop: int) -> Iterator[HostBatch]:
        """As DataSource.batches.

        Raises:
            ValueError: the function's batch has a wrong key, shape or id.
        """
        for step in itertools.count(first_step):
            rows = self._checked(step, self._function(step))
            yield {key: value[start:stop] for key, value in rows.items()}

    def heldout(self, batch_size: int, num_batches: int, start: int, stop: int) -> Iterator[HostBatch]:
        """There is none."""
        return iter(())

    def close(self) -> None:
        """Nothing to release."""

    def _checked(self, step: int, rows: HostBatch) -> HostBatch:
        B, T = self._shape
        default = {
            "segments": np.ones((B, T), np.int32),
            "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)),
            "mask": np.ones((B, T), np.float32),
        }
        where = f"the data function's batch of step {step}"
        if not {"tokens", "targets"} <= set(rows) <= set(BATCH):
            raise ValueError(f"{where} has {sorted(rows)}; it needs tokens and targets, and may have {sorted(default)}")
        if "segments" in rows and not self._packed:
            raise ValueError(f"{where} has segments, but data.segment_mask=false says that every row is one document")
        for key, value in rows.items():
            if np.shape(value) != self._shape:
                raise ValueError(
                    f"{where}: {key} is {list(np.shape(value))}, not [train.batch_size, train.seq_len] = [{B}, {T}]"
                )
        for key in ("tokens", "targets"):
            low, high = int(np.min(rows[key])), int(np.max(rows[key]))
            if low < 0 or high >= self._vocab_size:
                raise ValueError(f"{where}: {key} has the ids {low} to {high}, but model.vocab_size={self._vocab_size}")
        return {**default, **{key: np.asarray(value) for key, value in rows.items()}}


class Feed:
    """Places batches on a program's mesh."""

    def __init__(self, program: Program, source: DataSource):
        self._program, self._source = program, source
        self._num_micro = program.config.train.grad_accum
        self._shape = program.batch_shapes["tokens"].shape
        local = program.batch_sharding.addressable_devices_indices_map(self._shape).values()
        slices = [(index[1].start or 0, index[1].stop or self._shape[1]) for index in local if index is not None]
        self._first, self._last = min(a for a, _ in slices), max(b for _, b in slices)

    @property
    def tokens_per_byte(self) -> float | None:
        """Held-out tokens per byte of text, for bits per byte; None unless all of it is stores of text."""
        if not isinstance(self._source, Loader) or any(store.is_chat for store in self._source.stores):
            return None
        stores = self._source.stores
        return sum(s.num_tokens("heldout") for s in stores) / max(1, sum(s.num_bytes("heldout") for s in stores))

    def train_batches(self, first_step: int) -> Generator[Batch, None, None]:
        """Global batches [M, B, T] of every step from first_step on; closing it ends the reading."""
        host = self._source.batches(first_step, *self._rows)
        try:
            for rows in host:
                yield self._place(rows)
        finally:
            getattr(host, "close", lambda: None)()

    def heldout_batches(self, num_batches: int) -> Iterator[Batch]:
        """Held-out batches [M, B, T], each row at most once."""
        for rows in self._source.heldout(self._program.config.train.batch_size, num_batches, *self._rows):
            yield self._place(rows)

    @property
    def _rows(self) -> tuple[int, int]:
        return self._first * self._num_micro, self._last * self._num_micro

    def _place(self, rows: HostBatch) -> Batch:
        # Row b * M + m of the batch is row b of microbatch m: so a host's rows are contiguous for any M.
        def place(key: str, value: np.ndarray) -> jax.Array:
            spec = self._program.batch_shapes[key]
            blocks = value.reshape(-1, self._num_micro, *value.shape[1:]).swapaxes(0, 1)

            def part(index: Any) -> np.ndarray:
                start, stop = index[1].start or 0, index[1].stop or spec.shape[1]
                return blocks[:, start - self._first : stop - self._first].astype(spec.dtype, copy=False)

            return jax.make_array_from_callback(spec.shape, spec.sharding, part)

        return {key: place(key, value) for key, value in rows.items()}


class Ahead:
    """Takes batches in one thread of its own, so that who waits for one can give up."""

    def __init__(self, batches: Generator[Batch, None, None]):
        self._batches, self._waiting = batches, False
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        run = partial(contextvars.copy_context().run, self._run)
        self._thread = threading.Thread(target=run, name="maxlm-feed", daemon=True)
        self._thread.start()

    def next(self, give_up: Callable[[], bool], poll_s: float = 0.2) -> Batch | None:
        """The next batch; None where one is told to give up meanwhile, and then the next call waits on.

        Args:
            give_up: is asked every poll_s.
            poll_s: seconds.

        Raises:
            Exception: what reading raised.
        """
        if not self._waiting:
            self._asked.put(True)
            self._waiting = True
        while True:
            with contextlib.suppress(queue.Empty):
                found = self._found.get(timeout=poll_s)
                self._waiting = False
                if isinstance(found, BaseException):
                    raise found
                return found
            if give_up():
                return None

    def close(self) -> None:
        """Ends the reading; one that hangs is left to the end of the process."""
        self._asked.put(False)
        if not self._waiting:
            self._thread.join(HANGS_S)

    def _run(self) -> None:
        while self._asked.get():
            try:
                self._found.put(next(self._batches))
            except BaseException as error:
                self._found.put(error)
        self._batches.close()
