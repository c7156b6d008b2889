"""The arithmetic of the `ai.dfssm` ops, written as plainly as NumPy allows. Everything else is compared with this.

Activations, scales and sums of the float parts are fp32; integer sums are int32 and exact. Every function checks its
arguments against `schema.py` and raises DfssmError naming op, input, expected and got.
"""

import numpy as np

from .packing import from_row16, unpack_bits, up_from_row16
from .schema import LAYOUT_ROW16, OPS

F32 = np.float32

TINY = F32(1e-30)
"""A row of activations or of int8 state whose largest magnitude is below this counts as zero."""


def quantize_activations_ref(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def integer_matmul_ref(q: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Exact q i8 [..., K] . w i8 [M, K] -> i32 [..., M] (float64 holds every such sum: K * 127 * 127 < 2^53)."""
    return (q.astype(np.float64) @ w.astype(np.float64).T).astype(np.int32)


def binary_scaffold_matmul_ref(x, bits, scale, down, down_scale, up, up_scale, planes=1, layout=0):
    """y = (scale s)(2 sum_{bit=1} q - sum q) summed over planes + up_scale (up . h), h = (down_scale s)(down . q).

    x f32 [B,T,K], bits u8 [planes?,M,K/8] (layout 1: [planes?,Mp,K/8]), scale f32 [planes?,M], down i8 [R,K],
    down_scale f32 [R], up i8 [M,R], up_scale f32 [M] -> y f32 [B,T,M]. The axis `planes` is there when planes > 1.
    """
    arguments = dict(x=x, bits=bits, scale=scale, down=down, down_scale=down_scale, up=up, up_scale=up_scale)
    rows = OPS["BinaryScaffoldMatMul"].check(arguments, dict(planes=planes, layout=layout))["M"]
    if layout == LAYOUT_ROW16:
        bits, up = from_row16(bits, rows), up_from_row16(up, rows)
    if planes == 1:
        bits, scale = bits[None], scale[None]
    q, s = quantize_activations_ref(x)
    y = np.zeros((*x.shape[:-1], rows), F32)
    for plane in range(planes):
        y = y + (scale[plane] * s) * integer_matmul_ref(q, unpack_bits(bits[plane])).astype(F32)
    h = (down_scale * s) * integer_matmul_ref(q, down).astype(F32)
    return y + up_scale * (h @ up.astype(F32).T)


def int8_matmul_ref(x, w, w_scale):
    """y = (w_scale s)(w . q): x f32 [B,T,K], w i8 [M,K], w_scale f32 [M] -> f32 [B,T,M]. The LM head."""
    OPS["Int8MatMul"].check(dict(x=x, w=w, w_scale=w_scale))
    q, s = quantize_activations_ref(x)
    return (w_scale * s) * integer_matmul_ref(q, w).astype(F32)


def columns_ref(x: np.ndarray, start: int, width: int) -> np.ndarray:
    """The columns [start, start + width) of x [..., >= start + width]; all of x for start = -1."""
    return x if start < 0 else x[..., start : start + width]


def silu_ref(x: np.ndarray) -> np.ndarray:
    """x / (1 + exp(-x)) in fp32, without overflow."""
    e = np.exp(-np.abs(x))
    return (x * np.where(x >= 0, F32(1), e) / (F32(1) + e)).astype(F32)


def softplus_ref(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)) in fp32, without overflow."""
    return (np.maximum(x, F32(0)) + np.log1p(np.exp(-np.abs(x)))).astype(F32)


def causal_conv1d_step_ref(x, state, weight, bias, activation="silu", x_start=-1):
    """Depthwise causal convolution over [state, x]: x f32 [B,T,C], state f32 [B,C,W-1] (oldest first), weight f32
    [C,W], bias f32 [C] -> y f32 [B,T,C], new_state f32 [B,C,W-1]. With `x_start` x is a range of columns.
    """
    arguments = dict(x=x, state=state, weight=weight, bias=bias)
    sizes = OPS["CausalConv1dStep"].check(arguments, dict(activation=activation, x_start=x_start))
    x = columns_ref(x, x_start, sizes["C"])
    tokens, width = x.shape[1], weight.shape[1]
    window = np.concatenate([state.transpose(0, 2, 1), x], axis=1)  # [B, W-1+T, C]
    y = np.broadcast_to(bias, x.shape)
    for w in range(width):
        y = y + window[:, w : w + tokens] * weight[:, w]
    new_state = np.ascontiguousarray(window[:, tokens:].transpose(0, 2, 1))
    return (silu_ref(y) if activation == "silu" else y.astype(F32)), new_state


def quantize_state_ref(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """SSM state to int8, one scale a row of headdim: f32 [B,H,N,P] -> i8 [B,H,N,P], f32 [B,H,N].

    m = max|row|, q = rint(row * (127 / m)), scale = m / 127, as for the activations. No error feedback: carried along
    the row or along d_state (the sigma-delta of the paper) it raised the error of y from 0.9 % to 1.1 %, because
    the noise it shapes meets B and C, which have no order along d_state (`python bench/int8_state.py`).
    """
    q, scale = quantize_activations_ref(state)
    return q, scale[..., 0]


def selective_scan_step_ref(
    x, dt, B, C, A_log, D, dt_bias, state, state_scale=None, ngroups=1, dt_min=0.0, dt_max=float("inf"),
    x_start=-1, dt_start=-1, B_start=-1, C_start=-1,
):  # fmt: skip
    """The Mamba-2 recurrence over T tokens, one token after the other, in fp32.

    d = clamp(softplus(dt + dt_bias), dt_min, dt_max); state = exp(-exp(A_log) d) state + d B (x) x;
    y = C . state + D x. Head h reads group h // (H / ngroups) of B and C.

    x f32 [B,T,H*P], dt f32 [B,T,H], B and C f32 [B,T,ngroups*N], A_log, D, dt_bias f32 [H], state [B,H,N,P] fp32, fp16
    or int8 (then state_scale f32 [B,H,N]) -> y f32 [B,T,H*P], new_state, and new_state_scale for int8. A narrow state
    is widened at entry and rounded once at exit: prefill and steps differ by that rounding only. With their `*_start`
    x, dt, B and C are ranges of columns, of one tensor or of several.
    """
    arguments = dict(x=x, dt=dt, B=B, C=C, A_log=A_log, D=D, dt_bias=dt_bias, state=state, state_scale=state_scale)
    attributes = dict(ngroups=ngroups, dt_min=dt_min, dt_max=dt_max)
    attributes |= dict(x_start=x_start, dt_start=dt_start, B_start=B_start, C_start=C_start)
    sizes = OPS["SelectiveScanStep"].check(arguments, attributes)
    batch, tokens, heads, headdim, d_state = (sizes[k] for k in "BTHPN")
    x, dt = columns_ref(x, x_start, heads * headdim), columns_ref(dt, dt_start, heads)
    B, C = columns_ref(B, B_start, ngroups * d_state), columns_ref(C, C_start, ngroups * d_state)
    x = x.reshape(batch, tokens, heads, headdim)
    repeat = heads // ngroups
    B = B.reshape(batch, tokens, ngroups, d_state).repeat(repeat, axis=2)  # [B, T, H, N]
    C = C.reshape(batch, tokens, ngroups, d_state).repeat(repeat, axis=2)
    delta = np.clip(softplus_ref(dt + dt_bias), F32(dt_min), F32(dt_max))
    decay = np.exp(-np.exp(A_log) * delta)
    h = state.astype(F32)
    if state_scale is not None:
        h = h * state_scale[..., None]
    y = np.empty_like(x)
    for t in range(tokens):
        dB = delta[:, t, :, None] * B[:, t]  # [B, H, N]
        h = decay[:, t, :, None, None] * h + dB[..., None] * x[:, t, :, None, :]
        y[:, t] = np.einsum("bhn,bhnp->bhp", C[:, t], h) + D[:, None] * x[:, t]
    y = y.reshape(batch, tokens, heads * headdim)
    if state_scale is not None:
        return y, *quantize_state_ref(h)
    return y, h.astype(state.dtype)


def rms_norm_ref(x, weight, eps=1e-5):
    """x rsqrt(mean(x^2) + eps) weight: x f32 [B,T,C], weight f32 [C] -> f32 [B,T,C]."""
    OPS["RMSNorm"].check(dict(x=x, weight=weight), dict(eps=eps))
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + F32(eps)) * weight


def gated_rms_norm_ref(y, z, weight, eps=1e-5, groups=1, z_start=-1):
    """rmsnorm(y silu(z)) weight, each of `groups` equal parts of the channels normed on its own: y and z f32 [B,T,C],
    weight f32 [C] -> f32 [B,T,C]. With `z_start` z is a range of columns.
    """
    OPS["GatedRMSNorm"].check(dict(y=y, z=z, weight=weight), dict(eps=eps, groups=groups, z_start=z_start))
    z = columns_ref(z, z_start, y.shape[-1])
    v = (y * silu_ref(z)).reshape(*y.shape[:-1], groups, -1)
    v = v / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + F32(eps))
    return v.reshape(y.shape) * weight


REFERENCES = {
    "BinaryScaffoldMatMul": binary_scaffold_matmul_ref,
    "Int8MatMul": int8_matmul_ref,
    "CausalConv1dStep": causal_conv1d_step_ref,
    "SelectiveScanStep": selective_scan_step_ref,
    "GatedRMSNorm": gated_rms_norm_ref,
    "RMSNorm": rms_norm_ref,
}
"""Op name -> reference; call it with the op's input names and attributes as keywords."""
