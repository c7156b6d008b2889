"""What several ops compute: int8 and fp16 storage, exact integer products, SiLU; in NumPy and as ONNX text."""

from typing import Any

import numpy as np

from .schema import HALF_MAX as _HALF_MAX
from .schema import TINY as _TINY

F32 = np.float32
Array = np.ndarray[Any, np.dtype[Any]]

TINY, HALF_MAX = F32(_TINY), F32(_HALF_MAX)


def quantize_activations_ref(x: Array) -> tuple[Array, Array]:
    """Activations to int8, one scale a token: x f32 [..., K] -> q i8 [..., K], s f32 [..., 1].

    m = max|x|, q = rint(x * (127 / m)) half to even, s = m / 127; a row with m < TINY gives q = 0, s = 0 (127 / m would
    overflow near the denormals). A row with a NaN or an infinity gives q = 0, s = NaN, so that whatever is computed
    from it is NaN. These exact fp32 operations, on every backend, so that equal x gives equal q. |q| <= 127 because
    m * fl(127 / m) < 127.5.
    """
    m = np.max(np.abs(x), axis=-1, keepdims=True)
    zero, finite = m < TINY, np.isfinite(m)
    inv = np.where(zero, F32(0), F32(127) / np.where(zero, F32(1), m)).astype(F32)
    s = np.where(zero, F32(0), np.where(finite, m / F32(127), F32(np.nan))).astype(F32)
    return np.rint(np.where(finite, x, F32(0)) * np.where(finite, inv, F32(0))).astype(np.int8), s


def half_ref(x: Array) -> Array:
    """fp32 to fp16, to nearest even. What is past the largest fp16, infinity too, becomes +-HALF_MAX; NaN stays NaN."""
    return np.clip(x, -HALF_MAX, HALF_MAX).astype(np.float16)


def integer_matmul_ref(q: Array, w: Array) -> Array:
    """Exact q i8 [..., K] . w i8 [M, K] -> i32 [..., M] (float64 holds every such sum: K * 127 * 127 < 2^53)."""
    return (q.astype(np.float64) @ w.astype(np.float64).T).astype(np.int32)


def columns_ref(x: Array, start: int, width: int) -> Array:
    """The columns [start, start + width) of x [..., >= start + width]; all of x for start = -1."""
    return x if start < 0 else x[..., start : start + width]


def silu_ref(x: Array) -> Array:
    """x / (1 + exp(-x)) in fp32, without overflow."""
    e = np.exp(-np.abs(x))
    return (x * np.where(x >= 0, F32(1), e) / (F32(1) + e)).astype(F32)


NUMBERS = """
  zero = Constant <value = float {0.0}> ()
  one = Constant <value = float {1.0}> ()
  infinity = Constant <value = float {inf}> ()
  nan = Constant <value = float {nan}> ()
  last = Constant <value_ints = [-1]> ()
"""


def quantize(x: str) -> str:
    """x f32 [...,K] -> `q`, whole numbers in f32, and `s` f32 [...,1], as quantize_activations_ref; after NUMBERS."""
    # ReduceMax of ONNX Runtime loses a NaN, but no infinity.
    return f"""
  c127 = Constant <value = float {{127.0}}> ()
  tiny = Constant <value = float {{{float(TINY)!r}}}> ()
  magnitude = Abs ({x})
  finite = Less (magnitude, infinity)
  bounded = Where (finite, magnitude, infinity)
  m = ReduceMax <keepdims = 1> (bounded, last)
  nonzero = GreaterOrEqual (m, tiny)
  divisor = Where (nonzero, m, one)
  ratio = Div (c127, divisor)
  inv = Where (nonzero, ratio, zero)
  m127 = Div (divisor, c127)
  row_scale = Where (nonzero, m127, zero)
  row_finite = Less (m, infinity)
  s = Where (row_finite, row_scale, nan)
  known = Where (finite, {x}, zero)
  scaled = Mul (known, inv)
  q = Round (scaled)
"""


# x -> `s` f32 [B,T,1] and `qu` u8 = q + 128.
# MatMulInteger is used as u8 x u8 with zero points: its s8 x u8 kernels saturate on x86 without VNNI.
QUANTIZE = f"""
  {NUMBERS}
  {quantize("x")}
  c128 = Constant <value = float {{128.0}}> ()
  i128 = Constant <value = int32 {{128}}> ()
  offset = Constant <value = uint8 {{128}}> ()
  shifted = Add (q, c128)
  qu = Cast <to = 2> (shifted)
"""


def int8_product(out: str, weight: str, scale: str) -> str:
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


def silu(out: str, x: str) -> str:
    """`out` = x / (1 + exp(-x))."""
    return f"""
  {out}_minus = Neg ({x})
  {out}_exp = Exp ({out}_minus)
  {out}_one = Constant <value = float {{1.0}}> ()
  {out}_denominator = Add ({out}_one, {out}_exp)
  {out} = Div ({x}, {out}_denominator)
"""
