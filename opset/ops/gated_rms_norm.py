"""GatedRMSNorm: the gate z, and the norm in groups of channels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, Array, columns_ref, silu, silu_ref
from ..draw import activations
from ..schema import Attribute, Multiple, Op, Row, Value, columns, starts, tensor
from .rms_norm import EPS, SHAPES, mean_square_ref, norm_body, norm_tolerance


def gated_rms_norm_ref(
    y: Array, z: Array, weight: Array, eps: float = 1e-5, groups: int = 1, z_start: int = -1
) -> Array:
    """rmsnorm(y silu(z)) weight, each of `groups` equal parts of the channels normed on its own: y and z f32 [B,T,C],
    weight f32 [C] -> f32 [B,T,C]. With `z_start` z is a range of columns.
    """
    OP.check(dict(y=y, z=z, weight=weight), {"eps": eps, "groups": groups, "z_start": z_start})
    z = columns_ref(z, z_start, y.shape[-1])
    v = (y * silu_ref(z)).reshape(*y.shape[:-1], groups, -1)
    v = v / np.sqrt(mean_square_ref(v) + F32(eps))
    out: Array = v.reshape(y.shape) * weight
    return out


_SPLIT = """
  groups_0 = Constant <value_int: int = @groups> ()
  groups = Reshape (groups_0, last)
  tokens = Shape <start = 0, end = 2> (y)
  group_shape = Concat <axis = 0> (tokens, groups, last)
  v = Reshape (gated, group_shape)"""

_JOIN = """
  y_shape = Shape (y)
  flat = Reshape (normed, y_shape)"""


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    return silu("gate", "z") + "\n  gated = Mul (y, gate)\n" + norm_body(_SPLIT, _JOIN)


def _draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, C: int
) -> dict[str, Array]:
    z = (rng.standard_normal((B, T, C)) * 3).astype(F32)
    if kind == "saturated":
        z *= F32(40)  # exp(-z) overflows fp32
    y, weight = activations(rng, (B, T, C), kind), rng.uniform(0.5, 2, C).astype(F32)
    return {"y": y, "z": z, "weight": weight}


def _cases() -> Iterator[Row]:
    for one in SHAPES:
        yield one, {}, "normal"
    yield SHAPES[4], {"groups": 4, "eps": 1e-6}, "normal"
    yield SHAPES[2], {"groups": 2}, "normal"
    yield SHAPES[5], {}, "saturated"
    for start, one in zip((3, 0, 17, 2, 5), (SHAPES[0], *SHAPES[2:]), strict=True):
        yield one, {"z_start": start}, "normal"
    yield SHAPES[4], {"groups": 4, "z_start": 9}, "normal"


OP = Op(
    "GatedRMSNorm",
    inputs=(tensor("y", "float32", "B T C"), columns("z", "B T C"), tensor("weight", "float32", "C")),
    outputs=(tensor("out", "float32", "B T C", over="y"),),
    attributes=(EPS, Attribute("groups", 1, least=1), *starts("z")),
    requires=(Multiple("C", "groups"),),
    reference=gated_rms_norm_ref,
    body=_body,
    draw=_draw,
    cases=_cases,
    tolerance=norm_tolerance,
)
