"""Speculation: tokens that may come next are read together with the last one, for little more than its time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from . import ahead
from .state import State

if TYPE_CHECKING:
    from .engine import Engine

MOST = ahead.MOST - 1
"""Drafts of a run."""

Draft = Callable[[Sequence[int], int], Sequence[int]]
"""draft(ids, count): up to `count` tokens that may come after `ids`, which is what the sequence has read, and grows."""

# Drafts of the first run, and runs of a pause: 16 make wrong drafts cost 1 to 3 % of a text where all are wrong.
_FIRST, _PAUSE = 3, 16


class Speculation:
    """Reads the tokens of one sequence, `state` of batch 1, with up to `most` drafts of `draft` a run.

    After a run whose drafts were all right the next has two more, after another one less. At none there is a pause.

    Attributes: `runs`, of the model; `drafted` and `kept`: how many drafts those read, and how many were right.
    """

    def __init__(self, engine: Engine, state: State, most: int, draft: Draft):
        self._engine, self._state, self._most, self._draft = engine, state, most, draft
        self._ids: list[int] = []
        self._count = min(_FIRST, most)
        self._asked = self._right = 0  # of the last run
        self.runs = self.drafted = self.kept = 0
        engine.ahead(state)

    def begin(self, ids: Sequence[int]) -> None:
        """The sequence has read `ids`, perhaps after others."""
        self._ids += ids

    def read(self, token: int, left: int) -> None:
        """The state reads `token`, where the last run has not read it as a draft; at most `left` are read after it."""
        self._ids.append(token)
        row, rows, span, one = self._engine.ahead(self._state), self._state.rows, self._state.span, np.array([[token]])
        if row.draft == token:
            done = rows.begin_run(span, one)
            row.keep()
            done()
            self._right += 1
            self.kept += 1
        else:
            ids = self._engine.token_ids([token, *self._drafts(left)]).tolist()
            self._asked, self._right = row.run(ids, rows.begin_run(span, one)), 0
            self.drafted += self._asked
            self.runs += 1

    def _drafts(self, left: int) -> Sequence[int]:
        if self._asked:
            all_right = self._right == self._asked
            self._count = min(self._count + 2, self._most) if all_right else self._count - 1 or -_PAUSE
        elif self._count < 1:
            self._count += 1
        count = min(self._count, left)
        return self._draft(self._ids, count)[:count] if count > 0 else ()


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
