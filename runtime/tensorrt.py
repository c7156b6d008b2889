"""The step in TensorRT: states live on the device, and decoding replays a CUDA graph where the engine can be recorded.

The arrays of a `State` are copies on the host, brought up to date when they are asked for. A step writes the states of
its rows where it reads them: one buffer is bound as input and as output. TensorRT promises nothing about that, so it is
tried once when the engine is opened; see `TensorRTBackend`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any

import numpy as np

from dfssm.opset.errors import DfssmError

from .state import Layout, State

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
"""Names of TensorRT's DataType -> what NumPy calls them."""

ALIGNMENT = 256
"""Bytes to which the address of a tensor must be aligned for TensorRT; those of CUDA's allocations are."""


class TensorRTBackend:
    """An engine, a context of it for prompts, and one for the steps of each batch size: a graph that was recorded holds
    for the shapes that its context then had. `cuda` is a `Cuda`; `engine` an ICudaEngine. `in_place`: in the engine's
    graph one plugin of ours alone reads and writes a state. Then states are updated in place, if a trial shows no
    difference; else runs write to other buffers, which are copied back.
    """

    def __init__(self, engine: Any, cuda: Any, in_place: bool = True):
        self.engine, self.cuda = engine, cuda
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if "." in name and "_out." not in name]
        self.states = {name: name.replace(".", "_out.") for name in inputs}
        self.layout: Layout = {name: (self.dtype(name), tuple(engine.get_tensor_shape(name))[1:]) for name in inputs}
        self._require_known(names)
        self.vocab_size = int(engine.get_tensor_shape("logits")[-1])
        self._activations = 0  # where they lie, once there is a context
        last = engine.num_optimization_profiles - 1
        self.prompt_context = self._context(last)
        self._step_contexts: dict[int, Any] = {}
        self.max_batch, self.max_tokens = engine.get_tensor_profile_shape("input_ids", last)[2]
        # Contexts and the stream are one for all states, which may be run from several threads.
        self.lock = Lock()
        self.in_place = in_place and self._works_in_place()
        if in_place and not self.in_place:
            warnings.warn(
                "TensorRT does not update states in place on this GPU: they take twice the memory and a copy a step",
                RuntimeWarning,
                stacklevel=2,
            )

    def __del__(self) -> None:
        if getattr(self, "_activations", 0):
            self.cuda.free(self._activations)

    def step_context(self, batch: int) -> Any:
        """The context for T = 1 with `batch` rows, of the engine's first profile."""
        if batch not in self._step_contexts:
            self._step_contexts[batch] = self._context(0, final_kernels=True)
        return self._step_contexts[batch]

    def recordable(self, context: Any) -> bool:
        """Whether a run of `context` may be recorded. TensorRT-RTX tells; TensorRT records all of our ops."""
        return getattr(context, "is_stream_capturable", lambda stream: True)(self.cuda.stream)

    def _works_in_place(self) -> bool:
        """Whether a step and a prompt from arbitrary states give the same logits and states, bit for bit, from one
        buffer as from two. An engine that writes nothing to the second one works in the first whatever is bound.
        """
        rng = np.random.default_rng(0)
        states = {name: _arbitrary(rng, dtype, (1, *shape)) for name, (dtype, shape) in self.layout.items()}
        found = []
        for self.in_place in (False, True):
            pool, after = self.pool(1), {name: np.empty_like(state) for name, state in states.items()}
            pool.write(0, states)
            logits = []
            for tokens in (1, min(2, self.max_tokens)):  # kernels are chosen for each
                pool.run(np.zeros((1, tokens), np.int64), 0, lambda: None)
                logits.append(pool.logits.copy())
            pool.read(0, after)
            found.append([*logits, *after.values()])
        apart, together = found
        return _same_bits(apart, together) or not any(state.any() for state in apart[2:])

    def _context(self, profile: int, final_kernels: bool = False) -> Any:
        """With `final_kernels`, TensorRT-RTX compiles those for a shape before it runs it; else it begins with general
        ones and puts the better in their place when they are ready, which a recorded graph would not see.
        """
        settings = {}
        if hasattr(self.engine, "create_runtime_config"):
            config = settings["runtime_config"] = self.engine.create_runtime_config()
            # What lies between the layers takes gigabytes for a large batch. Contexts run one at a time, and share it.
            allocation = type(config.get_execution_context_allocation_strategy())
            config.set_execution_context_allocation_strategy(allocation.USER_MANAGED)
            strategy = getattr(config, "dynamic_shapes_kernel_specialization_strategy", None)
            if final_kernels and strategy is not None:
                config.dynamic_shapes_kernel_specialization_strategy = type(strategy).EAGER
        context = self.engine.create_execution_context(**settings)
        if context is not None and settings:
            size = self.engine.device_memory_size_v2
            self._activations = self._activations or self.cuda.allocate(size)
            context.set_device_memory(self._activations, size)
        if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
            raise DfssmError("TensorRT makes no execution context: see its message above; is the device's memory full?")
        return context

    def _require_known(self, names: list[str]) -> None:
        """DfssmError where these are not the tensors of a step as this dfssm runs it: one keeps its states in another
        form, say.
        """
        expected = {"input_ids", "logits", *self.states, *self.states.values()}
        unknown = expected.symmetric_difference(names)
        unknown |= {name for name, (_, shape) in self.layout.items() if min(shape) < 1}  # left open
        if unknown:
            raise DfssmError(
                f"the engine's inputs and outputs are not those of a step, see {', '.join(sorted(unknown))}: "
                "compile the model again, or use the dfssm that made it"
            )

    def dtype(self, name: str) -> np.dtype:
        found = self.engine.get_tensor_dtype(name).name
        if found not in DTYPES:
            raise DfssmError(
                f"{name} of the engine is {found}, which this dfssm does not know: compile the model again"
            )
        return np.dtype(DTYPES[found])

    def pool(self, rows: int) -> DevicePool:
        return DevicePool(self, np.zeros((rows, self.vocab_size), np.float32))

    def bind(self, state: State) -> DevicePool:
        pool = DevicePool(self, state.logits, state.tensors)
        pool.push()
        return pool


