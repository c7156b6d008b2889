"""The quantised arithmetic of the student in torch: `dfssm.opset.reference`, with gradients.

Integers are carried as integer-valued fp32 tensors, so that the same code trains and evaluates; their
products and sums are exact. Gradients are straight-through surrogates: rounding counts as the identity, sign
as a clamp (see the classes). Letters in shapes: tokens K wide, M rows of weights, R the rank, P binary
planes.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from dfssm.opset.schema import HALF_MAX, TINY

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


def _signs(x: Tensor) -> Tensor:
    """+1.0 where x > 0, else -1.0."""
    return (x > 0).to(torch.get_default_dtype()).mul_(2).sub_(1)  # on CPU three times as fast as torch.where


class _Sign(torch.autograd.Function):
    """+1 where x > 0, else -1; the gradient passes where |x| < window.

    The window (the clipped estimator of Hubara et al., arXiv 1602.02830) keeps weights that no small step
    could flip from drifting further from the threshold.
    """

    @staticmethod
    def forward(ctx, x: Tensor, window: float) -> Tensor:
        ctx.save_for_backward(x.abs() < window)
        return _signs(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


def integer_matmul(q: Tensor, w: Tensor, largest: int = LARGEST) -> Tensor:
    """Exact q[...,K] . w[M,K] -> fp32 [...,M] of int8 codes, held as fp32 or int8; no gradient.

    `largest` bounds |w|: 1 for signs.
    """
    if q.is_cuda and suits_int8_units(math.prod(q.shape[:-1]), *w.shape):
        return int8_units_matmul(q, w)
    columns = _EXACT // (LARGEST * largest)
    # bf16 holds every int8 code and TF32 too, and their products are summed in fp32: rounding to them is exact.
    pieces = zip(q.split(columns, -1), w.split(columns, -1), strict=True)
    with torch.no_grad():
        parts = [_product(a.float(), b.float().T, True) for a, b in pieces]
    # Each part is exact in fp32. Their sum may pass 2^24: it is rounded once, as the reference's int32.
    return parts[0] if len(parts) == 1 else sum(part.int() for part in parts).float()


def suits_int8_units(rows: int, outputs: int, columns: int) -> bool:
    """Whether torch._int_mm takes these sizes on a GPU, and its sums fit int32."""
    return rows > 16 and outputs % 8 == columns % 8 == 0 and 0 < columns * LARGEST**2 < 2**31


def int8_units_matmul(q: Tensor, w: Tensor) -> Tensor:
    """integer_matmul by the int8 units, twice as fast as TF32's on paper; the int32 sums are rounded once."""
    with torch.no_grad():
        rows = q.to(torch.int8).flatten(0, -2)
        return torch._int_mm(rows, w.to(torch.int8).T).float().view(*q.shape[:-1], len(w))


@torch.library.custom_op("dfssm::product", mutates_args=())
def _product(a: Tensor, b: Tensor, fast: bool) -> Tensor:
    """a @ b in fp32; `fast`: inputs may be rounded to bf16 (TF32 on CUDA) where that is faster, sums stay fp32.

    An op of its own, so that torch.compile keeps the layer around it in one piece: it does not trace the setting.
    """
    # The settings are from torch 2.9 on; the CPU's has no place before.
    cuda = a.device.type == "cuda"
    backend = torch.backends.cuda.matmul if cuda else getattr(torch.backends.mkldnn, "matmul", None)
    with torch.autocast(a.device.type, enabled=False):
        if not fast or backend is None or not hasattr(backend, "fp32_precision"):
            return a @ b
        before, backend.fp32_precision = backend.fp32_precision, "tf32" if cuda else "bf16"
        try:
            return a @ b
        finally:
            backend.fp32_precision = before


@_product.register_fake
def _(a: Tensor, b: Tensor, fast: bool) -> Tensor:
    return a @ b


