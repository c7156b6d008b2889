"""The scan of mamba_ssm in place of ssd_chunked, for training on a GPU where that package is installed.

The same mathematics by fused Triton kernels (Dao & Gu, arXiv 2405.21060), which multiply fp32 as TF32. So they train;
what is written is evaluated by our own. Not yet run on a GPU: on each it is tried once, beside ours, before it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .functional import ssd_chunked
from .teacher import SelectiveScan

Scan = Callable[..., tuple[Tensor, Tensor]]
"""Called as ssd_chunked, with all of its arguments but `round_state`."""

# TF32 keeps 11 bits of a number; a sum of products over a chunk and its gradients stay below a part in a hundred. A
# wrong argument, a sign or an order of axes is off by far more.
CLOSE = 1e-2


def find(device: torch.device) -> Scan | None:
    """The scan to train with on `device`, None where ssd_chunked is to be used. Warns where the two are apart."""
    if device.type != "cuda":
        return None
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    scan = adapted(mamba_chunk_scan_combined)
    apart = difference(scan, device)
    if apart <= CLOSE:
        return scan
    warnings.warn(f"mamba_ssm's scan is {apart:.1%} off ours on {device}: ours is used", RuntimeWarning, stacklevel=2)
    return None


@contextmanager
def lent(model: nn.Module, device: torch.device) -> Iterator[None]:
    """In the `with` block all scans of `model` are `find(device)`'s, where there is one."""
    scan = find(device)
    scans = [module for module in model.modules() if isinstance(module, SelectiveScan)]
    for module in scans:
        module.fused = scan
    try:
        yield
    finally:
        for module in scans:
            module.fused = None


def adapted(kernel: Callable[..., Any]) -> Scan:
    """mamba_chunk_scan_combined as `Scan`: there tensors have an axis of heads or groups, and a state is [B,H,P,N]."""

    def scan(*inputs: Tensor, ngroups: int, dt_limit: tuple[float, float], chunk_size: int) -> tuple[Tensor, Tensor]:
        x, dt, B, C, A_log, D, dt_bias, state = inputs
        y, last = kernel(
            x.unflatten(-1, (len(A_log), -1)),
            dt,
            -A_log.exp(),
            B.unflatten(-1, (ngroups, -1)),
            C.unflatten(-1, (ngroups, -1)),
            chunk_size,
            D=D,
            dt_bias=dt_bias,
            initial_states=state.mT.contiguous(),
            dt_softplus=True,
            dt_limit=dt_limit,
            return_final_states=True,
        )
        return y.flatten(2), last.mT

    return scan


def difference(scan: Scan, device: torch.device) -> float:
    """How far results and gradients of `scan` are from those of ssd_chunked, as a share of the largest of each tensor:
    two sequences of 150 tokens, 4 heads in 2 groups.
    """
    generator = torch.Generator().manual_seed(0)
    batch, tokens, heads, groups, P, N = 2, 150, 4, 2, 32, 16

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    inputs = [
        *(drawn(batch, tokens, size) for size in (heads * P, heads, groups * N, groups * N)),  # x, dt, B, C
        *(drawn(heads) for _ in range(3)),  # A_log, D, dt_bias
        drawn(batch, heads, N, P),
    ]
    to_y, to_state = drawn(batch, tokens, heads * P), drawn(batch, heads, N, P)

    def run(scan: Scan) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y, state = scan(*leaves, ngroups=groups, dt_limit=(0.0, math.inf), chunk_size=64)
        ((y * to_y).sum() + (state * to_state).sum()).backward()
        return [y.detach(), state.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    found, expected = run(scan), run(ssd_chunked)
    if len(found) != len(expected):
        return math.inf
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in pairs)
