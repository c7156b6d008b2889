"""Fixtures that more than one folder of tests uses. (That it is here also puts this folder on the path.)"""

import pytest
import tiny

from dfssm.targets import get_target


@pytest.fixture(scope="session")
def cpu_target() -> str:
    """The CPU target where this machine has it: it runs the states in place; else the portable one."""
    return "ort-cpu" if get_target("ort-cpu").probe().usable else "onnx"


@pytest.fixture(scope="session")
def tiny_bundle(cpu_target, tmp_path_factory):
    """A bundle of the tiny student with fp16 states and a tokenizer. Not to be written to."""
    return tiny.write_bundle(tmp_path_factory.mktemp("tiny") / "bundle", target=cpu_target, state_dtype="fp16")
