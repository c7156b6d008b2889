"""A CUDA device and a TensorRT engine made of NumPy and ONNX Runtime: what `runtime/tensorrt.py` does with real ones
is then seen without a GPU. The device refuses what a real one would: an unknown address, a copy past the end of an
allocation, work queued on a stream that is being recorded but cannot be.
"""

from types import SimpleNamespace

import numpy as np

_TYPES = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int8)": "INT8", "tensor(int64)": "INT64"}
_NUMPY = {"FLOAT": np.float32, "HALF": np.float16, "INT8": np.int8, "INT64": np.int64}


class FakeCuda:
    stream = 7

    def __init__(self):
        self.memory, self.recording, self.launches = {}, None, 0

    def allocate(self, size):
        address = 0x1000 * (len(self.memory) + 1) + 0x100000 * sum(len(m) for m in self.memory.values())
        self.memory[address] = np.zeros(size, np.uint8)
        return address

    def free(self, address):
        del self.memory[address]

    def to_device(self, address, array):
        self._immediate()
        assert array.flags.c_contiguous and array.nbytes <= len(self.memory[address])
        self.memory[address][: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

    def to_host(self, array, address):
        self._immediate()
        assert array.flags.c_contiguous and array.nbytes <= len(self.memory[address])
        array.reshape(-1).view(np.uint8)[:] = self.memory[address][: array.nbytes]

    def synchronize(self):
        self._immediate()

    def begin_capture(self):
        self.recording = []

    def end_capture(self):
        recording, self.recording = self.recording, None
        return recording

    def launch(self, recording):
        self.launches += 1
        for work in recording:
            work()

    def release(self, recording):
        recording.clear()

    def _immediate(self):
        assert self.recording is None, "this would not be part of the graph"


class FakeEngine:
    """An engine of two profiles over an ONNX Runtime session of the step graph; with `aliased`, new states must be
    bound where the old ones lie.
    """

    num_optimization_profiles = 2

    def __init__(self, cuda, session, max_batch, max_tokens, aliased):
        self.cuda, self.session, self.limits, self.aliased = cuda, session, (max_batch, max_tokens), aliased
        self.inputs = {t.name: t for t in session.get_inputs() if t.name != "logits_to_keep"}
        self.outputs = {t.name: t for t in session.get_outputs()}
        self.tensors = self.inputs | self.outputs
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=_TYPES[self.tensors[name].type])

    def get_tensor_shape(self, name):
        return tuple(size if isinstance(size, int) else -1 for size in self.tensors[name].shape)

    def get_aliased_input_tensor(self, name):
        return name.replace("_out.", ".") if self.aliased and "_out." in name else ""

    def get_tensor_profile_shape(self, name, profile):
        assert name == "input_ids"
        batch, tokens = self.limits[0], self.limits[1] if profile else 1
        return (1, 1), (1, 1), (batch, tokens)

    def create_execution_context(self):
        return FakeContext(self)


class FakeContext:
    def __init__(self, engine):
        self.engine, self.shapes, self.addresses, self.profile = engine, {}, {}, 0

    def set_optimization_profile_async(self, profile, stream):
        assert stream == self.engine.cuda.stream
        self.profile = profile

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        engine, memory = self.engine, self.engine.cuda.memory
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        batch, tokens = shapes["input_ids"]
        _, _, (most_rows, most_tokens) = engine.get_tensor_profile_shape("input_ids", self.profile)
        assert batch <= most_rows and tokens <= most_tokens
        for name in engine.outputs:
            assert (addresses[name] == addresses.get(engine.get_aliased_input_tensor(name))) == (
                engine.aliased and name != "logits"
            )

        def work():
            feeds = {"logits_to_keep": np.array(1)}
            for name in engine.inputs:
                dtype = np.dtype(_NUMPY[engine.get_tensor_dtype(name).name])
                size = int(np.prod(shapes[name])) * dtype.itemsize
                feeds[name] = memory[addresses[name]][:size].view(dtype).reshape(shapes[name]).copy()
            for name, array in zip(engine.outputs, engine.session.run(list(engine.outputs), feeds), strict=True):
                memory[addresses[name]][: array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)

        work() if engine.cuda.recording is None else engine.cuda.recording.append(work)
        return True
