"""The convolution and the scan of a deferred state as pure functions, as DeferredConv1dStep and DeferredScanStep."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dfssm.opset.pending import kept
from dfssm.opset.schema import BLOCK

from .functional import discretize
from .quant import half, quantize_state


def deferred_conv1d(x: Tensor, window: Tensor, weight: Tensor, bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """causal_conv1d with SiLU over x[B,T,C], behind the first W-1+count tokens of window[B,W+15,C]: y, new window."""
    past = weight.shape[1] - 1
    known = torch.cat((window[:, : past + count], x), dim=1)
    y = F.silu(F.conv1d(known[:, count:].mT, weight[:, None], bias, groups=weight.shape[0])).mT
    return y, _filled(window, known[:, kept(count, x.shape[1]) :])


def deferred_scan(
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    A_log: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    state: Sequence[Tensor],
    *,
    ngroups: int = 1,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, list[Tensor]]:
    """selective_scan_step on a deferred state of rows that have one count.

    `state`: ssm_state, pending_x, pending_B, pending_decay, pending_count and, of int8, ssm_scale, as in the graph.
    Returns y[B,T,H*P] and the new ones.
    """
    stored, *pending, counts = state[:5]
    scale = state[5] if len(state) > 5 else None
    heads, tokens, count = A_log.shape[0], x.shape[1], int(counts[0])
    delta = discretize(dt, dt_bias, dt_limit)
    xh = x.unflatten(-1, (heads, -1))
    added = (xh * delta[..., None]).flatten(2), B, torch.exp(-A_log.exp() * delta)
    known = [torch.cat((slots[:, :count], new), dim=1) for slots, new in zip(pending, added, strict=True)]

    def per_head(m: Tensor) -> Tensor:  # B,T,G*N -> B,H,T,N
        return m.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2).transpose(1, 2)

    xs, Bs, decays = known[0].unflatten(-1, (heads, -1)).transpose(1, 2), per_head(known[1]), known[2].mT
    Cs = per_head(torch.cat((torch.zeros_like(known[1][:, :count]), C), dim=1))
    moved, ys = kept(count, tokens), []
    for start in range(0, count + tokens, BLOCK):
        if start == moved:
            new_stored, new_scale = stored, scale
        h = stored.float() if scale is None else stored.float() * scale[..., None]
        x_b, B_b, C_b, decay = (m[:, :, start : start + BLOCK] for m in (xs, Bs, Cs, decays))
        # left[t, j]: what tokens j+1 to t leave of token j; total[t]: what tokens 0 to t leave of the state
        size = decay.shape[2]
        rows = [torch.cat((_suffix_products(decay[..., : t + 1]), decay.new_zeros(*decay.shape[:2], size - t - 1)), -1)
                for t in range(size)]  # fmt: skip
        left, total = torch.stack(rows, dim=2), decay.cumprod(2)
        scores = left * (C_b @ B_b.mT)
        ys.append(total[..., None] * (C_b @ h) + scores @ x_b)
        if start + BLOCK < count + tokens:
            folded = total[:, :, -1, None, None] * h + B_b.mT @ (left[:, :, -1, :, None] * x_b)
            stored, scale = _narrow(folded, stored.dtype)
    y = torch.cat(ys, dim=2)[:, :, count:].transpose(1, 2) + D[:, None] * xh
    new_pending = [_filled(slots, m[:, moved:]) for slots, m in zip(pending, known, strict=True)]
    scales = [] if new_scale is None else [new_scale]
    return y.flatten(2), [new_stored, *new_pending, torch.full_like(counts, count + tokens - moved), *scales]


def _suffix_products(decay: Tensor) -> Tensor:
    """[..., T] -> of each the product of those behind it."""
    return F.pad(decay.flip(-1).cumprod(-1)[..., :-1], (1, 0), value=1.0).flip(-1)


def _narrow(h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    if dtype == torch.int8:
        return quantize_state(h)
    return (half(h) if dtype == torch.float16 else h), None


def _filled(slots: Tensor, first: Tensor) -> Tensor:
    """`slots` with their first ones replaced."""
    return torch.cat((first, slots[:, first.shape[1] :]), dim=1)