class DevicePool:
    """Rows of states on the device, and what runs on them. `logits` f32[rows,V] is theirs on the host; `host`, name ->
    [rows,...], are copies of the states there, for `pull` and `push`.
    """

    def __init__(self, backend: TensorRTBackend, logits: np.ndarray, host: Mapping[str, np.ndarray] | None = None):
        self._backend, self._cuda = backend, backend.cuda
        self.logits, self._host = logits, host or {}
        rows = len(logits)
        self._ids_dtype = backend.dtype("input_ids")
        self._addresses: list[int] = []
        self._ids = self._allocate(rows * backend.max_tokens * self._ids_dtype.itemsize)
        self._logits = self._allocate(logits.nbytes)
        self._row_bytes = {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in backend.layout.items()}
        self._states = self._allocate_states()
        self._elsewhere: dict[str, dict[str, int]] = {}
        self._graphs: dict[tuple[int, int], Any] = {}  # first row and number of rows -> their step, recorded
        self._stale = self._ahead = False  # the host's copies are behind the device, or before it

    def __del__(self) -> None:
        if hasattr(self, "_graphs"):
            self._release_graphs()
        for address in getattr(self, "_addresses", []):
            self._cuda.free(address)

    def run(self, ids: np.ndarray, start: int, done: Callable[[], object], release_memory: bool = False) -> None:
        with self._device():
            self._compute(ids, start)
            self._cuda.to_host(self.logits[start : start + len(ids)], self._logits)
        done()

    @property
    def recorded(self) -> bool:
        """Whether the next step of all rows replays a graph."""
        return (0, len(self.logits)) in self._graphs

    def compute(self, ids: np.ndarray) -> None:
        """`run`, but the logits stay on the device: for measuring it alone."""
        with self._device():
            self._compute(ids, 0)

    def run_all_logits(self, ids: np.ndarray, start: int, done: Callable[[], object]) -> np.ndarray:
        """Token by token: the engine gives the logits of the last token only."""
        out = np.empty((*ids.shape, self._backend.vocab_size), np.float32)
        for t in range(ids.shape[1]):
            self.run(ids[:, t : t + 1], start, lambda: None)
            out[:, t] = self.logits[start : start + len(ids)]
        done()
        return out

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
        self.logits[to] = self.logits[source]

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

    def push(self) -> None:
        """The copies go to the device before it is used next: once, however many rows of them were written."""
        self._ahead, self._stale = True, False

    @contextmanager
    def _device(self) -> Iterator[None]:
        """Work for the device, queued in a `with` block and done after it. What it uses stays until then."""
        with self._backend.lock:
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

    def _compute(self, ids: np.ndarray, start: int) -> None:
        """Read ids [n,T] into rows from `start` on, a prompt in pieces that the engine was built for."""
        ids = ids.astype(self._ids_dtype, copy=False)
        for first in range(0, ids.shape[1], self._backend.max_tokens):
            self._run(np.ascontiguousarray(ids[:, first : first + self._backend.max_tokens]), start)

    def _run(self, ids: np.ndarray, start: int) -> None:
        rows = len(ids)
        lie = {name: self._address(name, start) for name in self._states}
        read = lie if all(address % ALIGNMENT == 0 for address in lie.values()) else self._buffers("read")
        written = read if self._backend.in_place else self._buffers("written")
        self._cuda.to_device(self._ids, ids)
        self._move(lie, read, rows)
        if ids.shape[1] > 1:
            self._queue(self._backend.prompt_context, ids.shape, read, written)
        elif graph := self._graphs.get((start, rows)):
            self._cuda.launch(graph)
        else:
            # The first run of a shape may allocate, which a capture forbids: run, then record the same for the next.
            context = self._backend.step_context(rows)
            self._queue(context, ids.shape, read, written)
            self._cuda.synchronize()
            if self._backend.recordable(context):
                if len(self._graphs) > 2 * len(self.logits):  # all from row 0 on, and each row alone
                    self._release_graphs()
                self._cuda.begin_capture()
                self._queue(context, ids.shape, read, written)
                self._graphs[start, rows] = self._cuda.end_capture()
        self._move(written, lie, rows)
        self._cuda.synchronize()  # `ids` is ours until here
        self._stale = True

    def _release_graphs(self) -> None:
        while self._graphs:
            self._cuda.release(self._graphs.popitem()[1])

    def _queue(self, context: Any, shape: tuple[int, ...], read: dict[str, int], written: dict[str, int]) -> None:
        """Queue a run of the ids [n,T] that were copied; `read` and `written`: where the states are."""
        context.set_input_shape("input_ids", shape)
        context.set_tensor_address("input_ids", self._ids)
        context.set_tensor_address("logits", self._logits)
        for name, out in self._backend.states.items():
            context.set_input_shape(name, (shape[0], *self._backend.layout[name][1]))
            context.set_tensor_address(name, read[name])
            context.set_tensor_address(out, written[name])
        if not context.execute_async_v3(self._cuda.stream):
            raise DfssmError(f"TensorRT could not run the step for {math.prod(shape)} tokens: see its message above")

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

    def _allocate_states(self) -> dict[str, int]:
        return {name: self._allocate(len(self.logits) * size) for name, size in self._row_bytes.items()}

    def _allocate(self, size: int) -> int:
        self._addresses.append(self._cuda.allocate(size))
        return self._addresses[-1]


def _same_bits(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def _arbitrary(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else rng.integers(-127, 128, shape, dtype)
