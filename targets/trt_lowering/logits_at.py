"""Logits of the tokens that the caller names: an input more, `logits_at` i64[K], their places in the call. Or those of
the last token only, without such an input.

The step graph lets its caller choose the last so many (`logits_to_keep`), by a slice whose size depends on a value.
TensorRT would compute that on the host at every step, and cannot bound it: of one token it would take the last 64. A
gather takes places from device memory, and K has bounds of its own in each profile: one in a step, and so many in a
prompt that its logits need no room for all of its tokens.
"""

import numpy as np
import onnx_graphsurgeon as gs

from dfssm.targets.trt_build import LOGITS_AT

from .graph import node_named

SLICE = "/keep/slice"


def run(graph: gs.Graph, only_last: bool = False) -> list[str]:
    """Returns the name of the node that chooses the tokens."""
    node = node_named(graph, SLICE)
    if node is None or isinstance(node.inputs[1], gs.Constant):
        return []
    if only_last:
        node.inputs[1] = gs.Constant("slice.start", np.array([-1]))
        return [node.name]
    places = gs.Variable(LOGITS_AT, np.int64, ["keep"])
    graph.inputs.append(places)
    node.op, node.name, node.attrs, node.inputs = "Gather", "/keep/gather", {"axis": 1}, [node.inputs[0], places]
    return [node.name]
