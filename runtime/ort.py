"""The step in ONNX Runtime: the buffers of a state bound once, so that a step passes no tensor through Python."""

from __future__ import annotations

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

    def __init__(self, session: onnxruntime.InferenceSession, in_place: bool):
        self.session, self._in_place = session, in_place
        self.vocab_size: int = session.get_outputs()[0].shape[-1]
        self.layout: Layout = {
            tensor.name: (np.dtype(_DTYPES[tensor.type]), tuple(tensor.shape[1:]))
            for tensor in session.get_inputs()
            if tensor.name not in ("input_ids", "logits_to_keep")
        }

    def bind(self, state: State) -> OrtBinding:
        return OrtBinding(self.session, state, self._in_place)


class OrtBinding:
    """`state` bound to `session`: its tensors as inputs and outputs, its logits as output.

    With `in_place` a state tensor is input and output of the same node, one buffer; otherwise the session
    writes to a second set of buffers, which is copied back after each run.
    """

    def __init__(self, session: onnxruntime.InferenceSession, state: State, in_place: bool):
        self.session = session
        self._io = session.io_binding()
        self._has_arena = session.get_session_options().enable_cpu_mem_arena
        self._token = np.zeros((state.batch, 1), np.int64)
        self._keep = np.ones((), np.int64)  # prefill and step want the last token's logits only
        self._logits = state.logits.reshape(state.batch, 1, -1)
        self._ids = self._token  # what is bound as input_ids now
        self._written_back = []
        self._bind("bind_input", "input_ids", self._token)
        self._bind("bind_input", "logits_to_keep", self._keep)
        self._bind("bind_output", "logits", self._logits)
        for name, tensor in state.tensors.items():
            written = tensor if in_place else np.empty_like(tensor)
            if not in_place:
                self._written_back.append((tensor, written))
            kind, layer = name.split(".")
            self._bind("bind_input", name, tensor)
            self._bind("bind_output", f"{kind}_out.{layer}", written)

    def feed_token(self, ids: np.ndarray) -> None:
        """Next run reads ids i64[B]."""
        self._token[:, 0] = ids
        if self._ids is not self._token:
            self._feed(self._token)

    def feed_prompt(self, ids: np.ndarray) -> None:
        """Next run reads ids i64[B,T], contiguous."""
        self._feed(ids)

    def run(self, release_memory: bool = False) -> None:
        """Run the graph: states and logits are then in the state's buffers. `release_memory`: keep none."""
        shrink = release_memory and self._has_arena
        self.session.run_with_iobinding(self._io, _SHRINK if shrink else None)
        if release_memory:
            trim()
        for tensor, written in self._written_back:
            np.copyto(tensor, written)

    def run_all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Run ids i64[B,T] and return the logits of all of them, f32[B,T,V]."""
        out = np.empty((*ids.shape, self._logits.shape[-1]), np.float32)
        self._feed(ids)
        self._keep[...] = 0
        self._bind("bind_output", "logits", out)
        try:
            self.run()
        finally:
            self._keep[...] = 1
            self._bind("bind_output", "logits", self._logits)
        return out

    def pull(self) -> None:
        """Nothing to do: the session works in the state's own arrays."""

    def push(self) -> None:
        """Nothing to do."""

    def _feed(self, ids: np.ndarray) -> None:
        self._ids = ids  # the session holds only the address
        self._bind("bind_input", "input_ids", ids)

    def _bind(self, method: str, name: str, array: np.ndarray) -> None:
        getattr(self._io, method)(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
