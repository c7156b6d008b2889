"""The calls of `Cuda`, held to the functions that cuda-bindings has: their number of arguments, and what goes where."""

import inspect
import re
import sys

import numpy as np
import pytest
from fake_device import FakeCuda

from dfssm.base import DfssmError

bindings = pytest.importorskip("cuda.bindings")
runtime = pytest.importorskip("cuda.bindings.runtime")


class Recorder:
    """cuda-bindings with every function replaced by one that succeeds and is written down; `current`: what
    cudaGetDevice says.
    """

    def __init__(self):
        self.calls, self.current = [], 0

    def __getattr__(self, name):
        real = getattr(runtime, name)
        if isinstance(real, type) or not callable(real):
            return real
        if name == "cudaGetDevice":
            return lambda: (runtime.cudaError_t.cudaSuccess, self.current)
        parameters = re.match(rf"{name}\((.*)\)", real.__doc__)[1]

        def call(*arguments):
            assert len(arguments) == len([text for text in parameters.split(", ") if text]), name
            self.calls.append((name, *arguments))
            return runtime.cudaError_t.cudaSuccess, 7

        return call


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(bindings, "runtime", recorder)
    return recorder


def test_without_the_bindings(monkeypatch):
    from dfssm.runtime.cuda import Cuda

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(DfssmError, match=r"^cuda-bindings is not installed: pip install 'dfssm\[trt\]'$"):
        Cuda()


def test_calls(recorder):
    from dfssm.runtime.cuda import Cuda

    cuda, array = Cuda(), np.zeros(3, np.float32)
    host, kind = array.ctypes.data, runtime.cudaMemcpyKind
    made = ("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking)
    assert recorder.calls == [("cudaGetDeviceCount",), made] and cuda.stream == 7
    recorder.calls.clear()
    assert cuda.allocate(100) == 7
    cuda.to_device(1, array)
    cuda.to_host(array, 2)
    cuda.copy(3, 4, 5)
    cuda.begin_capture()
    recorded = cuda.end_capture()
    cuda.launch(recorded)
    cuda.release(recorded)
    cuda.synchronize()
    cuda.free(1)
    pinned = cuda.pinned(24)
    assert (pinned.ctypes.data, pinned.nbytes, cuda.most_largest) == (7, 24, 0)
    cuda.unpin(pinned)
    assert recorder.calls == [
        ("cudaMalloc", 100),
        ("cudaMemsetAsync", 7, 0, 100, 7),
        ("cudaMemcpyAsync", 1, host, 12, kind.cudaMemcpyHostToDevice, 7),
        ("cudaMemcpyAsync", host, 2, 12, kind.cudaMemcpyDeviceToHost, 7),
        ("cudaMemcpyAsync", 3, 4, 5, kind.cudaMemcpyDeviceToDevice, 7),
        ("cudaStreamBeginCapture", 7, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed),
        ("cudaStreamEndCapture", 7),
        ("cudaGraphInstantiate", 7, 0),
        ("cudaGraphDestroy", 7),
        ("cudaGraphLaunch", 7, 7),
        ("cudaGraphExecDestroy", 7),
        ("cudaStreamSynchronize", 7),
        ("cudaFree", 1),
        ("cudaHostAlloc", 24, 0),
        ("cudaFreeHost", 7),
    ]
    del cuda
    assert recorder.calls[-1] == ("cudaStreamDestroy", 7)


def test_the_device_of_the_program_stays_its_own(recorder):
    """The stream is one of the first device's, whichever the program has chosen."""
    from dfssm.runtime.cuda import Cuda

    recorder.current = 3
    cuda = Cuda()
    assert [call[1] for call in recorder.calls[1:]] == [0, runtime.cudaStreamNonBlocking, 3]
    recorder.calls.clear()
    with pytest.raises(KeyError), cuda.device():
        raise KeyError
    assert recorder.calls == [("cudaSetDevice", 0), ("cudaSetDevice", 3)]


def test_a_process_that_forked(recorder, monkeypatch):
    from dfssm.runtime.cuda import Cuda

    error = runtime.cudaError_t.cudaErrorInitializationError
    monkeypatch.setattr(recorder, "cudaGetDeviceCount", lambda: (error, 0), raising=False)
    with pytest.raises(DfssmError, match="^CUDA says InitializationError .* let multiprocessing use 'spawn'$"):
        Cuda()


def test_the_stand_in_has_the_same_calls():
    from dfssm.runtime.cuda import Cuda

    names = [name for name, member in vars(Cuda).items() if inspect.isfunction(member) and name[0] != "_"]
    assert "largest" in names and len(names) > 12
    for name in names:
        ours, real = (list(inspect.signature(getattr(of, name)).parameters) for of in (FakeCuda, Cuda))
        assert len(ours) == len(real), name
