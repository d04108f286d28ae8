"""From host rows to global device arrays: each host loads the rows of its own devices."""

from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from maxlm.data.loader import Loader
from maxlm.loss import Batch
from maxlm.step import Program

HostBatch = dict[str, np.ndarray]


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
    """A data source made of one function: step -> global batch {tokens, targets, ...: [B, T]}.

    A function of the step alone, so that a resumed run sees what it would have seen. segments, positions and mask
    may be left out: then every row is one document and every target counts.
    """

    def __init__(self, function: Callable[[int], HostBatch]):
        self._function = function

    def batches(self, first_step: int, start: int, stop: int) -> Iterator[HostBatch]:
        """As DataSource.batches."""
        step = first_step
        while True:
            rows = self._complete(self._function(step))
            yield {key: value[start:stop] for key, value in rows.items()}
            step += 1

    def heldout(self, batch_size: int, num_batches: int, start: int, stop: int) -> Iterator[HostBatch]:
        """There is none."""
        return iter(())

    def close(self) -> None:
        """Nothing to release."""

    @staticmethod
    def _complete(rows: HostBatch) -> HostBatch:
        tokens = np.asarray(rows["tokens"], np.int32)
        default = {
            "segments": np.ones_like(tokens),
            "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
            "mask": np.ones(tokens.shape, np.float32),
        }
        return {**default, **rows}


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
        """Held-out tokens per byte of text, for bits per byte; None where the source is not made of token stores."""
        if not isinstance(self._source, Loader):
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
