"""ONNX function bodies of the `ai.dfssm` ops: the ops once more, in standard ONNX ops (opset 21), fp32.

A model file carries these as model-local functions, so it runs in any ONNX runtime without our libraries; where our
kernel is registered, it wins over the body. The bodies are an oracle for the kernels too: they share no code.

A body is specialised where ONNX cannot branch on an attribute: `layout` and `activation` by their value, a start of
columns by whether it is -1, the scan by the dtype of its state. One file uses one variant of an op.
"""

import onnx
from onnx import helper, parser

from .packing import COLUMNS, ROWS
from .reference import TINY
from .schema import DOMAIN, LAYOUT_ROW16, OPS, VERSION, Op, Tensor, in_wider

ONNX_OPSET = 21
"""Opset of the bodies and of the exported graphs; ONNX IR version 10 goes with it."""

IR_VERSION = 10

# Shared by the two quantised products: x -> `s` f32 [B,T,1] and `qu` u8 = q + 128.
# MatMulInteger is used as u8 x u8 with zero points: its s8 x u8 kernels saturate on x86 without VNNI.
_QUANTIZE = f"""
  c127 = Constant <value = float {{127.0}}> ()
  c128 = Constant <value = float {{128.0}}> ()
  zero = Constant <value = float {{0.0}}> ()
  one = Constant <value = float {{1.0}}> ()
  tiny = Constant <value = float {{{float(TINY)!r}}}> ()
  last = Constant <value_ints = [-1]> ()
  i128 = Constant <value = int32 {{128}}> ()
  offset = Constant <value = uint8 {{128}}> ()
  magnitude = Abs (x)
  m = ReduceMax <keepdims = 1> (magnitude, last)
  nonzero = GreaterOrEqual (m, tiny)
  divisor = Where (nonzero, m, one)
  ratio = Div (c127, divisor)
  inv = Where (nonzero, ratio, zero)
  m127 = Div (divisor, c127)
  s = Where (nonzero, m127, zero)
  scaled = Mul (x, inv)
  q = Round (scaled)
  shifted = Add (q, c128)
  qu = Cast <to = 2> (shifted)
"""


def _int8_product(out: str, weight: str, scale: str) -> str:
    """`out` = (scale s) (weight . q) for an int8 weight [M,K]."""
    return f"""
  {out}_wide = Cast <to = 6> ({weight})
  {out}_shifted = Add ({out}_wide, i128)
  {out}_unsigned = Cast <to = 2> ({out}_shifted)
  {out}_columns = Transpose <perm = [1, 0]> ({out}_unsigned)
  {out}_sum = MatMulInteger (qu, {out}_columns, offset, offset)
  {out}_float = Cast <to = 1> ({out}_sum)
  {out}_scale = Mul ({scale}, s)
  {out} = Mul ({out}_scale, {out}_float)
"""


# bits -> `signs` u8 (1 or 0) [planes * M, K]
_UNPACK_CANONICAL = """
  bits3 = Unsqueeze (bits, last)
  masked = BitwiseAnd (bits3, masks)
  bit = Cast <to = 9> (masked)
  bit8 = Cast <to = 2> (bit)
  width = Shape <start = -1> (x)
  flat = Concat <axis = 0> (last, width)
  signs = Reshape (bit8, flat)
"""

# Tiles [planes, blk, c, lane, b] with bit j -> [planes, blk, lane, c, j, b] = [planes, Mp, K], then the first M rows.
_UNPACK_ROW16 = f"""
  tile_shape = Constant <value_ints = [-1, {ROWS}, 4, 1]> ()
  tiles = Reshape (bits, tile_shape)
  masked = BitwiseAnd (tiles, masks)
  bit = Cast <to = 9> (masked)
  bit8 = Cast <to = 2> (bit)
  width = Shape <start = -1> (x)
  tile_columns = Constant <value_ints = [{COLUMNS}]> ()
  tiles_per_row = Div (width, tile_columns)
  tile_rest = Constant <value_ints = [{ROWS}, 4, 8]> ()
  split_shape = Concat <axis = 0> (last, tiles_per_row, tile_rest)
  split = Reshape (bit8, split_shape)
  ordered = Transpose <perm = [0, 2, 1, 4, 3]> (split)
  padded_shape = Concat <axis = 0> (planes_1, last, width)
  padded = Reshape (ordered, padded_shape)
  row_axis = Constant <value_ints = [1]> ()
  begin = Constant <value_ints = [0]> ()
  kept = Slice (padded, begin, rows, row_axis)
  flat = Concat <axis = 0> (last, width)
  signs = Reshape (kept, flat)
"""

_UP_CANONICAL = """
  up_rows = Cast <to = 1> (up)
"""