def gradient_dtype(device: torch.device) -> torch.dtype:
    """The type that autocast gives to products, fp32 without it."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in fp32 from inputs of `dtype`: the products of a backward pass."""
    if dtype != torch.float32 and a.device.type != "cpu":
        return (a.to(dtype) @ b.to(dtype)).float()
    return _product(a, b, dtype == torch.bfloat16)  # on CPU the copies would cost more than the product


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations or weights x[...,K] -> int8 codes q (integer-valued fp32) [...,K], a scale a row s[...,1].

    m = max|x|, q = rint(x * (127 / m)), s = m / 127, each an fp32 operation of its own; a row with m < TINY
    gives q = s = 0, one that is not finite s = NaN and q = 0, NaN where x is NaN or infinite: all products with s are
    NaN anyhow. The gradient of q * s is the identity: rounding passes it on, the scale is a constant.
    """
    x = x.float()
    m = x.detach().abs().amax(-1, keepdim=True)
    zero, wild = m < TINY, ~m.isfinite()
    # Tensor by tensor: torch multiplies by a reciprocal where one side of a division is a Python number.
    largest = torch.full_like(m, LARGEST)
    inverse = (largest / m).masked_fill(zero | wild, 0.0)
    return _Round.apply(x * inverse), (m / largest).masked_fill(zero, 0.0).masked_fill(wild, math.nan)


def dequantized(x: Tensor) -> Tensor:
    """The values that the int8 codes of x[...,K] stand for; the gradient passes unchanged."""
    q, s = quantize(x)
    return q * s


def quantize_state(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[...,P] as an int8 state is stored, i8 and a scale f32[...]; a row that is not finite is 0 with scale NaN."""
    q, s = quantize(x)
    return q.nan_to_num(0.0).to(torch.int8), s[..., 0]


