"""The scaffold's bits as 32-bit words: TensorRT's parser widens UINT8 weights to INT32, four times the bytes.

u8 [planes?,M,K/8] becomes int32 [planes?,M,K/32], the same bytes: column k of a row is bit k % 32 of word k / 32.
"""

import onnx
import onnx_graphsurgeon as gs

from .graph import ours, proto, view


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the tensors that are words now."""
    changed = []
    for node in ours(graph, "BinaryScaffoldMatMul"):
        bits = node.inputs[1]
        if (stored := proto(bits)) and stored.data_type == onnx.TensorProto.UINT8:
            *lead, width = bits.shape
            view(bits, onnx.TensorProto.INT32, [*lead, width // 4])
            changed.append(bits.name)
    return changed
