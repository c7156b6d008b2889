"""The CUDA kernels, built for the host emulation once."""

import pytest
from plugins_trt import emulated


@pytest.fixture(scope="session")
def kernels() -> emulated.Kernels:
    if not emulated.compiler():
        pytest.skip("no g++ here: the emulation needs its -fsanitize=thread")
    return emulated.load()
