"""Rows of the embedding without an int8 Gather.

TensorRT takes an INT8 constant as something quantised, fit for a DequantizeLinear or a plugin and nothing else. So the
table i8 [V,D] becomes words int32 [V,D/4], the same bytes; a row of words is gathered, and its bytes are taken apart
with arithmetic, for TensorRT has no BitShift and no BitwiseAnd. Every step is exact. A tied head gets the same words,
one constant in the engine: the Int8MatMul plugin reads them as the bytes they are.
"""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from .graph import Emitter, read, store, take_out, view

FLOAT, INT32 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT32
TOP = 2**24


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the tables that are words now."""
    changed = []
    for gather in [node for node in graph.nodes if node.op == "Gather"]:
        table = gather.inputs[0]
        if not isinstance(table, gs.Constant) or table.dtype != np.int8:
            continue
        rows, columns = table.shape
        if any(user.op == "DequantizeLinear" for user in table.outputs):
            # A native head needs it as int8, and two tensors over the same bytes of a file the parser refuses.
            payload = np.ascontiguousarray(read(table)).data
            table = gather.inputs[0] = store(f"{table.name}.words", payload, INT32, [rows, columns // 4], table)
        else:
            view(table, INT32, [rows, columns // 4])
        words = gather.outputs[0]
        (cast,) = words.outputs
        words.dtype, words.shape = np.int32, [*words.shape[:-1], columns // 4]
        (codes,) = take_out(cast)
        _take_apart(Emitter(graph, cast.name), words, codes, columns)
        changed.append(table.name)
    return changed


def _take_apart(emit: Emitter, words: gs.Variable, codes: gs.Variable, columns: int) -> None:
    """Write to `codes` [B,T,D] in fp32 the int8 numbers that lie in `words` [B,T,D/4].

    A word is b0 + 256 b1 + 65536 b2 + 2^24 b3 with b3 signed and the others not. It does not fit in fp32, so one
    integer division splits off the top first; where that truncates a negative word upwards, `borrow` is -1, else 0.
    """
    quotient = emit("Div", words, np.int32(TOP))
    rest = emit("Sub", words, emit("Mul", quotient, np.int32(TOP)))
    rest, quotient = (emit("Unsqueeze", emit("Cast", part, to=FLOAT), [-1]) for part in (rest, quotient))
    borrow = emit("Floor", emit("Mul", rest, 1 / TOP))
    rest = emit("Sub", rest, emit("Mul", borrow, float(TOP)))
    b3 = emit("Add", quotient, borrow)

    # floor(rest / 256^i) mod 256 for the lower bytes; `rest` < 2^24 leaves 0 in the place of the top one.
    shifted = emit("Floor", emit("Mul", rest, np.array([1, 2**-8, 2**-16, 2**-24], np.float32)))
    byte = emit("Sub", shifted, emit("Mul", emit("Floor", emit("Mul", shifted, 1 / 256)), 256.0))
    signed = emit("Sub", byte, emit("Mul", emit("Floor", emit("Mul", byte, 1 / 128)), 256.0))
    four = emit("Add", signed, emit("Mul", b3, np.array([0, 0, 0, 1], np.float32)))
    emit("Reshape", four, [0, 0, columns], out=codes)
