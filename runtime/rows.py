"""What is known of each row of a pool beside its tensors: what it has read, and whether it is sound."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from dfssm.base.errors import DfssmError

RECENT = 8
"""Tokens that a row remembers as they are: the bytes of an unfinished character are in the last three, and some of
these may be special ones, which are no text."""

INTERRUPTED = "a run on it was interrupted, or another thread runs it now"


class Rows:
    """The books of a pool: `tokens` i64[rows], `recent` i64[rows,RECENT], as in a `State`.

    A run writes the tensors in place, so one that ends half-way cannot be taken back. A row is therefore broken from
    `begin` to `end`: where no `end` follows, it stays so, and is refused until it is written anew.
    """

    def __init__(self, tokens: np.ndarray, recent: np.ndarray | None = None):
        self.tokens = tokens
        self.recent = np.full((len(tokens), RECENT), -1, np.int64) if recent is None else recent
        self.broken: dict[int, str] = {}  # row -> why
        self.claimed: set[int] = set()  # rows of which a generation is open

    def require_sound(self, rows: Iterable[int]) -> None:
        """DfssmError where one of `rows` is broken."""
        if self.broken and (row := next((row for row in rows if row in self.broken), None)) is not None:
            of = f"row {row} of " if len(self.tokens) > 1 else ""
            raise DfssmError(f"{of}the state is broken ({self.broken[row]}): reset it, or copy a sound one into it")

    def begin(self, rows: Iterable[int]) -> None:
        """The tensors of `rows` are about to change."""
        for row in rows:
            self.broken[row] = INTERRUPTED

    def end(self, rows: Iterable[int]) -> None:
        """They are of one moment again."""
        for row in rows:
            self.broken.pop(row, None)

    def begin_run(self, rows: range, ids: np.ndarray) -> partial[None]:
        """A run of ids i64[n,T] begins; what is returned is to be called when it has come to its end."""
        if self.broken:
            self.require_sound(rows)
        self.begin(rows)
        return partial(self._end_run, rows, ids)

    def _end_run(self, rows: range, ids: np.ndarray) -> None:
        tokens = ids.shape[1]
        # Of one row a view: a third of the time of a slice.
        some, read = (rows.start, ids[0]) if len(rows) == 1 else (slice(rows.start, rows.stop), ids)
        self.tokens[some] += tokens
        recent = self.recent[some]
        recent[..., :-tokens] = recent[..., tokens:]
        recent[..., -tokens:] = read[..., -RECENT:]
        self.end(rows)

    def copy(self, source: int, to: int) -> None:
        """Row `to` has read what `source` has."""
        self.tokens[to], self.recent[to] = self.tokens[source], self.recent[source]

    def reset(self, row: int) -> None:
        """The row has read nothing."""
        self.tokens[row], self.recent[row] = 0, -1
