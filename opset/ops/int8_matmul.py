"""Int8MatMul: the LM head, whose table is the embedding's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, QUANTIZE, Array, int8_product, integer_matmul_ref, quantize_activations_ref
from ..draw import activations, int8, sizes
from ..schema import EXACT_SUMS, Op, Row, Value, tensor
from ..tolerances import Tolerance, reduction


def int8_matmul_ref(x: Array, w: Array, w_scale: Array) -> Array:
    """y = (w_scale s)(w . q): x f32 [B,T,K], w i8 [M,K], w_scale f32 [M] -> f32 [B,T,M]. The LM head."""
    OP.check(dict(x=x, w=w, w_scale=w_scale))
    q, s = quantize_activations_ref(x)
    y: Array = (w_scale * s) * integer_matmul_ref(q, w).astype(F32)
    return y


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    return QUANTIZE + int8_product("y", "w", "w_scale")


def _draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, K: int, M: int
) -> dict[str, Array]:
    x = activations(rng, (B, T, K), kind)
    return {"x": x, "w": int8(rng, M, K), "w_scale": rng.uniform(1e-4, 1e-2, M).astype(F32)}


def _cases() -> Iterator[Row]:
    shapes = sizes(
        "B T K M",
        *[(1, 1, 32, 1), (1, 1, 64, 4), (1, 1, 100, 7), (1, 1, 1, 5), (1, 1, 2048, 19), (3, 1, 96, 33)],
        *[(1, 2, 64, 8), (2, 3, 33, 18), (1, 13, 130, 21), (1, 64, 192, 35)],
    )
    for one in shapes:
        yield one, {}, "normal"
    for kind in ("zero", "tiny", "huge", "ties"):
        yield shapes[7], {}, kind


def _tolerance(sizes: Mapping[str, Any], output: str) -> Tolerance:
    """One exact integer, two fp32 products."""
    return reduction(1)


OP = Op(
    "Int8MatMul",
    inputs=(tensor("x", "float32", "B T K"), tensor("w", "int8", "M K"), tensor("w_scale", "float32", "M")),
    outputs=(tensor("y", "float32", "B T M"),),
    requires=(EXACT_SUMS,),
    reference=int8_matmul_ref,
    body=_body,
    draw=_draw,
    cases=_cases,
    tolerance=_tolerance,
)
