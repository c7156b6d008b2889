"""What the tests of this folder run on: TensorRT engines on a GPU, and a stand-in for one that every machine has."""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from fake_device import FakeCuda, FakeEngine
from trt_graphs import DEMO

from dfssm.base import DfssmError
from dfssm.compiler.pipeline import Request, compile_model
from dfssm.runtime import Engine
from dfssm.runtime.tensorrt import TensorRTBackend
from dfssm.targets import cuda, trt, trt_build, trt_options

MAX_BATCH, MAX_TOKENS = 3, 32

BUILDERS = tuple(trt_build.MODULES)


@dataclass(frozen=True)
class Device:
    """`builder` of the engine, "" for the stand-in."""

    builder: str
    lowering: str = "plugin"

    def open(self, folder: Path, state_dtype: str) -> Engine:
        """The demo model, compiled into `folder`; the stand-in runs the portable graph instead."""
        if not self.builder:
            compile_model(Request(DEMO, "onnx", folder, state_dtype=state_dtype, verify=False))
            engine, fake = Engine.load(folder, threads=1), FakeCuda()
            steps = FakeEngine(fake, engine.backend.session, MAX_BATCH, MAX_TOKENS, rtx=True, max_logits=MAX_TOKENS)
            return Engine(folder, engine.manifest, TensorRTBackend(steps, fake), threads=1)
        options = {"builder": self.builder, "lowering": self.lowering, "sm": str(sm())}
        options |= {"max_batch": MAX_BATCH, "max_tokens": MAX_TOKENS}
        compile_model(Request(DEMO, "trt", folder, state_dtype=state_dtype, verify=False, options=options))
        return Engine.load(folder)


STAND_IN = pytest.param(Device(""), id="stand-in")
ENGINES = [pytest.param(Device(builder), id=builder, marks=pytest.mark.gpu) for builder in BUILDERS]


def sm() -> int:
    """The compute capability of the first GPU."""
    return cuda.devices()[0][0].sm


def missing() -> str:
    """Why this machine runs no engine at all: one line, or "" where it runs some."""
    _, no_gpu = cuda.devices()
    if no_gpu:
        return f"needs a GPU, and {no_gpu}"
    try:
        import_module("cuda.bindings.runtime")
    except ImportError:
        return "needs cuda-bindings: pip install 'dfssm[trt]'"
    if not trt_options.installed():
        return "needs TensorRT: pip install 'dfssm[trt]'"
    try:
        trt.find_library()
    except DfssmError as error:
        return str(error)
    return ""


def missing_for(builder: str, lowering: str = "plugin") -> str:
    """Why this machine runs no such engine, where it runs others."""
    if builder not in trt_options.installed():
        return f"{builder} is not installed"
    if lowering == "native" and sm() < 80:
        return f"native engines begin with SM 80, this is {sm()}"
    known = trt_build.known_sms(import_module(trt_build.MODULES[builder]))
    return f"{builder} does not build for SM {sm()}" if known and sm() not in known else ""