_UP_ROW16 = f"""
  rank = Shape <start = 0, end = 1> (down_scale)
  up_padded = Shape <start = 0, end = 1> (up)
  tile_rows = Constant <value_ints = [{ROWS}]> ()
  up_blocks = Div (up_padded, tile_rows)
  up_shape = Concat <axis = 0> (up_blocks, rank, tile_rows)
  up_tiles = Reshape <allowzero = 1> (up, up_shape)
  up_ordered = Transpose <perm = [0, 2, 1]> (up_tiles)
  up_flat = Concat <axis = 0> (up_padded, rank)
  up_all = Reshape <allowzero = 1> (up_ordered, up_flat)
  up_axis = Constant <value_ints = [0]> ()
  up_kept = Slice (up_all, up_axis, rows, up_axis)
  up_rows = Cast <to = 1> (up_kept)
"""


def _scaffold(layout: int) -> str:
    row16 = layout == LAYOUT_ROW16
    return f"""
  {_QUANTIZE}
  masks = Constant <value = uint8[8] {{1, 2, 4, 8, 16, 32, 64, 128}}> ()
  planes_0 = Constant <value_int: int = @planes> ()
  planes_1 = Reshape (planes_0, last)
  rows = Shape <start = 0, end = 1> (up_scale)
  {_UNPACK_ROW16 if row16 else _UNPACK_CANONICAL}
  columns = Transpose <perm = [1, 0]> (signs)
  positive = MatMulInteger (qu, columns, offset)
  two = Constant <value = int32 {{2}}> ()
  twice = Mul (positive, two)
  q32 = Cast <to = 6> (q)
  total = ReduceSum <keepdims = 1> (q32, last)
  sum = Sub (twice, total)
  sum_float = Cast <to = 1> (sum)
  tokens = Shape <start = 0, end = 2> (x)
  plane_shape = Concat <axis = 0> (tokens, planes_1, rows)
  by_plane = Reshape (sum_float, plane_shape)
  scale_shape = Concat <axis = 0> (planes_1, rows)
  plane_scale = Reshape (scale, scale_shape)
  s4 = Unsqueeze (s, last)
  scale_s = Mul (plane_scale, s4)
  scaffold_planes = Mul (scale_s, by_plane)
  plane_axis = Constant <value_ints = [2]> ()
  scaffold = ReduceSum <keepdims = 0> (scaffold_planes, plane_axis)
  {_int8_product("h", "down", "down_scale")}
  {_UP_ROW16 if row16 else _UP_CANONICAL}
  up_columns = Transpose <perm = [1, 0]> (up_rows)
  low_rank = MatMul (h, up_columns)
  correction = Mul (up_scale, low_rank)
  y = Add (scaffold, correction)
"""


def _int8_matmul() -> str:
    return _QUANTIZE + _int8_product("y", "w", "w_scale")


def _silu(out: str, x: str) -> str:
    return f"""
  {out}_minus = Neg ({x})
  {out}_exp = Exp ({out}_minus)
  {out}_one = Constant <value = float {{1.0}}> ()
  {out}_denominator = Add ({out}_one, {out}_exp)
  {out} = Div ({x}, {out}_denominator)
"""


def _conv(activation: str) -> str:
    return f"""
  x_channels = Transpose <perm = [0, 2, 1]> (x)
  window = Concat <axis = 2> (state, x_channels)
  i0 = Constant <value = int64 {{0}}> ()
  i1 = Constant <value = int64 {{1}}> ()
  first = Constant <value_ints = [0]> ()
  second = Constant <value_ints = [1]> ()
  third = Constant <value_ints = [2]> ()
  last = Constant <value_ints = [-1]> ()
  tokens_1 = Shape <start = 1, end = 2> (x)
  taps_1 = Shape <start = 1, end = 2> (weight)
  tokens = Squeeze (tokens_1, first)
  taps = Squeeze (taps_1, first)
  token_range = Range (i0, tokens, i1)
  tap_range = Range (i0, taps, i1)
  token_column = Unsqueeze (token_range, second)
  position = Add (token_column, tap_range)
  gathered = Gather <axis = 2> (window, position)
  weight3 = Unsqueeze (weight, second)
  products = Mul (gathered, weight3)
  sums = ReduceSum <keepdims = 0> (products, last)
  sums_tokens = Transpose <perm = [0, 2, 1]> (sums)
  {"preactivation" if activation == "silu" else "y"} = Add (sums_tokens, bias)
  {_silu("y", "preactivation") if activation == "silu" else ""}
  total = Shape <start = 2, end = 3> (window)
  new_state = Slice (window, tokens_1, total, third)
"""


