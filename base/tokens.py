"""Token ids that a caller gives: integers that the model knows."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import DfssmError


def token_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """Integers in range, as an array i64 of their shape; DfssmError for anything else."""
    try:
        array = np.asarray(ids)
    except (ValueError, TypeError):  # lists of unequal lengths
        raise DfssmError("token ids are no plain list: give integers") from None
    if array.size and array.dtype.kind not in "iu":
        raise DfssmError(f"token ids are {array.dtype}: give integers")
    plain = array.ravel().tolist()  # of one token five times as fast to look at
    if plain and not 0 <= min(plain) <= max(plain) < vocab_size:
        wrong = next(token for token in plain if not 0 <= token < vocab_size)
        raise DfssmError(f"token id {wrong} is out of range: this model has ids 0 to {vocab_size - 1}")
    return array.astype(np.int64, copy=False)


def token_rows(ids: Any, vocab_size: int) -> list[np.ndarray]:
    """Any form of prompts as a list of rows i64[T], T >= 1: [T], [B,T], or a list of rows of unequal lengths."""
    try:
        rows = list(ids) if np.ndim(ids[0]) else [ids]
    except (TypeError, LookupError):  # nothing, or no list
        rows = [ids]
    rows = [token_ids(row, vocab_size) for row in rows]
    for index, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise DfssmError(f"row {index} of the prompt has no tokens: give every row at least one")
    return rows
