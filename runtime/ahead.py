"""Runs of tokens that may turn out wrong, in ONNX Runtime: a row reads a few ahead, and keeps those that were right."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dfssm.opset.schema import BLOCK

from .batch import Batch

PENDING_COUNT = "pending_count."
"""Of the states of a layer, where they are deferred: how many tokens of a row are pending, u8[rows]."""


class RowAhead:
    """A row of a pool that reads ahead, as `batch` alone, with `logits` f32[1,V]; see `backend.Ahead`.

    Its state is a deferred one: tokens are taken back by lowering `counts`, u8[1] of each layer, of pending tokens.
    `settle` does so, before anything else is done with the row. Ctrl-C may come at any line: all that is known is one
    tuple, and counts are set to what they are to be, perhaps again.
    """

    def __init__(self, row: int, batch: Batch, logits: np.ndarray, counts: Sequence[np.ndarray]):
        self.row, self._batch, self._logits, self._counts = row, batch, logits, counts
        self._out = np.empty((1, BLOCK, logits.shape[-1]), np.float32)
        # Tokens of the last run, how many of them the row keeps, and how many were pending after all of them.
        self._last: tuple[tuple[int, ...], int, int] = (), 0, 0

    def run(self, ids: Sequence[int], done: Callable[[], object]) -> int:
        self.settle()
        ids = tuple(ids[:BLOCK])
        if len(ids) == 1:
            self._batch.run(np.array([ids]), done)
        else:
            out = self._out[:, : len(ids)]

            def keep_first() -> None:
                self._logits[:] = out[:, 0]
                self._last = ids, 1, int(self._counts[0][0])
                done()

            self._batch.call(np.array([ids]), out, keep_first)
        return len(ids) - 1

    @property
    def draft(self) -> int | None:
        ids, kept, _ = self._last
        return ids[kept] if kept < len(ids) else None

    def keep(self) -> None:
        ids, kept, pending = self._last
        self._logits[:] = self._out[:, kept]
        self._last = ids, kept + 1, pending

    def settle(self) -> None:
        """The row's state is that of the tokens that it keeps."""
        ids, kept, pending = self._last
        if kept < len(ids):
            for count in self._counts:
                count[:] = pending - (len(ids) - kept)
        self.forget()

    def forget(self) -> None:
        """The row was written: it has read no drafts."""
        self._last = (), 0, 0
