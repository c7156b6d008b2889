"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Return what malloc keeps of freed blocks, where it is glibc's; 0.2 to 3 ms.

    Reading a prompt of a 1.3B model, or a tokenizer, leaves 10 to 20 MB that decoding never needs again.
    """
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim:
        malloc_trim(0)
