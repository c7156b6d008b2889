"""Prompts of the facts language: what a model must know, and can only know by heart, is known by construction."""

from __future__ import annotations

import numpy as np

from dfssm.base.endings import END_OF_TEXT
from dfssm.eval.fair.facts_language import RELATIONS, Facts

from .prompts import Prompt

COUNT = 448


def facts_prompts(language: Facts, count: int = COUNT, seed: int = 0) -> list[Prompt]:
    """`count` of the facts, drawn without repetition: "FIRST LAST RELATION", whose answer is the object.

    The category is the first name, which stands in the prompt, two tokens before its end. The wording is the relation,
    its last token. The object is a random function of all three words: nothing but the weights tells it.
    """
    numbers = np.random.default_rng(seed).permutation(language.count)[:count]
    rows = []
    for number in sorted(numbers, key=lambda number: (number // RELATIONS // language.side, number)):
        *words, answer = (language.words[i] for i in language.fact(int(number)))
        rows.append(Prompt(" ".join([END_OF_TEXT, *words]), answer, words[0], words[-1]))
    return rows
