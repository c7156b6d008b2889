"""Speculation: tokens that may come next are read together with the last one, for little more than its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from dfssm.opset.schema import BLOCK

from .state import State

if TYPE_CHECKING:
    from .engine import Engine

MOST = BLOCK - 1
"""Drafts of a run."""

Draft = Callable[[Sequence[int], int], Sequence[int]]
"""draft(ids, count): up to `count` tokens that may come after `ids`, which is what the sequence has read, and grows."""

# Time of a run of 1 to 8 tokens, in runs of one (1.3B, between that of one thread and of two, AVX2 and AVX-512). Only
# how many drafts pay depends on it: with the time of the machine itself, texts are 0 to 5 % faster.
_TIMES = 1.0, 1.2, 1.6, 1.75, 1.9, 2.1, 2.2, 2.4

# The share of right drafts is that of the last 20 or so. Where no draft pays, every 16th run tries one.
_FORGET, _TRY = 0.95, 16


class Speculation:
    """Reads the tokens of one sequence, `state` of batch 1, with up to `most` drafts of `draft` a run.

    A run has as many drafts as give the most tokens for its time, by the share of recent drafts that were right.

    Attributes: `runs`, of the model; `drafted` and `kept`: how many drafts those read, and how many were right.
    """

    def __init__(self, engine: Engine, state: State, most: int, draft: Draft):
        self._engine, self._state, self._most, self._draft = engine, state, most, draft
        self._ids: list[int] = []
        self._tried, self._right = 4.0, 2.5  # recent drafts: worth two a run before the first was seen
        self._without = 0  # runs
        self.runs = self.drafted = self.kept = 0
        engine.ahead(state)

    def begin(self, ids: Sequence[int]) -> None:
        """The sequence has read `ids`, perhaps after others."""
        self._ids += ids

    def read(self, token: int, left: int) -> None:
        """The state reads `token`, where the last run has not read it as a draft; at most `left` are read after it."""
        row, rows, span, one = self._engine.ahead(self._state), self._state.rows, self._state.span, np.array([[token]])
        self._ids.append(token)
        if row.draft is not None:
            self._tried, self._right = _FORGET * self._tried + 1, _FORGET * self._right + (row.draft == token)
        if row.draft == token:
            done = rows.begin_run(span, one)
            row.keep()
            done()
            self.kept += 1
        else:
            ids = self._engine.token_ids([token, *self._drafts(left)]).tolist()
            self.drafted += row.run(ids, rows.begin_run(span, one))
            self.runs += 1

    def _drafts(self, left: int) -> Sequence[int]:
        share = self._right / self._tried
        tokens = list(accumulate(share**count for count in range(self._most + 1)))  # a run with so many drafts
        best = max(range(self._most + 1), key=lambda count: tokens[count] / _TIMES[count])
        self._without = 0 if best else self._without + 1
        count = min(best or int(self._without % _TRY == 0), left)
        return self._draft(self._ids, count)[:count] if count else ()


class PromptLookup:
    """A `Draft`: what followed where the text was before as it is now. That is where the longest end of `ids`, of at
    least two tokens, was; of several such places the latest. A text that ends in a loop goes on in it.
    """

    LONGEST = 16
    CANDIDATES = 32

    def __init__(self) -> None:
        self._seen = 0
        self._after: dict[tuple[int, int], list[int]] = {}  # two tokens -> where what followed them begins

    def __call__(self, ids: Sequence[int], count: int) -> Sequence[int]:
        for at in range(max(self._seen, 2), len(ids)):
            self._after.setdefault((ids[at - 2], ids[at - 1]), []).append(at)
        self._seen = len(ids)
        found = self._after.get((ids[-2], ids[-1]), [])[-self.CANDIDATES :] if len(ids) > 1 else []
        best = max(reversed(found), key=lambda at: self._alike(ids, at), default=len(ids))
        after = ids[best : best + count]
        return [after[i % len(after)] for i in range(count)] if after else []

    def _alike(self, ids: Sequence[int], at: int) -> int:
        """How many tokens before `at` are those at the end of `ids`."""
        most = min(at, self.LONGEST)
        return next((n for n in range(most) if ids[at - 1 - n] != ids[-1 - n]), most)
