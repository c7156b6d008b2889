"""The quantised arithmetic of the student in torch: `dfssm.opset.reference`, with gradients.

Integers are carried as integer-valued fp32 tensors, so that the same code trains and evaluates; their
products and sums are exact. Gradients are straight-through surrogates: rounding counts as the identity, sign
as a clamp (see the classes). Letters in shapes: tokens K wide, M rows of weights, R the rank, P binary
planes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dfssm.opset.reference import TINY

LARGEST = 127  # of |q| in an int8 tensor; -128 is not used, so that the codes are symmetric
_EXACT = 2**24  # fp32 holds every integer up to here
# The +-1 of all 256 bytes, LSB first: one look-up unpacks eight bits.
_SIGNS_OF_BYTE = torch.tensor([[2.0 * (byte >> bit & 1) - 1.0 for bit in range(8)] for byte in range(256)])


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


class _Sign(torch.autograd.Function):
    """+1 where x > 0, else -1; the gradient passes where |x| < window.

    The window (the clipped estimator of Hubara et al., arXiv 1602.02830) keeps weights that no small step
    could flip from drifting further from the threshold.
    """

    @staticmethod
    def forward(ctx, x: Tensor, window: float) -> Tensor:
        ctx.save_for_backward(x.abs() < window)
        return torch.where(x > 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


class _IntegerMatmul(torch.autograd.Function):
    """q[n,K] @ w[M,K].T, exact; both gradients of a plain product, in `gradient_dtype`."""

    @staticmethod
    def forward(ctx, q: Tensor, w: Tensor, columns: int, gradient_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(q, w)
        ctx.gradient_dtype = gradient_dtype
        with torch.autocast(q.device.type, enabled=False):
            parts = [a @ b.to(q.dtype).T for a, b in zip(q.split(columns, -1), w.split(columns, -1), strict=True)]
        # Each part is exact in fp32. Their sum may pass 2^24: it is rounded once, as the reference's int32.
        return parts[0] if len(parts) == 1 else sum(part.int() for part in parts).float()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        q, w = (t.to(ctx.gradient_dtype) for t in ctx.saved_tensors)
        gradient = gradient.to(ctx.gradient_dtype)
        to_q = (gradient @ w).float() if ctx.needs_input_grad[0] else None
        to_w = (gradient.T @ q).float() if ctx.needs_input_grad[1] else None
        return to_q, to_w, None, None


def integer_matmul(q: Tensor, w: Tensor, largest: int = LARGEST) -> Tensor:
    """Exact q[...,K] . w[M,K] -> fp32 [...,M] of int8 codes, held as fp32 or int8.

    `largest` bounds |w|: 1 for signs. Under autocast only the gradients take the cast type.
    """
    device = q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    columns = _EXACT // (LARGEST * largest)
    return _IntegerMatmul.apply(q.flatten(0, -2), w, columns, dtype).unflatten(0, q.shape[:-1])


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations or weights x[...,K] -> int8 codes q (integer-valued fp32) [...,K], a scale a row s[...,1].

    m = max|x|, q = rint(x * (127 / m)), s = m / 127, each an fp32 operation of its own; a row with m < TINY
    gives q = s = 0. The gradient of q * s is the identity: rounding passes it on, the scale is a constant.
    """
    x = x.float()
    m = x.detach().abs().amax(-1, keepdim=True)
    zero = m < float(TINY)
    # Tensor by tensor: torch multiplies by a reciprocal where one side of a division is a Python number.
    largest = torch.full_like(m, LARGEST)
    inverse = (largest / m).masked_fill(zero, 0.0)
    return _Round.apply(x * inverse), (m / largest).masked_fill(zero, 0.0)


def sign(latent: Tensor, window: float = 1.5) -> Tensor:
    """Latent weights -> +1 (latent > 0) or -1, with the windowed straight-through gradient."""
    return _Sign.apply(latent, window)


def pack_bits(signs: Tensor) -> Tensor:
    """Signs [...,K] -> u8 [...,K/8]: bit k is byte k/8, position k%8 (LSB first), 1 where > 0. K % 8 == 0."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=signs.device)
    return ((signs > 0).unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """u8 [...,K/8] -> fp32 +1 or -1 [...,K]; the inverse of pack_bits."""
    return _SIGNS_OF_BYTE.to(bits.device)[bits.int()].flatten(-2)


def binary_scaffold_matmul(
    x: Tensor, signs: Tensor, scale: Tensor, down: Tensor, down_scale: Tensor, up: Tensor, up_scale: Tensor
) -> Tensor:
    """y = (scale s)(signs . q), summed over planes, + up_scale (up . h), h = (down_scale s)(down . q).

    x[...,K]; signs [M,K] with scale [M], or [P,M,K] with [P,M]; int8 codes (any dtype) down [R,K] with
    down_scale [R] and up [M,R] with up_scale [M], R >= 0. Returns fp32 [...,M].
    """
    q, s = quantize(x)
    planes = (signs, scale) if signs.ndim == 3 else (signs[None], scale[None])
    y = sum((b * s) * integer_matmul(q, a, largest=1) for a, b in zip(*planes, strict=True))
    if down.shape[0]:
        h = (down_scale * s) * integer_matmul(q, down)
        with torch.autocast(x.device.type, enabled=False):
            y = y + up_scale * (h @ up.to(h.dtype).T)
    return y


def int8_matmul(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """y = (w_scale s)(w . q): x[...,K], int8 codes w [M,K], w_scale [M] -> fp32 [...,M]."""
    q, s = quantize(x)
    return (w_scale * s) * integer_matmul(q, w)
