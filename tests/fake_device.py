"""A CUDA device and a TensorRT engine made of NumPy and ONNX Runtime: what `runtime/tensorrt.py` does with real ones
is then seen without a GPU. They refuse what real ones would: an unknown address, one that is not aligned, a copy past
the end of an allocation, work of a thread whose device is another, work queued on a stream that is being recorded but
cannot be, a recording whose context has gone on to other shapes or other kernels.
"""

import threading
from contextlib import contextmanager
from enum import Enum
from itertools import count
from types import SimpleNamespace

import numpy as np

from dfssm.runtime.sampling import largest, total_weight

_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int8)": "INT8", "tensor(int64)": "INT64"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT64": np.int64}


class Strategy(Enum):
    LAZY, EAGER = range(2)


class Allocation(Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class FakeConfig:
    """Of a context of TensorRT-RTX."""

    def __init__(self):
        self.dynamic_shapes_kernel_specialization_strategy = Strategy.LAZY
        self.allocation = Allocation.STATIC

    def get_execution_context_allocation_strategy(self):
        return self.allocation

    def set_execution_context_allocation_strategy(self, strategy):
        self.allocation = strategy


class FakeCuda:
    """`syncs` counts waits, `copied` bytes from and to the host, and within the device. Of copies to and from the host,
    those of pinned memory may be recorded. `current`: the device of a thread that has chosen none; this one is 0.
    """

    stream, weighs = 7, True

    def __init__(self, most_largest=1024, current=0):
        self.memory, self.recording, self.launches = {}, False, 0
        self.recorded = []
        self.addresses = count(1 << 20, 1 << 32)
        self.most_largest, self.syncs = most_largest, 0
        self.host: dict[int, np.ndarray] = {}  # pinned memory, by address: threads add and remove their own
        self.copied = dict.fromkeys(("to device", "to host", "within"), 0)
        self.current, self.of_thread = current, threading.local()

    @contextmanager
    def device(self):
        before = getattr(self.of_thread, "device", self.current)
        self.of_thread.device = 0
        try:
            yield
        finally:
            self.of_thread.device = before

    def require_device(self):
        assert getattr(self.of_thread, "device", self.current) == 0, "the device of this thread is another"

    def allocate(self, size):
        self._immediate()  # it is zeroed
        address = next(self.addresses)
        self.memory[address] = np.zeros(size, np.uint8)
        return address

    def free(self, address):
        del self.memory[address]

    def at(self, address, size):
        """The `size` bytes from `address` on, which lie in one allocation."""
        start = max(start for start in tuple(self.memory) if start <= address)  # another thread may allocate
        assert address - start + size <= len(self.memory[start]), "past the end of an allocation"
        return self.memory[start][address - start :][:size]

    def pinned(self, size):
        array = np.full(size, 99, np.uint8)
        self.host[array.ctypes.data] = array
        return array

    def unpin(self, array):
        del self.host[array.ctypes.data]

    def zero(self, address, size):
        self._immediate()
        self.at(address, size)[:] = 0

    def to_device(self, address, array):
        assert array.flags.c_contiguous

        def work():
            self.at(address, array.nbytes)[:] = np.frombuffer(array.tobytes(), np.uint8)
            self.copied["to device"] += array.nbytes

        self._queue(work, array)

    def to_host(self, array, address):
        assert array.flags.c_contiguous

        def work():
            array.reshape(-1).view(np.uint8)[:] = self.at(address, array.nbytes)
            self.copied["to host"] += array.nbytes

        self._queue(work, array)

    def copy(self, to, source, size):
        self._immediate()
        self.at(to, size)[:] = self.at(source, size)
        self.copied["within"] += size

    def largest(self, logits, rows, vocab, count, tokens, values):
        assert 1 <= count <= min(vocab, self.most_largest)

        def work():
            of = self.at(logits, 4 * rows * vocab).view(np.float32)
            found = [largest(row, count) for row in of.reshape(rows, vocab)]
            for address, arrays in zip((tokens, values), zip(*found, strict=True), strict=True):
                array = np.concatenate(arrays)
                self.at(address, array.nbytes).view(array.dtype)[:] = array

        self._queue(work)

    def total_weight(self, logits, rows, vocab, divisors, totals):
        def work():
            of = self.at(logits, 4 * rows * vocab).view(np.float32).reshape(rows, vocab)
            by = self.at(divisors, 4 * rows).view(np.float32).tolist()
            self.at(totals, 8 * rows).view(np.int64)[:] = [total_weight(*one) for one in zip(of, by, strict=True)]

        self._queue(work)

    def synchronize(self):
        self.syncs += 1
        self.recording = False  # as `Cuda` does

    def begin_capture(self):
        self.require_device()
        self.recording, self.recorded = True, []

    def end_capture(self):
        assert self.recording
        self.recording = False
        return self.recorded

    def launch(self, recording):
        self.require_device()
        self.launches += 1
        for work in recording:
            work()

    def release(self, recording):
        recording.clear()

    def _queue(self, work, array=None):
        self.require_device()
        if not self.recording:
            work()
        else:
            assert array is None or any(np.shares_memory(array, pinned) for pinned in tuple(self.host.values()))
            self.recorded.append(work)

    def _immediate(self):
        self.require_device()
        assert not self.recording, "this would not be part of the graph"


ALIASED = ("aliased", "alias not reported")
BINDINGS = ("direct", *ALIASED, "copied", "overwritten")
"""What a TensorRT may do with a state's two addresses: give them to the op; write to the input's whatever the output's
is (it was declared an alias), and say so or not; copy the state to the output's and update it there; use the output's
for something else before the input is read.
"""


class FakeEngine:
    """An engine over an ONNX Runtime session, of two profiles: of a step graph T = 1 and `max_batch` rows, and T up to
    `max_tokens` with up to `prompt_rows` rows, of which up to `max_logits` tokens give their logits. With `rtx`, it has
    what only TensorRT-RTX has. Without `prompts` it has the former alone, and no input `logits_at`: as native engines.
    """

    def __init__(
        self, cuda, session, max_batch=1, max_tokens=1, binding="direct", rtx=False, prompt_rows=None, max_logits=4,
        prompts=True,
    ):  # fmt: skip
        assert binding in BINDINGS
        self.cuda, self.session, self.binding = cuda, session, binding
        self.limits = [(max_batch, 1, 1)]
        if prompts:
            self.limits.append((prompt_rows or max(max_batch - 1, 1), max_tokens, min(max_logits, max_tokens)))
        self.num_optimization_profiles = len(self.limits)
        self.inputs = {t.name: t for t in session.get_inputs() if t.name != "logits_to_keep"}
        if prompts and "input_ids" in self.inputs:
            self.inputs["logits_at"] = SimpleNamespace(type="tensor(int64)", shape=["keep"])
        self.outputs = {t.name: t for t in session.get_outputs()}
        self.tensors = self.inputs | self.outputs
        self.num_io_tensors = len(self.tensors)
        self.capturable = True
        if rtx:
            self.create_runtime_config = FakeConfig
            self.device_memory_size_v2 = 4096
        states = {name: name.replace("_out.", ".").replace("new_", "") for name in self.outputs}
        self.states = {name: state for name, state in states.items() if state in self.inputs}

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=_TYPES[self.tensors[name].type])

    def get_tensor_shape(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_aliased_input_tensor(self, name):
        return self.states.get(name) if self.binding == "aliased" else None

    def get_tensor_profile_shape(self, name, profile):
        batch, tokens, logits = self.limits[profile]
        return ((1, 1), (1, 1), (batch, tokens)) if name == "input_ids" else ((1,), (1,), (logits,))

    def create_execution_context(self, runtime_config=None):
        self.cuda.require_device()
        return FakeContext(self, runtime_config)


class FakeContext:
    def __init__(self, engine, config):
        self.engine, self.shapes, self.addresses, self.profile = engine, {}, {}, 0
        self.own_memory, self.activations = True, None
        if hasattr(engine, "create_runtime_config"):
            config = config or engine.create_runtime_config()
            self.own_memory = config.allocation is not Allocation.USER_MANAGED
            self.final_kernels = config.dynamic_shapes_kernel_specialization_strategy is Strategy.EAGER
            self.is_stream_capturable = lambda stream: stream == engine.cuda.stream and engine.capturable
        else:
            assert config is None
            self.final_kernels = True

    def set_optimization_profile_async(self, profile, stream):
        assert stream == self.engine.cuda.stream
        self.profile = profile
        return True

    def set_device_memory(self, address, size):
        assert size == self.engine.device_memory_size_v2 and not self.own_memory
        self.activations = address

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name, address):
        assert address % 256 == 0, "TensorRT takes no such address"
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        engine, cuda = self.engine, self.engine.cuda
        cuda.require_device()
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        assert self.own_memory or self.activations, "it was told that it would be given memory"
        if "input_ids" in shapes:
            batch, tokens = shapes["input_ids"]
            _, _, (most_rows, most_tokens) = engine.get_tensor_profile_shape("input_ids", self.profile)
            assert batch <= most_rows and tokens <= most_tokens
            if "logits_at" in shapes:
                assert shapes["logits_at"][0] <= engine.limits[self.profile][2]
        for name in engine.outputs:
            same = {other for other in engine.tensors if addresses[other] == addresses[name]}
            assert same <= {name, engine.states.get(name)}
        written = dict(addresses)
        if engine.binding in ALIASED:
            written |= {name: addresses[state] for name, state in engine.states.items()}

        def size_of(name):
            return int(np.prod(shapes[name])) * _NUMPY[engine.get_tensor_dtype(name).name]().itemsize

        def work():
            if self.activations:  # spoilt by each run: none may rely on what another left
                cuda.at(self.activations, engine.device_memory_size_v2)[:] = 99
            read = dict(addresses)
            for name, state in engine.states.items():
                if engine.binding == "copied":
                    cuda.at(addresses[name], size_of(state))[:] = cuda.at(addresses[state], size_of(state))
                    read[state] = addresses[name]
                elif engine.binding == "overwritten":
                    cuda.at(addresses[name], size_of(state))[:] = 85
            feeds = {}
            for name in engine.inputs:
                dtype = _NUMPY[engine.get_tensor_dtype(name).name]
                feeds[name] = cuda.at(read[name], size_of(name)).view(dtype).reshape(shapes[name]).copy()
            places = feeds.pop("logits_at", np.array([0]))
            if "input_ids" in shapes:
                tokens = shapes["input_ids"][1]
                assert 0 <= places.min() <= places.max() < tokens, "no such token"
                feeds["logits_to_keep"] = keep = np.array(tokens - places.min())
            made = dict(zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True))
            if "input_ids" in shapes:
                made["logits"] = made["logits"][:, places - tokens + keep]
            for name, array in made.items():
                cuda.at(written[name], array.nbytes)[:] = np.frombuffer(array.tobytes(), np.uint8)

        def recorded_work():
            assert self.shapes == shapes, "the context of a recording has other shapes now"
            work()

        if not engine.cuda.recording:
            work()
        else:
            assert self.final_kernels and engine.capturable
            engine.cuda.recorded.append(recorded_work)
        return True
