"""ONNX models of one node as TensorRT's parser sees them: bits in int32 words, no function body, plugin attributes."""

import nodes
import numpy as np
import onnx
from onnx import helper
from plugins_trt import engines

from dfssm.opset import DOMAIN, OPS, VERSION
from dfssm.opset.cases import CASES, Case
from dfssm.opset.functions import IR_VERSION, ONNX_OPSET

PLUGIN = {"plugin_version": engines.version(), "plugin_namespace": ""}

CANONICAL = [case for case in CASES if not case.attributes.get("layout")]
"""The plugins read the canonical layout only."""

TOKENS = {"x", "y", "z", "dt", "B", "C", "residual"}
"""Inputs [B, T, columns]; of the other activations, the states, only the first dimension is free."""


def feeds(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs that a model of one node leaves to the caller."""
    return {name: value for name, value in inputs.items() if name in TOKENS | nodes.ACTIVATIONS}


def lowered_inputs(case: Case) -> dict[str, np.ndarray]:
    inputs = case.inputs()
    return inputs | ({"bits": inputs["bits"].view(np.int32)} if "bits" in inputs else {})


def lowered_attributes(case: Case) -> dict:
    attributes = OPS[case.op].resolve(case.attributes) | PLUGIN
    return attributes | ({"int8_state": int(case.state_dtype == "int8")} if case.op == "SelectiveScanStep" else {})


def node_model(case: Case, inputs: dict[str, np.ndarray] | None = None, **attributes) -> onnx.ModelProto:
    """The case's op alone, weights as initializers, batch and tokens open. `inputs` replace the lowered ones,
    `attributes` are overlaid on the lowered ones; one of value None is left out."""
    quantized = case.state_dtype == "int8"
    names = [t.name for t in OPS[case.op].outputs if not t.optional or quantized]
    made = dict(zip(names, nodes.expected_outputs(case), strict=True))
    return model_of(case.op, inputs or lowered_inputs(case), lowered_attributes(case) | attributes, made)


def model_of(
    op: str, inputs: dict[str, np.ndarray], attributes: dict, outputs: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """A model of one node: `inputs` by name, of which the weights are initializers, and `outputs` of these dtypes."""
    attributes = {k: v for k, v in attributes.items() if v is not None}
    node = helper.make_node(op, list(inputs), list(outputs), "/the/node", domain=DOMAIN, **attributes)

    def info(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
        free = ["batch", "tokens"][: 2 if name in TOKENS else 1]
        dims = [*free, *value.shape[len(free) :]]
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), dims)

    graph = helper.make_graph(
        [node],
        op,
        [info(name, value) for name, value in feeds(inputs).items()],
        [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), None) for k, v in outputs.items()],
        [onnx.numpy_helper.from_array(value, name) for name, value in inputs.items() if name not in feeds(inputs)],
    )
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
