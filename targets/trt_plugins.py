"""What libdfssm_trt.so has plugins for: the ops of `dfssm.opset`, and chains of them that run as one (pass `fuse`)."""

from dataclasses import replace

from dfssm.opset import OPS
from dfssm.opset.schema import Attribute, Op, Tensor, tensor


def _inputs(op: str, **names: str) -> tuple[Tensor, ...]:
    """The inputs of `op` that `names` has, under its names there, in its order."""
    known = {tensor.name: tensor for tensor in OPS[op].inputs}
    return tuple(replace(known[old], name=new) for old, new in names.items())


def _attributes(op: str, *names: str) -> tuple[Attribute, ...]:
    return tuple(attribute for attribute in OPS[op].attributes if attribute.name in names)


# As the pass `words` leaves them.
_SCAFFOLD = (
    tensor("bits", "int32", "planes M K / 32"),
    *(tensor for tensor in OPS["BinaryScaffoldMatMul"].inputs if tensor.name not in ("x", "bits")),
)
_OF_SCAFFOLD = _attributes("BinaryScaffoldMatMul", "planes", "layout")

_ALL = (
    Op(
        "NormScaffoldConv",
        inputs=(
            tensor("x", "float32", "B T K"),
            tensor("norm_weight", "float32", "K"),
            *_SCAFFOLD,
            *_inputs("CausalConv1dStep", state="state", weight="conv_weight", bias="conv_bias"),
        ),
        outputs=(tensor("y", "float32", "B T M"), OPS["CausalConv1dStep"].outputs[1]),
        attributes=(
            *_attributes("RMSNorm", "eps"),
            *_OF_SCAFFOLD,
            *_attributes("CausalConv1dStep", "activation"),
            Attribute("x_start", 0, least=0),
        ),
    ),
    Op(
        "GatedNormScaffoldAdd",
        inputs=(
            tensor("y", "float32", "B T K"),
            tensor("z", "float32", "B T K", start="z_start"),
            tensor("norm_weight", "float32", "K"),
            *_SCAFFOLD,
            tensor("residual", "float32", "B T M"),
        ),
        outputs=(tensor("out", "float32", "B T M"),),
        attributes=(*_attributes("GatedRMSNorm", "eps", "groups", "z_start"), *_OF_SCAFFOLD),
    ),
)

FUSED: dict[str, Op] = {op.name: op for op in _ALL}
"""Name -> schema. NormScaffoldConv: RMSNorm, BinaryScaffoldMatMul, and CausalConv1dStep over the product's columns from
`x_start` on, in their place. GatedNormScaffoldAdd: GatedRMSNorm, BinaryScaffoldMatMul, and the sum with `residual`.
"""

PLUGINS: dict[str, Op] = OPS | FUSED
"""Every plugin's name -> its schema."""
