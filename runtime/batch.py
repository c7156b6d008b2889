"""Rows of states, bound to a session of ONNX Runtime once, so that a run passes no tensor through Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from dfssm.base.memory import trim
from dfssm.targets.session import run_error

# The arena keeps what a long prompt needed; decoding needs a hundredth of it.
_SHRINK = onnxruntime.RunOptions()
_SHRINK.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")


class Batch:
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
        self._session, self._io = session, session.io_binding()
        # What `session.run_with_iobinding` calls: itself it is Python, in which Ctrl-C may come at any line.
        self._run, self._bound = session._sess.run_with_iobinding, (self._io._iobinding,)
        self._has_arena = session.get_session_options().enable_cpu_mem_arena
        self._token = np.zeros((len(logits), 1), np.int64)
        self._keep = np.ones((), np.int64)
        self._logits = logits.reshape(len(logits), 1, -1)
        self._ids: np.ndarray | None = None  # what is bound now as input_ids, and as logits
        self._out: np.ndarray | None = None
        self._bind("bind_input", "logits_to_keep", self._keep)
        self._use(self._token, self._logits)
        for name, tensor in read.items():
            kind, layer = name.split(".")
            self._bind("bind_input", name, tensor)
            self._bind("bind_output", f"{kind}_out.{layer}", written.get(name, tensor))
        self._written_back = [(read[name], tensor) for name, tensor in written.items()]

    def run(self, ids: np.ndarray, done: Callable[[], object], release_memory: bool = False) -> None:
        """Run ids i64[n,T]: states and logits are then in their buffers. `done` as in `Pool.run`."""
        if ids.shape[1] == 1:
            self._token[:] = ids
            ids = self._token
        self.call(ids, self._logits, done, _SHRINK if release_memory and self._has_arena else None)
        if release_memory:
            trim()

    def run_all_logits(self, ids: np.ndarray, done: Callable[[], object]) -> np.ndarray:
        """Run ids i64[n,T] and return the logits of all of them, f32[n,T,V]."""
        out = np.empty((*ids.shape, self._logits.shape[-1]), np.float32)

        def keep_last() -> None:
            self._logits[:, 0] = out[:, -1]
            done()

        self.call(ids, out, keep_last)
        self._use(self._token, self._logits)  # nothing else holds these two any longer
        return out

    def call(self, ids: np.ndarray, out: np.ndarray, done: Callable[[], object], options: Any = None) -> None:
        """Run ids i64[n,T] with the logits of all of them to `out` f32[n,T,V], which is kept until the next run."""
        if ids is not self._ids or out is not self._out:
            self._use(ids, out)
        ran: list[None] = []
        try:
            # One call in C, so that Ctrl-C is raised before the run or after it, and `ran` tells which.
            ran.extend(map(self._run, self._bound, (options,)))
        except Exception as error:  # ONNX Runtime's errors have no common base but Exception
            raise run_error(self._session, error) from error
        finally:
            if ran:
                for tensor, written in self._written_back:
                    np.copyto(tensor, written)
                done()

    def _use(self, ids: np.ndarray, out: np.ndarray) -> None:
        """Bind the ids and the logits of a run. The session holds only addresses, and Ctrl-C may come at any line."""
        if ids is not self._ids:
            self._ids = None
            self._bind("bind_input", "input_ids", ids)
            self._ids = ids
        if out is not self._out:
            self._out = None
            self._keep[...] = 1 if out is self._logits else 0  # prefill and step want the last token's logits only
            self._bind("bind_output", "logits", out)
            self._out = out

    def _bind(self, method: str, name: str, array: np.ndarray) -> None:
        getattr(self._io, method)(name, "cpu", 0, array.dtype.type, list(array.shape), array.ctypes.data)
