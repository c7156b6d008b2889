"""RMSNorm: one node for six of ONNX's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, NUMBERS, Array
from ..draw import activations, sizes
from ..schema import Attribute, Op, Row, Value, tensor
from ..tolerances import Tolerance, reduction

EPS = Attribute("eps", 1e-5, least=0)


def mean_square_ref(v: Array) -> Array:
    """The mean of v^2 over the last axis, which stays; NaN where the squares overflow fp32 (|v| from 1.8e19 on): what
    is too large to be normed shall not become zero in silence.
    """
    mean = np.mean(v * v, axis=-1, keepdims=True)
    return np.where(np.isinf(mean), F32(np.nan), mean)


def rms_norm_ref(x: Array, weight: Array, eps: float = 1e-5) -> Array:
    """x rsqrt(mean(x^2) + eps) weight: x f32 [B,T,C], weight f32 [C] -> f32 [B,T,C]."""
    OP.check(dict(x=x, weight=weight), {"eps": eps})
    out: Array = x / np.sqrt(mean_square_ref(x) + F32(eps)) * weight
    return out


def norm_body(split: str, join: str) -> str:
    """`out`, from the rows `v` that `split` makes and `flat` that `join` makes of the normed ones."""
    return f"""
  {NUMBERS}
  {split}
  square = Mul (v, v)
  mean_square = ReduceMean <keepdims = 1> (square, last)
  finite = Less (mean_square, infinity)
  mean = Where (finite, mean_square, nan)
  eps_0 = Constant <value_float: float = @eps> ()
  variance = Add (mean, eps_0)
  root = Sqrt (variance)
  normed = Div (v, root)
  {join}
  out = Mul (flat, weight)
"""


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    return norm_body("v = Identity (x)", "flat = Identity (normed)")


def _draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, C: int
) -> dict[str, Array]:
    x = activations(rng, (B, T, C), kind)
    return {"x": x, "weight": rng.uniform(0.5, 2, C).astype(F32)}


SHAPES = sizes("B T C", (1, 1, 1), (1, 1, 64), (1, 1, 100), (3, 1, 33), (2, 7, 48), (1, 3, 1024))


def _cases() -> Iterator[Row]:
    for one in SHAPES:
        yield one, {}, "normal"
    yield SHAPES[4], {"eps": 1e-3}, "zero"


def norm_tolerance(sizes: Mapping[str, Any], output: str) -> Tolerance:
    return reduction(sizes["C"])


OP = Op(
    "RMSNorm",
    inputs=(tensor("x", "float32", "B T C"), tensor("weight", "float32", "C")),
    outputs=(tensor("out", "float32", "B T C", over="x"),),
    attributes=(EPS,),
    reference=rms_norm_ref,
    body=_body,
    draw=_draw,
    cases=_cases,
    tolerance=norm_tolerance,
)
