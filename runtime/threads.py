"""How many threads a step gets when the caller does not say."""

from __future__ import annotations

import os
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """Physical cores this process may use, and no more than its container's CPU quota; at least 1.

    A second hyperthread of a core adds nothing to a step that is bound by memory, and makes every barrier
    wait longer.
    """
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
    else:
        allowed = set(range(os.cpu_count() or 1))
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota()))


def _siblings(cpu: int) -> str:
    """The hyperthreads of `cpu`'s core, as the kernel names them; without topology a CPU is a core."""
    try:
        return (CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int:
    """CPUs of the cgroup's quota, rounded up; a large number where there is none."""
    try:
        quota, period = QUOTA.read_text().split()
        return -(-int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return 1 << 16
