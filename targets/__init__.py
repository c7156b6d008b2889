"""Targets of `dfcompile`: one module a target, all with the interface `Target`."""

from importlib import import_module
from typing import cast

from dfssm.base import DfssmError

from .target import EngineTarget, Option, Probe, Target, has_engine

__all__ = ["TARGETS", "EngineTarget", "Option", "Probe", "Target", "get_target", "has_engine"]

_MODULES = {"ort-cpu": ".ort_cpu", "onnx": ".onnx", "trt": ".trt"}

TARGETS = tuple(_MODULES)
"""Names of the known targets, the first being the one to recommend."""


def get_target(name: str) -> Target:
    """The target `name`. Raises DfssmError listing the known ones."""
    if name not in _MODULES:
        raise DfssmError(f"unknown target '{name}': choose one of {', '.join(TARGETS)}")
    return cast(Target, import_module(_MODULES[name], __name__))
