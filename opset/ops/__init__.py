"""The ops of `ai.dfssm`, version 1, and those fused of them: one module each, which holds all there is to know.

The tables are made, and the modules imported, when they are first asked for: a program that runs bundles needs only
the names.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..fusion import FusedOp
    from ..schema import Op

    OPS: dict[str, Op]
    DEFERRED_OPS: dict[str, Op]
    ALL_OPS: dict[str, Op]
    FUSED: dict[str, FusedOp]

IN_PLACE_OF = {"CausalConv1dStep": "DeferredConv1dStep", "SelectiveScanStep": "DeferredScanStep"}
"""Op -> the one that a graph with a deferred state has in its place."""

MODULES = {
    "OPS": {  # in the order of docs/ops.md
        "BinaryScaffoldMatMul": "binary_scaffold_matmul",
        "Int8MatMul": "int8_matmul",
        "CausalConv1dStep": "causal_conv1d_step",
        "SelectiveScanStep": "selective_scan_step",
        "GatedRMSNorm": "gated_rms_norm",
        "RMSNorm": "rms_norm",
    },
    "DEFERRED_OPS": {  # of a deferred state; the CPU's only
        "DeferredConv1dStep": "deferred_conv1d_step",
        "DeferredScanStep": "deferred_scan_step",
    },
    "FUSED": {  # chains of those and of ONNX's Add; no model file has them
        "NormScaffoldConv": "norm_scaffold_conv",
        "GatedNormScaffoldAdd": "gated_norm_scaffold_add",
    },
}
"""Op name -> its module, of each of the tables."""

ALL_NAMES = MODULES["OPS"].keys() | MODULES["DEFERRED_OPS"].keys()
"""Of ALL_OPS, which are those that a model file may have: OPS and DEFERRED_OPS."""


def __getattr__(name: str) -> object:
    tables = ("OPS", "DEFERRED_OPS") if name == "ALL_OPS" else (name,)
    if not set(tables) <= MODULES.keys():
        raise AttributeError(f"module '{__name__}' has no attribute {name!r}")
    found = {op: import_module(f".{module}", __name__).OP for of in tables for op, module in MODULES[of].items()}
    globals()[name] = found
    return found
