"""The runtime's backends on a machine without a GPU: ONNX Runtime's, and TensorRT's over the stand-in of a device."""

import json
import shutil

from fake_device import FakeCuda, FakeEngine

from dfssm.runtime import Engine
from dfssm.runtime.ort import OrtBackend
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets import get_target, trt
from dfssm.targets.bundle import ENGINE, MANIFEST, MODEL, sealed

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


def trt_bundle(folder, portable, monkeypatch, session=None, **kind):
    """A bundle of target trt in `folder`, made of one of target onnx, which every part of dfssm opens as an engine over
    the stand-in. `session` runs instead of its own graph.
    """
    session = session or get_target("onnx").open_session(portable, threads=1)
    shutil.copytree(portable, folder)
    (folder / MODEL).rename(folder / ENGINE)
    document = json.loads((folder / MANIFEST).read_text())
    files = document["files"] | {ENGINE: document["files"].pop(MODEL)}
    engine = {"builder": "tensorrt-rtx", "lowering": "plugin", "embed_plugins": True, "sm": [86], "version": "1.7"}
    (folder / MANIFEST).write_text(sealed(document | {"target": "trt", "files": files, "engine": engine}))
    cuda = FakeCuda()
    monkeypatch.setattr(trt, "check", lambda *arguments: None)
    monkeypatch.setattr(trt, "open_engine", lambda *arguments: FakeEngine(cuda, session, **kind))
    monkeypatch.setattr("dfssm.runtime.cuda.Cuda", lambda library: cuda)
    return folder
