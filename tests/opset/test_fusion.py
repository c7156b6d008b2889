"""The fused ops: their reference and their body against the ops one after another."""

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from plugins_trt.fused import CASES, FusedCase

from dfssm.base import DfssmError
from dfssm.opset import DOMAIN, VERSION
from dfssm.opset.functions import IR_VERSION, ONNX_OPSET, function_proto
from dfssm.opset.ops import FUSED
from dfssm.opset.reference import REFERENCES


def references(op: str, inputs: dict, **attributes) -> tuple[np.ndarray, ...]:
    made = REFERENCES[op](**inputs, **attributes)
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("op", FUSED)
def test_the_reference_is_the_chain(op):
    for case in CASES:
        if case.op != op or case.sizes["M"] > 1000:
            continue
        inputs = case.inputs()
        made = FUSED[op].reference(**inputs, **case.attributes)
        for a, b in zip(made, case.chain(inputs, references), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=case.id)


def body_model(case: FusedCase, inputs: dict) -> onnx.ModelProto:
    """The fused node, its body and those of its steps as functions."""
    attributes = FUSED[case.op].resolve(case.attributes)
    steps = [
        function_proto(step.op.name, **{name: attributes[name] for name in step.attributes})
        for step in FUSED[case.op].steps
        if step.op.domain
    ]
    node = helper.make_node(case.op, list(inputs), case.outputs, "fused", domain=DOMAIN, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in inputs.items()
    ]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None] * 3) for name in case.outputs]
    return helper.make_model(
        helper.make_graph([node], "fused", infos, outputs),
        functions=[*steps, function_proto(case.op, **attributes)],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
    )


@pytest.mark.parametrize("op", FUSED)
def test_the_body_is_the_reference(op):
    for case in CASES:
        if case.op != op or case.sizes["M"] > 1000:
            continue
        inputs = case.inputs()
        model = body_model(case, inputs)
        onnx.checker.check_model(model, full_check=True)
        case.check(ReferenceEvaluator(model).run(None, inputs), inputs)


def test_what_does_not_fit_is_named():
    case = next(case for case in CASES if case.op == "NormScaffoldConv")
    inputs, M, C = case.inputs(), case.sizes["M"], case.sizes["C"]
    with pytest.raises(DfssmError, match=rf"input 'state' has C={C}, expected x_start={M} \+ C <= M={M}$"):
        FUSED[case.op].reference(**inputs, x_start=M)
    with pytest.raises(DfssmError, match="NormScaffoldConv: unknown attribute 'xstart'; known: eps, planes, layout, "):
        FUSED[case.op].resolve({"xstart": 1})
