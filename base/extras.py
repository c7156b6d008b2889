"""Packages that a command takes besides those of every install: what is missing, and the command that installs it.

What an extra of dfssm holds is read from the metadata of the installed dfssm, which come from pyproject.toml. Nothing
is imported to find out: it takes milliseconds, where importing torch takes seconds. Standard library only; its
importlib.metadata, 2.5 MB of parsers of e-mail and archives, is imported when it is asked: a process that only runs a
bundle asks nothing.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec

from .errors import DfssmError

Needs = Mapping[str, Sequence[str]]
"""Extra of dfssm -> those of its packages that are needed; "" -> packages to be installed by their own name."""

_MODULES = {"cuda-bindings": "cuda.bindings", "llama-cpp-python": "llama_cpp", "tensorrt-rtx-cu13": "tensorrt_rtx"}
"""Of the packages whose module has another name."""


def require(*needs: Needs) -> None:
    """Raises DfssmError that says what `lacking` says, if that is anything."""
    if message := lacking(*needs):
        raise DfssmError(message)


def lacking(*needs: Needs) -> str:
    """All packages that are missing or too old, and the command that mends it, in one line; "" where there are none."""
    absent, old, install = [], [], []
    for extra, package in dict.fromkeys((key, name) for need in needs for key in need for name in need[key]):
        found, least = _version(package), _least(extra, package)
        if found is None:
            absent.append(package)
        elif found and _release(found) < _release(least):
            old.append(f"{package} is {found}, {least} or newer is needed")
        else:
            continue
        install.append((extra, f"'{package}>={least}'" if least else package))
    if not install:
        return ""
    if absent:
        *others, last = dict.fromkeys(absent)
        old.insert(0, f"{', '.join(others)} and {last} are not installed" if others else f"{last} is not installed")
    extras = ",".join(dict.fromkeys(extra for extra, _ in install if extra))
    named = [f"'dfssm[{extras}]'"] if extras else []
    return f"{'; '.join(old)}: pip install {' '.join(named + [package for extra, package in install if not extra])}"


def _version(package: str) -> str | None:
    """The version of a package that can be imported, "" where it does not say; None where it cannot."""
    module = _MODULES.get(package, package.replace("-", "_"))
    if module in sys.modules:
        there = sys.modules[module] is not None
    else:
        try:
            spec = find_spec(module)
        except ImportError:  # there is not even what it is a part of
            spec = None
        there = spec is not None and spec.origin is not None  # a folder of that name has none, as W&B's of its logs
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package) if there else None
    except PackageNotFoundError:
        return ""


def _least(extra: str, package: str) -> str:
    """The oldest version that the extra declares, or any extra for a package by its own name; "" where none does."""
    declared = _declared()
    if extra:
        return declared[extra][package]
    return next((packages[package] for packages in declared.values() if package in packages), "")


@cache
def _declared() -> dict[str, dict[str, str]]:
    """Extra -> package -> its oldest version, from lines as `torch>=2.4; extra == "compile"`."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        lines = requires("dfssm") or []
    except PackageNotFoundError:
        raise DfssmError(
            "dfssm is on the path but not installed, which leaves its extras unknown: pip install it"
        ) from None
    declared: dict[str, dict[str, str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        least = re.search(r">=\s*([\d.]+)", requirement)
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        declared.setdefault(extra[1] if extra else "", {})[name] = least[1] if least else ""
    return declared


def _release(version: str) -> list[int]:
    """The numbers of a version without zeros at the end: 2.13.0+cpu is [2, 13]."""
    numbers = [int(number) for number in re.split(r"[^\d.]", version, maxsplit=1)[0].split(".") if number]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
