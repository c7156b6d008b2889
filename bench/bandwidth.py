"""What the memory gives: the bandwidth of reading, and of reading and writing in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dfssm.targets.ort_cpu import installed_library

REPEATS = 5


class Bandwidth:
    """Probes over `size` bytes by `threads` threads. With the size of the weights, as much of it is cached.

    A probe is the median of a few repetitions, in GB/s. "Read and write" counts both directions.
    """

    def __init__(self, size: int, threads: int):
        self._memory = np.ones(max(size, 1 << 24) // 8, np.int64)
        self._parts = np.array_split(self._memory, threads)
        self._pool = ThreadPoolExecutor(threads)
        self.threads = threads
        self._library = installed_library()  # without it NumPy measures, some percent lower
        self.read()  # the first time touches the pages

    def read(self) -> float:
        """GB/s of reading the memory once."""
        if self._library:
            size = self._memory.nbytes
            return float(np.median([self._library.read_bandwidth(size, self.threads) for _ in range(REPEATS)]))
        return self._rate(np.bitwise_or.reduce, self._memory.nbytes)

    def read_write(self) -> float:
        """GB/s of updating the memory in place."""
        return self._rate(lambda part: np.add(part, 1, out=part), 2 * self._memory.nbytes)

    def close(self) -> None:
        self._pool.shutdown()

    def _rate(self, work: Callable, moved: int) -> float:
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            list(self._pool.map(work, self._parts))
            seconds.append(time.perf_counter() - start)
        return moved / float(np.median(seconds)) / 1e9
