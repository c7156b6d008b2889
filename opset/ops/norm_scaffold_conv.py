"""NormScaffoldConv: RMSNorm, the product, and the convolution of its columns from `x_start` on, in their place."""

from ..fusion import Splice, Step, fuse
from . import binary_scaffold_matmul, causal_conv1d_step, rms_norm

OP = fuse(
    "NormScaffoldConv",
    (
        Step(rms_norm.OP, "x norm_weight", "normed", {"C": "K"}),
        Step(binary_scaffold_matmul.OP, "normed bits scale down down_scale up up_scale", "product"),
        Step(causal_conv1d_step.OP, "product state conv_weight conv_bias", "channels new_state"),
    ),
    outputs="y new_state",
    splice=Splice("y", base="product", part="channels", start="x_start"),
)
