"""DeferredScanStep: the recurrence of SelectiveScanStep, on a stored state that is written once in BLOCK tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..arithmetic import F32, HALF_MAX, NUMBERS, Array, columns_ref, half_ref, quantize
from ..draw import sizes
from ..pending import COUNTS, check_count, gather, kept, update
from ..schema import BLOCK, SLOTS, Between, Multiple, Op, Row, Value, tensor
from ..tolerances import Tolerance, reduction
from .deferred_conv1d_step import counts
from .selective_scan_step import (
    ATTRIBUTES,
    DISCRETIZE,
    INPUTS,
    STATES,
    discretize_ref,
    quantize_state_ref,
    rounded_state,
)
from .selective_scan_step import draw as draw_immediate


def deferred_scan_step_ref(
    x: Array, dt: Array, B: Array, C: Array, A_log: Array, D: Array, dt_bias: Array, state: Array, pending_x: Array,
    pending_B: Array, pending_decay: Array, pending_count: Array, state_scale: Array | None = None, ngroups: int = 1,
    dt_min: float = 0.0, dt_max: float = math.inf,
    x_start: int = -1, dt_start: int = -1, B_start: int = -1, C_start: int = -1,
) -> tuple[Array, ...]:  # fmt: skip
    """y of SelectiveScanStep, from the state `h` before the token's block and the tokens of the block:

    y_t = (a_0 .. a_t) C_t . h + sum over j <= t of (a_j+1 .. a_t) (C_t . B_j) (d_j x_j) + D x_t, with the decays
    a = exp(-exp(A_log) d) multiplied, 0 the first token of the block. After BLOCK tokens they are folded into the
    state, h = (a_0 .. a_7) h + sum of (a_j+1 .. a_7) B_j (x) (d_j x_j), which is then rounded to what it is stored as.

    The stored state is `h` before the first pending token; of these there are `pending_count` u8 [B] (see
    `opset.pending`), with d x in pending_x f32 [B,16,H*P], B in pending_B f32 [B,16,ngroups*N] and a in pending_decay
    f32 [B,16,H]. All else as in SelectiveScanStep. Returns y, new_state, new_pending_x, new_pending_B,
    new_pending_decay, new_pending_count, and new_state_scale for int8; slots behind the new count are as they were.
    """
    arguments = dict(x=x, dt=dt, B=B, C=C, A_log=A_log, D=D, dt_bias=dt_bias, state=state, state_scale=state_scale)
    arguments |= dict(pending_x=pending_x, pending_B=pending_B)
    arguments |= dict(pending_decay=pending_decay, pending_count=pending_count)
    attributes: dict[str, Value] = dict(ngroups=ngroups, dt_min=dt_min, dt_max=dt_max)
    attributes |= dict(x_start=x_start, dt_start=dt_start, B_start=B_start, C_start=C_start)
    bound = OP.check(arguments, attributes)
    check_count(OP.name, pending_count)
    batch, tokens, heads, headdim, d_state = (bound[k] for k in "BTHPN")
    x, dt = columns_ref(x, x_start, heads * headdim), columns_ref(dt, dt_start, heads)
    B, C = columns_ref(B, B_start, ngroups * d_state), columns_ref(C, C_start, ngroups * d_state)
    delta, decay = discretize_ref(dt, A_log, dt_bias, dt_min, dt_max)
    dx = (x.reshape(batch, tokens, heads, headdim) * delta[..., None]).reshape(x.shape)

    def per_head(vectors: Array) -> Array:  # [T,G*N] -> [T,H,N]
        return vectors.reshape(-1, ngroups, d_state).repeat(heads // ngroups, axis=1)

    y, new_state = x.copy(), state.copy()
    new_scale = None if state_scale is None else state_scale.copy()
    new_pending = pending_x.copy(), pending_B.copy(), pending_decay.copy()
    new_count = pending_count.copy()
    for b, count in enumerate(pending_count.tolist()):
        known = [
            np.concatenate([slots[b, :count], added[b]])
            for slots, added in ((pending_x, dx), (pending_B, B), (pending_decay, decay))
        ]
        xs, Bs, decays = known[0].reshape(-1, heads, headdim), per_head(known[1]), known[2]
        Cs = per_head(C[b])
        last = kept(count, tokens)
        stored, scale = state[b], None if state_scale is None else state_scale[b]
        h = _widen(stored, scale)
        for t in range(count + tokens):
            first = t // BLOCK * BLOCK
            if t and t == first:
                total, weights = _weights(decays[t - BLOCK : t])
                h = total[:, None, None] * h
                for j, weight in enumerate(weights, t - BLOCK):
                    h = h + Bs[j][..., None] * (weight[:, None] * xs[j])[:, None]
                stored, scale = _narrow(h, state.dtype)
                h = _widen(stored, scale)
            if t == last:
                new_state[b] = stored
                if new_scale is not None:
                    new_scale[b] = scale
            if t >= count:
                total, weights = _weights(decays[first : t + 1])
                out = total[:, None] * np.einsum("hn,hnp->hp", Cs[t - count], h)
                for j, weight in enumerate(weights, first):
                    out += (weight * np.einsum("hn,hn->h", Cs[t - count], Bs[j]))[:, None] * xs[j]
                y[b, t - count] = (out + D[:, None] * x[b, t - count].reshape(heads, headdim)).reshape(-1)
        new_count[b] = count + tokens - last
        for slots, vectors in zip(new_pending, known, strict=True):
            slots[b, : new_count[b]] = vectors[last:]
    outputs = (y, new_state, *new_pending, new_count)
    return outputs if new_scale is None else (*outputs, new_scale)


def _weights(decays: Array) -> tuple[Array, Array]:
    """Of the decays [T,H] of tokens: what the last leaves of the state before them [H], and of each token [T,H]."""
    products = np.cumprod(decays[::-1], axis=0, dtype=F32)[::-1]
    return products[0], np.concatenate([products[1:], np.ones_like(products[:1])])


def _widen(stored: Array, scale: Array | None) -> Array:
    return stored.astype(F32) if scale is None else stored.astype(F32) * scale[..., None]


def _narrow(h: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
    if dtype == np.int8:
        return quantize_state_ref(h)
    return half_ref(h) if dtype == np.float16 else h, None


def _body(attributes: Mapping[str, Value], state_dtype: str) -> str:
    int8 = state_dtype == "int8"
    # The state as `q`, numbers that its type holds, times `s`, a scale of each row.
    rounded = {
        "int8": quantize("h_out"),
        "float16": f"""
    half_max = Constant <value = float {{{float(HALF_MAX)!r}}}> ()
    half_min = Neg (half_max)
    saturated = Clip (h_out, half_min, half_max)
    half = Cast <to = 10> (saturated)
    q = Cast <to = 1> (half)
    s = Identity (s_in)""",
    }.get(state_dtype, """
    q = Identity (h_out)
    s = Identity (s_in)""")  # fmt: skip
    code = {"int8": 3, "float16": 10}.get(state_dtype, 1)

    def blocks(out: str, of: str, shape: str, perm: str) -> str:
        return f"""
  {out}_apart = Reshape ({of}, {shape})
  {out} = Transpose <perm = [{perm}]> ({out}_apart)"""

    def per_head(out: str, of: str) -> str:  # [B,L,G*N] -> [L/8,B,H,8,N]
        return f"""
  {out}_groups = Reshape ({of}, group_shape)
  {out}_wide = Expand ({out}_groups, wide_shape)
  {blocks(out, f"{out}_wide", "head_shape", "1, 0, 3, 2, 4")}"""

    return f"""
  {NUMBERS}
  {DISCRETIZE}
  {COUNTS}
  one_1 = Constant <value_ints = [1]> ()
  i0 = Constant <value = int64 {{0}}> ()
  i1 = Constant <value = int64 {{1}}> ()
  slots = Constant <value = int64 {{{SLOTS}}}> ()
  block_1 = Constant <value_ints = [{BLOCK}]> ()
  batch = Shape <start = 0, end = 1> (x)
  heads = Shape <start = 0, end = 1> (A_log)
  d_state = Shape <start = 2, end = 3> (state)
  x_shape = Concat <axis = 0> (batch, tokens, heads, last)
  x_heads = Reshape (x, x_shape)
  delta_column = Unsqueeze (delta, last)
  dx_heads = Mul (delta_column, x_heads)
  flat_shape = Shape (x)
  dx = Reshape (dx_heads, flat_shape)
  {update("new_pending_x", "pending_x", "dx")}
  {update("new_pending_B", "pending_B", "B")}
  {update("new_pending_decay", "pending_decay", "decay")}

  spread = Add (tokens, slots)
  spread_more = Add (spread, block)
  spread_less = Sub (spread_more, i1)
  block_count = Div (spread_less, block)
  most = Mul (block_count, block)
  most_0 = Squeeze (most)
  position = Range (i0, most_0, i1)
  newest = Sub (length, i1)
  index = Min (position, newest)
  {gather("window_x", "pending_x", "dx", "index")}
  {gather("window_B", "pending_B", "B", "index")}
  {gather("window_C", "pending_B", "C", "index")}
  {gather("window_decay", "pending_decay", "decay", "index")}
  groups_0 = Constant <value_int: int = @ngroups> ()
  groups = Reshape (groups_0, one_1)
  repeat = Div (heads, groups)
  group_shape = Concat <axis = 0> (batch, block_count, block_1, groups, one_1, d_state)
  wide_shape = Concat <axis = 0> (batch, block_count, block_1, groups, repeat, d_state)
  head_shape = Concat <axis = 0> (batch, block_count, block_1, heads, d_state)
  row_shape = Concat <axis = 0> (batch, block_count, block_1, heads, last)
  {per_head("B_blocks", "window_B")}
  {per_head("C_blocks", "window_C")}
  {blocks("x_blocks", "window_x", "row_shape", "1, 0, 3, 2, 4")}
  decay_shape = Concat <axis = 0> (batch, block_count, block_1, heads)
  {blocks("decay_blocks", "window_decay", "decay_shape", "1, 0, 3, 2")}

  place = Constant <value_ints = [{", ".join(map(str, range(BLOCK)))}]> ()
  column = Unsqueeze (place, pair)
  cube_axes = Constant <value_ints = [1, 2]> ()
  cube = Unsqueeze (place, cube_axes)
  causal = LessOrEqual (place, column)
  upto = LessOrEqual (place, cube)
  after = Greater (place, column)
  between = And (after, upto)

  q0 = Cast <to = 1> (state)
  scale_shape = Concat <axis = 0> (batch, heads, d_state)
  {"scales = Identity (state_scale)" if int8 else "scales = Expand (one, scale_shape)"}
  s0 = Unsqueeze (scales, last)
  blocks_0 = Squeeze (block_count)
  number = Range (i0, blocks_0, i1)
  state_axes = Constant <value_ints = [2, 3]> ()
  kept_block = Unsqueeze (whole, state_axes)
  q_last, s_last, q_kept, s_kept, y_blocks = Scan <num_scan_inputs = 5, body = step (
      float[b, h, n, p] q_in, float[b, h, n, o] s_in, float[b, h, n, p] q_before, float[b, h, n, o] s_before,
      int64 i, float[b, h, l, p] x_b, float[b, h, l, n] B_b, float[b, h, l, n] C_b, float[b, h, l] decay_b
      ) => (float[b, h, n, p] q, float[b, h, n, o] s, float[b, h, n, p] q_kept_out, float[b, h, n, o] s_kept_out,
      float[b, h, l, p] y_b) {{
    reached = Equal (i, kept_block)
    q_kept_out = Where (reached, q_in, q_before)
    s_kept_out = Where (reached, s_in, s_before)
    h_in = Mul (q_in, s_in)
    axis2 = Constant <value_ints = [-2]> ()
    axes23 = Constant <value_ints = [-3, -2]> ()
    decay_cube = Unsqueeze (decay_b, axes23)
    factors = Where (between, decay_cube, one)
    products = ReduceProd <keepdims = 0> (factors, last)
    decay_square = Unsqueeze (decay_b, axis2)
    all_factors = Where (causal, decay_square, one)
    total = ReduceProd <keepdims = 1> (all_factors, last)
    from_state = MatMul (C_b, h_in)
    y_state = Mul (total, from_state)
    B_columns = Transpose <perm = [0, 1, 3, 2]> (B_b)
    dots = MatMul (C_b, B_columns)
    scores = Mul (products, dots)
    scores_5 = Unsqueeze (scores, last)
    axis_2 = Constant <value_ints = [2]> ()
    x_5 = Unsqueeze (x_b, axis_2)
    terms = Mul (scores_5, x_5)
    causal_3 = Unsqueeze (causal, last)
    known_terms = Where (causal_3, terms, zero)
    axis3 = Constant <value_ints = [3]> ()
    y_tokens = ReduceSum <keepdims = 0> (known_terms, axis3)
    y_b = Add (y_state, y_tokens)
    first_7 = Constant <value_ints = [{BLOCK - 1}]> ()
    weights = Gather <axis = 2> (products, first_7)
    weights_column = Transpose <perm = [0, 1, 3, 2]> (weights)
    x_left = Mul (weights_column, x_b)
    added = MatMul (B_columns, x_left)
    total_last = Gather <axis = 2> (total, first_7)
    h_left = Mul (total_last, h_in)
    h_out = Add (h_left, added)
    {rounded}
  }}> (q0, s0, q0, s0, number, x_blocks, B_blocks, C_blocks, decay_blocks)
  y_window = Transpose <perm = [1, 0, 3, 2, 4]> (y_blocks)
  y_rows_shape = Concat <axis = 0> (batch, most, last)
  y_rows = Reshape (y_window, y_rows_shape)
  some = Squeeze (tokens)
  token = Range (i0, some, i1)
  token_at = Add (count, token)
  token_row = Unsqueeze (token_at, behind)
  y_new = GatherND <batch_dims = 1> (y_rows, token_row)
  D_column = Unsqueeze (D, last)
  D_heads = Mul (D_column, x_heads)
  D_x = Reshape (D_heads, flat_shape)
  y = Add (y_new, D_x)
  new_state = Cast <to = {code}> (q_kept)
  {"new_state_scale = Squeeze (s_kept, last)" if int8 else ""}
