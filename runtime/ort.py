"""The step in ONNX Runtime: the buffers of a batch bound once, so that a step passes no tensor through Python."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime

from .memory import trim
from .state import Layout, State

_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}

# The arena keeps what a long prompt needed; decoding needs a hundredth of it.
_SHRINK = onnxruntime.RunOptions()
_SHRINK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")


class OrtBackend:
    """A session of the step graph. With `in_place` a state may be written where it is read: our kernels can, a function
    body in stock ops cannot.
    """

    max_batch = 1 << 16

    def __init__(self, session: onnxruntime.InferenceSession, in_place: bool):
        self.session, self._in_place = session, in_place
        self.vocab_size: int = session.get_outputs()[0].shape[-1]
        self.layout: Layout = {
            tensor.name: (np.dtype(_DTYPES[tensor.type]), tuple(tensor.shape[1:]))
            for tensor in session.get_inputs()
            if tensor.name not in ("input_ids", "logits_to_keep")
        }

    def pool(self, rows: int) -> OrtPool:
        return self.bind(State.zeros("", self.layout, self.vocab_size, rows))

    def bind(self, state: State) -> OrtPool:
        return OrtPool(self.session, state.tensors, state.logits, self._in_place)


class OrtPool:
    """Rows of `tensors`, name -> [rows,...], which it works in, and of `logits` f32[rows,V].

    With `in_place` a state tensor is input and output of the same node, one buffer; otherwise the session writes to a
    second set of buffers, which is copied back after each run.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, tensors: dict[str, np.ndarray], logits: np.ndarray, in_place: bool
    ):
        self.session, self.tensors, self.logits = session, tensors, logits
        self._written = {} if in_place else {name: np.empty_like(tensor) for name, tensor in tensors.items()}
        self._batches: dict[tuple[int, int], _Batch] = {}  # first row and number of rows -> them, bound

    def run(self, ids: np.ndarray, start: int = 0, release_memory: bool = False) -> None:
        self._batch(start, len(ids)).run(ids, release_memory)

    def run_all_logits(self, ids: np.ndarray, start: int = 0) -> np.ndarray:
        return self._batch(start, len(ids)).run_all_logits(ids)

    def reset(self, row: int) -> None:
        for tensor in (*self.tensors.values(), self.logits):
            tensor[row] = 0

    def copy(self, source: int, to: int) -> None:
        for tensor in (*self.tensors.values(), self.logits):
            tensor[to] = tensor[source]

    def read(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            tensor[0] = self.tensors[name][row]

    def write(self, row: int, tensors: Mapping[str, np.ndarray]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name][row] = tensor[0]

    def pull(self) -> None:
        """Nothing to do: the session works in the state's own arrays."""

    def push(self) -> None:
        """Nothing to do."""

    def _batch(self, start: int, count: int) -> _Batch:
        if (start, count) not in self._batches:
            if len(self._batches) > 2 * len(self.logits):  # more than all that begin in row 0, and each row alone
                self._batches.clear()
            rows = slice(start, start + count)
            read = {name: tensor[rows] for name, tensor in self.tensors.items()}
            written = {name: tensor[rows] for name, tensor in self._written.items()}
            self._batches[start, count] = _Batch(self.session, read, written, self.logits[rows])
        return self._batches[start, count]


class _Batch:
    """Rows bound to `session`: the states that it reads, by name, those that it writes where they are others, and the
    logits f32[n,V].
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        read: dict[str, np.ndarray],
        written: dict[str, np.ndarray],
        logits: np.ndarray,
    ):
        self.session = session
        self._io = session.io_binding()
        self._has_arena = session.get_session_options().enable_cpu_mem_arena
        self._token = np.zeros((len(logits), 1), np.int64)
        self._keep = np.ones((), np.int64)  # prefill and step want the last token's logits only
        self._logits = logits.reshape(len(logits), 1, -1)
        self._ids = self._token  # what is bound as input_ids now
        self._bind("bind_input", "input_ids", self._token)
        self._bind("bind_input", "logits_to_keep", self._keep)
        self._bind("bind_output", "logits", self._logits)
        for name, tensor in read.items():
            kind, layer = name.split(".")
            self._bind("bind_input", name, tensor)
            self._bind("bind_output", f"{kind}_out.{layer}", written.get(name, tensor))
        self._written_back = [(read[name], tensor) for name, tensor in written.items()]

    def run(self, ids: np.ndarray, release_memory: bool = False) -> None:
        """Run ids i64[n,T]: states and logits are then in their buffers."""
        self._feed(ids)
        shrink = release_memory and self._has_arena
        self.session.run_with_iobinding(self._io, _SHRINK if shrink else None)
        if release_memory:
            trim()
        for tensor, written in self._written_back:
            np.copyto(tensor, written)

    def run_all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Run ids i64[n,T] and return the logits of all of them, f32[n,T,V]."""
        out = np.empty((*ids.shape, self._logits.shape[-1]), np.float32)
        self._keep[...] = 0
        self._bind("bind_output", "logits", out)
        try:
            self.run(ids)
        finally:
            self._keep[...] = 1
            self._bind("bind_output", "logits", self._logits)
        return out

    def _feed(self, ids: np.ndarray) -> None:
        if ids.shape[1] == 1:
            self._token[:] = ids
            ids = self._token
        if ids is not self._ids:
            self._ids = ids  # the session holds only the address
            self._bind("bind_input", "input_ids", ids)

    def _bind(self, method: str, name: str, array: np.ndarray) -> None:
        getattr(self._io, method)(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
