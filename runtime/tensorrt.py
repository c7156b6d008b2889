"""The step in TensorRT: states live on the device, and decoding replays a CUDA graph where the engine can be recorded.

The arrays of a `State` are copies on the host, brought up to date when they are asked for. A step writes its new states
beside the old ones and the two sets of buffers change places, so there is a captured graph for either direction; where
the engine itself declares that an output lies on its input (the plugins' `getAliasedInput`), there is one set.
"""

from __future__ import annotations

import math
from threading import Lock
from typing import Any

import numpy as np

from dfssm.opset.errors import DfssmError

from .state import Layout, State

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
"""Names of TensorRT's DataType -> what NumPy calls them."""


class TensorRTBackend:
    """An engine, a context of it for prompts, and one for the steps of each batch size: a graph that was recorded holds
    for the shapes that its context then had. `cuda` is a `Cuda`; `engine` an ICudaEngine.
    """

    def __init__(self, engine: Any, cuda: Any):
        self.engine, self.cuda = engine, cuda
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if "." in name and "_out." not in name]
        self.states = {name: name.replace(".", "_out.") for name in inputs}
        self.layout: Layout = {name: (self.dtype(name), tuple(engine.get_tensor_shape(name))[1:]) for name in inputs}
        self.vocab_size = int(engine.get_tensor_shape("logits")[-1])
        # An older TensorRT cannot be asked: it copies where a plugin wants one buffer and is given two.
        alias = getattr(engine, "get_aliased_input_tensor", lambda name: None)
        self.aliased = {name for name, out in self.states.items() if alias(out) == name}
        last = engine.num_optimization_profiles - 1
        self.prompt_context = self._context(last)
        self._step_contexts: dict[int, Any] = {}
        self.max_batch, self.max_tokens = engine.get_tensor_profile_shape("input_ids", last)[2]
        # Contexts and the stream are one for all states, which may be run from several threads.
        self.lock = Lock()

    def step_context(self, batch: int) -> Any:
        """The context for T = 1 with `batch` rows, of the engine's first profile."""
        if batch not in self._step_contexts:
            self._step_contexts[batch] = self._context(0, final_kernels=True)
        return self._step_contexts[batch]

    def recordable(self, context: Any) -> bool:
        """Whether a run of `context` may be recorded. TensorRT-RTX tells; TensorRT records all of our ops."""
        return getattr(context, "is_stream_capturable", lambda stream: True)(self.cuda.stream)

    def _context(self, profile: int, final_kernels: bool = False) -> Any:
        """With `final_kernels`, TensorRT-RTX compiles those for a shape before it runs it; else it begins with general
        ones and puts the better in their place when they are ready, which a recorded graph would not see.
        """
        settings = {}
        if final_kernels and hasattr(self.engine, "create_runtime_config"):
            config = self.engine.create_runtime_config()
            strategy = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
            if strategy is not None:
                config.dynamic_shapes_kernel_specialization_strategy = type(strategy).EAGER
                settings["runtime_config"] = config
        context = self.engine.create_execution_context(**settings)
        if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
            raise DfssmError("TensorRT makes no execution context: see its message above; is the device's memory full?")
        return context

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(DTYPES[self.engine.get_tensor_dtype(name).name])

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

    def __del__(self) -> None:
        for executable in getattr(self, "_graphs", {}).values():
            self._cuda.release(executable)
        for address in getattr(self, "_addresses", []):
            self._cuda.free(address)

    def feed_token(self, ids: np.ndarray) -> None:
        self._next = ids.reshape(self._batch, 1).astype(self._ids_dtype)

    def feed_prompt(self, ids: np.ndarray) -> None:
        self._next = ids.astype(self._ids_dtype)

    def run(self, release_memory: bool = False) -> None:
        with self._backend.lock:
            self._compute()
            self._cuda.to_host(self._logits_host, self._logits)
            self._cuda.synchronize()

    @property
    def recorded(self) -> bool:
        """Whether the next step replays a graph."""
        return self._side in self._graphs

    def compute(self) -> None:
        """`run`, but the logits stay on the device: for measuring it alone."""
        with self._backend.lock:
            self._compute()

    def run_all_logits(self, ids: np.ndarray) -> np.ndarray:
        """Token by token: the engine gives the logits of the last token only."""
        out = np.empty((*ids.shape, self._backend.vocab_size), np.float32)
        for t in range(ids.shape[1]):
            self.feed_token(ids[:, t])
            self.run()
            out[:, t] = self._logits_host
        return out

    def pull(self) -> None:
        with self._backend.lock:
            if self._stale:
                for name, array in self._host.items():
                    self._cuda.to_host(array, self._states[name][self._side])
                self._cuda.synchronize()
                self._stale = False

    def push(self) -> None:
        with self._backend.lock:
            for name, array in self._host.items():
                self._cuda.to_device(self._states[name][self._side], array)
            self._cuda.synchronize()
            self._stale = False

    def _compute(self) -> None:
        """Run the fed tokens, a prompt in pieces that the engine was built for."""
        for start in range(0, self._next.shape[1], self._backend.max_tokens):
            self._run(np.ascontiguousarray(self._next[:, start : start + self._backend.max_tokens]))

    def _run(self, ids: np.ndarray) -> None:
        self._cuda.to_device(self._ids, ids)
        if ids.shape[1] > 1:
            self._queue(self._backend.prompt_context, ids.shape)
        elif self.recorded:
            self._cuda.launch(self._graphs[self._side])
        else:
            # The first run of a shape may allocate, which a capture forbids: run, then record the same for the next.
            context = self._backend.step_context(self._batch)
            self._queue(context, ids.shape)
            self._cuda.synchronize()
            if self._backend.recordable(context):
                self._cuda.begin_capture()
                self._queue(context, ids.shape)
                self._graphs[self._side] = self._cuda.end_capture()
        self._cuda.synchronize()  # `ids` is ours until here
        self._side = 1 - self._side
        self._stale = True

    def _queue(self, context: Any, shape: tuple[int, ...]) -> None:
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
