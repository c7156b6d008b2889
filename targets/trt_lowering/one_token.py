"""One token a call: the graph without prefill, every dimension of tokens 1, and that token's logits.

What `native` makes of a scan is the recurrence of one step. A prompt is then read token by token.
"""

import onnx_graphsurgeon as gs

from .graph import node_named, uses
from .logits_at import SLICE


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the tensors that have one token now."""
    changed = []
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and {"T", "keep"} & set(tensor.shape or ()):
            tensor.shape = [1 if size in ("T", "keep") else size for size in tensor.shape]
            changed.append(tensor.name)
    if kept := node_named(graph, SLICE):  # the last token is the only one
        for user, index in uses(kept.outputs[0]):
            user.inputs[index] = kept.inputs[0]
    return changed
