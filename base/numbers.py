"""Numbers that a caller gives, of the right kind and within their bounds; times for people. Standard library only."""

import math
import os
from numbers import Integral, Real

from .errors import DfssmError

_BITS = 14_000  # Python prints no number of more than 4,300 digits


def require_whole(name: str, value: object, least: int = 0, most: float = math.inf, meaning: str = "") -> None:
    """DfssmError unless `value` is a whole number from `least` to `most`; `meaning` explains one."""
    _require(name, value, isinstance(value, Integral), "a whole number", least, most, meaning)


def require_real(name: str, value: object, least: float, most: float, meaning: str = "") -> None:
    """DfssmError unless `value` is a number from `least` to `most`; NaN is none."""
    _require(name, value, isinstance(value, Real), "a number", least, most, meaning)


def require_memory(what: str, size: int, remedy: str) -> None:
    """DfssmError where this machine has fewer than `size` bytes: to ask for them would fail, or end the process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise DfssmError(f"{what} takes {size / 1e6:,.0f} MB, this machine has {memory / 1e6:,.0f} MB: {remedy}")


def duration(seconds: float) -> str:
    """42 s, 5 min 3 s, 6 h 12 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _require(name: str, value: object, is_kind: bool, kind: str, least: float, most: float, meaning: str) -> None:
    endless = isinstance(value, int) and value.bit_length() > _BITS
    if endless or not is_kind or isinstance(value, bool) or not least <= value <= most:  # type: ignore[operator]
        bounds = f">= {least}" if most == math.inf else f"from {least} to {most:,}"
        found = "has over 4,000 digits" if endless else f"is {value!r}"
        raise DfssmError(f"{name} {found}: give {kind} {bounds}{meaning and f' ({meaning})'}")
