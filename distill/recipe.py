"""Recipes: every ingredient of a distillation by name, and what it asks for at each point of the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from dfssm.base.errors import DfssmError


def _number(default: float, least: float, most: float, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "range": (least, most)})


def _choice(default: str, others: Sequence[str], help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": (default, *others)})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The ingredients, each with its help text and its range or choices. Any other value raises DfssmError.

    Learning rates rise over `warmup` of the steps and fall to `final_lr` of themselves, along a `curve`: a cosine, or
    level until the last `decay` of the steps and then straight down (warm-up, stable, decay: arXiv 2404.06395).
    """

    rank: int = _number(16, 0, 4096, "Rank of the int8 low-rank correction; 0: none.")
    planes: int = _number(1, 1, 8, "Binary planes: about N bits per weight.")
    hard: str = _choice("sign", ["levels"], "What weights become: their signs, or one of several levels as published.")
    levels: int = _number(17, 3, 65537, "How many levels: 17 in the paper, 257 in the README of its code.")
    anneal: str = _choice(
        "none", ["continuous", "levels"], "What they are annealed from: nothing, the continuous latents, or levels."
    )
    anneal_share: float = _number(0.5, 0, 1, "Share of the scaffold's training over which they are annealed.")
    init: str = _choice(
        "svd",
        ["activations", "zero", "calibrated"],
        "Start at the data-free conversion: with the SVD of the residual as its low rank, the same weighted by "
        "activations, or 0; or at the calibrated conversion, on --init-tokens.",
    )
    init_tokens: int = _number(2**17, 1, 2**40, "Tokens of the training text to calibrate on.")
    budget: float = _number(
        0.0,
        0,
        1_000_000,
        "Megabytes of weights, for --init calibrated: rank and planes of each projection are chosen on --init-tokens. "
        "0: --rank and --planes.",
    )
    activations: str = _choice("int8", ["float"], "Inputs of the projections in training.")
    train_float: bool = dataclasses.field(
        default=True, metadata={"help": "Also train the norms, the convolution, A, D, dt and the embedding."}
    )
    scaffold_share: float = _number(
        1.0,
        0,
        1,
        "Share of the steps that train the scaffold; then only the low rank trains, in float. 1: both at once.",
    )
    lr: float = _number(8e-3, 1e-12, 1_000, "Peak learning rate.")
    low_rank_lr: float = _number(1.0, 1e-6, 1_000_000, "Learning rate of the low rank, as a multiple of --lr.")
    float_lr: float = _number(0.25, 1e-6, 1_000_000, "Learning rate of the float parameters, as a multiple of --lr.")
    float_rates: str = _choice(
        "equal",
        ["relative"],
        "Learning rates of the float tensors: equal, or each in proportion to the tensor's root mean square at the "
        "start.",
    )
    warmup: float = _number(0.05, 0, 1, "Share of the steps over which the learning rate rises.")
    curve: str = _choice(
        "cosine", ["wsd"], "Learning rate after the warm-up: a cosine, or level and then down; wsd can be lengthened."
    )
    decay: float = _number(0.2, 0, 1, "With --curve wsd: share of the steps over which the learning rate falls.")
    final_lr: float = _number(0.05, 0, 1, "Learning rate at the end, as a multiple of --lr.")
    temperature: float = _number(1.0, 0.1, 100, "Temperature of both distributions in the KL divergence.")
    cross_entropy: float = _number(0.0, 0, 1_000_000, "Weight of the cross entropy, added to the KL divergence.")
    hidden: float = _number(0.0, 0, 1_000_000, "Weight of the squared error of the hidden states, layer by layer.")
    ste_window: float = _number(
        1.5, 1e-6, 1_000_000, "Straight-through gradient: it passes to latents below this, in units of the row's scale."
    )
    clamp_window: float = _number(
        1.0, 1, 1_000_000, "Straight-through gradient of levels and clamped latents: it passes to latents below this."
    )
    state_dtype: str = _choice("fp32", ["int8"], "int8: round the state between the chunks of a window.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value, known = field.name, getattr(self, field.name), field.metadata
            if "choices" in known and value not in known["choices"]:
                raise DfssmError(f"{name} is {value!r}; choose one of {', '.join(known['choices'])}")
            if "range" in known and not known["range"][0] <= value <= known["range"][1]:
                raise DfssmError("{} is {}; give a number from {:,} to {:,}".format(name, value, *known["range"]))

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
        return self.at(self.lr * curve, first)

    def at(self, rate: float, first: bool = True) -> dict[str, float]:
        """Learning rate of each group where the scaffold's is `rate`; `first`: in the part that trains the scaffold."""
        two_stages = self.scaffold_share < 1
        return {
            "scaffold": rate if first else 0.0,
            "low_rank": 0.0 if two_stages and first else rate * self.low_rank_lr,
            "float": rate * self.float_lr if self.train_float and first else 0.0,
        }

    @property
    def level(self) -> tuple[float, float] | None:
        """Between which points of the run nothing depends on its length; None for a recipe that is never so."""
        if self.curve == "cosine" or self.scaffold_share < 1 or self.anneal != "none":
            return None
        return self.warmup, 1 - self.decay

    def low_rank(self, progress: float) -> str:
        """Form of the low rank: absent while the published recipe trains the scaffold, then float."""
        if self.scaffold_share == 1:
            return "int8"
        return "none" if progress < self.scaffold_share else "float"

    def _curve(self, progress: float) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        if self.curve == "wsd":
            return 1 - (1 - self.final_lr) * max(0.0, progress - 1 + self.decay) / max(1e-9, self.decay)
        falling = (progress - self.warmup) / max(1e-9, 1 - self.warmup)
        return self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, falling)))


RECIPES = {
    "binary": Recipe(),
    # Stage 1 of 12.3 M tokens at 3e-4, stage 2 of 20 M at 1e-3: ratios kept, the rates scale with --lr. All parameters
    # train in stage 1, along a ramp of its whole length; gradients pass latents of any size. The published loss is
    # 0.7 T^2 KL, summed over the 512 tokens of a window, + 0.3 CE, a mean: per token a CE of 0.3 / (0.7 * 4 * 512).
    "paper": Recipe(
        hard="levels",
        anneal="continuous",
        anneal_share=1.0,
        init="zero",
        activations="float",
        scaffold_share=12.3 / 32.3,
        lr=3e-4,
        low_rank_lr=10 / 3,
        float_lr=1.0,
        final_lr=0.0,
        temperature=2.0,
        cross_entropy=0.3 / (0.7 * 4 * 512),
        clamp_window=1_000_000,
    ),
}
"""`binary` ends at what ships; `paper` is the published recipe, evaluated at 17 levels and exported by sign."""
