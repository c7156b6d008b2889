"""What several ops compute: quantisation, exact integer products, SiLU; each in NumPy and as text of an ONNX body."""

from typing import Any

import numpy as np

from .schema import TINY as _TINY

F32 = np.float32
Array = np.ndarray[Any, np.dtype[Any]]

TINY = F32(_TINY)


def quantize_activations_ref(x: Array) -> tuple[Array, Array]:
    """Activations to int8, one scale a token: x f32 [..., K] -> q i8 [..., K], s f32 [..., 1].

    m = max|x|, q = rint(x * (127 / m)) half to even, s = m / 127; a row with m < TINY gives q = 0, s = 0 (127 / m would
    overflow near the denormals). These exact fp32 operations, on every backend, so that equal x gives equal q.
    |q| <= 127 because m * fl(127 / m) < 127.5. NaN and infinity in x are outside the contract.
    """
    m = np.max(np.abs(x), axis=-1, keepdims=True)
    zero = m < TINY
    inv = np.where(zero, F32(0), F32(127) / np.where(zero, F32(1), m)).astype(F32)
    s = np.where(zero, F32(0), m / F32(127)).astype(F32)
    return np.rint(x * inv).astype(np.int8), s


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


# x -> `s` f32 [B,T,1] and `qu` u8 = q + 128.
# MatMulInteger is used as u8 x u8 with zero points: its s8 x u8 kernels saturate on x86 without VNNI.
QUANTIZE = f"""
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
