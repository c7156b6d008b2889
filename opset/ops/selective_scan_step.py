"""SelectiveScanStep: the Mamba-2 recurrence, one token after the other, on a state that is stored narrow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, HALF_MAX, NUMBERS, Array, columns_ref, half_ref, quantize, quantize_activations_ref
from ..draw import sizes
from ..schema import STATE_DTYPES, Attribute, Multiple, Op, Row, Value, columns, starts, tensor
from ..tolerances import EPS16, Tolerance, reduction


def softplus_ref(x: Array) -> Array:
    """log(1 + exp(x)) in fp32, without overflow."""
    return (np.maximum(x, F32(0)) + np.log1p(np.exp(-np.abs(x)))).astype(F32)


def discretize_ref(dt: Array, A_log: Array, dt_bias: Array, dt_min: float, dt_max: float) -> tuple[Array, Array]:
    """The step d = clamp(softplus(dt + dt_bias), dt_min, dt_max) and the decay exp(-exp(A_log) d): f32 [B,T,H] both."""
    delta = np.clip(softplus_ref(dt + dt_bias), F32(dt_min), F32(dt_max))
    return delta, np.exp(-np.exp(A_log) * delta)


def quantize_state_ref(state: Array) -> tuple[Array, Array]:
    """SSM state to int8, one scale a row of headdim: f32 [B,H,N,P] -> i8 [B,H,N,P], f32 [B,H,N].

    m = max|row|, q = rint(row * (127 / m)), scale = m / 127, as for the activations. No error feedback: carried along
    the row or along d_state (the sigma-delta of the paper) it raised the error of y from 0.9 % to 1.1 %, because
    the noise it shapes meets B and C, which have no order along d_state (`python bench/int8_state.py`).
    """
    q, scale = quantize_activations_ref(state)
    return q, scale[..., 0]


def selective_scan_step_ref(
    x: Array, dt: Array, B: Array, C: Array, A_log: Array, D: Array, dt_bias: Array, state: Array,
    state_scale: Array | None = None, ngroups: int = 1, dt_min: float = 0.0, dt_max: float = math.inf,
    x_start: int = -1, dt_start: int = -1, B_start: int = -1, C_start: int = -1,
) -> tuple[Array, ...]:  # fmt: skip
    """The Mamba-2 recurrence over T tokens, one token after the other, in fp32.

    d = clamp(softplus(dt + dt_bias), dt_min, dt_max); state = exp(-exp(A_log) d) state + d B (x) x;
    y = C . state + D x. Head h reads group h // (H / ngroups) of B and C.

    x f32 [B,T,H*P], dt f32 [B,T,H], B and C f32 [B,T,ngroups*N], A_log, D, dt_bias f32 [H], state [B,H,N,P] fp32, fp16
    or int8 (then state_scale f32 [B,H,N]) -> y f32 [B,T,H*P], new_state, and new_state_scale for int8. A narrow state
    is widened at entry and rounded once at exit (half_ref, quantize_state_ref): prefill and steps differ by that
    rounding only. With their `*_start` x, dt, B and C are ranges of columns, of one tensor or of several.
    """
    arguments = dict(x=x, dt=dt, B=B, C=C, A_log=A_log, D=D, dt_bias=dt_bias, state=state, state_scale=state_scale)
    attributes: dict[str, Value] = dict(ngroups=ngroups, dt_min=dt_min, dt_max=dt_max)
    attributes |= dict(x_start=x_start, dt_start=dt_start, B_start=B_start, C_start=C_start)
    bound = OP.check(arguments, attributes)
    batch, tokens, heads, headdim, d_state = (bound[k] for k in "BTHPN")
    x, dt = columns_ref(x, x_start, heads * headdim), columns_ref(dt, dt_start, heads)
    B, C = columns_ref(B, B_start, ngroups * d_state), columns_ref(C, C_start, ngroups * d_state)
    x = x.reshape(batch, tokens, heads, headdim)
    repeat = heads // ngroups
    B = B.reshape(batch, tokens, ngroups, d_state).repeat(repeat, axis=2)  # [B, T, H, N]
    C = C.reshape(batch, tokens, ngroups, d_state).repeat(repeat, axis=2)
    delta, decay = discretize_ref(dt, A_log, dt_bias, dt_min, dt_max)
    h = state.astype(F32)
    if state_scale is not None:
        h = h * state_scale[..., None]
    y: Array = np.empty_like(x)
    for t in range(tokens):
        dB = delta[:, t, :, None] * B[:, t]  # [B, H, N]
        h = decay[:, t, :, None, None] * h + dB[..., None] * x[:, t, :, None, :]
        y[:, t] = np.einsum("bhn,bhnp->bhp", C[:, t], h) + D[:, None] * x[:, t]
    y = y.reshape(batch, tokens, heads * headdim)
    if state_scale is not None:
        return y, *quantize_state_ref(h)
    return y, half_ref(h) if state.dtype == np.float16 else h


DISCRETIZE = """
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
"""
"""`delta` and `decay` as discretize_ref; after NUMBERS."""


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    int8 = state_dtype == "int8"
    widen = """
  stored = Cast <to = 1> (state)
  stored_scale = Unsqueeze (state_scale, last)
  h0 = Mul (stored, stored_scale)"""
    narrow = f"""
  {quantize("h_last")}
  new_state = Cast <to = 3> (q)
  new_state_scale = Squeeze (s, last)"""
    if not int8:
        widen = "h0 = Cast <to = 1> (state)"
        narrow = "new_state = Identity (h_last)"
    if state_dtype == "float16":
        narrow = f"""
  half_max = Constant <value = float {{{float(HALF_MAX)!r}}}> ()
  half_min = Neg (half_max)
  saturated = Clip (h_last, half_min, half_max)
  new_state = Cast <to = 10> (saturated)"""

    def per_head(name: str) -> str:  # [B,T,G*N] -> [T,B,H,N]
        return f"""
  {name}_groups = Reshape ({name}, group_shape)
  {name}_wide = Expand ({name}_groups, wide_shape)
  {name}_btHN = Reshape ({name}_wide, head_shape)
  {name}_T = Transpose <perm = [1, 0, 2, 3]> ({name}_btHN)"""

    return f"""
  {NUMBERS}
  one_1 = Constant <value_ints = [1]> ()
  {DISCRETIZE}
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


def draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, H: int, P: int, N: int,
    state: str = "float32",
) -> dict[str, Array]:  # fmt: skip
    groups = attributes.get("ngroups", 1)
    h = rng.standard_normal((B, H, N, P)).astype(F32)
    h[:, :, :1] = 0  # rows of a fresh state
    inputs = {
        "x": rng.standard_normal((B, T, H * P)).astype(F32),
        "dt": rng.standard_normal((B, T, H)).astype(F32),
        "B": rng.standard_normal((B, T, groups * N)).astype(F32),
        "C": rng.standard_normal((B, T, groups * N)).astype(F32),
        "A_log": np.log(rng.uniform(1, 16, H)).astype(F32),
        "D": rng.standard_normal(H).astype(F32),
        # softplus of -7 .. -2: time steps of 0.001 .. 0.1, as trained models have
        "dt_bias": rng.uniform(-7, -2, H).astype(F32),
        "state": h.astype(state),
    }
    if kind == "extreme":  # softplus far out on both sides
        inputs["dt"] *= F32(30)
    if state == "int8":
        inputs["state"], inputs["state_scale"] = quantize_state_ref(h)
    return inputs


def _cases() -> Iterator[Row]:
    shapes = sizes(
        "B T H P N",
        *[(1, 1, 1, 1, 1), (1, 1, 4, 64, 128), (1, 1, 3, 32, 16), (2, 1, 4, 24, 17), (1, 1, 2, 7, 5)],
        *[(3, 2, 2, 16, 8), (1, 7, 4, 64, 33), (2, 19, 4, 33, 16), (1, 64, 2, 32, 64)],
    )
    for state in ("float32", "float16", "int8"):
        for one in shapes:
            yield {**one, "state": state}, {}, "normal"
        yield {**shapes[6], "state": state}, {"ngroups": 2}, "normal"
        yield {**shapes[1], "state": state}, {"ngroups": 4}, "normal"
        limits: dict[str, Value] = {"dt_min": 0.001, "dt_max": 0.1}
        yield {**shapes[7], "state": state}, limits, "normal"
        ranges: dict[str, Value] = {"x_start": 5, "dt_start": 1, "B_start": 0, "C_start": 35}
        for one in (shapes[1], shapes[3], shapes[4], shapes[7]):
            yield {**one, "state": state}, ranges, "normal"
        yield {**shapes[6], "state": state}, {"ngroups": 2, "x_start": 3, "B_start": 18}, "normal"
        yield {**shapes[5], "state": state}, {"dt_start": 7, "C_start": 1}, "normal"
    yield shapes[6], {}, "extreme"


def _tolerance(sizes: Mapping[str, Any], output: str) -> Tolerance:
    if not output.startswith("new_state"):
        return reduction(sizes["N"] + sizes["T"])
    return rounded_state(sizes, sizes["T"])


def rounded_state(sizes: Mapping[str, Any], terms: int) -> Tolerance:
    """Of what is computed with so many `terms` and stored, or from what was. int8: a last-bit difference of fp32 may
    move a value across a rounding tie, one step of the row's scale.
    """
    dtype = sizes.get("state", "float32")
    step = {"float32": 0.0, "float16": EPS16, "int8": 1 / 127}[dtype]
    return Tolerance(step + reduction(terms).relative, f"{dtype} state, one rounding step apart")


STATES = "|".join(STATE_DTYPES.values())
INPUTS = (
    columns("x", "B T H * P"),
    columns("dt", "B T H"),
    columns("B", "B T ngroups * N"),
    columns("C", "B T ngroups * N"),
    tensor("A_log", "float32", "H"),
    tensor("D", "float32", "H"),
    tensor("dt_bias", "float32", "H"),
    tensor("state", STATES, "B H N P"),
)
ATTRIBUTES = (
    Attribute("ngroups", 1, least=1),
    Attribute("dt_min", 0.0, at_most="dt_max"),
    Attribute("dt_max", math.inf),
    *starts("x", "dt", "B", "C"),
)
"""Of DeferredScanStep, too."""

OP = Op(
    "SelectiveScanStep",
    inputs=(
        *INPUTS,
        tensor("state_scale", "float32", "B H N", scale_of="state"),
    ),
    outputs=(
        tensor("y", "float32", "B T H * P"),
        tensor("new_state", STATES, "B H N P", over="state"),
        tensor("new_state_scale", "float32", "B H N", scale_of="state", over="state_scale"),
    ),
    attributes=ATTRIBUTES,
    requires=(Multiple("H", "ngroups"),),
    reference=selective_scan_step_ref,
    body=_body,
    draw=draw,
    cases=_cases,
    tolerance=_tolerance,
)
