"""What the synthetic languages share: documents of token ids, endless and fresh, and a tokenizer of whole words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from dfssm.base.endings import END_OF_TEXT
from dfssm.base.files import write_file

END = 0
"""Id of the token that ends a document."""

TEACHER, STUDENT, TEST = range(3)
"""Whose text: the second number of a key. Keys of one seed that differ in it are of different texts."""


@dataclass(frozen=True)
class Document:
    """ids i64[n], the last one END; known bool[n]: the tokens that a model which has learned the language can name."""

    ids: np.ndarray
    known: np.ndarray

    @classmethod
    def of(cls, ids: Sequence[int], known: Sequence[bool]) -> Document:
        return cls(np.array([*ids, END]), np.array([*known, False]))


class Language(Protocol):
    """`words`: the vocabulary, by id. `document`: a fresh document of the source of random numbers that it is given."""

    words: list[str]

    def document(self, random: Random) -> Document: ...


def seeded(seed: int, whose: int, part: int = 0) -> Random:
    """A source of random numbers for each key; unlike sums of numbers, keys do not meet."""
    return Random(int(np.random.default_rng((seed, whose, part)).integers(1 << 62)))


def vocab_size(language: Language) -> int:
    """Tokens of a model for it, padded as those of published checkpoints are."""
    return -(-len(language.words) // 32) * 32


class Fresh:
    """Training windows of fresh documents, a `Source` of `dfssm.distill.data`: none is ever seen twice.

    Window k is a function of `seed` and k alone. It begins within a document, as windows of a text do. A token that can
    be known is given as ~id.
    """

    def __init__(self, language: Language, tokens: int, seed: int):
        self.language, self.tokens, self.seed = language, tokens, seed
        self.position = 0

    def __getitem__(self, k: int) -> np.ndarray:
        """Window k, i64[tokens + 1]."""
        random = seeded(self.seed, TEACHER, k)
        ids: list[np.ndarray] = []
        missing = self.tokens + 1
        while missing > 0:
            document = self.language.document(random)
            marked = np.where(document.known, ~document.ids, document.ids)
            ids.append(marked if ids else marked[random.randrange(len(marked)) :])
            missing -= len(ids[-1])
        return np.concatenate(ids)[: self.tokens + 1]

    def take(self, count: int) -> np.ndarray:
        """The next `count` windows, i64[count, tokens + 1]."""
        first = self.position
        self.position += count
        return np.stack([self[k] for k in range(first, self.position)])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def tokenizer(language: Language) -> str:
    """The tokenizer.json of a language: words between blanks."""
    words = {word: i for i, word in enumerate(language.words)}
    made = Tokenizer(models.WordLevel(words, unk_token=END_OF_TEXT))  # a tokenizer must have one
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([END_OF_TEXT])
    return str(made.to_str())


def text(language: Language, random: Random, count: int, folder: Path) -> list[str]:
    """text.jsonl in `folder`, of at least `count` tokens, a document in a line: written unless it is there."""

    def write(draft: Path) -> None:
        written = 0
        with draft.open("w") as out:
            while written < count:
                ids = language.document(random).ids
                out.write(json.dumps({"text": " ".join(language.words[i] for i in ids[:-1])}) + "\n")
                written += len(ids)

    file = folder / "text.jsonl"
    if not file.is_file():
        write_file(file, write, parents=True)
    return [str(file)]
