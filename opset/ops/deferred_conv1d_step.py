"""DeferredConv1dStep: CausalConv1dStep of a deferred state, whose last tokens can be taken back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, Array, columns_ref, silu, silu_ref
from ..draw import sizes
from ..pending import COUNTS, check_count, gather, kept, update
from ..schema import SLOTS, Attribute, Between, Op, Row, Value, columns, starts, tensor
from ..tolerances import Tolerance, reduction


def deferred_conv1d_step_ref(
    x: Array, window: Array, weight: Array, bias: Array, pending_count: Array,
    activation: str = "silu", x_start: int = -1,
) -> tuple[Array, Array]:  # fmt: skip
    """The convolution of CausalConv1dStep, over the tokens of `window` f32 [B,W+15,C] and then x.

    The window holds the W-1 tokens before the stored state, oldest first, and behind them `pending_count` u8 [B] more.
    The new one is moved on with the stored state (`kept`); what lies behind its last token is as it was. x f32 [B,T,C],
    weight f32 [C,W], bias f32 [C] -> y f32 [B,T,C], new_window. With `x_start` x is a range of columns.
    """
    arguments = dict(x=x, window=window, weight=weight, bias=bias, pending_count=pending_count)
    bound = OP.check(arguments, {"activation": activation, "x_start": x_start})
    check_count(OP.name, pending_count)
    x = columns_ref(x, x_start, bound["C"])
    tokens, width = x.shape[1], weight.shape[1]
    y, new_window = np.empty_like(x), window.copy()
    for b, count in enumerate(pending_count.tolist()):
        known = np.concatenate([window[b, : width - 1 + count], x[b]])
        y[b] = bias
        for w in range(width):
            y[b] += known[count + w : count + w + tokens] * weight[:, w]
        left = known[kept(count, tokens) :]
        new_window[b, : len(left)] = left
    return (silu_ref(y) if activation == "silu" else y), new_window


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    activated = attributes["activation"] == "silu"
    return f"""
  {COUNTS}
  i0 = Constant <value = int64 {{0}}> ()
  i1 = Constant <value = int64 {{1}}> ()
  taps_1 = Shape <start = 1, end = 2> (weight)
  taps = Squeeze (taps_1)
  past = Sub (taps_1, i1)
  filled = Add (count, past)
  still = Add (left, past)
  {update("new_window", "window", "x", "filled", "still")}
  some = Squeeze (tokens)
  token = Range (i0, some, i1)
  tap = Range (i0, taps, i1)
  token_column = Unsqueeze (token, pair)
  reach = Add (token_column, tap)
  flat = Reshape (reach, behind)
  index = Add (count, flat)
  {gather("read", "window", "x", "index", "filled")}
  batch = Shape <start = 0, end = 1> (x)
  apart = Concat <axis = 0> (batch, tokens, taps_1, behind)
  by_tap = Reshape (read, apart)
  weight_rows = Transpose <perm = [1, 0]> (weight)
  products = Mul (by_tap, weight_rows)
  axis = Constant <value_ints = [2]> ()
  sums = ReduceSum <keepdims = 0> (products, axis)
  {"preactivation" if activated else "y"} = Add (sums, bias)
  {silu("y", "preactivation") if activated else ""}
"""


def _draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, C: int, W: int, count: int
) -> dict[str, Array]:
    return {
        "x": rng.standard_normal((B, T, C)).astype(F32),
        "window": rng.standard_normal((B, SLOTS + W - 1, C)).astype(F32),
        "weight": rng.standard_normal((C, W)).astype(F32),
        "bias": rng.standard_normal(C).astype(F32),
        "pending_count": counts(B, count),
    }


def counts(batch: int, first: int) -> Array:
    """A count for each row, `first` that of the first."""
    return ((first + 5 * np.arange(batch)) % SLOTS).astype(np.uint8)


def _cases() -> Iterator[Row]:
    for width in (2, 3, 4):
        shapes = [(1, 1, 1, 0), (1, 1, 33, 3), (4, 1, 16, 0), (1, 2, 40, 8), (2, 3, 17, 6), (3, 8, 96, 7)]
        for B, T, C, count in (*shapes, (3, 25, 9, 2)):
            yield dict(B=B, T=T, C=C, W=width, count=count), {}, "normal"
    yield dict(B=2, T=5, C=24, W=4, count=15), {"activation": "none"}, "normal"
    ranges = sizes("B T C W count", (1, 1, 33, 4, 15), (3, 1, 16, 2, 0), (2, 3, 17, 4, 9), (3, 17, 96, 4, 5))
    for start, one in zip((0, 1, 13, 34), ranges, strict=True):
        yield one, {"x_start": start}, "normal"


def _tolerance(sizes: Mapping[str, Any], output: str) -> Tolerance:
    return reduction(sizes["W"] + 1)


OP = Op(
    "DeferredConv1dStep",
    inputs=(
        columns("x", "B T C"),
        tensor("window", "float32", f"B W + {SLOTS - 1} C"),
        tensor("weight", "float32", "C W"),
        tensor("bias", "float32", "C"),
        tensor("pending_count", "uint8", "B"),
    ),
    outputs=(
        tensor("y", "float32", "B T C"),
        tensor("new_window", "float32", f"B W + {SLOTS - 1} C", over="window"),
    ),
    attributes=(Attribute("activation", "silu", ("silu", "none")), *starts("x")),
    requires=(Between("W", 2, 4),),
    reference=deferred_conv1d_step_ref,
    body=_body,
    draw=_draw,
    cases=_cases,
    tolerance=_tolerance,
)
