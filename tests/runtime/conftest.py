import pytest
import tiny

from dfssm.runtime import Engine


@pytest.fixture(scope="session", params=["fp32", "fp16", "int8"])
def engine(request, cpu_target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / request.param
    return Engine.load(tiny.write_bundle(folder, target=cpu_target, state_dtype=request.param))
