"""What libdfssm_trt.so has plugins for: the ops of `dfssm.opset`, and those fused of them (pass `fuse`)."""

from dfssm.opset.ops import FUSED, OPS
from dfssm.opset.schema import Op

__all__ = ["FUSED", "PLUGINS"]

PLUGINS: dict[str, Op] = OPS | FUSED
"""Every plugin's name -> its schema. In TensorRT `bits` are int32 words, see the pass `words`."""
