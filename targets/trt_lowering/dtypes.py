"""State the dtype of every tensor: in a strongly typed network TensorRT takes them from the graph, and from it alone.

Of the tensors that earlier passes made, they follow from the nodes by ONNX's inference; nodes of our domain have
theirs in the schema, and what the graph states for them is checked against it.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from dfssm.targets.trt_plugins import PLUGINS

from .graph import ours
from .half import is_activation


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the tensors that got a dtype. ValueError for one that has none, or the wrong one."""
    inferred = onnx.shape_inference.infer_shapes(gs.export_onnx(graph.cleanup().toposort()), strict_mode=True)
    types = {value.name: value for value in inferred.graph.value_info}
    changed = []
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Variable) and (tensor.dtype is None or tensor.shape is None):
            if name not in types:
                raise ValueError(f"the dtype of {name} does not follow from the nodes before it")
            known = gs.import_onnx(_one_value(types[name])).inputs[0]
            tensor.dtype, tensor.shape = known.dtype, known.shape
            changed.append(name)
    for node in ours(graph):
        for spec, tensor in zip(PLUGINS[node.op].outputs, node.outputs, strict=False):
            allowed = (*spec.dtypes, "float16") if is_activation(spec) else spec.dtypes
            if np.dtype(tensor.dtype).name not in allowed:
                raise ValueError(f"{node.name}: output '{spec.name}' is {tensor.dtype}, expected {allowed}")
    return changed


def _one_value(value: onnx.ValueInfoProto) -> onnx.ModelProto:
    """A model that is nothing but `value`: graphsurgeon reads types as part of one only."""
    return onnx.helper.make_model(onnx.helper.make_graph([], "value", [value], []))