def _scan(state_dtype: str) -> str:
    int8 = state_dtype == "int8"
    widen = """
  stored = Cast <to = 1> (state)
  stored_scale = Unsqueeze (state_scale, last)
  h0 = Mul (stored, stored_scale)"""
    narrow = f"""
  c127 = Constant <value = float {{127.0}}> ()
  tiny = Constant <value = float {{{float(TINY)!r}}}> ()
  magnitude = Abs (h_last)
  m = ReduceMax <keepdims = 1> (magnitude, last)
  nonzero = GreaterOrEqual (m, tiny)
  divisor = Where (nonzero, m, one)
  ratio = Div (c127, divisor)
  inv = Where (nonzero, ratio, zero)
  m127 = Div (divisor, c127)
  row_scale = Where (nonzero, m127, zero)
  new_state_scale = Squeeze (row_scale, last)
  scaled = Mul (h_last, inv)
  rounded = Round (scaled)
  new_state = Cast <to = 3> (rounded)"""
    if not int8:
        widen = "h0 = Cast <to = 1> (state)"
        narrow = f"new_state = Cast <to = {10 if state_dtype == 'float16' else 1}> (h_last)"

    def per_head(name: str) -> str:  # [B,T,G*N] -> [T,B,H,N]
        return f"""
  {name}_groups = Reshape ({name}, group_shape)
  {name}_wide = Expand ({name}_groups, wide_shape)
  {name}_btHN = Reshape ({name}_wide, head_shape)
  {name}_T = Transpose <perm = [1, 0, 2, 3]> ({name}_btHN)"""

    return f"""
  zero = Constant <value = float {{0.0}}> ()
  one = Constant <value = float {{1.0}}> ()
  last = Constant <value_ints = [-1]> ()
  one_1 = Constant <value_ints = [1]> ()
  raw = Add (dt, dt_bias)
  raw_magnitude = Abs (raw)
  raw_minus = Neg (raw_magnitude)
  e = Exp (raw_minus)
  u = Add (one, e)
  u_1 = Sub (u, one)
  lost = Equal (u_1, zero)
  u_1_safe = Where (lost, one, u_1)
  log_u = Log (u)
  log_e = Mul (log_u, e)
  log_ratio = Div (log_e, u_1_safe)
  log1p = Where (lost, e, log_ratio)
  raw_positive = Max (raw, zero)
  softplus = Add (raw_positive, log1p)
  lower = Constant <value_float: float = @dt_min> ()
  upper = Constant <value_float: float = @dt_max> ()
  delta_low = Max (softplus, lower)
  delta = Min (delta_low, upper)
  A = Exp (A_log)
  A_delta = Mul (A, delta)
  exponent = Neg (A_delta)
  decay = Exp (exponent)
  delta_T = Transpose <perm = [1, 0, 2]> (delta)
  decay_T = Transpose <perm = [1, 0, 2]> (decay)
  tokens = Shape <start = 0, end = 2> (x)
  heads = Shape <start = 0, end = 1> (A_log)
  d_state = Shape <start = 2, end = 3> (state)
  groups_0 = Constant <value_int: int = @ngroups> ()
  groups = Reshape (groups_0, last)
  repeat = Div (heads, groups)
  group_shape = Concat <axis = 0> (tokens, groups, one_1, d_state)
  wide_shape = Concat <axis = 0> (tokens, groups, repeat, d_state)
  head_shape = Concat <axis = 0> (tokens, heads, d_state)
  {per_head("B")}
  {per_head("C")}
  x_shape = Concat <axis = 0> (tokens, heads, last)
  x_heads = Reshape (x, x_shape)
  x_T = Transpose <perm = [1, 0, 2, 3]> (x_heads)
  {widen}
  h_last, y_T = Scan <num_scan_inputs = 5, body = step (
      float[b, h, n, p] h_in, float[b, h, p] x_t, float[b, h] delta_t, float[b, h] decay_t,
      float[b, h, n] B_t, float[b, h, n] C_t) => (float[b, h, n, p] h_out, float[b, h, p] y_t) {{
    axis1 = Constant <value_ints = [-1]> ()
    axis2 = Constant <value_ints = [-2]> ()
    axes2 = Constant <value_ints = [-2, -1]> ()
    decay4 = Unsqueeze (decay_t, axes2)
    kept = Mul (decay4, h_in)
    delta3 = Unsqueeze (delta_t, axis1)
    dB = Mul (delta3, B_t)
    dB4 = Unsqueeze (dB, axis1)
    x4 = Unsqueeze (x_t, axis2)
    added = Mul (dB4, x4)
    h_out = Add (kept, added)
    C4 = Unsqueeze (C_t, axis2)
    y4 = MatMul (C4, h_out)
    y_t = Squeeze (y4, axis2)
  }}> (h0, x_T, delta_T, decay_T, B_T, C_T)
  y_heads = Transpose <perm = [1, 0, 2, 3]> (y_T)
  D_column = Unsqueeze (D, last)
  D_x = Mul (D_column, x_heads)
  y_D = Add (y_heads, D_x)
  y_shape = Shape (x)
  y = Reshape (y_D, y_shape)
  {narrow}
"""


