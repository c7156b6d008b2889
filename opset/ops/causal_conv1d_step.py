"""CausalConv1dStep: a depthwise causal convolution that carries its last W-1 tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, Array, columns_ref, silu, silu_ref
from ..draw import sizes
from ..schema import Attribute, Between, Op, Row, Value, columns, starts, tensor
from ..tolerances import Tolerance, reduction


def causal_conv1d_step_ref(
    x: Array, state: Array, weight: Array, bias: Array, activation: str = "silu", x_start: int = -1
) -> tuple[Array, Array]:
    """Depthwise causal convolution over [state, x]: x f32 [B,T,C], state f32 [B,C,W-1] (oldest first), weight f32
    [C,W], bias f32 [C] -> y f32 [B,T,C], new_state f32 [B,C,W-1]. With `x_start` x is a range of columns.
    """
    arguments = dict(x=x, state=state, weight=weight, bias=bias)
    bound = OP.check(arguments, {"activation": activation, "x_start": x_start})
    x = columns_ref(x, x_start, bound["C"])
    tokens, width = x.shape[1], weight.shape[1]
    window = np.concatenate([state.transpose(0, 2, 1), x], axis=1)  # [B, W-1+T, C]
    y = np.broadcast_to(bias, x.shape)
    for w in range(width):
        y = y + window[:, w : w + tokens] * weight[:, w]
    new_state = np.ascontiguousarray(window[:, tokens:].transpose(0, 2, 1))
    return (silu_ref(y) if activation == "silu" else y.astype(F32)), new_state


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    activated = attributes["activation"] == "silu"
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
  {"preactivation" if activated else "y"} = Add (sums_tokens, bias)
  {silu("y", "preactivation") if activated else ""}
  total = Shape <start = 2, end = 3> (window)
  new_state = Slice (window, tokens_1, total, third)
"""


def _draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, C: int, W: int
) -> dict[str, Array]:
    return {
        "x": rng.standard_normal((B, T, C)).astype(F32),
        "state": rng.standard_normal((B, C, W - 1)).astype(F32),
        "weight": rng.standard_normal((C, W)).astype(F32),
        "bias": rng.standard_normal(C).astype(F32),
    }


def _cases() -> Iterator[Row]:
    for width in (2, 3, 4):
        shapes = [(1, 1, 1), (1, 1, 33), (3, 1, 16), (1, 2, 40), (2, 3, 17), (3, 7, 96)]
        for one in sizes("B T C W", *((*shape, width) for shape in shapes)):
            yield one, {}, "normal"
    yield dict(B=1, T=5, C=24, W=4), {"activation": "none"}, "normal"
    ranges = sizes("B T C W", (1, 1, 33, 4), (3, 1, 16, 2), (1, 2, 40, 3), (2, 3, 17, 4), (3, 7, 96, 4))
    for start, one in zip((0, 1, 3, 13, 34), ranges, strict=True):
        yield one, {"x_start": start}, "normal"


def _tolerance(sizes: Mapping[str, Any], output: str) -> Tolerance:
    return reduction(sizes["W"] + 1)


OP = Op(
    "CausalConv1dStep",
    inputs=(
        columns("x", "B T C"),
        tensor("state", "float32", "B C W - 1"),
        tensor("weight", "float32", "C W"),
        tensor("bias", "float32", "C"),
    ),
    outputs=(tensor("y", "float32", "B T C"), tensor("new_state", "float32", "B C W - 1", over="state")),
    attributes=(Attribute("activation", "silu", ("silu", "none")), *starts("x")),
    requires=(Between("W", 2, 4),),
    reference=causal_conv1d_step_ref,
    body=_body,
    draw=_draw,
    cases=_cases,
    tolerance=_tolerance,
)
