"""Tensors several at a time, as far as they fit into memory, and transposes that use the caches."""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import jax
import numpy as np

THREADS = min(8, 2 * (os.cpu_count() or 1))
IN_FLIGHT = 128 << 20
"""Bytes of tensors that are worked on at a time, unless one is larger: that one is worked on alone."""
SCRATCH = 32 << 20
"""Bytes of a tensor, at most, that is read into memory which its thread uses again and again."""
ALIGNED = 64
"""Bytes of whose multiples memory has to begin for XLA to take it without a copy."""
BAND = 2 << 20
"""Bytes of an array that are made and used at a time."""


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


_of_thread = threading.local()


def scratch(num_bytes: int) -> np.ndarray | None:
    """Bytes [num_bytes] or more that the calling thread has until it asks again, or None where they are too many.

    New memory is zeroed by the kernel, page by page, which takes longer than reading into it.
    """
    if num_bytes > SCRATCH:
        return None
    if not hasattr(_of_thread, "memory"):
        memory = np.empty(SCRATCH + ALIGNED, np.uint8)
        _of_thread.memory = memory[-memory.ctypes.data % ALIGNED :]
    return _of_thread.memory


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
    # PJRT takes arrays of any strides and transposes them in blocks: 2 to 10 times as fast as numpy
    return x if x.flags.c_contiguous else np.asarray(jax.device_put(x, jax.local_devices(backend="cpu")[0]))
