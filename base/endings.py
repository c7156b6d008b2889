"""How a text ends: the token's usual name, and the ids in a config. Standard library only."""

from __future__ import annotations

import math

from .errors import DfssmError

END_OF_TEXT = "<|endoftext|>"
"""Ends a text in most vocabularies, and separates the documents of a plain text file."""


def end_ids(value: object, vocab_size: float = math.inf, name: str = "eos_token_id") -> tuple[int, ...]:
    """The `eos_token_id` of a config, null, an id or a list of them, as ids without repeats, in its order. Or another
    entry `name` of this form. DfssmError for anything else, and for an id that the vocabulary lacks.

    Each of them ends a text that is generated; the first separates the documents of a text to learn from or to score.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            an_id = "an integer >= 0" if vocab_size == math.inf else f"an id of the vocabulary (0 to {vocab_size - 1})"
            raise DfssmError(f"config: {name} is {value!r}; it must be null, {an_id}, or a list of them")
    return tuple(dict.fromkeys(ids))
