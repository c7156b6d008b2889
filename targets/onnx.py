"""Target `onnx`: the portable step graph. Canonical bits, every op with its body in standard ops, no library of ours.

It runs wherever ONNX runs, through the function bodies: exact, and slow, since they unpack the bits at every step.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dfssm.opset.schema import LAYOUT_CANONICAL

from .bundle import DATA, MODEL
from .files import Files
from .session import create_session, session_options
from .target import Option, Probe, Progress, Tensors

if TYPE_CHECKING:
    import onnxruntime

NAME = "onnx"
SUMMARY = "portable, slow"
LAYOUTS = (LAYOUT_CANONICAL,)

# What every ONNX backend has; nobody picks this target for its speed.
DEFAULT_STATE_DTYPE = "fp32"

# A step of 1.3B takes half a minute through the bodies. Prefill, one call, is verified over as many tokens as ever.
VERIFY_STEPS = 1
VERIFIED_BY = (NAME,)
OPTIONS: tuple[Option, ...] = ()

IS_ENGINE = False
FILES = (MODEL, DATA)
WEIGHTS = DATA
LIBRARY = ""
DEFERRED = True
IN_PLACE = False  # a function body in stock ops reads what it has written
EXACT = False  # sums are added up as ONNX Runtime likes on this CPU


def probe(**options: Any) -> Probe:
    """Always usable: ONNX Runtime is a dependency of dfssm."""
    import onnxruntime

    return Probe(NAME, {"onnxruntime": onnxruntime.__version__})


def why_not_run() -> str:
    """As `probe` says."""
    return ""


def kernels(own: Path | None = None) -> str:
    """ONNX Runtime."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} on {platform.machine()}"


def machine(**options: Any) -> None:
    """Any."""


def triton_backend(**options: Any) -> str:
    """That of ONNX Runtime."""
    return "onnxruntime"


def layout(**options: Any) -> int:
    """The canonical one, which model.pt holds."""
    return LAYOUT_CANONICAL


def lower(tensors: Tensors, layout: int) -> Tensors:
    """The tensors as they are."""
    return tensors


def build(folder: Path, progress: Progress | None = None, **options: Any) -> tuple[list[str], dict[str, Any]]:
    """Nothing to add to the graph."""
    return [MODEL, DATA], {}


def open_session(
    folder: str | Path | Files, threads: int = 0, model: str = MODEL, own: Path | None = None, mmap: bool = True
) -> onnxruntime.InferenceSession:
    """The graph `model` of `folder` in stock ONNX Runtime. Raises DfssmError when it does not open."""
    # Folding would unpack every scaffold to a byte a weight and hold that, 5 GB for 1.3B where 2 GB do; steps gain
    # little by it.
    return create_session(folder, model, session_options(threads), mmap, disabled_optimizers=["ConstantFolding"])
