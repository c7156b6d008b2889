"""The ONNX bodies against the references, over the whole case table, in two runtimes that are not ours."""

import numpy as np
import onnx
import onnxruntime
import pytest
from each import check_each
from nodes import ALL_OPS, check_outputs, expected_outputs, node_model
from onnx.reference import ReferenceEvaluator

from dfssm.opset.cases import CASES, DEFERRED_CASES, cases
from dfssm.opset.functions import function_proto


def run_reference_evaluator(model, inputs):
    with np.errstate(over="ignore"):  # exp(-z) of a saturated gate is meant to overflow
        return ReferenceEvaluator(model).run(None, inputs)


def run_stock_onnxruntime(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("run", [run_reference_evaluator, run_stock_onnxruntime])
@pytest.mark.parametrize("op", ALL_OPS)
def test_body_is_the_reference(op, run):
    check_each(cases(op), lambda case: check_outputs(case, run(node_model(case, body=True), case.inputs())))


ONE_OF_EACH_BODY = {
    function_proto(case.op, case.state_dtype, **case.attributes).SerializeToString(): case
    for case in CASES + DEFERRED_CASES
}


@pytest.mark.parametrize("case", ONE_OF_EACH_BODY.values(), ids=lambda c: c.id)
def test_bodies_pass_the_full_checker_and_strict_inference(case):
    model = node_model(case, body=True)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def test_tolerances_reject_a_wrong_result():
    case = cases("BinaryScaffoldMatMul")[3]
    inputs = case.inputs()
    flipped = inputs | {"bits": inputs["bits"] ^ np.uint8([1] + [0] * (inputs["bits"].shape[1] - 1))}
    with pytest.raises(AssertionError, match="relative error"):
        check_outputs(case, expected_outputs(case, flipped))
