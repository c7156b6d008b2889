"""The step in TensorRT: states live on the device, and decoding replays a CUDA graph.

The arrays of a `State` are copies on the host, brought up to date when they are asked for. A step writes its new states
beside the old ones and the two sets of buffers change places, so there is a captured graph for either direction; where
the engine itself declares that an output lies on its input (the plugins' `getAliasedInput`), there is one set.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from dfssm.opset.errors import DfssmError
from dfssm.targets import get_target
from dfssm.targets.bundle import Manifest

from .cuda import Cuda
from .state import Layout, State

DECODE, PREFILL = 0, 1
"""The execution contexts, in order: T = 1 with the engine's first profile, more tokens with its last."""

_DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}


class TensorRTBackend:
    """An engine with one context for steps and one for prompts. `cuda` is a `Cuda`; `engine` an ICudaEngine."""

    def __init__(self, engine: Any, cuda: Any):
        self.engine, self.cuda = engine, cuda
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if "." in name and "_out." not in name]
        self.states = {name: name.replace(".", "_out.") for name in inputs}
        self.layout: Layout = {name: (self.dtype(name), tuple(engine.get_tensor_shape(name))[1:]) for name in inputs}
        self.vocab_size = int(engine.get_tensor_shape("logits")[-1])
        self.aliased = {name for name, out in self.states.items() if engine.get_aliased_input_tensor(out) == name}
        # Two even where one profile serves both: a prompt must not change the context whose step was recorded.
        self.contexts = []
        last = engine.num_optimization_profiles - 1
        for profile in (0, last):
            context = engine.create_execution_context()
            context.set_optimization_profile_async(profile, cuda.stream)
            self.contexts.append(context)
        self.max_batch, self.max_tokens = engine.get_tensor_profile_shape("input_ids", last)[2]

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> TensorRTBackend:
        """Load the bundle's engine. DfssmError when this machine has no device, or the engine is not for it."""
        target = get_target(manifest.target)
        target.check(folder, manifest)
        cuda = Cuda()
        return cls(target.open_engine(folder, manifest, cuda.capability()), cuda)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(_DTYPES[self.engine.get_tensor_dtype(name).name])

    def bind(self, state: State) -> DeviceBinding:
        if state.batch > self.max_batch:
            raise DfssmError(
                f"the state has {state.batch} rows, the engine was built for {self.max_batch}: "
                f"compile with --max-batch {state.batch}"
            )
        return DeviceBinding(self, state)


class DeviceBinding:
    """The device's copy of one state, and what runs on it."""

    def __init__(self, backend: TensorRTBackend, state: State):
        self._backend, self._cuda = backend, backend.cuda
        self._host = dict(state.tensors)
        self._logits_host = state.logits
        self._batch = state.batch
        self._ids_dtype = backend.dtype("input_ids")
        self._addresses: list[int] = []
        self._ids = self._allocate(self._batch * backend.max_tokens * self._ids_dtype.itemsize)
        self._logits = self._allocate(state.logits.nbytes)
        # Where each state lies: a step reads [self._side] and writes the other.
        self._states = {}
        for name, array in self._host.items():
            first = self._allocate(array.nbytes)
            self._states[name] = (first, first if name in backend.aliased else self._allocate(array.nbytes))
        self._side = 0
        self._graphs: dict[int, Any] = {}
        self._stale = False
        self._next = np.zeros((self._batch, 1), self._ids_dtype)
        self.push()

    def __del__(self):
        for executable in getattr(self, "_graphs", {}).values():
            self._cuda.release(executable)
        for address in getattr(self, "_addresses", []):
            self._cuda.free(address)

    def feed_token(self, ids: np.ndarray) -> None:
        self._next = ids.reshape(self._batch, 1).astype(self._ids_dtype)

    def feed_prompt(self, ids: np.ndarray) -> None:
        self._next = ids.astype(self._ids_dtype)

    def run(self, release_memory: bool = False) -> None:
        """Run the fed tokens, a prompt in pieces that the engine was built for."""
        for start in range(0, self._next.shape[1], self._backend.max_tokens):
            self._run(np.ascontiguousarray(self._next[:, start : start + self._backend.max_tokens]))
        self._cuda.to_host(self._logits_host, self._logits)
        self._cuda.synchronize()

    def run_all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Token by token: the engine gives the logits of the last token only."""
        out = np.empty((*ids.shape, self._backend.vocab_size), np.float32)
        for t in range(ids.shape[1]):
            self.feed_token(ids[:, t])
            self.run()
            out[:, t] = self._logits_host
        return out

    def pull(self) -> None:
        if self._stale:
            for name, array in self._host.items():
                self._cuda.to_host(array, self._states[name][self._side])
            self._cuda.synchronize()
            self._stale = False

    def push(self) -> None:
        for name, array in self._host.items():
            self._cuda.to_device(self._states[name][self._side], array)
        self._cuda.synchronize()
        self._stale = False

    def _run(self, ids: np.ndarray) -> None:
        self._cuda.to_device(self._ids, ids)
        if ids.shape[1] > 1:
            self._queue(self._backend.contexts[-1], ids.shape)
        elif self._side in self._graphs:
            self._cuda.launch(self._graphs[self._side])
        else:
            # The first run of a shape may allocate, which a capture forbids: run, then record the same for the next.
            context = self._backend.contexts[DECODE]
            self._queue(context, ids.shape)
            self._cuda.synchronize()
            self._cuda.begin_capture()
            self._queue(context, ids.shape)
            self._graphs[self._side] = self._cuda.end_capture()
        self._cuda.synchronize()  # `ids` is ours until here
        self._side = 1 - self._side
        self._stale = True

    def _queue(self, context, shape: tuple[int, int]) -> None:
        """Queue the step from one side of the states to the other."""
        context.set_input_shape("input_ids", shape)
        context.set_tensor_address("input_ids", self._ids)
        context.set_tensor_address("logits", self._logits)
        for name, out in self._backend.states.items():
            sides = self._states[name]
            context.set_input_shape(name, self._host[name].shape)
            context.set_tensor_address(name, sides[self._side])
            context.set_tensor_address(out, sides[1 - self._side])
        if not context.execute_async_v3(self._cuda.stream):
            raise DfssmError(f"TensorRT could not run the step for {math.prod(shape)} tokens: see its message above")

    def _allocate(self, size: int) -> int:
        self._addresses.append(self._cuda.allocate(size))
        return self._addresses[-1]
