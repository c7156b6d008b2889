"""The demo model on every kind of device, beside the ort-cpu bundle. Without a GPU the stand-in alone runs."""

import pytest
from gpu import devices
from gpu.devices import Device
from trt_graphs import DEMO

from dfssm.compiler.pipeline import Request, compile_model
from dfssm.runtime import Engine


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := devices.missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", params=["fp32", "fp16", "int8"])
def state_dtype(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def reference(state_dtype, cpu_target, tmp_path_factory) -> Engine:
    """The demo model on the CPU."""
    folder = tmp_path_factory.mktemp("reference") / "bundle"
    compile_model(Request(DEMO, cpu_target, folder, state_dtype=state_dtype, verify=False))
    return Engine.load(folder, threads=1)


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    """The demo model on a `Device` with a state dtype, compiled and loaded once."""
    engines = {}

    def open_once(device: Device, state_dtype: str) -> Engine:
        if device.builder and (reason := devices.missing_for(device.builder, device.lowering)):
            pytest.skip(reason)
        key = device, state_dtype
        if key not in engines:
            engines[key] = device.open(tmp_path_factory.mktemp("device") / "bundle", state_dtype)
        return engines[key]

    return open_once


@pytest.fixture(params=[devices.STAND_IN, *devices.ENGINES])
def device(request, opened, state_dtype) -> Engine:
    return opened(request.param, state_dtype)
