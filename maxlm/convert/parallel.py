"""Tensors several at a time, as far as they fit into memory, and transposes that use the caches."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

THREADS = min(8, 2 * (os.cpu_count() or 1))
IN_FLIGHT = 128 << 20
"""Bytes of tensors that are worked on at a time, unless one is larger: that one is worked on alone."""
BAND = 4 << 20
"""Bytes of an array that are made and used at a time."""
LINE = 32
"""Bytes of a row that a transpose moves at a time: half a cache line was the fastest of 32 to 512."""


def run_all(jobs: Iterable[tuple[int, Callable[[], None]]], advance: Callable[[int], None]) -> None:
    """Runs jobs in threads.

    Args:
        jobs: bytes of each, and what is to be done; begun in this order.
        advance: hears of the bytes of each that is done.

    Raises:
        What the first job raises that fails; those that have not begun are left out.
    """
    running = dict[Future[None], int]()

    def collect() -> None:
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            advance(running.pop(future))
            future.result()

    with ThreadPoolExecutor(THREADS, thread_name_prefix="maxlm-convert") as pool:
        try:
            for size, job in jobs:
                while running and sum(running.values()) + size > IN_FLIGHT:
                    collect()
                running[pool.submit(job)] = size
            while running:
                collect()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def bands(x: np.ndarray) -> Iterator[np.ndarray]:
    """An array in contiguous pieces along its first dimension, each small enough to stay in the caches.

    What takes a piece next finds it there: writing a whole transpose to a file takes four times as long. Args: x: of
    any strides; a transpose of contiguous dimensions is moved in blocks, much faster than numpy's copy.
    """
    rows = max(1, BAND // max(1, x.itemsize * math.prod(x.shape[1:])))
    for i in range(0, len(x), rows):
        yield _contiguous(x[i : i + rows])


def contiguous(x: np.ndarray) -> np.ndarray:
    """The same, contiguous."""
    if x.flags.c_contiguous or not x.ndim:
        return x
    out, at = np.empty(x.shape, x.dtype), 0
    for band in bands(x):
        out[at : at + len(band)] = band
        at += len(band)
    return out


def _contiguous(x: np.ndarray) -> np.ndarray:
    if x.flags.c_contiguous or x.nbytes < 1 << 16:
        return np.ascontiguousarray(x)
    bits = x.view(f"u{x.itemsize}")
    for cut in range(1, x.ndim):  # is it [a, b] of what lies in memory as [b, a]?
        before = bits.transpose(*range(cut, x.ndim), *range(cut))
        try:
            matrix = before.reshape(math.prod(before.shape[: x.ndim - cut]), -1, copy=False)
        except ValueError:
            continue
        if matrix.strides[1] == x.itemsize:
            out, step = np.empty(matrix.shape[::-1], bits.dtype), LINE // x.itemsize
            for i in range(0, len(matrix), step):
                out[:, i : i + step] = matrix[i : i + step].T
            return out.view(x.dtype).reshape(x.shape)
    return np.ascontiguousarray(x)