def _norm(x: str, grouped: bool) -> str:
    shape = """
  groups_0 = Constant <value_int: int = @groups> ()
  groups = Reshape (groups_0, last)
  tokens = Shape <start = 0, end = 2> (y)
  group_shape = Concat <axis = 0> (tokens, groups, last)
  v = Reshape (gated, group_shape)"""
    unshape = """
  y_shape = Shape (y)
  flat = Reshape (normed, y_shape)"""
    return f"""
  last = Constant <value_ints = [-1]> ()
  {shape if grouped else f"v = Identity ({x})"}
  square = Mul (v, v)
  mean = ReduceMean <keepdims = 1> (square, last)
  eps_0 = Constant <value_float: float = @eps> ()
  variance = Add (mean, eps_0)
  root = Sqrt (variance)
  normed = Div (v, root)
  {unshape if grouped else "flat = Identity (normed)"}
  out = Mul (flat, weight)
"""


def _gated_norm() -> str:
    return _silu("gate", "z") + "\n  gated = Mul (y, gate)\n" + _norm("gated", grouped=True)


def _size(op: Op, symbol: str, out: str) -> str:
    """`out` i64 [1], the value of one symbol of a shape: an attribute, or a dimension of an input."""
    if symbol in op.defaults:
        return f"""
  {out}_0 = Constant <value_int: int = @{symbol}> ()
  {out}_shape = Constant <value_ints = [1]> ()
  {out} = Reshape ({out}_0, {out}_shape)
"""
    name, axis = next((t.name, t.shape.index(symbol)) for t in op.inputs if not t.start and symbol in t.shape)
    return f"""
  {out} = Shape <start = {axis}, end = {axis + 1}> ({name})
"""


def _columns(op: Op, tensor: Tensor) -> str:
    """`<tensor>`, the columns that the op reads of the parameter `<tensor>_all`."""
    name, factors = tensor.name, tensor.shape[-1].split(" * ")
    sizes = [f"{name}_size{i}" for i in range(len(factors))]
    return f"""
  {_size(op, tensor.start, f"{name}_begin")}
  {"".join(_size(op, factor, size) for factor, size in zip(factors, sizes, strict=True))}
  {name}_sizes = Concat <axis = 0> ({", ".join(sizes)})
  {name}_width = ReduceProd <keepdims = 1> ({name}_sizes)
  {name}_end = Add ({name}_begin, {name}_width)
  {name}_axis = Constant <value_ints = [2]> ()
  {name} = Slice ({name}_all, {name}_begin, {name}_end, {name}_axis)
"""


def function_proto(name: str, state_dtype: str = "float32", **attributes) -> onnx.FunctionProto:
    """The body of op `name` as an ONNX function.

    `attributes` are the op's attributes at the node (`layout`, `activation` and whether a start is -1 choose the
    variant, the others stay references to the node's attributes); `state_dtype` (NumPy name) chooses the variant of
    SelectiveScanStep. An input that is read as a range of columns is called `<name>_all` in the body.
    """
    op = OPS[name]
    attributes = op.resolve(attributes)
    body = {
        "BinaryScaffoldMatMul": lambda: _scaffold(attributes["layout"]),
        "Int8MatMul": _int8_matmul,
        "CausalConv1dStep": lambda: _conv(attributes["activation"]),
        "SelectiveScanStep": lambda: _scan(state_dtype),
        "GatedRMSNorm": _gated_norm,
        "RMSNorm": lambda: _norm("x", grouped=False),
    }[name]()
    wanted = [t for t in op.inputs if not t.optional or state_dtype == "int8"]
    made = [t for t in op.outputs if not t.optional or state_dtype == "int8"]
    wider = [t for t in wanted if in_wider(t, attributes)]
    body = "".join(_columns(op, t) for t in wider) + body
    inputs = ", ".join(f"{t.name}_all" if t in wider else t.name for t in wanted)
    outputs = ", ".join(t.name for t in made)
    text = f'<domain: "{DOMAIN}", opset_import: ["": {ONNX_OPSET}]>\n{name} ({inputs}) => ({outputs}) {{{body}}}'
    function = parser.parse_function(text)
    function.attribute_proto.extend(helper.make_attribute(a.name, a.default) for a in op.attributes)
    function.doc_string = f"{DOMAIN} version {VERSION}, {name} in standard ops; semantics in docs/ops.md"
    return function


def make_node(name: str, inputs: list[str], outputs: list[str], node_name: str, **attributes) -> onnx.NodeProto:
    """A node of op `name` with every attribute written out: onnx's ReferenceEvaluator does not fill the defaults of
    attributes that a function body refers to.
    """
    return helper.make_node(name, inputs, outputs, node_name, domain=DOMAIN, **OPS[name].resolve(attributes))
