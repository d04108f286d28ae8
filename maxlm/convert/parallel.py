"""Tensors several at a time, as far as they fit into memory, and transposes that use the caches."""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np

THREADS = min(8, 2 * (os.cpu_count() or 1))
IN_FLIGHT = 128 << 20
"""Bytes of tensors that are worked on at a time, unless one is larger: that one is worked on alone."""
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


def transposed(x: np.ndarray) -> np.ndarray:
    """A matrix's transpose, contiguous; for large ones faster than numpy's copy, on several cores."""
    bits = x.view(f"u{x.dtype.itemsize}")
    if bits.nbytes < 1 << 20 or not bits.flags.c_contiguous:
        return np.ascontiguousarray(bits.T).view(x.dtype)
    out = np.empty(bits.shape[::-1], bits.dtype)
    step, num_bands = LINE // bits.itemsize, min(THREADS, os.cpu_count() or 1)
    edges = [len(bits) * i // num_bands // step * step for i in range(num_bands)] + [len(bits)]

    def move(first: int, last: int) -> None:
        for i in range(first, last, step):
            out[:, i : min(i + step, last)] = bits[i : min(i + step, last)].T

    bands = [threading.Thread(target=move, args=edges[i : i + 2]) for i in range(num_bands)]
    for band in bands:
        band.start()
    for band in bands:
        band.join()
    return out.view(x.dtype)
