"""The memory of a training on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

# Of glibc's malloc.h, and what its own adaptation comes to with tensors of this size.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MOST = 1 << 25


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """In the `with` block, memory that is freed stays with the process, for the next tensor.

    Otherwise glibc returns that of large tensors at once, and the kernel clears page after page for the next one: an
    eighth of a step's processor time. Other C libraries are left alone.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 1 << 16)
        mallopt(_MMAP_THRESHOLD, _MOST)
        mallopt(_TRIM_THRESHOLD, 2 * _MOST)
        trim(0)
