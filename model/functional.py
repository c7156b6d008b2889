"""The float pieces of a Mamba-2 block as pure functions: norms, causal convolution, selective scan.

Arithmetic is fp32 whatever the activations' storage (fp64 stays fp64, for tests). Shapes: batch B, tokens T,
channels C, heads H of headdim P, groups G, state size N. The scan is the SSD of Dao & Gu, "Transformers are
SSMs", arXiv 2405.21060.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """fp16 and bf16 to fp32; fp32 and fp64 unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _mean_square(x: Tensor) -> Tensor:
    """The mean of x^2 over the last axis, which stays; NaN where the squares overflow."""
    mean = x.square().mean(-1, keepdim=True)
    return mean.masked_fill(mean.isinf(), math.nan)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x[..., C] / rms(x) * weight[C]."""
    x = _wide(x)
    return x * torch.rsqrt(_mean_square(x) + eps) * weight


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """rms_norm(y * silu(z)) * weight with one rms per group of C // groups channels: the gate comes first."""
    v = (_wide(y) * F.silu(_wide(z))).unflatten(-1, (groups, -1))
    return (v * torch.rsqrt(_mean_square(v) + eps)).flatten(-2) * weight


def causal_conv1d(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of x[B,T,C], weight[C,W], bias[C]; activation "silu" or "none".

    state[B,C,W-1] holds the tokens before x, newest last. Returns y[B,T,C] and the new state.
    """
    window = torch.cat((state.mT.to(x.dtype), x), dim=1).mT
    # In two dimensions the channels may lie beside one another, as they do in x: on CPU 1.5 times as fast.
    y = F.conv2d(window.unsqueeze(2), weight[:, None, None], bias, groups=weight.shape[0]).squeeze(2).mT.contiguous()
    # A copy: a view would keep the whole window alive.
    return (F.silu(y) if activation == "silu" else y), window[:, :, x.shape[1] :].clone()


def discretize(dt: Tensor, dt_bias: Tensor, dt_limit: tuple[float, float]) -> Tensor:
    """The step size softplus(dt + dt_bias), clamped to dt_limit. dt[...,H], dt_bias[H]."""
    delta = F.softplus(_wide(dt) + dt_bias)
    return delta if dt_limit == (0.0, math.inf) else delta.clamp(*dt_limit)


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    ngroups: int = 1,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """The recurrence, token by token: state = exp(-exp(A_log) d) state + d B (x) x; y = C . state + D x.

    x[B,T,H*P], dt[B,T,H], B and C [B,T,G*N], A_log, D, dt_bias [H], state[B,H,N,P]; head h reads group
    h // (H/G). Returns y[B,T,H*P] and the new state; `state` is kept.
    """
    heads = A_log.shape[0]
    delta = discretize(dt, dt_bias, dt_limit)  # B,T,H
    decay = torch.exp(-A_log.exp() * delta)
    xh = _wide(x).unflatten(-1, (heads, -1))  # B,T,H,P
    Bh, Ch = (
        _wide(m).unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2) for m in (B, C)
    )  # B,T,H,N
    state, ys = _wide(state), []
    for t in range(x.shape[1]):
        update = (delta[:, t, :, None] * Bh[:, t])[..., None] * xh[:, t, :, None, :]
        state = decay[:, t, :, None, None] * state + update
        ys.append((Ch[:, t, :, None, :] @ state).squeeze(2))  # B,H,P
    y = torch.stack(ys, dim=1) + D[:, None] * xh
    return y.flatten(2), state


class _Decayed(torch.autograd.Function):
    """scores[...,L,L] of pairs of tokens, times exp(log_decay[...,R,L]) of one over that of the other, for each of R
    heads: [...,R,L,L], 0 above the diagonal. These are the largest tensors of a scan: no operation more than it takes.
    """

    @staticmethod
    def forward(ctx, log_decay: Tensor, scores: Tensor) -> Tensor:
        # The logarithms as sums of two numbers of half their size: differences in fp64 would take twice as long. In the
        # order of the result: it would take that of its operands otherwise, and be copied for the product after it.
        log_decay = log_decay.contiguous()
        high = log_decay.to(scores.dtype)
        low = (log_decay - high).to(scores.dtype)
        decay = (high[..., :, None] - high[..., None, :]).add_(low[..., :, None]).sub_(low[..., None, :])
        decay.exp_().tril_()  # above the diagonal it is a growth, and may overflow
        result = decay * scores.unsqueeze(-3)
        ctx.save_for_backward(decay, result)
        ctx.dtype = log_decay.dtype
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        decay, result = ctx.saved_tensors
        to_exponent = gradient * result  # a row's token decays less by it, a column's more
        to_log_decay = to_exponent.sum(-1) - to_exponent.sum(-2)
        return to_log_decay.to(ctx.dtype), (gradient * decay).sum(-3)


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    *,
    ngroups: int = 1,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 64,
    round_state: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """selective_scan_step for a sequence, as matrix products over chunks of `chunk_size` tokens (any T >= 1).

    Same arguments, results and mathematics; only the order of the sums differs. `round_state` changes the state
    [...,P] that one chunk leaves to the next.
    """
    (batch, heads, N, P), tokens = state.shape, x.shape[1]
    L, R, padding = min(chunk_size, tokens), heads // ngroups, -tokens % min(chunk_size, tokens)
    x, B, C, delta = _wide(x), _wide(B), _wide(C), discretize(dt, dt_bias, dt_limit)

    # Axes: b batch, c chunk, l and s tokens of a chunk, g group, r head of the group, n state, p headdim.
    def chunks(m: Tensor, *sizes: int) -> Tensor:
        # A padded token has delta = 0: it neither decays the state nor adds to it.
        m = F.pad(m, (0, 0, 0, padding)) if padding else m  # which copies what needs none, too
        return m.view(batch, -1, L, ngroups, *sizes)

    Bc, Cc = chunks(B, N).transpose(2, 3), chunks(C, N).transpose(2, 3)  # b c g l n
    xd = chunks(x, R, P) * chunks(delta, R, 1)  # b c l g r p
    # Log decay up to and including each token, in fp64: differences of a long running sum lose digits.
    log_decay = chunks(-A_log.exp() * delta, R).double().cumsum(2)  # b c l g r

    # Within a chunk: attention with the decay between two tokens for a mask.
    decayed = _Decayed.apply(log_decay.permute(0, 1, 3, 4, 2), Cc @ Bc.mT)
    y = decayed @ xd.permute(0, 1, 3, 4, 2, 5)  # b c g r l p

    # From chunk to chunk: the heads of a group side by side in one product, so that B and C are not repeated.
    to_end = (log_decay[:, :, -1:] - log_decay).exp().to(x.dtype)[..., None]  # b c l g r 1
    from_start = log_decay.exp().to(x.dtype)[..., None]
    added = (Bc.mT @ (xd * to_end).flatten(4).transpose(2, 3)).unflatten(-1, (R, P))  # b c g n r p
    carry, entering = _wide(state).unflatten(1, (ngroups, R)).transpose(2, 3), []  # b g n r p
    for new, kept in zip(added.unbind(1), from_start[:, :, -1, :, None].unbind(1), strict=True):
        entering.append(carry)
        carry = torch.addcmul(new, kept, carry)
        carry = carry if round_state is None else round_state(carry)
    before = (Cc @ torch.stack(entering, dim=1).flatten(4)).transpose(2, 3)  # b c l g (r p)
    before = before.unflatten(-1, (R, P))

    y = torch.addcmul(y.permute(0, 1, 4, 2, 3, 5), before, from_start)
    y = y.reshape(batch, -1, heads * P)[:, :tokens]
    return torch.addcmul(y, x, D.repeat_interleave(P)), carry.transpose(2, 3).flatten(1, 2)
