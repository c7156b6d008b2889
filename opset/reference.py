"""The arithmetic of the `ai.dfssm` ops, written as plainly as NumPy allows. Everything else is compared with this.

Each op's stands in its module of `ops/`, what they share in `arithmetic.py`; here are all of them by name. Activations,
scales and sums of the float parts are fp32; integer sums are int32 and exact. Every function checks its arguments and
raises DfssmError naming op, input, expected and got.
"""

from .arithmetic import HALF_MAX, TINY, columns_ref, half_ref, integer_matmul_ref, quantize_activations_ref, silu_ref
from .ops import ALL_OPS
from .ops.binary_scaffold_matmul import binary_scaffold_matmul_ref
from .ops.causal_conv1d_step import causal_conv1d_step_ref
from .ops.deferred_conv1d_step import deferred_conv1d_step_ref
from .ops.deferred_scan_step import deferred_scan_step_ref
from .ops.gated_rms_norm import gated_rms_norm_ref
from .ops.int8_matmul import int8_matmul_ref
from .ops.rms_norm import rms_norm_ref
from .ops.selective_scan_step import quantize_state_ref, selective_scan_step_ref, softplus_ref

__all__ = [
    "HALF_MAX",
    "REFERENCES",
    "TINY",
    "binary_scaffold_matmul_ref",
    "causal_conv1d_step_ref",
    "columns_ref",
    "deferred_conv1d_step_ref",
    "deferred_scan_step_ref",
    "gated_rms_norm_ref",
    "half_ref",
    "int8_matmul_ref",
    "integer_matmul_ref",
    "quantize_activations_ref",
    "quantize_state_ref",
    "rms_norm_ref",
    "selective_scan_step_ref",
    "silu_ref",
    "softplus_ref",
]

REFERENCES = {name: op.reference for name, op in ALL_OPS.items()}
"""Op name -> reference; call it with the op's input names and attributes as keywords."""
