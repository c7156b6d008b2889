"""The step in ONNX Runtime: the buffers of a batch bound once, so that a step passes no tensor through Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime

from dfssm.base.errors import DfssmError

from .ahead import PENDING_COUNT, RowAhead
from .batch import Batch
from .sampling import largest
from .state import Layout, State

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
"""Of states, by the names of ONNX Runtime."""


class OrtBackend:
    """A session of the step graph. With `in_place` a state may be written where it is read: our kernels can, a function
    body in stock ops cannot.
    """

    max_batch = 1 << 16

    # Longer runs are no faster (1.3B: 32 to 256 tokens within the noise), and take memory: 8 MB of activations at 64
    # tokens, 40 MB at 256.
    max_tokens = max_logits = 64

    def __init__(self, session: onnxruntime.InferenceSession, in_place: bool):
        self.session, self._in_place = session, in_place
        states = [t for t in session.get_inputs() if t.name not in ("input_ids", "logits_to_keep")]
        written, found = {t.name.replace(".", "_out.") for t in states}, [t.name for t in session.get_outputs()]
        if found[:1] != ["logits"] or not written <= set(found) or any(t.type not in DTYPES for t in states):
            raise DfssmError(f"{session.dfssm_path} is not the graph of a step: compile the model again")
        self.vocab_size: int = session.get_outputs()[0].shape[-1]
        table = session.dfssm_weights.get("embedding.weight")
        self.d_model: int | None = table.shape()[-1] if table else None
        self.layout: Layout = {t.name: (np.dtype(DTYPES[t.type]), tuple(t.shape[1:])) for t in states}

    def pool(self, rows: int) -> OrtPool:
        return self.bind(State.zeros("", self.layout, self.vocab_size, rows))

    def bind(self, state: State) -> OrtPool:
        return OrtPool(self.session, state.tensors, state.logits, self._in_place)


class OrtPool:
    """Rows of `tensors`, name -> [rows,...], which it works in, and of `logits` f32[rows,V].

    With `in_place` a state tensor is input and output of the same node, one buffer; otherwise the session writes to a
    second set of buffers, which is copied back after each run.
    """

    on_host = True

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        tensors: Mapping[str, np.ndarray],
        logits: np.ndarray,
        in_place: bool,
    ):
        self.session, self.tensors, self.logits = session, tensors, logits
        self._in_place = in_place
        self._written = {} if in_place else {name: np.empty_like(tensor) for name, tensor in tensors.items()}
        self._batches: dict[tuple[int, int], Batch] = {}  # first row and number of rows -> them, bound
        self._ahead: RowAhead | None = None

    def run(self, ids: np.ndarray, start: int, done: Callable[[], object], release_memory: bool = False) -> None:
        self._settle(start, len(ids))
        self._batch(start, len(ids)).run(ids, done, release_memory)

    def run_all_logits(self, ids: np.ndarray, start: int, done: Callable[[], object]) -> np.ndarray:
        self._settle(start, len(ids))
        return self._batch(start, len(ids)).run_all_logits(ids, done)

    def ahead(self, row: int) -> RowAhead:
        """For one row at a time: another one is settled."""
        if self._ahead is None or self._ahead.row != row:
            counts = self._counts(row)
            if not self._in_place or not counts:
                raise DfssmError(
                    "speculation needs a bundle of target ort-cpu with a deferred state, of which tokens can be "
                    "taken back: compile with --target ort-cpu --state-dtype fp16-deferred"
                )
            self.pull()
            self._ahead = RowAhead(row, self._batch(row, 1), self.logits[row : row + 1], counts)
        return self._ahead

    def rollback(self, row: int, tokens: int) -> None:
        """Row `row` has not read the last `tokens` that it has: of a deferred state, with nothing copied. `logits` stay
        those of the last run. DfssmError where so many are not pending.
        """
        self._settle(row)
        counts = self._counts(row)
        left = int(counts[0][0]) - tokens if counts else -1
        if left < 0:
            raise DfssmError(f"{tokens} tokens cannot be taken back: compile with a -deferred --state-dtype")
        for count in reversed(counts):  # the one that was asked last: whoever is interrupted may ask again
            count[0] = left

    def logits_of(self, row: int) -> np.ndarray:
        found: np.ndarray = self.logits[row]
        return found

    def largest(self, row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        return largest(self.logits[row], count)

    def weighed(self, row: int, temperature: float) -> None:
        return None

    def reset(self, row: int) -> None:
        self._forget(row)
        for tensor in (*self.tensors.values(), self.logits):
            tensor[row] = 0

    def copy(self, source: int, to: int) -> None:
        self._settle(source)
        self._forget(to)
        for tensor in (*self.tensors.values(), self.logits):
            tensor[to] = tensor[source]

    def read(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        self._settle(row)
        for name, tensor in tensors.items():
            tensor[0] = self.tensors[name][row]

    def write(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        self._forget(row)
        for name, tensor in tensors.items():
            self.tensors[name][row] = tensor[0]

    def pull(self) -> None:
        """The session works in the state's own arrays, but for a row that reads ahead."""
        if self._ahead is not None:
            self._ahead.settle()

    def pull_logits(self) -> None:
        """Nothing to do."""

    def push(self) -> None:
        if self._ahead is not None:
            self._ahead.forget()

    def _counts(self, row: int) -> list[np.ndarray]:
        """How many tokens of the row are pending, u8[1] of each layer; none where the state is not deferred."""
        at = slice(row, row + 1)
        return [tensor[at] for name, tensor in self.tensors.items() if name.startswith(PENDING_COUNT)]

    def _settle(self, start: int, count: int = 1) -> None:
        """Rows that are to be read are in their own memory."""
        if self._ahead is not None and start <= self._ahead.row < start + count:
            self._ahead.settle()

    def _forget(self, row: int) -> None:
        """The row is to be written."""
        if self._ahead is not None and self._ahead.row == row:
            self._ahead.forget()

    def _batch(self, start: int, count: int) -> Batch:
        if (start, count) not in self._batches:
            if len(self._batches) > 2 * len(self.logits):  # more than all that begin in row 0, and each row alone
                self._batches.clear()
            rows = slice(start, start + count)
            read = {name: tensor[rows] for name, tensor in self.tensors.items()}
            written = {name: tensor[rows] for name, tensor in self._written.items()}
            self._batches[start, count] = Batch(self.session, read, written, self.logits[rows])
        return self._batches[start, count]
