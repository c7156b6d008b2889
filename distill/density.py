"""Projections on their way to one bit: density-field weights, annealed from continuous to levels or signs."""

from __future__ import annotations

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfssm.model.quant import dequantized, sign
from dfssm.model.student import DFSSMLM, BinaryLinear

LEVELS = 17  # of the published density field: -8/8 .. 8/8


class _Clamp(torch.autograd.Function):
    """w within [-1, 1], on the nearest of `count` levels if there are any; the gradient passes where |w| < window."""

    @staticmethod
    def forward(ctx, w: Tensor, count: int, window: float) -> Tensor:
        ctx.save_for_backward(w)
        ctx.window, half = window, (count - 1) / 2
        return (w.clamp(-1.0, 1.0) * half).round() / half if count else w.clamp(-1.0, 1.0)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        (w,) = ctx.saved_tensors
        return g * (w.abs() < ctx.window), None, None


def levels(w: Tensor, count: int = LEVELS, window: float = 1.0) -> Tensor:
    """Density-field weights: latents -> `count` levels of [-1, 1], straight-through (paper, stage 1)."""
    return _Clamp.apply(w, count, window)


class DensityLinear(BinaryLinear):
    """A BinaryLinear that can be softer than what ships.

    The scaffold is scale * ((1 - blend) * soft(latent) + blend * hard(latent)): `hard` is the sign, or the 17 levels of
    the paper; `soft` the clamped latent, or the levels on the way to the sign. With hard = sign, blend = 1 and int8
    operands it is BinaryLinear, the arithmetic that ships.
    """

    hard, soft = "sign", "continuous"  # "sign" or "levels"; "continuous" or "levels"
    levels = LEVELS
    clamp_window = 1.0  # the gradient of levels and of clamped latents passes below it
    blend: float | Tensor = 1.0  # a tensor while it moves: torch.compile makes a program of each number
    float_activations = False
    low_rank = "int8"  # or "float", or "none" while the scaffold is trained without it

    @classmethod
    def of(cls, linear: BinaryLinear) -> Self:
        """One that trains the parameters of `linear`."""
        with torch.device("meta"):
            module = cls(linear.latent.shape[-1], linear.latent.shape[-2], len(linear.down))
        for name, parameter in linear.named_parameters():
            setattr(module, name, parameter)
        return module

    @property
    def ships(self) -> bool:
        return self.is_hard and (self.hard, self.float_activations, self.low_rank) == ("sign", False, "int8")

    @property
    def is_hard(self) -> bool:
        return not isinstance(self.blend, Tensor) and self.blend == 1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.ships:
            return super().forward(x)
        weight = (self.scale[..., None] * self._scaffold()).reshape(-1, *self.latent.shape[-2:]).sum(0)
        if self.low_rank != "none" and len(self.down):
            form = dequantized if self.low_rank == "int8" else torch.Tensor.float
            weight = weight + form(self.up) @ form(self.down)
        return F.linear(x if self.float_activations else dequantized(x), weight)

    def _scaffold(self) -> Tensor:
        hard = sign(self.latent, self.window) if self.hard == "sign" else self._clamped(self.levels)
        if self.is_hard:
            return hard
        soft = self._clamped(0 if self.soft == "continuous" else self.levels)
        return (1.0 - self.blend) * soft + self.blend * hard

    def _clamped(self, count: int) -> Tensor:
        return _Clamp.apply(self.latent, count, self.clamp_window)


def densify(student: DFSSMLM, **attributes) -> list[DensityLinear]:
    """Put a DensityLinear with these attributes in the place of each projection, of its parameters; returns them."""
    for path, module in list(student.named_modules()):
        if isinstance(module, BinaryLinear):
            student.set_submodule(path, DensityLinear.of(module))
    layers = projections(student)
    set_attributes(layers, **attributes)
    return layers


def projections(student: nn.Module) -> list[DensityLinear]:
    return [module for module in student.modules() if isinstance(module, DensityLinear)]


def set_attributes(modules: list[DensityLinear], **attributes) -> None:
    for module in modules:
        for name, value in attributes.items():
            if not hasattr(DensityLinear, name):
                raise AttributeError(name)
            setattr(module, name, value)


@torch.no_grad()
def zero_low_rank(layers: list[DensityLinear]) -> None:
    """Begin as low-rank adapters do: down random, up next to zero (a row of zeros has no int8 scale to learn by)."""
    for layer in layers:
        nn.init.normal_(layer.up, std=1e-6)
        nn.init.normal_(layer.down, std=layer.down.shape[-1] ** -0.5)
