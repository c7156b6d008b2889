"""Sequences that come and go while others run: slots of one resident pool of states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dfssm.opset.errors import DfssmError

from .state import RECENT, State, newest, require_model

if TYPE_CHECKING:
    from .engine import Engine


class Slot:
    """One sequence of a pool. `row`: where it lies now, -1 when it has left; `tokens`: how many it has read; `recent`:
    the last of them, as in a `State` of one row.
    """

    __slots__ = ("recent", "row", "tokens")

    def __init__(self, row: int):
        self.row = row
        self.reset()

    def reset(self) -> None:
        """It has read nothing."""
        self.tokens, self.recent = 0, np.full((1, RECENT), -1, np.int64)


class Slots:
    """A pool of `capacity` rows in the engine's backend. Slots lie side by side from row 0 on, so that a batch of them
    is a range of rows and runs where it lies. Joining, leaving, resetting and copying touch one row.

    Not for several threads at once. Raises DfssmError for a capacity below 1.
    """

    def __init__(self, engine: Engine, capacity: int):
        if capacity < 1:
            raise DfssmError(f"capacity is {capacity}: give room for at least one sequence")
        self.engine, self.capacity = engine, capacity
        self.pool = engine.backend.pool(capacity + 1)  # the last row is for exchanging two others
        self._slots: list[Slot] = []  # by row

    def __len__(self) -> int:
        return len(self._slots)

    def join(self) -> Slot:
        """A slot that has read nothing. Raises DfssmError when all are taken."""
        if len(self) == self.capacity:
            raise DfssmError(f"all {self.capacity} slots are taken: let one leave, or make more of them")
        slot = Slot(len(self))
        self._slots.append(slot)
        self.pool.reset(slot.row)
        return slot

    def leave(self, slot: Slot) -> None:
        """Give the slot up. The last one takes its row."""
        row, last = self._row(slot), self._slots.pop()
        if last is not slot:
            self.pool.copy(last.row, row)
            self._slots[row], last.row = last, row
        slot.row = -1

    def reset(self, slot: Slot) -> None:
        """The slot has read nothing."""
        self.pool.reset(self._row(slot))
        slot.reset()

    def copy(self, source: Slot, to: Slot) -> None:
        """`to` has read what `source` has: a prefix that several share is read once."""
        self.pool.copy(self._row(source), self._row(to))
        to.tokens, to.recent = source.tokens, source.recent

    def save(self, slot: Slot, state: State) -> None:
        """`state`, of one row, becomes the slot's: outside the pool, where it may be kept or written to a file."""
        self._check(state)
        row = self._row(slot)
        self.pool.read(row, state.tensors)
        state.logits[0], state.tokens[0], state.recent[:] = self.pool.logits[row], slot.tokens, slot.recent
        state.push()

    def load(self, slot: Slot, state: State) -> None:
        """The slot becomes `state`, of one row."""
        self._check(state)
        row = self._row(slot)
        self.pool.write(row, {name: np.ascontiguousarray(tensor) for name, tensor in state.tensors.items()})
        self.pool.logits[row] = state.logits[0]
        slot.tokens, slot.recent = int(state.tokens[0]), state.recent.copy()

    def run(self, slots: Sequence[Slot], ids: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """Read ids i64[n,T], in range, a row a slot, as one batch. Returns the logits of their last tokens, f32[n,V].

        Slots that do not lie side by side in this order are moved there first: run the same ones in the same order.
        """
        ids = np.ascontiguousarray(ids, np.int64)
        if len(slots) != len(ids) or not ids.size:
            raise DfssmError(f"{len(slots)} slots and tokens {list(ids.shape)}: give each slot a row of one or more")
        rows = [self._row(slot) for slot in slots]
        if len(set(rows)) != len(rows):
            raise DfssmError("a slot is in the batch twice: give each once")
        if rows != list(range(rows[0], rows[0] + len(rows))):
            for row, slot in enumerate(slots):
                self._exchange(slot, row)
        start = slots[0].row
        self.pool.run(ids, start)
        for slot, read in zip(slots, ids, strict=True):
            slot.tokens += len(read)
            slot.recent = newest(slot.recent, read[None])
        return self.pool.logits[start : start + len(ids)].copy()

    def _exchange(self, slot: Slot, row: int) -> None:
        """Put `slot` into `row`, and what is there where it was."""
        other, spare = self._slots[row], self.capacity
        if other is slot:
            return
        for source, to in ((row, spare), (slot.row, row), (spare, slot.row)):
            self.pool.copy(source, to)
        self._slots[row], self._slots[slot.row] = slot, other
        slot.row, other.row = row, slot.row

    def _row(self, slot: Slot) -> int:
        if not 0 <= slot.row < len(self) or self._slots[slot.row] is not slot:
            raise DfssmError("the slot has left, or is of another pool: join again")
        return slot.row

    def _check(self, state: State) -> None:
        if state.batch != 1:
            raise DfssmError(f"a slot is one sequence, the state has {state.batch}: use state.row(i)")
        require_model(state, self.engine.model, self.engine.backend.layout, self.engine.vocab_size)
