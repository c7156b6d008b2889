"""What libdfssm_ort_cpu.so says of this CPU, asked through its C functions (plugins/ort_cpu/machine.cpp)."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dfssm.base import DfssmError


class CpuLibrary:
    """The op library in the file `path`. Raises DfssmError for a file that is none, or an older one."""

    def __init__(self, path: Path):
        try:
            library = ctypes.CDLL(str(path.resolve()))
            self._isas, self._isa, self._error = (
                _function(library, f"dfssm_cpu_{name}", ctypes.c_char_p) for name in ("isas", "isa", "error")
            )
            self._patterns = _function(library, "dfssm_memory_patterns", ctypes.c_char_p)
            self._bandwidth = _function(
                library, "dfssm_memory_bandwidth", ctypes.c_double, ctypes.c_int64, *3 * [ctypes.c_int]
            )
            self._clock = _function(library, "dfssm_cpu_clock", ctypes.c_double)
            self._time_ops = _function(library, "dfssm_time_ops", None, ctypes.c_int)
            self._op_seconds = _function(library, "dfssm_op_seconds", ctypes.c_double, ctypes.c_char_p)
        except OSError as error:
            raise DfssmError(f"{path} does not load: {error}") from None
        except AttributeError:
            raise DfssmError(f"{path} is not the op library of this dfssm: reinstall dfssm") from None

    def isas(self) -> list[str]:
        """Instruction sets whose kernels this CPU can run, the plainest first."""
        isas: bytes = self._isas()
        return isas.decode().split()

    def isa(self) -> str:
        """The one in use: $DFSSM_ISA, else the best. Raises DfssmError when that names none of `isas`."""
        name: bytes | None = self._isa()
        if name is None:
            raise DfssmError(f"{self._error().decode()}; unset DFSSM_ISA or name one of them")
        return name.decode()

    def memory_patterns(self) -> list[str]:
        """Ways to go through memory, by the numbers that `memory_bandwidth` takes."""
        patterns: bytes = self._patterns()
        return patterns.decode().split(";")

    def memory_bandwidth(self, size: int, threads: int, pattern: int, writes: bool = False) -> float:
        """GB/s of one pass over `size` bytes of memory (at least 1 MiB) with `threads` threads: reading, or updating in
        place, both directions counted.
        """
        rate: float = self._bandwidth(size, threads, pattern, writes)
        if rate <= 0:
            raise DfssmError(
                f"{size} bytes of memory could not be read with {threads} threads: free some, or give less"
            )
        return rate

    def clock(self) -> float:
        """Cycles a second of a core, now."""
        cycles: float = self._clock()
        return cycles

    def time_ops(self, wanted: bool) -> None:
        """From now on count the time of each op, from 0; or no longer. Not while a session runs."""
        self._time_ops(wanted)

    def op_seconds(self, op: str) -> float:
        """Seconds that all nodes of `op`, in all sessions, took while they were counted."""
        seconds: float = self._op_seconds(op.encode())
        return seconds


def _function(library: ctypes.CDLL, name: str, result: type | None, *arguments: type) -> Callable[..., Any]:
    function = library[name]  # by item: an object of its own, whose types nobody else sets
    function.restype, function.argtypes = result, arguments
    return function
