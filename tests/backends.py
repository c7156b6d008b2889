"""The runtime's backends on a machine without a GPU: ONNX Runtime's, and TensorRT's over the stand-in of a device."""

from fake_device import FakeCuda, FakeEngine

from dfssm.runtime import Engine
from dfssm.runtime.ort import OrtBackend
from dfssm.runtime.tensorrt import TensorRTBackend

MAX_TOKENS = 5
"""Of a run of the device."""


def with_backend(engine: Engine, backend) -> Engine:
    return Engine(engine.folder, engine.manifest, backend, threads=1)


def on_device(engine: Engine, max_batch: int = 4, in_place: bool = True, **kind) -> Engine:
    cuda = FakeCuda()
    fake = FakeEngine(cuda, engine.backend.session, max_batch=max_batch, max_tokens=MAX_TOKENS, **kind)
    return with_backend(engine, TensorRTBackend(fake, cuda, in_place))


BACKENDS = {
    "ort": lambda engine: engine,
    "ort, not in place": lambda engine: with_backend(engine, OrtBackend(engine.backend.session, in_place=False)),
    "device": on_device,
    "device, not in place": lambda engine: on_device(engine, in_place=False),
    "device, rtx": lambda engine: on_device(engine, rtx=True),
}