"""


def _draw(
    rng: np.random.Generator, attributes: Mapping[str, Any], kind: str, B: int, T: int, H: int, P: int, N: int,
    count: int, state: str = "float32",
) -> dict[str, Array]:  # fmt: skip
    inputs = draw_immediate(rng, attributes, kind, B, T, H, P, N, state)
    scale = {name: inputs.pop(name) for name in ("state_scale",) if name in inputs}
    return {
        **inputs,
        "pending_x": (0.1 * rng.standard_normal((B, SLOTS, H * P))).astype(F32),
        "pending_B": rng.standard_normal((B, SLOTS, attributes.get("ngroups", 1) * N)).astype(F32),
        "pending_decay": rng.uniform(0.5, 1, (B, SLOTS, H)).astype(F32),
        "pending_count": counts(B, count),
        **scale,
    }


def _cases() -> Iterator[Row]:
    shapes = sizes(
        "B T H P N count",
        *[(1, 1, 1, 1, 1, 0), (1, 1, 4, 64, 128, 7), (1, 1, 3, 32, 16, 8), (4, 1, 4, 24, 17, 0), (1, 1, 2, 7, 5, 15)],
        *[(3, 2, 2, 16, 8, 7), (1, 7, 4, 64, 33, 4), (2, 8, 2, 33, 16, 11), (2, 29, 2, 32, 64, 3)],
    )
    for state in ("float32", "float16", "int8"):
        for one in shapes:
            yield {**one, "state": state}, {}, "normal"
        yield {**shapes[6], "state": state}, {"ngroups": 2}, "normal"
        limits: dict[str, Value] = {"dt_min": 0.001, "dt_max": 0.1}
        yield {**shapes[7], "state": state}, limits, "normal"
        ranges: dict[str, Value] = {"x_start": 5, "dt_start": 1, "B_start": 0, "C_start": 35}
        for one in (shapes[3], shapes[7]):
            yield {**one, "state": state}, ranges, "normal"
    yield shapes[6], {}, "extreme"


def _tolerance(sizes: Mapping[str, Any], output: str) -> Tolerance:
    if output == "new_pending_count":
        return Tolerance(1 / SLOTS, "a whole number below that of slots")
    if output.startswith("new_pending"):
        return reduction(1)
    # y too is computed from what was rounded.
    return rounded_state(sizes, BLOCK if output.startswith("new_state") else sizes["N"] + BLOCK)


_PENDING = (
    ("pending_x", "float32", "B S H * P"),
    ("pending_B", "float32", "B S ngroups * N"),
    ("pending_decay", "float32", "B S H"),
    ("pending_count", "uint8", "B"),
)

OP = Op(
    "DeferredScanStep",
    inputs=(
        *INPUTS,
        *(tensor(*spec) for spec in _PENDING),
        tensor("state_scale", "float32", "B H N", scale_of="state"),
    ),
    outputs=(
        tensor("y", "float32", "B T H * P"),
        tensor("new_state", STATES, "B H N P", over="state"),
        *(tensor(f"new_{name}", dtype, shape, over=name) for name, dtype, shape in _PENDING),
        tensor("new_state_scale", "float32", "B H N", scale_of="state", over="state_scale"),
    ),
    attributes=ATTRIBUTES,
    requires=(Multiple("H", "ngroups"), Between("S", SLOTS, SLOTS, "two blocks of tokens")),
    reference=deferred_scan_step_ref,
    body=_body,
    draw=_draw,
    cases=_cases,
    tolerance=_tolerance,
)
