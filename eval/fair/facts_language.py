"""A language of facts that only weights can hold, among sentences that nothing repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import numpy as np

from dfssm.base.endings import END_OF_TEXT

from .language import Document

SENTENCES = 12  # of a document
FIRSTS = LASTS = 64  # names in the vocabulary, whatever the number of facts: all sizes have one shape of model
RELATIONS, OBJECTS = 4, 32
NOUNS, VERBS, ADJECTIVES = 16, 8, 8
_ZIPF = [1 / rank for rank in range(1, 17)]


class Facts:
    """`side`^2 * RELATIONS facts "FIRST LAST RELATION OBJECT .", each with an object of its own.

    The objects are drawn independently and uniformly: nothing but the fact itself tells its object, and a guess is
    right in one of OBJECTS cases. All combinations of names and relations are stated, equally often, in random order:
    what comes before the object has nothing to be learned. A document states no fact twice, so that none can be copied
    from the context. About a `share` of its sentences are facts; the others are drawn from a grammar (an article that
    agrees with its noun, a verb that agrees with its subject, words of Zipf's frequencies).
    """

    def __init__(self, side: int = 16, share: float = 0.5, seed: int = 0):
        self.side, self.share = side, share
        self.objects = np.random.default_rng((seed, side)).integers(OBJECTS, size=side * side * RELATIONS)
        groups = {
            "": [END_OF_TEXT, "."],
            "article": ["a", "every", "some", "most"],  # two for one thing, two for several
            "noun": [f"noun{i}{s}" for s in ("", "s") for i in range(NOUNS)],
            "verb": [f"verb{i}{s}" for s in ("s", "") for i in range(VERBS)],
            "adjective": [f"adjective{i}" for i in range(ADJECTIVES)],
            "first": [f"first{i}" for i in range(FIRSTS)],
            "last": [f"last{i}" for i in range(LASTS)],
            "relation": [f"relation{i}" for i in range(RELATIONS)],
            "object": [f"object{i}" for i in range(OBJECTS)],
        }
        self.words: list[str] = []
        self.begin: dict[str, int] = {}  # id of the first word of each group
        for name, words in groups.items():
            self.begin[name] = len(self.words)
            self.words += words

    @property
    def count(self) -> int:
        """Number of facts."""
        return len(self.objects)

    def fact(self, number: int) -> list[int]:
        """The ids of a fact without the full stop; the last one is its object."""
        names, relation = divmod(number, RELATIONS)
        first, last = divmod(names, self.side)
        parts = {"first": first, "last": last, "relation": relation, "object": int(self.objects[number])}
        return [self.begin[name] + value for name, value in parts.items()]

    def sentence(self, random: Random) -> list[int]:
        """The ids of a sentence of the grammar without the full stop."""
        plural = random.random() < 0.5
        ids = self._noun_phrase(random, plural)
        ids.append(self.begin["verb"] + VERBS * plural + _frequent(random, VERBS))
        if random.random() < 0.6:
            ids += self._noun_phrase(random, random.random() < 0.5)
        return ids

    def document(self, random: Random, facts: Sequence[int] | None = None) -> Document:
        """A document that states these facts, by default some of all."""
        if facts is None:
            facts = random.sample(range(self.count), sum(random.random() < self.share for _ in range(SENTENCES)))
        sentences = [self.fact(number) for number in facts]
        sentences += [self.sentence(random) for _ in range(SENTENCES - len(facts))]
        order = random.sample(range(len(sentences)), len(sentences))
        ids: list[int] = []
        known: list[bool] = []
        for i in order:
            ids += [*sentences[i], self.begin[""] + 1]
            known += [False] * (len(sentences[i]) - 1) + [i < len(facts), False]
        return Document.of(ids, known)

    def everything(self, random: Random) -> Iterator[Document]:
        """Documents that state each fact once."""
        numbers = random.sample(range(self.count), self.count)
        size = max(1, round(SENTENCES * self.share))
        for begin in range(0, self.count, size):
            yield self.document(random, numbers[begin : begin + size])

    def _noun_phrase(self, random: Random, plural: bool) -> list[int]:
        ids = [self.begin["article"] + 2 * plural + (random.random() < 0.5)]
        if random.random() < 0.4:
            ids.append(self.begin["adjective"] + _frequent(random, ADJECTIVES))
        return [*ids, self.begin["noun"] + NOUNS * plural + _frequent(random, NOUNS)]


def stored(count: int, share_right: float, objects: int = OBJECTS) -> float:
    """Of `count` facts those that are held: what is right, less what guessing gets right. Never negative."""
    chance = 1 / objects
    return count * max(0.0, (share_right - chance) / (1 - chance))


def _frequent(random: Random, count: int) -> int:
    """One of `count` numbers, number i with a frequency in proportion to 1 / (i + 1)."""
    return random.choices(range(count), _ZIPF[:count])[0]
