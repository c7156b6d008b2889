"""Sequences that come and go while others run: slots of one resident pool of states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.base.numbers import require_whole

from .backend import choose
from .rows import Rows
from .sampler import Sampler
from .sampling import Sampling
from .state import State, require_model

if TYPE_CHECKING:
    from .engine import Engine


class Slot:
    """One sequence of a pool. `row`: where it lies now, -1 when it has left."""

    __slots__ = ("_rows", "row")

    def __init__(self, rows: Rows, row: int):
        self._rows, self.row = rows, row

    def __repr__(self) -> str:
        return f"<Slot: row {self.row}, {self.tokens} tokens read>" if self.row >= 0 else "<Slot: it has left>"

    @property
    def tokens(self) -> int:
        """How many it has read."""
        return int(self._rows.tokens[self.row])


class Slots:
    """A pool of `capacity` rows in the engine's backend. Slots lie side by side from row 0 on, so that a batch of them
    is a range of rows and runs where it lies. Joining, leaving, resetting and copying touch one row.

    As with a `State`, what is interrupted half-way leaves the rows that it changes broken, and no others: their slots
    are refused until they are reset, loaded, or another is copied into them.

    Not for several threads at once. Raises DfssmError for a capacity below 1.
    """

    def __init__(self, engine: Engine, capacity: int):
        require_whole("capacity", capacity, 1)
        self.engine, self.capacity = engine, capacity
        self.pool = engine.backend.pool(capacity + 1)  # the last row is for exchanging two others
        self.rows = Rows(np.zeros(capacity + 1, np.int64))
        self._slots: list[Slot] = []  # by row

    def __repr__(self) -> str:
        return f"<Slots: {len(self)} of {self.capacity} taken>"

    def __len__(self) -> int:
        return len(self._slots)

    def join(self) -> Slot:
        """A slot that has read nothing. Raises DfssmError when all are taken."""
        if len(self) == self.capacity:
            raise DfssmError(f"all {self.capacity} slots are taken: let one leave, or make more of them")
        slot = Slot(self.rows, len(self))
        self._reset(slot.row)
        self._slots.append(slot)
        return slot

    def leave(self, slot: Slot) -> None:
        """Give the slot up. The last one takes its row."""
        row, last = self._row(slot), self._slots[-1]
        if last is not slot:
            self._move(last.row, row)
        # No calls until all is changed: Ctrl-C comes before or after it.
        self._slots[row], last.row = last, row
        slot.row = -1
        del self._slots[-1]

    def reset(self, slot: Slot) -> None:
        """The slot has read nothing."""
        self._reset(self._row(slot))

    def copy(self, source: Slot, to: Slot) -> None:
        """`to` has read what `source` has: a prefix that several share is read once."""
        row = self._row(source)
        self.rows.require_sound([row])
        self._move(row, self._row(to))

    def save(self, slot: Slot, state: State) -> None:
        """`state`, of one row, becomes the slot's: outside the pool, where it may be kept or written to a file."""
        self._check(state)
        row = self._row(slot)
        self.rows.require_sound([row])
        state.rows.begin(state.span)
        self.pool.read(row, state.tensors)
        state.logits[0], state.tokens[0], state.recent[0] = (
            self.pool.logits[row],
            self.rows.tokens[row],
            self.rows.recent[row],
        )
        state.push()
        state.rows.end(state.span)

    def load(self, slot: Slot, state: State) -> None:
        """The slot becomes `state`, of one row."""
        self._check(state)
        state.require_sound()
        row = self._row(slot)
        self.rows.begin([row])
        self.pool.write(row, {name: np.ascontiguousarray(tensor) for name, tensor in state.tensors.items()})
        self.pool.logits[row], self.rows.tokens[row] = state.logits[0], state.tokens[0]
        self.rows.recent[row] = state.recent[0]
        self.rows.end([row])

    def run(self, slots: Sequence[Slot], ids: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
        """Read ids i64[n,T], a row a slot, as one batch. Returns the logits of their last tokens, f32[n,V].

        Raises DfssmError where some are NaN or infinite; their slots are then broken, the others have read theirs.
        Slots that do not lie side by side in this order are moved there first: run the same ones in the same order.
        """
        span = self._run(slots, ids)
        logits = self.pool.logits[span.start : span.stop].copy()
        self.engine.check(self.pool, self.rows, span, logits)
        return logits

    def read(self, slots: Sequence[Slot], ids: np.ndarray | Sequence[Sequence[int]]) -> None:
        """`run` without a look at the logits: `next` is to choose by them."""
        self._run(slots, ids)

    def next(self, slots: Sequence[Slot], samplings: Sequence[Sampling | Sampler]) -> list[int | Exception]:
        """The token that each slot's `Sampling` takes after what the slot has read, or why it has none: what `run`
        raises, or a processor. One with penalties, processors or logprobs goes in the `Sampler` of its text. A device
        keeps the logits, unless one needs all of a row.
        """
        if len(samplings) != len(slots):
            raise DfssmError(f"{len(slots)} slots and {len(samplings)} samplings: give each slot one")
        rows = [self._row(slot) for slot in slots]
        self.rows.require_sound(rows)
        positions = self.rows.tokens[rows].tolist()
        chosen = choose(self.pool, rows, [Sampler.of(sampling) for sampling in samplings], positions)
        found: list[int | Exception] = []
        for row, one in zip(rows, chosen, strict=True):
            if isinstance(one, Exception):
                found.append(one)
            else:
                token, logit = one
                found.append(token if math.isfinite(logit) else self._error(row) or token)
        return found

    def _error(self, row: int) -> DfssmError | None:
        """What is to be said of the numbers of `row`, if anything."""
        try:
            self.engine.check(self.pool, self.rows, range(row, row + 1), self.pool.logits[row : row + 1])
        except DfssmError as error:
            return error
        return None

    def choose(
        self,
        slots: Sequence[Slot],
        ids: np.ndarray | Sequence[Sequence[int]],
        samplings: Sequence[Sampling | Sampler],
    ) -> list[int]:
        """`read`, then `next`; raises what is no token."""
        samplers = [Sampler.of(sampling) for sampling in samplings]
        self._run(slots, ids)
        tokens = []
        for found in self.next(slots, samplers):
            if isinstance(found, Exception):
                raise found
            tokens.append(found)
        return tokens

    def _run(self, slots: Sequence[Slot], ids: np.ndarray | Sequence[Sequence[int]]) -> range:
        """Returns the rows that they lie in."""
        ids = np.ascontiguousarray(self.engine.token_ids(ids))
        if ids.ndim != 2 or len(slots) != len(ids) or not ids.size:
            raise DfssmError(f"{len(slots)} slots and tokens {list(ids.shape)}: give each slot a row of one or more")
        rows = [self._row(slot) for slot in slots]
        if len(set(rows)) != len(rows):
            raise DfssmError("a slot is in the batch twice: give each once")
        self.rows.require_sound(rows)
        if rows != list(range(rows[0], rows[0] + len(rows))):
            for row, slot in enumerate(slots):
                self._exchange(slot, row)
        start = slots[0].row
        span = range(start, start + len(ids))
        self.engine.run(self.pool, self.rows, span, ids)
        return span

    def _reset(self, row: int) -> None:
        self.rows.begin([row])
        self.pool.reset(row)
        self.rows.reset(row)
        self.rows.end([row])

    def _move(self, source: int, to: int) -> None:
        """Row `to` becomes row `source`, broken or sound."""
        self.rows.begin([to])
        self.pool.copy(source, to)
        self.rows.copy(source, to)
        if source not in self.rows.broken:
            self.rows.end([to])

    def _exchange(self, slot: Slot, row: int) -> None:
        """Put `slot` into `row`, and what is there where it was."""
        other, here, spare = self._slots[row], slot.row, self.capacity
        if other is slot:
            return
        was_broken = row in self.rows.broken  # `slot` is sound
        self.rows.begin([row, here])
        for source, to in ((row, spare), (here, row), (spare, here)):
            self.pool.copy(source, to)
            self.rows.copy(source, to)
        self._slots[row], self._slots[here] = slot, other
        slot.row, other.row = row, here
        self.rows.end([row] if was_broken else [row, here])

    def _row(self, slot: Slot) -> int:
        if not 0 <= slot.row < len(self) or self._slots[slot.row] is not slot:
            raise DfssmError("the slot has left, or is of another pool: join again")
        return slot.row

    def _check(self, state: State) -> None:
        if state.batch != 1:
            raise DfssmError(f"a slot is one sequence, the state has {state.batch}: use state.row(i)")
        require_model(state, self.engine.model, self.engine.backend.layout, self.engine.vocab_size)
