"""BinaryScaffoldMatMul: the product with a 1-bit matrix, plus an int8 low-rank correction."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, QUANTIZE, Array, int8_product, integer_matmul_ref, quantize_activations_ref
from ..draw import activations, int8, sizes
from ..layouts import LAYOUT_CANONICAL, LAYOUTS, Layout
from ..packing import from_layout, pack_bits, to_layout, unpack_bits, up_from_layout, up_to_layout
from ..schema import EXACT_SUMS, Attribute, Multiple, Op, Row, Value, tensor
from ..tolerances import Tolerance, reduction


def binary_scaffold_matmul_ref(
    x: Array, bits: Array, scale: Array, down: Array, down_scale: Array, up: Array, up_scale: Array,
    planes: int = 1, layout: int = LAYOUT_CANONICAL,
) -> Array:  # fmt: skip
    """y = (scale s)(2 sum_{bit=1} q - sum q) summed over planes + up_scale (up . h), h = (down_scale s)(down . q).

    x f32 [B,T,K], bits u8 [planes?,Mp,K/8], scale f32 [planes?,M], down i8 [R,K], down_scale f32 [R], up i8 [Mp,R],
    up_scale f32 [M] -> y f32 [B,T,M]. Mp is M in whole tiles of the layout; the axis `planes` is there when planes > 1.
    """
    arguments = dict(x=x, bits=bits, scale=scale, down=down, down_scale=down_scale, up=up, up_scale=up_scale)
    rows = OP.check(arguments, {"planes": planes, "layout": layout})["M"]
    bits, up = from_layout(bits, rows, LAYOUTS[layout]), up_from_layout(up, rows, LAYOUTS[layout])
    if planes == 1:
        bits, scale = bits[None], scale[None]
    q, s = quantize_activations_ref(x)
    y = np.zeros((*x.shape[:-1], rows), F32)
    for plane in range(planes):
        y = y + (scale[plane] * s) * integer_matmul_ref(q, unpack_bits(bits[plane])).astype(F32)
    h = (down_scale * s) * integer_matmul_ref(q, down).astype(F32)
    return y + up_scale * (h @ up.astype(F32).T)


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


def _unpack(layout: Layout) -> str:
    """As _UNPACK_CANONICAL, from tiles: (blk, c, ...) as stored -> [planes, Mp, K], then the first M rows."""
    inner = [(layout.rows, 0, *layout.split)[axis - 1] for axis in layout.order[2:]]
    back = [layout.order.index(axis) for axis in range(len(layout.order))]
    return f"""
  tile_shape = Constant <value_ints = {[-1, *inner[:-1], 1]}> ()
  tiles = Reshape (bits, tile_shape)
  masked = BitwiseAnd (tiles, masks)
  bit = Cast <to = 9> (masked)
  bit8 = Cast <to = 2> (bit)
  width = Shape <start = -1> (x)
  tile_columns = Constant <value_ints = [{layout.columns}]> ()
  tiles_per_row = Div (width, tile_columns)
  tile_rest = Constant <value_ints = {inner}> ()
  split_shape = Concat <axis = 0> (last, tiles_per_row, tile_rest)
  split = Reshape (bit8, split_shape)
  ordered = Transpose <perm = {back}> (split)
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


def _unpack_up(layout: Layout) -> str:
    return f"""
  rank = Shape <start = 0, end = 1> (down_scale)
  up_padded = Shape <start = 0, end = 1> (up)
  tile_rows = Constant <value_ints = [{layout.rows}]> ()
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


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    canonical, layout = attributes["layout"] == LAYOUT_CANONICAL, LAYOUTS[int(attributes["layout"])]
    return f"""
  {QUANTIZE}
  masks = Constant <value = uint8[8] {{1, 2, 4, 8, 16, 32, 64, 128}}> ()
  planes_0 = Constant <value_int: int = @planes> ()
  planes_1 = Reshape (planes_0, last)
  rows = Shape <start = 0, end = 1> (up_scale)
  {_UNPACK_CANONICAL if canonical else _unpack(layout)}
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
  {int8_product("h", "down", "down_scale")}
  {_UP_CANONICAL if canonical else _unpack_up(layout)}
  up_columns = Transpose <perm = [1, 0]> (up_rows)
  low_rank = MatMul (h, up_columns)
  correction = Mul (up_scale, low_rank)
  y = Add (scaffold, correction)
"""


def _draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, K: int, M: int, R: int
) -> dict[str, Array]:
    planes, layout = attributes.get("planes", 1), LAYOUTS[attributes.get("layout", LAYOUT_CANONICAL)]
    lead = (planes,) if planes > 1 else ()
    bits = pack_bits(rng.standard_normal((*lead, M, K)).astype(F32))
    up = int8(rng, M, R)
    return {
        "x": activations(rng, (B, T, K), kind),
        "bits": to_layout(bits, layout),
        "scale": rng.uniform(0.01, 0.1, (*lead, M)).astype(F32),
        "down": int8(rng, R, K),
        "down_scale": rng.uniform(1e-4, 1e-3, R).astype(F32),
        "up": up_to_layout(up, layout),
        "up_scale": rng.uniform(1e-3, 1e-2, M).astype(F32),
    }


def _cases() -> Iterator[Row]:
    shapes = sizes(
        "B T K M R",
        (1, 1, 32, 1, 0),
        (1, 1, 64, 16, 1),
        (1, 1, 96, 15, 2),
        (1, 1, 256, 40, 16),
        (1, 1, 1024, 33, 5),
        (3, 1, 128, 48, 4),
        (1, 2, 160, 17, 3),
        (1, 7, 64, 32, 2),
        (3, 5, 96, 31, 16),
        (1, 12, 128, 64, 4),
        (1, 13, 32, 49, 1),
        (1, 64, 288, 80, 8),
        (2, 33, 512, 16, 0),
    )
    for layout in LAYOUTS:
        for one in shapes:
            yield one, {"layout": layout}, "normal"
        for one in (shapes[3], shapes[8]):
            yield one, {"layout": layout, "planes": 2}, "normal"
        yield shapes[6], {"layout": layout, "planes": 3}, "normal"
        for kind in ("zero", "tiny", "huge", "ties"):
            yield shapes[8], {"layout": layout}, kind


def _tolerance(sizes: Mapping[str, Any], output: str) -> Tolerance:
    """Integers are exact; the rank-R product and the planes are fp32 sums."""
    return reduction(sizes["R"] + 2 * sizes.get("planes", 1))


OP = Op(
    "BinaryScaffoldMatMul",
    inputs=(
        tensor("x", "float32", "B T K"),
        tensor("bits", "uint8", "planes Mp K / 8"),
        tensor("scale", "float32", "planes M"),
        tensor("down", "int8", "R K"),
        tensor("down_scale", "float32", "R"),
        tensor("up", "int8", "Mp R"),
        tensor("up_scale", "float32", "M"),
    ),
    outputs=(tensor("y", "float32", "B T M"),),
    attributes=(Attribute("planes", 1, least=1), Attribute("layout", LAYOUT_CANONICAL, tuple(LAYOUTS))),
    requires=(Multiple("K", 32), EXACT_SUMS),
    may_be_zero="R",
    reference=binary_scaffold_matmul_ref,
    body=_body,
    draw=_draw,
    cases=_cases,
    tolerance=_tolerance,
)
