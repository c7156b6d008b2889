"""What the unpacked model costs on the same device: a decode step of Mamba-2 in bf16, as the field's implementations do
it: torch's matrix products and a Triton kernel for each of norm, convolution, state and gated norm, all in one CUDA
graph. States are laid out [B,H,P,N]. Its result is checked against `reference_step`, which is plain torch in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from .graph import Recording
from .speed import Record, fits, seconds_of

EPS = 1e-5
TOLERANCE = 0.05
"""Of logits and states after two layers, as a share of the largest: bf16 rounds each of some ten results by 2^-9."""


@dataclass(frozen=True)
class Sizes:
    """The defaults are those of mamba2-1.3b."""

    vocabulary: int = 50288
    width: int = 2048
    layers: int = 48
    heads: int = 64
    headdim: int = 64
    state: int = 128
    taps: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.headdim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.state


@triton.jit
def norm_kernel(x, weight, out, width: tl.constexpr, eps: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    value = tl.load(x + row * width + column, inside, 0.0)
    scale = 1 / tl.sqrt(tl.sum(value * value) / width + eps)
    normed = value * scale * tl.load(weight + column, inside, 0.0)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), inside)


@triton.jit
def gated_norm_kernel(y, z, weight, out, z_stride, width: tl.constexpr, eps: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(z + row * z_stride + column, inside, 0.0).to(tl.float32)
    value = tl.load(y + row * width + column, inside, 0.0) * gate / (1 + tl.exp(-gate))
    scale = 1 / tl.sqrt(tl.sum(value * value) / width + eps)
    normed = value * scale * tl.load(weight + column, inside, 0.0)
    tl.store(out + row * width + column, normed.to(out.dtype.element_ty), inside)


@triton.jit
def conv_kernel(x, past, weight, bias, out, x_stride, channels: tl.constexpr, taps: tl.constexpr, BLOCK: tl.constexpr):
    """`past` [B, taps - 1, channels], oldest first."""
    row, channel = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < channels
    newest = tl.load(x + row * x_stride + channel, inside, 0.0).to(tl.float32)
    total = tl.load(bias + channel, inside, 0.0) + newest * tl.load(
        weight + (taps - 1) * channels + channel, inside, 0.0
    )
    memory = past + row * (taps - 1) * channels + channel
    for tap in tl.static_range(taps - 1):
        value = tl.load(memory + tap * channels, inside, 0.0)
        total += value * tl.load(weight + tap * channels + channel, inside, 0.0)
        if tap > 0:
            tl.store(memory + (tap - 1) * channels, value, inside)
    tl.store(memory + (taps - 2) * channels, newest, inside)
    tl.store(out + row * channels + channel, total / (1 + tl.exp(-total)), inside)


@triton.jit
def scan_kernel(
    xbc, dt, A_log, D, dt_bias, state, y, dt_stride,
    heads: tl.constexpr, headdim: tl.constexpr, n_state: tl.constexpr, inner: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of rows of headdim of one head."""
    row, head = tl.program_id(0), tl.program_id(1)
    p, n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, n_state)
    token = xbc + row * (inner + 2 * n_state)
    step = tl.load(dt + row * dt_stride + head).to(tl.float32) + tl.load(dt_bias + head)
    step = tl.where(step > 20, step, tl.log(1 + tl.exp(step)))
    decay = tl.exp(-tl.exp(tl.load(A_log + head)) * step)
    x = tl.load(token + head * headdim + p)
    into, from_ = tl.load(token + inner + n), tl.load(token + inner + n_state + n)
    at = state + ((row * heads + head).to(tl.int64) * headdim + p[:, None]) * n_state + n[None, :]
    new = decay * tl.load(at).to(tl.float32) + (step * x)[:, None] * into[None, :]
    tl.store(at, new.to(state.dtype.element_ty))
    result = tl.sum(new * from_[None, :], 1) + tl.load(D + head) * x
    tl.store(y + (row * heads + head) * headdim + p, result)


