"""The op library under each instruction set this machine can run."""

import os
import shutil

import onnx
import onnxruntime
import pytest

from dfssm import _native
from dfssm.targets.ort_cpu import LIBRARY, find_library


class OpLibrary:
    """One loaded copy of libdfssm_ort_cpu.so, and sessions with it.

    A library chooses its kernels once, when it is loaded. A copy in another file is another library to the
    loader, so one process can test every instruction set.
    """

    def __init__(self, isa: str, folder):
        self.isa = isa
        self.path = shutil.copy(find_library(), folder / f"{isa}-{LIBRARY}")
        before = os.environ.get("DFSSM_ISA")
        os.environ["DFSSM_ISA"] = isa
        try:
            self.options()
        finally:
            del os.environ["DFSSM_ISA"]
            if before is not None:
                os.environ["DFSSM_ISA"] = before

    def options(self, threads: int = 1) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.register_custom_ops_library(str(self.path))
        return options

    def session(self, model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), self.options(threads), providers=["CPUExecutionProvider"]
        )


@pytest.fixture(scope="session")
def libraries(tmp_path_factory) -> dict[str, OpLibrary]:
    folder = tmp_path_factory.mktemp("libraries")
    return {isa: OpLibrary(isa, folder) for isa in _native.isas()}


@pytest.fixture(params=_native.isas())
def library(request, libraries) -> OpLibrary:
    """Once for every instruction set of this machine."""
    return libraries[request.param]


@pytest.fixture
def default_library(libraries) -> OpLibrary:
    """With the kernels a user of this machine gets."""
    return libraries[_native.default_isa()]
