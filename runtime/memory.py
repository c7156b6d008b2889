"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import ctypes.util

_libc = ctypes.CDLL(ctypes.util.find_library("c"))


def trim() -> None:
    """Return what malloc keeps of freed blocks, where it is glibc's; 0.2 to 3 ms.

    Reading a prompt of a 1.3B model, or a tokenizer, leaves 10 to 20 MB that decoding never needs again.
    """
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
