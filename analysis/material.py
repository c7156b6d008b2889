"""What every study reads, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .gram import Draws
from .prompts import Prompts
from .states import collect
from .subject import Subject, random_twin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL, RANDOM, AGAINST = "model", "random weights", "teacher"
"""Whose states: of what is studied, of its twin with random weights, of the teacher beside it."""

PUBLISHED = tuple(layer / 48 for layer in (2, 14, 32, 46))
"""The stages of the published atlas, as shares of the depth."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Study:
    """`arrays`: by name, what the figure shows, for people to draw their own. `says`: what the model shows, in a
    sentence. `null_says`: what chance shows.
    """

    name: str
    title: str
    arrays: dict[str, Any]
    figure: Figure
    says: str
    null_says: str


@dataclass
class Material:
    """States f32[L+1,N,D] of the prompts by MODEL, RANDOM and, where it is given, AGAINST, and the models themselves.

    `draws`: how many times labels are shuffled and prompts drawn again.
    """

    prompts: Prompts
    subjects: dict[str, Subject]
    states: dict[str, np.ndarray]
    draws: int = 100
    seed: int = 0
    progress: Progress = field(default=lambda name, done, total: None)

    @classmethod
    def read(
        cls,
        subject: Subject,
        against: Subject | None,
        prompts: Prompts,
        cache: Path,
        progress: Progress,
        **options: Any,
    ) -> Material:
        """Run the prompts through the models, or take their states from the folder `cache`."""
        subjects = {MODEL: subject, RANDOM: random_twin(subject)}
        if against:
            subjects[AGAINST] = against
        states = {}
        for who, one in subjects.items():
            states[who] = collect(one, prompts, cache, partial(progress, who))
        return cls(prompts, subjects, states, progress=progress, **options)

    @property
    def n_layer(self) -> int:
        return self.subjects[MODEL].n_layer

    @property
    def layers(self) -> np.ndarray:
        """i64[L+1]: 0 is the embedding."""
        return np.arange(self.n_layer + 1)

    @property
    def stages(self) -> list[int]:
        """Layers at the depths of the published stages; fewer where the model has few layers."""
        return sorted({round(share * self.n_layer) for share in PUBLISHED})

    @property
    def few(self) -> int:
        """A tenth of the draws, for nulls that need the model."""
        return max(3, self.draws // 10)

    @cached_property
    def categories(self) -> np.ndarray:
        return self.prompts.labels("category")

    @property
    def labellings(self) -> dict[str, np.ndarray]:
        """The category of each prompt, and its answer where answers come more than once."""
        found = {"category": self.categories}
        return found | ({"answer": self.prompts.labels("answer")} if self.prompts.answers_shared else {})

    def drawn(self, labels: np.ndarray) -> Draws:
        return Draws.of(labels, self.draws, self.seed)

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)
