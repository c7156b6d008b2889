"""GatedNormScaffoldAdd: GatedRMSNorm, the product, and the sum with the residual."""

from ..fusion import ADD, Step, fuse
from . import binary_scaffold_matmul, gated_rms_norm

OP = fuse(
    "GatedNormScaffoldAdd",
    (
        Step(gated_rms_norm.OP, "y z norm_weight", "normed", {"C": "K"}),
        Step(binary_scaffold_matmul.OP, "normed bits scale down down_scale up up_scale", "product"),
        Step(ADD, "residual product", "out"),
    ),
    outputs="out",
)
