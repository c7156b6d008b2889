"""One token a call: the graph without prefill, every dimension of tokens 1.

What `native` makes of a scan is the recurrence of one step. A prompt is then read token by token.
"""

import onnx_graphsurgeon as gs

from .graph import node_named
from .last_token import SLICE


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the tensors that have one token now."""
    changed = []
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and "T" in (tensor.shape or ()):
            tensor.shape = [1 if size == "T" else size for size in tensor.shape]
            changed.append(tensor.name)
    last = node_named(graph, SLICE)
    if last is not None and isinstance(last.inputs[1], gs.Constant):  # the last token is the only one
        for user in list(last.outputs[0].outputs):
            user.inputs[user.inputs.index(last.outputs[0])] = last.inputs[0]
    return changed
