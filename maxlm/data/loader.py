"""The loader: a global batch is a pure function of (seed, step), whoever asks for whichever part of it.

Row r of a split is tokens [r T, r T + T + 1) of its stream; the last token is only a target. Rows of conversations are
packed (packed.py).

A mixture interleaves
its stores so that after any number of rows each store has had its share, to within one row; each store visits its own
rows in a random order, another one each epoch. Both are computed from an index, so that nothing grows with the
number of rows and resuming takes one integer.

References:
    grain's index shuffle, a pseudorandom permutation computed per index; the interleaving is that of
    grain.MapDataset.mix, which rounds weights to whole hundredths of the smallest and so misses given shares by
    up to a percent, hence our own.
"""

import bisect
import hashlib
import itertools
import math
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import grain
import numpy as np

from maxlm.config import DataConfig, TrainConfig
from maxlm.data.packed import PackedRows
from maxlm.data.sources import DataError
from maxlm.data.store import SPLITS, Split, TokenStore, open_stores

Batch = dict[str, np.ndarray]
# The index shuffle works on 32-bit integers.
MAX_ROWS = 2**32 - 1
READER = "maxlm-loader"
"""Names of reading threads begin so."""


class Loader:
    """Rows of global batches, from a mixture of token stores. Safe to use from many threads.

    Every batch is dict(tokens, targets, segments, positions: int32 [B, T], mask: float32 [B, T]). A token's segment
    is the number of its document in the row, from 1, and its position counts from the document's first token in the
    row (with data.segment_mask=false: 1 and 0..T-1 throughout). mask is 0 where the input ends a document, since the
    next token cannot be known from it. Of conversations mask is 1 where the assistant says the target.

    Args:
        data: the mixture.
        train: seed, batch_size, seq_len and length of the run.
        vocab_size: ids that the model knows, as a count.

    Raises:
        FileNotFoundError, ValueError: as open_stores; or a store's training split is shorter than one row, or
            data.segment_mask=false would let conversations see each other.
    """

    def __init__(self, data: DataConfig, train: TrainConfig, vocab_size: int):
        self._data, self._train = data, train
        self.stores = open_stores(data, vocab_size)
        self._shares = _whole_shares([store.weight for store in data.stores])
        self._rows = {split: [self._rows_of(store, split) for store in self.stores] for split in SPLITS}
        self._order = [self._rows_in_order(index, store) for index, store in enumerate(self.stores)]

    @property
    def rows_per_epoch(self) -> list[int]:
        """Rows of each store's training split."""
        return [len(order) for order in self._order]

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of a step.

        Args:
            step: optimizer step, from 0.
            start: first row within the global batch.
            stop: row after the last, at most train.batch_size.
        """
        if not 0 <= start <= stop <= self._train.batch_size or step < 0:
            raise ValueError(f"rows {start} to {stop} of step {step} leave batches of {self._train.batch_size} rows")
        first = step * self._train.batch_size
        places = [self._place(index) for index in range(first + start, first + stop)]
        return self._read("train", places)

    def batches(self, first_step: int, start: int, stop: int) -> Generator[Batch, None, None]:
        """Rows [start, stop) of each global batch from first_step to the end of the run, read ahead by threads.

        Reading starts at once. Closing the iterator, or coming to its end, waits for the threads and ends them; close
        it before the loader.
        """
        steps = iter(range(first_step, self._train.num_steps))
        pool = ThreadPoolExecutor(self._data.read_threads, READER)
        ahead = deque(
            pool.submit(self.rows, step, start, stop) for step in itertools.islice(steps, self._data.prefetch)
        )

        def drain() -> Generator[Batch, None, None]:
            try:
                while ahead:
                    batch = ahead.popleft().result()
                    ahead.extend(pool.submit(self.rows, step, start, stop) for step in itertools.islice(steps, 1))
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)

        return drain()

    def heldout(self, batch_size: int, num_batches: int, start: int, stop: int) -> Iterator[Batch]:
        """Rows [start, stop) of up to num_batches batches of held-out text, each row once, always the same.

        The stores follow one another in the order of the config, and the rows taken are spread evenly over them. The
        last batch is filled up with rows of zeros: tokens, segments and mask.

        Args:
            batch_size: rows of a global batch.
            num_batches: batches at most; fewer, or none, if there is less held-out text.
            start: first row of each batch to return.
            stop: row after the last.
        """
        counts = list(map(len, self._rows["heldout"]))
        total, ends = sum(counts), list(itertools.accumulate(counts))
        wanted = min(total, num_batches * batch_size)
        for first in range(0, wanted, batch_size):
            places = []
            for i in range(first + start, min(first + stop, wanted)):
                row = i * total // wanted
                index = bisect.bisect_right(ends, row)
                places.append((index, row - ends[index] + counts[index]))
            batch = self._read("heldout", places)
            missing = stop - start - len(places)
            yield {key: np.pad(value, ((0, missing), (0, 0))) for key, value in batch.items()} if missing else batch

    def close(self) -> None:
        """Closes the stores."""
        for store in self.stores:
            store.close()

    @property
    def notes(self) -> list[str]:
        """What users should know of the conversations' rows, one sentence per store."""
        notes = []
        for store, rows in zip(self.stores, self._rows["train"], strict=True):
            if isinstance(rows, PackedRows) and (rows.num_cut or rows.num_unlearned):
                notes.append(
                    f"store {store.path}: {rows.num_cut:,} conversations are cut to train.seq_len="
                    f"{self._train.seq_len}, {rows.num_unlearned:,} are left out since no answer begins before the cut"
                )
        return notes

    def _rows_of(self, store: TokenStore, split: Split) -> "_TextRows | PackedRows":
        if not store.is_chat:
            return _TextRows(store, split, self._train.seq_len, self._data.segment_mask)
        if not self._data.segment_mask:
            raise DataError(
                f"store {store.path} holds conversations, which data.segment_mask=false would let see each other; "
                "set it to true"
            )
        return PackedRows(store, split, self._train.seq_len)

    def _rows_in_order(self, index: int, store: TokenStore) -> grain.MapDataset:
        num_rows = len(self._rows["train"][index])
        if num_rows < 1:
            raise DataError(
                f"store {store.path} has {store.num_tokens('train')} training tokens, too few for one row of "
                f"train.seq_len={self._train.seq_len}; lower train.seq_len or build it from more text"
            )
        if num_rows > MAX_ROWS:
            raise DataError(f"store {store.path} has {num_rows} rows, more than {MAX_ROWS}; split it in two stores")
        rows = grain.MapDataset.range(num_rows)
        if not self._data.shuffle:
            return rows
        # grain adds the epoch to the seed, so seeds of stores must not be neighbours.
        name = f"{self._train.seed} {index}".encode()
        return rows.shuffle(seed=int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little"))

    def _place(self, index: int) -> tuple[int, int]:
        """Store and row of the run's index-th row, counted from 0."""
        store, count = _interleave(index, self._shares)
        return store, int(self._order[store][count])  # pyrefly: ignore

    def _read(self, split: Split, places: list[tuple[int, int]]) -> Batch:
        batch: Batch = {}
        for index, rows in enumerate(self._rows[split]):
            chosen = [i for i, (owner, _) in enumerate(places) if owner == index]
            if chosen or not places:
                for key, value in rows.read([places[i][1] for i in chosen]).items():
                    batch.setdefault(key, np.empty((len(places), value.shape[1]), value.dtype))[chosen] = value
        return batch


class _TextRows:
    """The rows of one split of documents: seq_len tokens after another, and the one behind them."""

    def __init__(self, store: TokenStore, split: Split, seq_len: int, segment_mask: bool):
        self._store, self._split, self._seq_len, self._segment_mask = store, split, seq_len, segment_mask

    def __len__(self) -> int:
        return max(0, self._store.num_tokens(self._split) - 1) // self._seq_len

    def read(self, rows: list[int]) -> Batch:
        tokens_BT1 = self._store.read_rows(self._split, [row * self._seq_len for row in rows], self._seq_len + 1)
        return make_batch(tokens_BT1.astype(np.int32), self._store.eos_id, self._segment_mask)


def make_batch(tokens_BT1: np.ndarray, eos_id: int, segment_mask: bool) -> Batch:
    """Turns rows of T + 1 tokens into inputs, targets, document structure and loss mask.

    Args:
        tokens_BT1: int32 [B, T + 1].
        eos_id: token that ends a document.
        segment_mask: whether documents of a row are told apart.

    Returns:
        dict(tokens, targets, segments, positions: int32 [B, T], mask: float32 [B, T]), as Loader describes.
    """
    tokens_BT = np.ascontiguousarray(tokens_BT1[:, :-1])
    index_T = np.arange(tokens_BT.shape[1], dtype=np.int32)
    ends_BT = tokens_BT == eos_id
    batch = {
        "tokens": tokens_BT,
        "targets": np.ascontiguousarray(tokens_BT1[:, 1:]),
        "mask": (~ends_BT).astype(np.float32),
    }
    if segment_mask:
        # An end-of-document token belongs to the document it ends: the next one starts behind it.
        starts_BT = np.zeros_like(ends_BT)
        starts_BT[:, 1:] = ends_BT[:, :-1]
        batch["segments"] = 1 + np.cumsum(starts_BT, axis=1, dtype=np.int32)
        first_BT = np.maximum.accumulate(np.where(starts_BT, index_T, 0), axis=1)
        batch["positions"] = index_T - first_BT
    else:
        batch["segments"] = np.ones_like(tokens_BT)
        batch["positions"] = np.broadcast_to(index_T, tokens_BT.shape).copy()
    return batch


def identity(data: DataConfig) -> dict[str, Any]:
    """What a run's batches depend on beside seed, batch_size and seq_len, as JSON.

    A run may move its stores, but not resume with other tokens, weights or order.

    Raises:
        FileNotFoundError, DataError: as TokenStore.
    """
    stores = []
    for config in data.stores:
        store = TokenStore(config.path)
        hashes = {split: store.content_hash(split) for split in ("train", "heldout")}
        stores.append({"weight": config.weight, "tokenizer": store.tokenizer_identity["sha256"], **hashes})
    return {"stores": stores, "shuffle": data.shuffle, "segment_mask": data.segment_mask}


def _whole_shares(weights: list[float]) -> list[int]:
    """Whole numbers in exactly the proportions of the weights, read as the decimals they were written as."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    shares = [int(fraction * scale) for fraction in fractions]
    common = math.gcd(*shares)
    return [share // common for share in shares]


def _interleave(index: int, shares: list[int]) -> tuple[int, int]:
    """Which store the index-th row of a mixture comes from, and how many rows it has given before.

    Of the first k rows, a store with share p of s gives k - floor(k (s - p) / s); the rest goes to the other stores by
    the same rule. Python's integers keep this exact for any index.
    """
    remaining = sum(shares)
    before, after = index, index + 1
    for store, share in enumerate(shares):
        rest_before = before * (remaining - share) // remaining
        rest_after = after * (remaining - share) // remaining
        if before - rest_before != after - rest_after:
            return store, before - rest_before
        before, after, remaining = rest_before, rest_after, remaining - share
    raise AssertionError(f"row {index} belongs to no store of {shares}")
