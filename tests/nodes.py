"""ONNX models of one `ai.dfssm` node, the unit under test of every backend that runs ONNX."""

import numpy as np
import onnx
import onnxruntime
from extremes import same
from onnx import helper

from dfssm.opset import DOMAIN, VERSION
from dfssm.opset.cases import Case
from dfssm.opset.functions import IR_VERSION, ONNX_OPSET, function_proto, make_node
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.reference import REFERENCES

STATES = {"state", "state_scale", "window", "pending_x", "pending_B", "pending_decay", "pending_count"}
ACTIVATIONS = {"x", "y", "z", "dt", "B", "C"} | STATES
"""Inputs that change from call to call; all others are weights."""


def expected_outputs(case: Case, inputs: dict | None = None) -> list[np.ndarray]:
    """What the reference makes of the case's inputs."""
    expected = REFERENCES[case.op](**(inputs or case.inputs()), **case.attributes)
    return list(expected) if isinstance(expected, tuple) else [expected]


def output_names(case: Case) -> list[str]:
    """The outputs that the case's node has: the scale of a state only where the state is int8."""
    return [t.name for t in ALL_OPS[case.op].outputs if not t.optional or case.state_dtype == "int8"]


def feeds(inputs: dict) -> dict:
    """The inputs that `node_model(constants=True)` leaves to the caller."""
    return {name: value for name, value in inputs.items() if name in ACTIVATIONS}


def check_outputs(case: Case, actual: list[np.ndarray], inputs: dict | None = None, finite: bool = True) -> None:
    """AssertionError unless `actual` is the reference's result within the op's tolerance. `finite`: all of that must be
    finite, too.
    """
    inputs = inputs or case.inputs()
    expected = expected_outputs(case, inputs)
    sizes = ALL_OPS[case.op].check(inputs, case.attributes) | {"state": case.state_dtype}
    assert len(actual) == len(expected)
    for spec, got, wanted in zip(ALL_OPS[case.op].outputs, actual, expected, strict=False):
        assert got.dtype == wanted.dtype
        assert np.isfinite(wanted).all() or not finite, f"the reference's {spec.name} is not finite"
        same(got, wanted, ALL_OPS[case.op].tolerance(sizes, spec.name), spec.name)


def node_model(case: Case, constants=False, body=False, types=True, attributes=None) -> onnx.ModelProto:
    """The case's op alone, every dimension of its inputs a symbol.

    `constants`: the weights are initializers, as in a real model, else inputs. `body`: the op's function
    body is there too. `types`: outputs are declared, else the runtime must infer them. `attributes`
    replace the case's, unchecked.
    """
    inputs, names = case.inputs(), output_names(case)
    if attributes is None:
        node = make_node(case.op, list(inputs), names, "/the/node", **case.attributes)
    else:
        node = helper.make_node(case.op, list(inputs), names, "/the/node", domain=DOMAIN, **attributes)
    fed = feeds(inputs) if constants else inputs

    def info(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
        dims = [f"{name}_{axis}" for axis in range(value.ndim)]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), dims)

    outputs = dict(zip(names, expected_outputs(case), strict=True)) if types else {}
    graph = helper.make_graph(
        [node],
        case.op,
        [info(name, value) for name, value in fed.items()],
        [info(name, outputs[name]) if types else onnx.ValueInfoProto(name=name) for name in names],
        [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items() if name not in fed],
    )
    return helper.make_model(
        graph,
        functions=[function_proto(case.op, case.state_dtype, **case.attributes)] if body else [],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
    )


def check_state_in_place(case: Case, session: onnxruntime.InferenceSession) -> None:
    """Two calls on bound buffers, the state's input and output one and the same, each against the reference."""
    inputs = case.inputs()
    state = {t.over: inputs[t.over].copy() for t in ALL_OPS[case.op].outputs if t.over in inputs}
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value.copy()) for name, value in state.items()}
    binding = session.io_binding()
    for name, value in feeds(inputs).items():
        if name not in state:
            binding.bind_cpu_input(name, value)
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"new_{name}", value)
    binding.bind_output("y", "cpu")
    for _ in range(2):
        session.run_with_iobinding(binding)
        outputs = [binding.get_outputs()[-1].numpy(), *(value.numpy() for value in values.values())]
        check_outputs(case, outputs, inputs | state)
        state = {name: value.numpy().copy() for name, value in values.items()}
