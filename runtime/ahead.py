"""Runs of tokens that may turn out wrong, in ONNX Runtime: a row reads a few ahead, and keeps those that were right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .ort import Batch

MOST = 8
"""Tokens of a run, those that are read again included."""


class RowAhead:
    """A row of a pool, `tensors` name -> [1,...] and `logits` f32[1,V], that reads ahead; see `backend.Ahead`.

    A run with drafts reads the state in one memory and writes it to another, so that nothing is copied. Where all its
    tokens are kept, the row goes on in the other one. Where some are not, it goes on in the first, and those that were
    kept are read again at the head of the next run: it takes little longer, since its time is that of the weights.
    `settle` brings the row back to its own memory.

    `bind(read, written)` is a batch that reads the one and writes the other. Ctrl-C may come at any line: all that is
    known is therefore one tuple, replaced when the memory is as it says.
    """

    def __init__(
        self,
        row: int,
        tensors: Mapping[str, np.ndarray],
        logits: np.ndarray,
        bind: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], Batch],
    ):
        self.row, self._logits, self._bind = row, logits, bind
        self._sides = tensors, {name: np.empty_like(tensor) for name, tensor in tensors.items()}
        self._batches: dict[tuple[int, int], Batch] = {}
        self._out = np.empty((1, MOST, logits.shape[-1]), np.float32)
        # Which of `_sides` the last run with drafts read, its tokens, and how many of them the row keeps.
        self._last: tuple[int, tuple[int, ...], int] = 0, (), 0

    def run(self, ids: Sequence[int], done: Callable[[], object]) -> int:
        side, again = self._resume()
        ids = (*again, *ids)[:MOST]
        if len(ids) == 1:
            self._last = side, (), 0
            self._batch(side, side).run(np.array([ids]), done)
        else:
            self._run(side, ids, len(again) + 1, done)
        return len(ids) - len(again) - 1

    @property
    def draft(self) -> int | None:
        _, ids, kept = self._last
        return ids[kept] if kept < len(ids) else None

    def keep(self) -> None:
        side, ids, kept = self._last
        self._logits[:] = self._out[:, kept]
        self._last = side, ids, kept + 1

    def settle(self) -> None:
        """The row is in its own memory, and has read what it kept."""
        side, again = self._resume()
        if again:
            self._run(side, again, len(again), lambda: None)
            side = 1 - side
        if side:
            for own, spare in zip(*(tensors.values() for tensors in self._sides), strict=True):
                np.copyto(own, spare)
        self.forget()

    def forget(self) -> None:
        """The row's own memory was written: that is the row."""
        self._last = 0, (), 0

    def _resume(self) -> tuple[int, tuple[int, ...]]:
        """The side that the next run reads, and the tokens that the row has read after that state."""
        side, ids, kept = self._last
        return (side, ids[:kept]) if kept < len(ids) else (1 - side if ids else side, ())

    def _run(self, side: int, ids: tuple[int, ...], kept: int, done: Callable[[], object]) -> None:
        out = self._out[:, : len(ids)]

        def keep() -> None:
            self._logits[:] = out[:, kept - 1]
            self._last = side, ids, kept
            done()

        self._batch(side, 1 - side).call(np.array([ids]), out, keep)

    def _batch(self, read: int, written: int) -> Batch:
        if (read, written) not in self._batches:
            self._batches[read, written] = self._bind(self._sides[read], self._sides[written])
        return self._batches[read, written]
