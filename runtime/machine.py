"""Facts about this machine and this process, read from Linux; a fact that is not to be had is None."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dfssm.base.threads import default_threads
from dfssm.targets.ort_cpu import installed_library

PACKAGES = ("dfssm", "numpy", "onnxruntime", "tokenizers", "onnx", "torch", "polygraphy")


def machine() -> dict[str, str | int | None]:
    """CPU, cores and threads to use, memory in bytes, operating system."""
    return {
        "cpu": _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.processor() or platform.machine(),
        "cores": default_threads(),
        "memory_bytes": _kilobytes("MemTotal", "/proc/meminfo"),
        "memory_available_bytes": _kilobytes("MemAvailable", "/proc/meminfo"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    }


def packages() -> dict[str, str | None]:
    """Versions of what dfssm uses; None = not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def instruction_sets() -> list[str]:
    """The kernels' instruction sets that this CPU can run, slowest first; empty without the op library."""
    library = installed_library()
    return library.isas() if library else []


def process_memory() -> dict[str, int | None]:
    """Resident bytes of this process: now, its peak, and how it divides.

    "file": mapped from files and clean, such as weights: the kernel can drop it and read it again.
    "anonymous": heap, states, buffers.
    """
    rollup = "/proc/self/smaps_rollup"
    resident, anonymous = _kilobytes("Rss", rollup), _kilobytes("Anonymous", rollup)
    return {
        "rss_bytes": resident,
        "peak_rss_bytes": _kilobytes("VmHWM", "/proc/self/status"),
        "anonymous_bytes": anonymous,
        "file_bytes": None if resident is None or anonymous is None else resident - anonymous,
    }


def _first(pattern: str, path: str) -> str | None:
    try:
        found = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return found and found[1].strip()


def _kilobytes(key: str, path: str) -> int | None:
    """The line `key: n kB` of a file in /proc, in bytes."""
    number = _first(rf"^{key}:\s*(\d+) kB$", path)
    return None if number is None else int(number) * 1024
