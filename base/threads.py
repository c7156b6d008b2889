"""How many threads a step, or another work on all cores, gets when the caller does not say."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
PROC = Path("/proc/self")

# What a mount of control groups is: its root within the hierarchy, its place, and its kind and options (proc(5)).
_MOUNT = re.compile(r"^\d+ \d+ \S+ (\S+) (\S+) .*? - (cgroup2?) \S+ (\S+)", re.MULTILINE)


def default_threads() -> int:
    """Physical cores this process may use, and no more than its container's CPU quota; at least 1.

    A second hyperthread of a core adds nothing to a step that is bound by memory, and makes every barrier
    wait longer.
    """
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min([len(cores), *map(math.ceil, _quotas())]))


def _siblings(cpu: int) -> str:
    """The hyperthreads of `cpu`'s core, as the kernel names them; without topology a CPU is a core."""
    try:
        return (CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quotas() -> Iterator[float]:
    """CPUs of each quota that holds for this process: of its control group and of those around it, version 1 or 2."""
    try:
        mounts, groups = (PROC / "mountinfo").read_text(), (PROC / "cgroup").read_text().splitlines()
    except OSError:
        return
    paths = {
        controller: path for _, names, path in (g.split(":", 2) for g in groups) for controller in names.split(",")
    }
    for root, place, kind, options in _MOUNT.findall(mounts):
        controller = "" if kind == "cgroup2" else "cpu"
        if controller not in paths or (controller and controller not in options.split(",")):
            continue
        # In a container the path may be that of the host: then what is mounted is the group itself.
        top = Path(place)
        inside = Path(paths[controller])
        group = top / inside.relative_to(root) if inside.is_relative_to(root) else top
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (quota := _quota(folder)):
                yield quota


def _quota(group: Path) -> float:
    """CPUs of one group's quota; 0 where it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(0.0, int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max": no limit
        return 0.0
