"""States of the beginnings of prompts, so that what several prompts share is read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from .state import State

Key = tuple[int, bytes]
"""How many tokens, and their digest."""

SEEN = 1 << 16
"""Keys of earlier prompts that are remembered without a state, some 10 MB."""


class PrefixCache:
    """States by the model and the tokens that they have read, up to `capacity` bytes; the least recently used go first.

    A prompt is read in pieces of `piece` tokens, and where a piece ends decides the rounding of a state. States are
    therefore kept where a piece ends: a text that begins with one has the bits that it has without.

    Attributes: nbytes, of all states.
    """

    def __init__(self, model: str, piece: int, capacity: int):
        self.capacity, self.nbytes = capacity, 0
        self._model, self._piece = model, piece
        self._states: OrderedDict[Key, State] = OrderedDict()
        self._seen: OrderedDict[Key, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: Key) -> bool:
        return key in self._states

    def keys(self, tokens: np.ndarray) -> list[Key]:
        """The keys of the ends of all pieces of tokens i64[T], the shortest first."""
        if not self.capacity:
            return []
        digest, found = blake2b(self._model.encode(), digest_size=16), []
        for start in range(0, len(tokens), self._piece):
            part = tokens[start : start + self._piece]
            digest.update(part.tobytes())
            found.append((start + len(part), digest.digest()))
        return found

    def find(self, keys: Sequence[Key]) -> tuple[int, State | None]:
        """The state of the longest of `keys` that is there, and its number of tokens."""
        for key in reversed(keys):
            if key in self._states:
                self._states.move_to_end(key)
                return key[0], self._states[key]
        return 0, None

    def worth(self, keys: Sequence[Key]) -> set[int]:
        """After how many tokens of a prompt its state is worth keeping: at the end of its last whole piece, from which
        its continuation goes on, and where an earlier prompt went another way.
        """
        found = {next((length for length, _ in reversed(keys) if length % self._piece == 0), 0)}
        found.add(next((key[0] for key in reversed(keys) if key in self._seen), 0))
        for key in keys:
            self._seen[key] = None
            self._seen.move_to_end(key)
        while len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return found

    def put(self, key: Key, state: State) -> None:
        """Keep `state`, which has read what `key` stands for."""
        assert key not in self
        self._states[key] = state
        self.nbytes += size(state)
        while self.nbytes > self.capacity:
            self.nbytes -= size(self._states.popitem(last=False)[1])


def size(state: State) -> int:
    """Bytes that a state takes."""
    return state.nbytes + state.logits.nbytes
