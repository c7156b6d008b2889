"""The ops of `ai.dfssm`, version 1, and those fused of them: one module each, which holds all there is to know."""

from ..fusion import FusedOp
from ..schema import Op
from . import (
    binary_scaffold_matmul,
    causal_conv1d_step,
    gated_norm_scaffold_add,
    gated_rms_norm,
    int8_matmul,
    norm_scaffold_conv,
    rms_norm,
    selective_scan_step,
)

_OPS = (
    binary_scaffold_matmul, int8_matmul, causal_conv1d_step, selective_scan_step, gated_rms_norm, rms_norm
)  # fmt: skip

OPS: dict[str, Op] = {module.OP.name: module.OP for module in _OPS}
"""Op name -> op, in the order of docs/ops.md."""

FUSED: dict[str, FusedOp] = {module.OP.name: module.OP for module in (norm_scaffold_conv, gated_norm_scaffold_add)}
"""Name -> op that is a chain of those and of ONNX's Add; no model file has them."""
