"""What the memory gives: the bandwidth of reading, and of reading and writing in place, each by its best pattern."""

from __future__ import annotations

import numpy as np

from dfssm.targets.cpu_library import CpuLibrary
from dfssm.targets.ort_cpu import find_library


class Probes:
    """Figures of one kind of probe, f64[P] a time, and which of its P patterns they make the best.

    The best is the pattern of the highest median: the highest single figures would be those of lucky moments.
    """

    def __init__(self, patterns: list[str]):
        self._patterns = patterns
        self._rounds: list[np.ndarray] = []

    def add(self, *probes: np.ndarray) -> None:
        """A round's probes, of which the mean counts."""
        self._rounds.append(np.mean(probes, axis=0))

    @property
    def best(self) -> int:
        return int(np.median(self._rounds, axis=0).argmax())

    @property
    def pattern(self) -> str:
        return self._patterns[self.best]

    @property
    def rates(self) -> np.ndarray:
        """GB/s of the best pattern, f64[rounds]."""
        return np.array(self._rounds)[:, self.best]


class Bandwidth:
    """Probes over `size` bytes by `threads` threads. With the size of the weights, as much of it is cached.

    A probe passes once over the memory with every pattern: one stream, four far from each other or eight neighbouring
    pages, with and without software prefetch, pages of 4 kB and of 2 MB, the widest loads of this CPU.
    """

    def __init__(self, size: int, threads: int):
        self._size, self._threads = max(size, 1 << 24), threads
        self._library = CpuLibrary(find_library())
        self.patterns = self._library.memory_patterns()
        self.read()  # the first time touches the pages

    def read(self) -> np.ndarray:
        """GB/s of reading the memory once, f64[P]."""
        return self._probe(writes=False)

    def read_write(self) -> np.ndarray:
        """GB/s of updating the memory in place, both directions counted, f64[P]."""
        return self._probe(writes=True)

    def _probe(self, writes: bool) -> np.ndarray:
        patterns = range(len(self.patterns))
        return np.array([self._library.memory_bandwidth(self._size, self._threads, p, writes) for p in patterns])

    def close(self) -> None:
        """Nothing to do: the library keeps the memory for the next probe."""
