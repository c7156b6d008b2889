"""The ops of `ai.dfssm`, version 1: one module each, which holds all there is to know of it."""

from ..schema import Op
from . import (
    binary_scaffold_matmul,
    causal_conv1d_step,
    gated_rms_norm,
    int8_matmul,
    rms_norm,
    selective_scan_step,
)

_MODULES = (
    binary_scaffold_matmul, int8_matmul, causal_conv1d_step, selective_scan_step, gated_rms_norm, rms_norm
)  # fmt: skip

OPS: dict[str, Op] = {module.OP.name: module.OP for module in _MODULES}
"""Op name -> op, in the order of docs/ops.md."""
