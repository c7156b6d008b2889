"""Logits of the last token only.

The step graph lets its caller choose how many (`logits_to_keep`), by a slice whose size depends on a value: TensorRT
would compute that on the host at every step, and would allocate logits for all tokens of the longest prompt. Nobody
generating text wants more than the last, so that is what an engine gives.
"""

import numpy as np
import onnx_graphsurgeon as gs

from .graph import node_named

SLICE = "/keep/slice"


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the tensors whose tokens became one."""
    node = node_named(graph, SLICE)
    if node is None or isinstance(node.inputs[1], gs.Constant):
        return []
    node.inputs[1] = gs.Constant("slice.start", np.array([-1]))
    changed = []
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and "keep" in (tensor.shape or ()):
            tensor.shape = [1 if size == "keep" else size for size in tensor.shape]
            changed.append(tensor.name)
    return changed
