"""How a text ends: the token's usual name, and the ids in a config. Standard library only."""

from __future__ import annotations

from .errors import DfssmError

END_OF_TEXT = "<|endoftext|>"
"""Ends a text in most vocabularies, and separates the documents of a plain text file."""


def end_ids(value: object) -> tuple[int, ...]:
    """The `eos_token_id` of a config, null, an id or a list of them, as ids without repeats, in its order.

    Each of them ends a text that is generated; the first separates the documents of a text to learn from or to score.
    """
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for token in ids:
        if type(token) is not int or token < 0:
            raise DfssmError(f"config: eos_token_id is {value!r}; it must be null, an integer >= 0, or a list of them")
    return tuple(dict.fromkeys(ids))
