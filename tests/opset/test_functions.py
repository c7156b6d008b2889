"""The ONNX bodies against the references, over the whole case table, in two runtimes that are not ours."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from dfssm.opset.cases import CASES, Case, cases
from dfssm.opset.functions import IR_VERSION, ONNX_OPSET, function_proto, make_node
from dfssm.opset.reference import REFERENCES
from dfssm.opset.schema import DOMAIN, OPS, VERSION
from dfssm.opset.tolerances import op_tolerance


def single_node_model(case: Case) -> onnx.ModelProto:
    """The case's op alone, every dimension dynamic, with its function body."""
    op, inputs = OPS[case.op], case.inputs()
    outputs = [t for t in op.outputs if not t.optional or case.state_dtype == "int8"]

    def info(name, dtype, rank):
        return helper.make_tensor_value_info(name, dtype, [f"{name}_{axis}" for axis in range(rank)])

    state_type = helper.np_dtype_to_tensor_dtype(np.dtype(case.state_dtype))
    node = make_node(case.op, list(inputs), [t.name for t in outputs], "node", **case.attributes)
    graph = helper.make_graph(
        [node],
        case.op,
        [info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.ndim) for k, v in inputs.items()],
        [info(t.name, state_type if t.name == "new_state" else onnx.TensorProto.FLOAT, len(t.shape)) for t in outputs],
    )
    return helper.make_model(
        graph,
        functions=[function_proto(case.op, case.state_dtype, **case.attributes)],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
    )


def run_reference_evaluator(model, inputs):
    with np.errstate(over="ignore"):  # exp(-z) of a saturated gate is meant to overflow
        return ReferenceEvaluator(model).run(None, inputs)


def run_stock_onnxruntime(model, inputs):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("run", [run_reference_evaluator, run_stock_onnxruntime])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_body_is_the_reference(case, run):
    inputs = case.inputs()
    expected = REFERENCES[case.op](**inputs, **case.attributes)
    expected = expected if isinstance(expected, tuple) else (expected,)
    actual = run(single_node_model(case), inputs)
    sizes = OPS[case.op].check(inputs, case.attributes) | {"state": case.state_dtype}
    assert len(actual) == len(expected)
    for spec, got, wanted in zip(OPS[case.op].outputs, actual, expected, strict=False):
        assert got.dtype == wanted.dtype
        op_tolerance(case.op, sizes, spec.name).check(got, wanted, spec.name)


ONE_OF_EACH_BODY = {
    function_proto(case.op, case.state_dtype, **case.attributes).SerializeToString(): case for case in CASES
}


@pytest.mark.parametrize("case", ONE_OF_EACH_BODY.values(), ids=lambda c: c.id)
def test_bodies_pass_the_full_checker_and_strict_inference(case):
    model = single_node_model(case)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)


def test_tolerances_reject_a_wrong_result():
    case = cases("BinaryScaffoldMatMul")[3]
    inputs = case.inputs()
    expected = REFERENCES[case.op](**inputs, **case.attributes)
    flipped = inputs | {"bits": inputs["bits"] ^ np.uint8([1] + [0] * (inputs["bits"].shape[1] - 1))}
    actual = REFERENCES[case.op](**flipped, **case.attributes)
    with pytest.raises(AssertionError, match="relative error"):
        op_tolerance(case.op, OPS[case.op].check(inputs)).check(actual, expected)