def half(x: Tensor) -> Tensor:
    """x as fp16, saturating at +-65504; NaN stays NaN. The gradient passes where nothing saturates."""
    return x.clamp(-HALF_MAX, HALF_MAX).half()


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [M,K] -> int8 codes [M,K] (integer-valued fp32) and their scales [M]; K may be 0, with scales of 0."""
    if not weight.shape[1]:
        return weight.float(), weight.new_zeros(len(weight), dtype=torch.float32)
    q, s = quantize(weight)
    return q, s[:, 0]


def sign(latent: Tensor, window: float = 1.5) -> Tensor:
    """Latent weights -> +1 (latent > 0) or -1, with the windowed straight-through gradient."""
    return _Sign.apply(latent, window)


def pack_bits(signs: Tensor) -> Tensor:
    """Signs [...,K] -> u8 [...,K/8]: bit k is byte k/8, position k%8 (LSB first), 1 where > 0. K % 8 == 0."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=signs.device)
    return ((signs > 0).unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """u8 [...,K/8] -> fp32 +1 or -1 [...,K]; the inverse of pack_bits."""
    # Half the time of `table[bits.int()]`, on 2 to 2,000 rows.
    return _SIGNS_OF_BYTE.to(bits.device).index_select(0, bits.flatten().int()).view(*bits.shape[:-1], -1)


@torch.no_grad()
def binary_scaffold_matmul(
    x: Tensor, signs: Tensor, scale: Tensor, down: Tensor, down_scale: Tensor, up: Tensor, up_scale: Tensor
) -> Tensor:
    """y = (scale s)(signs . q), summed over planes, + up_scale (up . h), h = (down_scale s)(down . q).

    x[...,K]; signs [M,K] with scale [M], or [P,M,K] with [P,M]; int8 codes (any dtype) down [R,K] with
    down_scale [R] and up [M,R] with up_scale [M], R >= 0. Returns fp32 [...,M], without a gradient.
    """
    return _scaffold_product(*quantize(x), signs, scale, down, down_scale, up, up_scale)[0]


def _scaffold_product(q, s, signs, scale, down, down_scale, up, up_scale) -> tuple[Tensor, Tensor]:
    """`binary_scaffold_matmul` of the codes q, s of x; returns y[...,M] and h[...,R]."""
    planes = (signs, scale) if signs.ndim == 3 else (signs[None], scale[None])
    parts = ((b * s).mul_(integer_matmul(q, a, largest=1)) for a, b in zip(*planes, strict=True))
    y = functools.reduce(Tensor.add_, parts)
    h = (down_scale * s) * integer_matmul(q, down)
    if down.shape[0]:
        with torch.autocast(q.device.type, enabled=False):
            y.add_((h @ up.to(h.dtype).T).mul_(up_scale))
    return y, h


@torch.no_grad()
def int8_matmul(x: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """y = (w_scale s)(w . q): x[...,K], int8 codes w [M,K], w_scale [M] -> fp32 [...,M], without a gradient."""
    q, s = quantize(x)
    return (w_scale * s).mul_(integer_matmul(q, w))


class _TrainedScaffold(torch.autograd.Function):
    """binary_scaffold_matmul of latents. What is kept of x for the backward pass is its int8 codes.

    The gradients are those of the product of the dequantised operands, with every quantiser the identity and sign
    passing |latent| < window.
    """

    @staticmethod
    def forward(ctx, x: Tensor, latent: Tensor, scale: Tensor, down: Tensor, up: Tensor, window: float) -> Tensor:
        q, s = quantize(x)
        (dq, ds), (uq, us) = (quantize_rows(t) for t in (down, up))
        y, h = _scaffold_product(q, s, _signs(latent), scale, dq, ds, uq, us)
        ctx.save_for_backward(q.to(torch.int8), s, latent, scale, h, dq * ds[:, None], uq * us[:, None])
        ctx.window, ctx.dtype, ctx.x_dtype = window, gradient_dtype(x.device), x.dtype
        return y

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        q, s, latent, scale, h, down, up = ctx.saved_tensors
        signs, dtype = _signs(latent), ctx.dtype
        rows = g.flatten(0, -2).float()
        x = q.float().mul_(s).flatten(0, -2)
        weight = signs * scale[..., None]
        if signs.ndim == 3:  # one product for all planes
            weight = weight.sum(0)
        # Transposed: the CPU's library takes ten times as long for a matrix of a few columns as for one of a few rows.
        through_h = product(up.T.contiguous(), rows.T, dtype).T
        to_x = product(rows, weight, dtype) + product(through_h, down, dtype)
        to_weight = product(rows.T, x, dtype)  # of the sum of scale * signs, every plane's
        to_scale = (signs * to_weight).sum(-1)
        to_latent = (to_weight * scale[..., None]).masked_fill_(latent.abs() >= ctx.window, 0.0)
        to_down = product(through_h.T, x, dtype)
        to_up = product(h.flatten(0, -2).T, rows, dtype).T
        return to_x.view(q.shape).to(ctx.x_dtype), to_latent, to_scale, to_down, to_up, None


def trained_scaffold_matmul(
    x: Tensor, latent: Tensor, scale: Tensor, down: Tensor, up: Tensor, window: float = 1.5
) -> Tensor:
    """binary_scaffold_matmul with the signs of `latent` and the int8 rows of the latents down[R,K] and up[M,R]."""
    return _TrainedScaffold.apply(x, latent, scale, down, up, window)


class _TrainedInt8(torch.autograd.Function):
    """int8_matmul of latents, with gradients as _TrainedScaffold."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        (q, s), (w, w_scale) = quantize(x), quantize_rows(weight)
        ctx.save_for_backward(q.to(torch.int8), s, w * w_scale[:, None])
        ctx.dtype, ctx.x_dtype = gradient_dtype(x.device), x.dtype
        return (w_scale * s) * integer_matmul(q, w)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        q, s, weight = ctx.saved_tensors
        rows = g.flatten(0, -2).float()
        to_x = product(rows, weight, ctx.dtype).view(q.shape).to(ctx.x_dtype)
        return to_x, product(rows.T, (q.float() * s).flatten(0, -2), ctx.dtype)


def trained_int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """int8_matmul with the int8 rows of the latents weight[M,K]."""
    return _TrainedInt8.apply(x, weight)
