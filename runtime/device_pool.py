"""Rows of states on the device, and the runs of an engine on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.targets.trt_build import LOGITS_AT

from .sampling import divisor, largest

if TYPE_CHECKING:
    from .backend import Ahead
    from .tensorrt import TensorRTBackend

ALIGNMENT = 256
"""Bytes to which the address of a tensor must be aligned for TensorRT; those of CUDA's allocations are."""

NOWHERE = range(0)


class DevicePool:
    """Rows of states on the device, and what runs on them. `host`, name -> [rows,...], are copies of the states, for
    `pull` and `push`; `logits` f32[rows,V] are the host's, too.

    A step leaves its logits on the device, where they are looked at for the tokens that `largest` was asked for before;
    those, and the ids of the next step, go through pinned memory. Of all the rest the device waits for nothing: the one
    wait of a step is at its end.
    """

    def __init__(self, backend: TensorRTBackend, logits: np.ndarray, host: Mapping[str, np.ndarray] | None = None):
        self._backend, self._cuda = backend, backend.cuda
        self._host_logits, self._host = logits, host or {}
        rows = len(logits)
        self._ids_dtype = backend.dtype("input_ids")
        self._row_bytes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in backend.layout.items()}
        self._addresses: list[int] = []
        self._pinned: list[np.ndarray] = []
        self._elsewhere: dict[str, dict[str, int]] = {}
        self._graphs: dict[tuple[int, int], Any] = {}  # first row and number of rows -> their step, recorded
        self._stale = self._ahead = False  # the host's copies are behind the device, or before it
        self._behind = NOWHERE  # the rows whose logits are on the device alone
        self._next: np.ndarray | None = None  # the tokens that a step left in `_ids`
        self._top: _Largest | None = None  # of a step, where they were asked for; and those of `_behind`
        self._found: _Largest | None = None
        self._all_logits = 0  # allocated when first asked for
        most = max(rows, min(rows, backend.prompt_rows) * backend.max_tokens)
        with self._device():
            self._ids = self._allocate(most * self._ids_dtype.itemsize)
            self._first_place = self._allocate(8)  # of the only token of a step
            self._places = self._allocate(8 * backend.max_logits)
            self._logits = self._allocate(logits.nbytes)
            self._given_ids = self._pin((rows,), self._ids_dtype)
            self._states = self._allocate_states()

    def __del__(self) -> None:
        if hasattr(self, "_graphs"):
            self._release_graphs()
        for address in getattr(self, "_addresses", []):
            self._cuda.free(address)
        for array in getattr(self, "_pinned", []):
            self._cuda.unpin(array)

    on_host = False

    @property
    def logits(self) -> np.ndarray:
        self.pull_logits()
        return self._host_logits

    @property
    def recorded(self) -> bool:
        """Whether the next step of all rows replays a graph."""
        return (0, len(self._host_logits)) in self._graphs

    def run(self, ids: np.ndarray, start: int, done: Callable[[], object], release_memory: bool = False) -> None:
        self.compute(ids, start)
        done()

    def compute(self, ids: np.ndarray, start: int = 0) -> None:
        """Read ids [n,T] into rows from `start` on, a prompt in pieces that the engine was built for."""
        with self._device():
            ids = ids.astype(self._ids_dtype, copy=False)
            if 1 in (ids.shape[1], self._backend.max_tokens):
                rows = range(start, start + len(ids))
                self._keep_logits(rows)
                for t in range(ids.shape[1]):
                    if t:
                        self._cuda.synchronize()  # `_given_ids` are the last token's until then
                    self._step(ids[:, t], rows)
            else:
                for part, rows in self._groups(ids, start):
                    self._keep_logits(rows)
                    for first in range(0, ids.shape[1], self._backend.max_tokens):
                        piece = part[:, first : first + self._backend.max_tokens]
                        self._prompt(piece, rows, np.array([piece.shape[1] - 1]), self._logits)
                    self._behind, self._found = rows, None

    def run_all_logits(self, ids: np.ndarray, start: int, done: Callable[[], object]) -> np.ndarray:
        backend, vocab = self._backend, self._backend.vocab_size
        out = np.empty((*ids.shape, vocab), np.float32)
        if ids.shape[1] == 1:
            self.compute(ids, start)
            out[:, 0] = self.logits[start : start + len(ids)]
        else:
            with self._device():
                self._keep_logits(NOWHERE)
                if not self._all_logits:
                    self._all_logits = self._allocate(4 * backend.prompt_rows * backend.max_logits * vocab)
                for part, rows in self._groups(ids.astype(self._ids_dtype, copy=False), start):
                    self._prompt(part, rows, np.arange(ids.shape[1]), self._all_logits)
                    self._cuda.to_host(out[rows.start - start : rows.stop - start], self._all_logits)
            self._host_logits[start : start + len(ids)] = out[:, -1]
        done()
        return out

    def ahead(self, row: int) -> Ahead:
        raise DfssmError(
            "speculation needs runs of several tokens with the bits of runs of one, which TensorRT does not promise: "
            "use a bundle of target ort-cpu, or leave it out"
        )

    def logits_of(self, row: int) -> np.ndarray:
        found: np.ndarray = self._host_logits[row]
        if row in self._behind:
            with self._device():
                self._cuda.to_host(found, self._logits + (row - self._behind.start) * found.nbytes)
        return found

    def largest(self, row: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        count = min(count, self._backend.vocab_size)
        if row in self._behind and self._found and count <= self._found.count:
            at = row - self._behind.start
            return self._found.tokens[at, :count].copy(), self._found.logits[at, :count].copy()
        if count <= self._cuda.most_largest and (self._top is None or count > self._top.count):
            self._look_for(count)
        return largest(self.logits[row], count)

    def weighed(self, row: int, temperature: float) -> tuple[np.ndarray, np.ndarray, int] | None:
        by, count = divisor(temperature), min(self._cuda.most_largest, self._backend.vocab_size)
        if not count or not self._cuda.weighs:
            return None
        at, found = row - self._behind.start, self._found
        if row in self._behind and found and found.weight and found.weight.used[at] == by:
            return found.tokens[at].copy(), found.logits[at].copy(), int(found.weight.totals[at])
        if not self._top or not self._top.weight:
            self._look_for(count, weigh=True)
        assert self._top and self._top.weight
        self._top.weight.divisors[row] = by
        return None

    def reset(self, row: int) -> None:
        with self._device():
            for name, size in self._row_bytes.items():
                self._cuda.zero(self._address(name, row), size)
            self._stale = True
        self.logits[row] = 0

    def copy(self, source: int, to: int) -> None:
        with self._device():
            for name, size in self._row_bytes.items():
                self._cuda.copy(self._address(name, to), self._address(name, source), size)
            self._stale = True
        logits = self.logits
        logits[to] = logits[source]

    def read(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        with self._device():
            for name, tensor in tensors.items():
                self._cuda.to_host(tensor, self._address(name, row))

    def write(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        with self._device():
            for name, tensor in tensors.items():
                self._cuda.to_device(self._address(name, row), tensor)
            self._stale = True

    def pull(self) -> None:
        if self._stale:
            with self._device():
                for name, array in self._host.items():
                    self._cuda.to_host(array, self._states[name])
            self._stale = False

    def pull_logits(self) -> None:
        if self._behind:
            with self._device():
                self._keep_logits(NOWHERE)

    def push(self) -> None:
        """The copies go to the device before it is used next: once, however many rows of them were written."""
        self._ahead, self._stale = True, False

    @contextmanager
    def _device(self) -> Iterator[None]:
        """Work for the device, queued in a `with` block and done after it. What it uses stays until then. Room for it,
        too, which is zeroed in the stream: another thread may be recording that.
        """
        with self._backend.lock, self._cuda.device():
            try:
                if self._cuda.recording:  # it was cut short
                    self._cuda.synchronize()
                if self._ahead:
                    for name, array in self._host.items():
                        self._cuda.to_device(self._states[name], array)
                    self._cuda.synchronize()  # the copies, too, may then be written
                    self._ahead = False
                yield
            finally:
                self._cuda.synchronize()

    def _keep_logits(self, but: range) -> None:
        """The room of the logits is needed: queue a copy to the host, where rows have theirs there that are not in
        `but`, which get others.
        """
        if not set(self._behind) <= set(but):
            self._cuda.to_host(self._host_logits[self._behind.start : self._behind.stop], self._logits)
            self._behind = NOWHERE

    def _groups(self, ids: np.ndarray, start: int) -> Iterator[tuple[np.ndarray, range]]:
        """ids [n,T] for rows from `start` on, as many rows at a time as a prompt may have."""
        for first in range(0, len(ids), self._backend.prompt_rows):
            part = ids[first : first + self._backend.prompt_rows]
            yield part, range(start + first, start + first + len(part))

    def _prompt(self, ids: np.ndarray, rows: range, places: np.ndarray, logits: int) -> None:
        """Read ids [n,T] into `rows`; the logits of the tokens at `places` go to the address `logits`."""
        ids = np.ascontiguousarray(ids)
        with self._bound(rows) as (read, written):
            self._cuda.to_device(self._ids, ids)
            self._cuda.to_device(self._places, places)
            self._next = None
            at = self._places, len(places)
            self._queue(self._backend.prompt_context, ids.shape, read, written, at, logits)
        self._cuda.synchronize()  # `ids` is ours until here

    def _step(self, ids: np.ndarray, rows: range) -> None:
        """Read one token a row, ids [n], into `rows`."""
        key = rows.start, len(rows)
        with self._bound(rows) as (read, written):
            self._feed(ids)
            if graph := self._graphs.get(key):
                self._cuda.launch(graph)
            else:
                # The first run of a shape may allocate, which a capture forbids: run, then record it for the next.
                context = self._backend.step_context(len(rows))
                self._queue_step(context, read, written, rows)
                self._cuda.synchronize()
                if self._backend.recordable(context):
                    if len(self._graphs) > 2 * len(self._host_logits):  # all from row 0 on, and each row alone
                        self._release_graphs()
                    self._cuda.begin_capture()
                    self._queue_step(context, read, written, rows)
                    self._graphs[key] = self._cuda.end_capture()
        self._behind, self._found = rows, self._top
        if self._top and self._top.weight:
            self._top.weight.used = self._top.weight.divisors[rows.start : rows.stop].copy()
        if self._top and self._top.on_device[0] == self._ids:
            self._next = self._top.tokens[: len(rows), 0]

    def _feed(self, ids: np.ndarray) -> None:
        """Queue a copy of the ids of a step, unless they are those that the last one left there."""
        if self._next is None or not np.array_equal(self._next, ids):
            self._given_ids[: len(ids)] = ids
            self._cuda.to_device(self._ids, self._given_ids[: len(ids)])
        self._next = None

    def _queue_step(self, context: Any, read: dict[str, int], written: dict[str, int], rows: range) -> None:
        """Queue the engine, and what is looked for in its logits: the part of a step that is recorded."""
        count, vocab = len(rows), self._backend.vocab_size
        self._queue(context, (count, 1), read, written, (self._first_place, 1), self._logits)
        if top := self._top:
            tokens, logits = top.on_device
            self._cuda.largest(self._logits, count, vocab, top.count, tokens, logits)
            self._cuda.to_host(top.tokens[:count], tokens)
            self._cuda.to_host(top.logits[:count], logits)
            if weight := top.weight:
                divisors, totals = weight.on_device
                self._cuda.to_device(divisors, weight.divisors[rows.start : rows.stop])
                self._cuda.total_weight(self._logits, count, vocab, divisors, totals)
                self._cuda.to_host(weight.totals[:count], totals)

    def _release_graphs(self) -> None:
        while self._graphs:
            self._cuda.release(self._graphs.popitem()[1])

    def _queue(
        self,
        context: Any,
        shape: tuple[int, ...],
        read: dict[str, int],
        written: dict[str, int],
        places: tuple[int, int],
        logits: int,
    ) -> None:
        """Queue a run of the ids [n,T] that were copied. `read` and `written`: where the states are; `places`: where
        those of the logits are, and how many; `logits`: where these go.
        """
        context.set_input_shape("input_ids", shape)
        context.set_tensor_address("input_ids", self._ids)
        context.set_tensor_address("logits", logits)
        if self._backend.gives_places:
            context.set_input_shape(LOGITS_AT, places[1:])
            context.set_tensor_address(LOGITS_AT, places[0])
        for name, out in self._backend.states.items():
            context.set_input_shape(name, (shape[0], *self._backend.layout[name][1]))
            context.set_tensor_address(name, read[name])
            context.set_tensor_address(out, written[name])
        if not context.execute_async_v3(self._cuda.stream):
            raise DfssmError(f"TensorRT could not run the step for {math.prod(shape)} tokens: see its message above")

    @contextmanager
    def _bound(self, rows: range) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
        """For a run: where the states of `rows` are read, and where they are written. Afterwards they are in place."""
        lie = {name: self._address(name, rows.start) for name in self._states}
        read = lie if all(address % ALIGNMENT == 0 for address in lie.values()) else self._buffers("read")
        written = read if self._backend.in_place else self._buffers("written")
        self._move(lie, read, len(rows))
        yield read, written
        self._move(written, lie, len(rows))
        self._stale = True

    def _move(self, source: dict[str, int], to: dict[str, int], rows: int) -> None:
        """Queue a copy of the states of so many rows, where it is one."""
        for name, size in self._row_bytes.items() if source is not to else ():
            self._cuda.copy(to[name], source[name], rows * size)

    def _buffers(self, use: str) -> dict[str, int]:
        """Other buffers for the states of a run: to be read where rows lie at addresses that TensorRT does not take (of
        usual sizes none do), to be written where it does not work in place.
        """
        if use not in self._elsewhere:
            self._elsewhere[use] = self._allocate_states()
        return self._elsewhere[use]

    def _address(self, name: str, row: int) -> int:
        return int(self._states[name] + row * self._row_bytes[name])

    def _look_for(self, count: int, weigh: bool = False) -> None:
        """From the next step on, for so many logits of each row, and for the weight of all."""
        rows, weight = len(self._host_logits), None
        with self._device():
            tokens, logits = (self._pin((rows, count), np.dtype(kind)) for kind in (np.int64, np.float32))
            # The one token of each row is the input of the next step.
            next_ids = self._ids if count == 1 and self._ids_dtype == tokens.dtype else self._allocate(tokens.nbytes)
            if weigh:
                divisors, totals = self._pin((rows,), np.dtype(np.float32)), self._pin((rows,), np.dtype(np.int64))
                divisors[:] = 1
                weight = _Weight((self._allocate(divisors.nbytes), self._allocate(totals.nbytes)), divisors, totals)
            self._top = _Largest(count, (next_ids, self._allocate(logits.nbytes)), tokens, logits, weight)
            self._release_graphs()

    def _allocate_states(self) -> dict[str, int]:
        return {name: self._allocate(len(self._host_logits) * size) for name, size in self._row_bytes.items()}

    def _allocate(self, size: int) -> int:
        self._addresses.append(self._cuda.allocate(size))
        return self._addresses[-1]

    def _pin(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        self._pinned.append(self._cuda.pinned(math.prod(shape) * dtype.itemsize))
        array: np.ndarray = self._pinned[-1].view(dtype).reshape(shape)
        return array


@dataclass
class _Weight:
    """Room for the weight of all logits of each row: what their differences are divided by, f32[rows], and what they
    come to, i64[rows], in the device's memory and in pinned memory. `used`: the former, of the rows of the last step.
    """

    on_device: tuple[int, int]
    divisors: np.ndarray
    totals: np.ndarray
    used: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))


@dataclass
class _Largest:
    """Room for the `count` largest logits of each row: their tokens i64 and themselves f32, in the device's memory, and
    [rows,count] in pinned memory.
    """

    count: int
    on_device: tuple[int, int]
    tokens: np.ndarray
    logits: np.ndarray
    weight: _Weight | None