class Model:
    """Random weights on `device`; what a normalised input gives stays of its size."""

    def __init__(self, sizes: Sizes, device: str, dtype: torch.dtype = torch.bfloat16):
        self.sizes, self.device, self.dtype = s, device, dtype = sizes, device, dtype

        def normal(*shape: int, size: float, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, device=device) * size).to(dtype)

        def rows(count: int, low: float, high: float) -> Tensor:
            return torch.empty(count, device=device).uniform_(low, high)

        self.embedding = normal(s.vocabulary, s.width, size=1.0)
        self.norm = torch.ones(s.width, device=device)
        self.layers = [
            {
                "norm": rows(s.width, 0.8, 1.2),
                "in_proj": normal(s.inner + s.channels + s.heads, s.width, size=s.width**-0.5),
                "conv": normal(s.taps, s.channels, size=0.5, dtype=torch.float32),
                "bias": normal(s.channels, size=0.1, dtype=torch.float32),
                "A_log": rows(s.heads, 0.0, 2.7),
                "D": rows(s.heads, 0.8, 1.2),
                "dt_bias": rows(s.heads, -5.0, -2.0),
                "gated_norm": rows(s.inner, 0.8, 1.2),
                "out_proj": normal(s.width, s.inner, size=s.inner**-0.5),
            }
            for _ in range(s.layers)
        ]

    def bytes(self) -> int:
        """Of all weights; the embedding is read whole, as the head."""
        every = [self.embedding, self.norm, *(value for layer in self.layers for value in layer.values())]
        return sum(value.nbytes for value in every)

    def states(self, rows: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """(of the convolution, of the scan) of each layer, zero."""
        s = self.sizes
        return [
            (
                torch.zeros(rows, s.taps - 1, s.channels, device=self.device),
                torch.zeros(rows, s.heads, s.headdim, s.state, dtype=dtype, device=self.device),
            )
            for _ in self.layers
        ]

    def step(self, ids: Tensor, states: list[tuple[Tensor, Tensor]]) -> Tensor:
        """ids [B] -> logits [B, vocabulary]; `states` are updated in place."""
        s, rows = self.sizes, len(ids)
        hidden = self.embedding[ids].float()
        normed, gated = (torch.empty(rows, size, dtype=self.dtype, device=self.device) for size in (s.width, s.inner))
        xbc, y = (torch.empty(rows, size, device=self.device) for size in (s.channels, s.inner))
        block = min(s.headdim, 16)
        for layer, (past, state) in zip(self.layers, states, strict=True):
            self._norm(hidden, layer["norm"], normed)
            z = normed @ layer["in_proj"].t()
            stride = z.stride(0)
            grid = (rows, triton.cdiv(s.channels, 256))
            conv_kernel[grid](
                z[:, s.inner :], past, layer["conv"], layer["bias"], xbc, stride, s.channels, s.taps, BLOCK=256
            )
            scan_kernel[(rows, s.heads, s.headdim // block)](
                xbc, z[:, s.inner + s.channels :], layer["A_log"], layer["D"], layer["dt_bias"], state, y, stride,
                s.heads, s.headdim, s.state, s.inner, BLOCK=block,
            )  # fmt: skip
            power = triton.next_power_of_2(s.inner)
            gated_norm_kernel[(rows,)](y, z, layer["gated_norm"], gated, stride, s.inner, EPS, BLOCK=power)
            hidden += gated @ layer["out_proj"].t()
        self._norm(hidden, self.norm, normed)
        return normed @ self.embedding.t()

    def _norm(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        width = self.sizes.width
        norm_kernel[(len(x),)](x, weight, out, width, EPS, BLOCK=triton.next_power_of_2(width))


def reference_step(model: Model, ids: Tensor, states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list]:
    """`Model.step` in plain fp32: (logits, new states)."""
    s, new_states = model.sizes, []
    hidden = model.embedding[ids].float()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight, EPS)

    for layer, (past, state) in zip(model.layers, states, strict=True):
        products = norm(hidden, layer["norm"]) @ layer["in_proj"].float().t()
        z, xbc, dt = products.split([s.inner, s.channels, s.heads], dim=-1)
        window = torch.cat([past, xbc[:, None]], dim=1)
        xbc = functional.silu((window * layer["conv"]).sum(1) + layer["bias"])
        x, into, from_ = xbc.split([s.inner, s.state, s.state], dim=-1)
        x = x.unflatten(-1, (s.heads, s.headdim))
        step = functional.softplus(dt + layer["dt_bias"])
        decay = torch.exp(-layer["A_log"].exp() * step)
        state = state.float() * decay[..., None, None] + torch.einsum("bh,bhp,bn->bhpn", step, x, into)
        y = torch.einsum("bhpn,bn->bhp", state, from_) + layer["D"][:, None] * x
        hidden = hidden + norm(y.flatten(1) * functional.silu(z), layer["gated_norm"]) @ layer["out_proj"].float().t()
        new_states.append((window[:, 1:], state))
    return norm(hidden, model.norm) @ model.embedding.float().t(), new_states


def check_baseline(sizes: Sizes, device: str, dtype: torch.dtype = torch.bfloat16, rows: int = 3) -> list[str]:
    """Three steps of a model of these sizes against the reference, each from the states that it made; lines of text."""
    model = Model(sizes, device, dtype)
    states, failed = model.states(rows, torch.float32), []
    for call in range(3):
        ids = torch.randint(0, sizes.vocabulary, (rows,), device=device)
        expected, new = reference_step(model, ids, states)
        logits = model.step(ids, states)
        made, wanted_of = [logits, *chain(*states)], [expected, *chain(*new)]
        for number, (ours, wanted) in enumerate(zip(made, wanted_of, strict=True)):
            error = ((ours - wanted).abs().max() / wanted.abs().max()).item()
            if not error <= TOLERANCE:
                failed.append(f"baseline, step {call}, tensor {number}: relative error {error:.3g} > {TOLERANCE}")
    return failed


def measure_baseline(
    sizes: Sizes, device: str, batches: Iterable[int], bandwidth: float, state: str
) -> Iterator[Record]:
    """Records as of speed.measure, of the whole step."""
    model, dtype = Model(sizes, device), {"fp32": torch.float32, "fp16": torch.float16}[state]
    one = sizes.layers * (sizes.inner * sizes.state * dtype.itemsize + 4 * (sizes.taps - 1) * sizes.channels)
    for rows in batches:
        record: Record = {"rows": rows, "tokens": 1}
        if not fits(rows * one, device):
            yield record | {"skipped": f"states of {rows * one / 2**30:.1f} GiB"}
            continue
        states = model.states(rows, dtype)
        ids = torch.randint(0, sizes.vocabulary, (rows,), device=device)
        model.step(ids, states)
        recorded = Recording(device, lambda ids=ids, states=states: model.step(ids, states))
        took = seconds_of(recorded.replay, device)
        floor = (model.bytes() + 2 * rows * one) / bandwidth
        yield record | {"us": took * 1e6, "tok_s": rows / took, "floor_us": floor * 1e6, "of_floor": floor / took}
        del recorded, states
        if device == "cuda":
            torch.cuda.empty_cache()
