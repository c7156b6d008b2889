"""The calls of `Cuda`, held to the functions that cuda-bindings has: their number of arguments, and what goes where."""

import inspect
import re
import sys

import numpy as np
import pytest
from fake_device import FakeCuda

from dfssm.opset import DfssmError

bindings = pytest.importorskip("cuda.bindings")
runtime = pytest.importorskip("cuda.bindings.runtime")


class Recorder:
    """cuda-bindings with every function replaced by one that succeeds and is written down."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        real = getattr(runtime, name)
        if isinstance(real, type):
            return real
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
    assert recorder.calls == [("cudaGetDeviceCount",), ("cudaStreamCreate",)] and cuda.stream == 7
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
        ("cudaStreamBeginCapture", 7, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal),
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


def test_the_stand_in_has_the_same_calls():
    from dfssm.runtime.cuda import Cuda

    names = [name for name, member in vars(Cuda).items() if inspect.isfunction(member) and name[0] != "_"]
    assert "largest" in names and len(names) > 12
    for name in names:
        ours, real = (list(inspect.signature(getattr(of, name)).parameters) for of in (FakeCuda, Cuda))
        assert len(ours) == len(real), name
