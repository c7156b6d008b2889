"""Causal localisation: the last token's state of one prompt, put into another at a layer, and which answer comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .prompts import Prompts
from .subject import Subject

Array = np.ndarray

PROMPTS = 10
"""That are paired with each other: 45 pairs, each both ways."""

_ROWS = 32


@dataclass(frozen=True)
class Swaps:
    """Of P ordered pairs (`base`, `donor`) of n chosen prompts: logits of the n answers, `own` f32[n,n] of each prompt
    as it is, `swapped` f32[L+1,P,n] of the base with the donor's state after each layer.
    """

    base: Array
    donor: Array
    own: Array
    swapped: Array

    def margins(self, answers: Array) -> tuple[Array, Array]:
        """f64[L+1,P']: by how much the donor's answer is preferred to the base's, and which of the pairs these are:
        those of which each prompt by itself prefers its own. `answers` i64[n]: which of the n answers is whose.
        """
        ours, theirs = answers[self.base], answers[self.donor]
        fit = (self.own[self.base, ours] > self.own[self.base, theirs]) & (
            self.own[self.donor, theirs] > self.own[self.donor, ours]
        )
        pairs = np.flatnonzero(fit)
        rows = np.arange(len(pairs))
        kept = self.swapped[:, pairs].astype(np.float64)
        return kept[:, rows, theirs[pairs]] - kept[:, rows, ours[pairs]], pairs


def flip_layers(margins: Array) -> Array:
    """i64[P]: the first layer at which the donor's answer is preferred; -1 where there is none."""
    flipped = margins > 0
    return np.where(flipped.any(0), flipped.argmax(0), -1)


def choose(templates: Array, answers: Array, count: int = PROMPTS) -> Array:
    """i64[<= count]: the first prompts of the most frequent wording whose answers begin with different tokens. They are
    not chosen by what the model knows: of many prompts some seem to know any answer. `templates`, `answers` i64[N].
    """
    of_one: dict[int, int] = {}
    for i in np.flatnonzero(templates == np.bincount(templates).argmax()):
        of_one.setdefault(int(answers[i]), int(i))
    return np.array(list(of_one.values())[:count])


def swap(
    subject: Subject, prompts: Prompts, chosen: Array, states: Array, progress: Callable[[int, int], None]
) -> Swaps:
    """Run all ordered pairs of the `chosen` prompts; states f32[L+1,N,D] of all prompts."""
    count = len(chosen)
    base, donor = (v.ravel() for v in np.meshgrid(np.arange(count), np.arange(count), indexing="ij"))
    base, donor = base[base != donor], donor[base != donor]
    answers = prompts.answer_ids[chosen]
    ids = [prompts.ids[i] for i in chosen]
    own = subject.model.hidden(ids, layers=()).logits[:, answers]
    swapped = np.empty((len(states), len(base), count), np.float32)
    for layer in range(len(states)):
        for start in range(0, len(base), _ROWS):
            some = slice(start, start + _ROWS)
            patch = {layer: np.ascontiguousarray(states[layer, chosen[donor[some]]])}
            found = subject.model.hidden([ids[i] for i in base[some]], layers=(), patch=patch)
            swapped[layer, some] = found.logits[:, answers]
        progress(layer + 1, len(states))
    return Swaps(base, donor, own, swapped)
