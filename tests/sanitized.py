"""A pytest plugin (-p sanitized): the native part is that of build/sanitizers/, which `make test-sanitizers` builds."""

import importlib.util
import sys
from pathlib import Path

import dfssm
from dfssm.targets import ort_cpu

BUILD = Path(__file__).parents[1] / "build/sanitizers"

(_path,) = BUILD.glob("_native*.so")
_spec = importlib.util.spec_from_file_location("dfssm._native", _path)
dfssm._native = sys.modules["dfssm._native"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(dfssm._native)
ort_cpu.find_library = lambda folder=None: BUILD / ort_cpu.LIBRARY
