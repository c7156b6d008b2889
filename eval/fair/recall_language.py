"""Languages of recall, which only the state can hold: key-value pairs, a copy, a needle, each after a gap of noise."""

from __future__ import annotations

from random import Random

from dfssm.base.endings import END_OF_TEXT

from .language import Document

KEYS = VALUES = 32
NOISE = 16
TASKS = ("pairs", "copy", "needle")
LONGEST, SHORTEST = 1024, 8  # tokens of a document in training


class Recall:
    """Documents of the three tasks, of SHORTEST to LONGEST tokens and up to `most` items.

    The length n has the density 1 / n^2: the documents of each octave of lengths have the same share of all tokens. Of
    lengths that are equally frequent, or their logarithms, nearly all tokens would be noise of the longest ones, and a
    teacher learns nothing (seen after 3 M tokens).

    pairs (MQAR, arXiv 2312.04927): "pairs k v k v ... NOISE ask k v k v ...", the same pairs in another order, each key
    once. copy: "copy v v v ... NOISE ask v v v ...". needle: "NOISE needle k v NOISE ask k v". Known are the values
    after `ask`; all else is drawn uniformly.
    """

    def __init__(self, most: int = 8):
        self.most = most
        self.words = [END_OF_TEXT, *TASKS, "ask"]
        self.key = len(self.words)
        self.value, self.noise = self.key + KEYS, self.key + KEYS + VALUES
        for name, count in (("key", KEYS), ("value", VALUES), ("noise", NOISE)):
            self.words += [f"{name}{i}" for i in range(count)]

    def document(self, random: Random) -> Document:
        task = random.choice(TASKS)
        items = 1 if task == "needle" else random.randint(1, self.most)
        length = round(1 / random.uniform(1 / LONGEST, 1 / SHORTEST))
        return self.task(random, task, items, max(length, self.least(task, items)))

    @staticmethod
    def least(task: str, items: int) -> int:
        """Tokens of the shortest document, without the END."""
        return 2 + {"pairs": 4, "copy": 2, "needle": 4}[task] * items

    def task(self, random: Random, task: str, items: int, length: int) -> Document:
        """A document of `length` tokens before the END."""
        noise = [self.noise + random.randrange(NOISE) for _ in range(length - self.least(task, items))]
        ask, mark = self.words.index("ask"), self.words.index(task)
        values = [self.value + random.randrange(VALUES) for _ in range(items)]
        if task == "copy":
            ids = [mark, *values, *noise, ask, *values]
            return Document.of(ids, [False] * (len(ids) - items) + [True] * items)
        pairs = [[self.key + key, value] for key, value in zip(random.sample(range(KEYS), items), values, strict=True)]
        asked = random.sample(pairs, items)
        before = random.randint(0, len(noise)) if task == "needle" else 0
        ids = [*noise[:before], mark, *sum(pairs, []), *noise[before:], ask, *sum(asked, [])]
        return Document.of(ids, [False] * (len(ids) - 2 * items) + [False, True] * items)
