"""Recipes: every ingredient of a distillation by name, and what it asks for at each point of the run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dfssm.opset.errors import DfssmError

CHOICES = {
    "hard": ("sign", "levels"),
    "anneal": ("none", "continuous", "levels"),
    "init": ("svd", "activations", "zero"),
    "activations": ("int8", "float"),
    "state_dtype": ("fp32", "int8"),
}


def _option(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The ingredients. An invalid value raises DfssmError.

    Learning rates rise over `warmup` of the steps and fall along a cosine to `final_lr` of themselves.
    """

    rank: int = _option(16, "Rank of the int8 low-rank correction.")
    planes: int = _option(1, "Binary planes of the scaffold: 2 is about 2 bits a weight.")
    hard: str = _option("sign", "What a weight becomes: its sign, or one of 17 levels as published.")
    anneal: str = _option("none", "What it comes from: nothing else, the continuous latent, or the 17 levels.")
    anneal_share: float = _option(0.5, "Share of the scaffold's steps over which the hard weights fade in.")
    init: str = _option("svd", "Low rank at the start: SVD of the residual, weighted by activations, or zero.")
    activations: str = _option("int8", "Inputs of the projections in training.")
    train_float: bool = _option(True, "Train norms, convolution, A, D, dt and the embedding too.")
    scaffold_share: float = _option(1.0, "Share of the steps after which only the low rank trains, in float.")
    lr: float = _option(8e-3, "Highest learning rate.")
    low_rank_lr: float = _option(1.0, "Of the low rank, times --lr.")
    float_lr: float = _option(0.25, "Of what ships in float, times --lr.")
    warmup: float = _option(0.05, "Share of the steps over which the rate rises.")
    final_lr: float = _option(0.05, "Learning rate at the end, times --lr; a cosine leads there.")
    cross_entropy: float = _option(0.0, "Weight of the cross entropy beside the KL divergence from the teacher.")
    hidden: float = _option(0.0, "Weight of the distance between the layers' outputs and the teacher's.")
    ste_window: float = _option(1.5, "The sign passes gradients to latents below this, in scales of the row.")
    state_dtype: str = _option("fp32", "int8: round the state between the chunks of a window.")

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise DfssmError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}")
        for name, lowest in (("rank", 0), ("planes", 1)):
            if getattr(self, name) < lowest:
                raise DfssmError(f"{name} is {getattr(self, name)}; it must be {lowest} or above")
        for name in ("lr", "ste_window", "low_rank_lr", "float_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise DfssmError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("anneal_share", "scaffold_share", "warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise DfssmError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        for name in ("cross_entropy", "hidden"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DfssmError(f"{name} is {getattr(self, name)}; it must be 0 or above")

    def blend(self, progress: float) -> float:
        """Share of the hard weights at `progress` (0 to 1) of the run."""
        if self.anneal == "none":
            return 1.0
        length = self.anneal_share * self.scaffold_share
        return min(1.0, progress / length) if length else 1.0

    def rates(self, progress: float) -> dict[str, float]:
        """Learning rate of each group of parameters at `progress` (0 to 1) of the run."""
        share = self.scaffold_share
        first = progress < share or share == 1
        curve = self._curve(progress / share if first else (progress - share) / (1 - share))
        two_stages = share < 1
        return {
            "scaffold": self.lr * curve if first else 0.0,
            "low_rank": 0.0 if two_stages and first else self.lr * self.low_rank_lr * curve,
            "float": self.lr * self.float_lr * curve if self.train_float and first else 0.0,
        }

    def low_rank(self, progress: float) -> str:
        """Form of the low rank: absent while the published recipe trains the scaffold, then float."""
        if self.scaffold_share == 1:
            return "int8"
        return "none" if progress < self.scaffold_share else "float"

    def _curve(self, progress: float) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        falling = (progress - self.warmup) / max(1e-9, 1 - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))


RECIPES = {
    "binary": Recipe(),
    # Stage 1 of 12.3 M tokens at 3e-4, stage 2 of 20 M at 1e-3 (paper.md): ratios kept, the rates scale with --lr.
    "paper": Recipe(
        hard="levels",
        anneal="continuous",
        init="zero",
        activations="float",
        train_float=False,
        scaffold_share=12.3 / 32.3,
        lr=3e-4,
        low_rank_lr=10 / 3,
        final_lr=0.0,
        cross_entropy=1.0,
    ),
}
"""`binary` ends at what ships; `paper` is the published recipe, evaluated at 17 levels and exported by sign."""
