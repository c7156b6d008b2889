"""Our ops in standard ones, for one token: an engine of this graph needs no plugin.

The arithmetic is that of `dfssm.opset.reference`. Activations are quantised by the same float operations; the codes
stay in fp32, where products with +-1 and int8 weights are whole numbers, and sums of them exact up to 2^24 (a
scaffold's never are larger). The scaffold's signs become INT4, four times the packed bits, with a block-wise
DequantizeLinear whose scales are 1: the rows' scales are applied to the exact sum, as in the reference.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from dfssm.opset import OPS
from dfssm.opset.packing import unpack_bits
from dfssm.opset.reference import HALF_MAX, TINY

from .graph import Emitter, ours, read, store, take_out

FLOAT, INT8, INT4 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT4

Attributes: TypeAlias = dict[str, Any]
Outputs: TypeAlias = list[gs.Variable]

BLOCKS = (128, 64, 32)
"""Columns that share one scale of a DequantizeLinear; the largest that divides K, and K % 32 == 0."""


def run(graph: gs.Graph) -> list[str]:
    """Returns the names of the nodes that were replaced."""
    changed: list[str] = []
    shared: dict[str, gs.Constant] = {}
    for node in ours(graph):
        emit = Emitter(graph, node.name, shared)
        inputs = [_columns(emit, node, i) for i in range(len(node.inputs))]
        _OPS[node.op](emit, node.attrs, take_out(node), *inputs)
        changed.append(node.name)
    return changed


def _columns(emit: Emitter, node: gs.Node, index: int) -> gs.Tensor:
    """Input `index` of `node`, cut to the columns that the op reads where an attribute `<its name>_start` says so."""
    name, tensor = OPS[node.op].inputs[index].name, node.inputs[index]
    start = node.attrs.get(f"{name}_start", -1)
    if start < 0:
        return tensor
    if node.op == "SelectiveScanStep":
        _, heads, d_state, headdim = node.inputs[7].shape
        states = node.attrs["ngroups"] * d_state
        width = {"x": heads * headdim, "dt": heads, "B": states, "C": states}[name]
    else:  # as many channels as the weight has: the convolution's x, the norm's z
        width = node.inputs[2].shape[0]
    return emit("Slice", tensor, [start], [start + width], [-1])


def _quantize(emit: Emitter, x: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """x -> codes q in fp32, and their scale s, one a row of the last axis."""
    magnitude = emit("Abs", x)
    finite = emit("Less", magnitude, np.inf)
    m = emit("ReduceMax", emit("Where", finite, magnitude, np.inf), [-1], keepdims=1)
    nonzero = emit("GreaterOrEqual", m, float(TINY))
    divisor = emit("Where", nonzero, m, 1.0)
    inv = emit("Where", nonzero, emit("Div", 127.0, divisor), 0.0)
    s = emit("Where", nonzero, emit("Div", divisor, 127.0), 0.0)
    s = emit("Where", emit("Less", m, np.inf), s, np.nan)
    return emit("Round", emit("Mul", emit("Where", finite, x, 0.0), inv)), s


def _product(emit: Emitter, x: gs.Tensor, w: gs.Tensor) -> gs.Tensor:
    """x . w^T for int8 weights [M,K]."""
    wide = emit("DequantizeLinear", w, 1.0)
    return emit("MatMul", x, emit("Transpose", wide, perm=[1, 0]))


def _signs(emit: Emitter, bits: gs.Constant) -> gs.Tensor:
    """Packed bits [planes?,M,K/8] -> the signs +-1 in fp32 [planes*M,K], kept as INT4."""
    signs = unpack_bits(np.asarray(read(bits))).view(np.uint8) & 15
    rows, columns = signs.size // signs.shape[-1], signs.shape[-1]
    pairs = signs.reshape(rows, -1, 2)
    packed = pairs[..., 0] | pairs[..., 1] << 4  # the first of two in the lower half of a byte
    codes = store(f"{bits.name}.int4", packed.tobytes(), INT4, [rows, columns], bits)
    block = next(size for size in BLOCKS if columns % size == 0)
    ones = emit.shared("ones", np.ones((rows, columns // block), np.float32))
    return emit("DequantizeLinear", codes, ones, axis=1, block_size=block)


def _scaffold(emit: Emitter, attrs: Attributes, outputs: Outputs, *inputs: gs.Tensor) -> None:
    x, bits, scale, down, down_scale, up, up_scale = inputs
    (y,) = outputs
    (rows,), planes = up_scale.shape, attrs["planes"]
    q, s = _quantize(emit, x)
    sums = emit("MatMul", q, emit("Transpose", _signs(emit, bits), perm=[1, 0]))
    if planes > 1:
        sums = emit("Reshape", sums, [0, planes, rows])  # [B,1,planes*M]: the one token gives its place to the planes
    sums = emit("Mul", emit("Mul", scale, s), sums)
    if planes > 1:
        sums = emit("ReduceSum", sums, [1], keepdims=1)
    if not down.shape[0]:
        emit("Identity", sums, out=y)
        return
    h = emit("Mul", emit("Mul", down_scale, s), _product(emit, q, down))
    emit("Add", sums, emit("Mul", up_scale, _product(emit, h, up)), out=y)


def _int8_matmul(emit: Emitter, attrs: Attributes, outputs: Outputs, *inputs: gs.Tensor) -> None:
    x, w, w_scale = inputs
    q, s = _quantize(emit, x)
    emit("Mul", emit("Mul", w_scale, s), _product(emit, q, w), out=outputs[0])


def _silu(emit: Emitter, x: gs.Tensor, out: gs.Tensor | None = None) -> gs.Tensor:
    return emit("Div", x, emit("Add", 1.0, emit("Exp", emit("Neg", x))), out=out)


def _conv(emit: Emitter, attrs: Attributes, outputs: Outputs, *inputs: gs.Tensor) -> None:
    x, state, weight, bias = inputs
    y, new_state = outputs
    width = weight.shape[1]
    window = emit("Concat", state, emit("Transpose", x, perm=[0, 2, 1]), axis=2)  # [B,C,W]
    emit("Slice", window, [1], [width], [2], out=new_state)
    total = emit("ReduceSum", emit("Mul", window, weight), [2], keepdims=1)
    total = emit("Add", emit("Transpose", total, perm=[0, 2, 1]), bias)
    if attrs["activation"] == "silu":
        _silu(emit, total, out=y)
    else:
        emit("Identity", total, out=y)


def _softplus(emit: Emitter, x: gs.Tensor) -> gs.Tensor:
    """log(1 + exp(x)) as max(x, 0) + log1p(exp(-|x|)): TensorRT's Softplus loses the digits of small values."""
    e = emit("Exp", emit("Neg", emit("Abs", x)))
    u = emit("Add", 1.0, e)
    rounded = emit("Sub", u, 1.0)  # log1p(e) = log(u) e / (u - 1) makes up for what 1 + e lost
    lost = emit("Equal", rounded, 0.0)
    log1p = emit("Div", emit("Mul", emit("Log", u), e), emit("Where", lost, 1.0, rounded))
    return emit("Add", emit("Max", x, 0.0), emit("Where", lost, e, log1p))


