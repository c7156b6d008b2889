"""The step in TensorRT: states live on the device, and decoding replays a CUDA graph where the engine can be recorded.

The arrays of a `State` are copies on the host, brought up to date when they are asked for. A step writes the states of
its rows where it reads them: one buffer is bound as input and as output. TensorRT promises nothing about that, so it is
tried once when the engine is opened; see `TensorRTBackend`.
"""

from __future__ import annotations

import warnings
from threading import Lock
from typing import Any

import numpy as np

from dfssm.base.errors import DfssmError
from dfssm.targets.trt_build import LOGITS_AT

from .device_pool import DevicePool
from .state import Layout, State

DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT32": np.int32, "INT64": np.int64}
"""Names of TensorRT's DataType -> what NumPy calls them."""


class TensorRTBackend:
    """An engine, a context of it for prompts, and one for the steps of each batch size: a graph that was recorded holds
    for the shapes that its context then had. `cuda` is a `Cuda`; `engine` an ICudaEngine. `in_place`: in the engine's
    graph one plugin of ours alone reads and writes a state. Then states are updated in place, if a trial shows no
    difference; else runs write to other buffers, which are copied back.

    A step is of up to `max_batch` rows, a prompt of up to `prompt_rows` rows and `max_tokens` tokens, of which up to
    `max_logits` give their logits.
    """

    def __init__(self, engine: Any, cuda: Any, in_place: bool = True):
        self.engine, self.cuda = engine, cuda
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [name for name in names if "." in name and "_out." not in name]
        self.states = {name: name.replace(".", "_out.") for name in inputs}
        self.layout: Layout = {name: (self.dtype(name), tuple(engine.get_tensor_shape(name))[1:]) for name in inputs}
        self._require_known(names)
        self.vocab_size = int(engine.get_tensor_shape("logits")[-1])
        self.d_model: int | None = None
        self._activations = 0  # where they lie, once there is a context
        last = engine.num_optimization_profiles - 1
        self.prompt_context = self._context(last)
        self._step_contexts: dict[int, Any] = {}
        self.max_batch = engine.get_tensor_profile_shape("input_ids", 0)[2][0]
        self.prompt_rows, self.max_tokens = engine.get_tensor_profile_shape("input_ids", last)[2]
        self.gives_places = LOGITS_AT in names
        self.max_logits = engine.get_tensor_profile_shape(LOGITS_AT, last)[2][0] if self.gives_places else 1
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
        with self.cuda.device():
            context = self.engine.create_execution_context(**settings)
            if context is not None and settings:
                size = self.engine.device_memory_size_v2
                self._activations = self._activations or self.cuda.allocate(size)
                context.set_device_memory(self._activations, size)
            if context is None or not context.set_optimization_profile_async(profile, self.cuda.stream):
                raise DfssmError(
                    "TensorRT makes no execution context: see its message above; is the device's memory full?"
                )
        return context

    def _require_known(self, names: list[str]) -> None:
        """DfssmError where these are not the tensors of a step as this dfssm runs it: one keeps its states in another
        form, say.
        """
        expected = {"input_ids", "logits", *self.states, *self.states.values()}
        unknown = expected.symmetric_difference(names) - {LOGITS_AT}  # of one token a call there is one place
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


def _same_bits(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


def _arbitrary(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else rng.integers(-127, 128, shape, dtype)