def _scan(emit: Emitter, attrs: Attributes, outputs: Outputs, *inputs: gs.Tensor) -> None:
    x, dt, B, C, A_log, D, dt_bias, state, *scales = inputs
    y, new_state, *new_scale = outputs
    _, heads, d_state, headdim = state.shape
    groups = attrs["ngroups"]
    split = [0, groups, heads // groups]  # the heads of a group side by side: its B and C broadcast over them
    delta = _softplus(emit, emit("Add", dt, dt_bias))
    if attrs["dt_min"] > 0:
        delta = emit("Max", delta, attrs["dt_min"])
    if np.isfinite(attrs["dt_max"]):
        delta = emit("Min", delta, attrs["dt_max"])
    decay = emit("Exp", emit("Neg", emit("Mul", emit("Exp", A_log), delta)))
    delta, decay = (emit("Reshape", v, [*split, 1, 1]) for v in (delta, decay))
    B, C = (emit("Reshape", v, [0, groups, 1, d_state, 1]) for v in (B, C))
    x = emit("Reshape", x, [*split, 1, headdim])
    h = emit("Cast", state, to=FLOAT)
    if scales:
        h = emit("Mul", h, emit("Unsqueeze", scales[0], [-1]))
    h = emit("Reshape", h, [*split, d_state, headdim])
    h = emit("Add", emit("Mul", decay, h), emit("Mul", emit("Mul", delta, B), x))
    total = emit("ReduceSum", emit("Mul", C, h), [3], keepdims=1)
    total = emit("Add", total, emit("Mul", emit("Reshape", D, [1, groups, heads // groups, 1, 1]), x))
    emit("Reshape", total, [0, 1, heads * headdim], out=y)
    h = emit("Reshape", h, [0, heads, d_state, headdim])
    if scales:
        codes, scale = _quantize(emit, h)
        emit("Cast", codes, to=INT8, out=new_state)
        emit("Squeeze", scale, [-1], out=new_scale[0])
    elif state.dtype == np.float16:
        half_max = float(HALF_MAX)
        emit("Cast", emit("Clip", h, -half_max, half_max), to=onnx.TensorProto.FLOAT16, out=new_state)
    else:
        emit("Identity", h, out=new_state)


def _normed(emit: Emitter, v: gs.Tensor, eps: float) -> gs.Tensor:
    mean = emit("ReduceMean", emit("Mul", v, v), [-1], keepdims=1)
    mean = emit("Where", emit("Less", mean, np.inf), mean, np.nan)
    return emit("Div", v, emit("Sqrt", emit("Add", mean, eps)))


def _rms_norm(emit: Emitter, attrs: Attributes, outputs: Outputs, *inputs: gs.Tensor) -> None:
    x, weight = inputs
    emit("Mul", _normed(emit, x, attrs["eps"]), weight, out=outputs[0])


def _gated_norm(emit: Emitter, attrs: Attributes, outputs: Outputs, *inputs: gs.Tensor) -> None:
    y, z, weight = inputs
    channels, groups = weight.shape[0], attrs["groups"]
    gated = emit("Mul", y, _silu(emit, z))
    grouped = emit("Reshape", gated, [0, 1, groups, channels // groups])
    flat = emit("Reshape", _normed(emit, grouped, attrs["eps"]), [0, 1, channels])
    emit("Mul", flat, weight, out=outputs[0])


_OPS: dict[str, Callable[..., None]] = {
    "BinaryScaffoldMatMul": _scaffold,
    "Int8MatMul": _int8_matmul,
    "CausalConv1dStep": _conv,
    "SelectiveScanStep": _scan,
    "GatedRMSNorm": _gated_norm,
    "RMSNorm": _rms_norm,
}
