import pytest
import tiny
from chats import add_template
from serving import serving

from dfssm.runtime import Engine


@pytest.fixture(scope="session")
def engine(tiny_bundle):
    return Engine.load(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def talking(cpu_target, tmp_path_factory):
    """With a chat template."""
    folder = tiny.write_bundle(tmp_path_factory.mktemp("chat") / "bundle", target=cpu_target, state_dtype="fp16")
    return Engine.load(add_template(folder), threads=1)


@pytest.fixture(scope="session")
def server(engine):
    with serving(engine, slots=4, queue=8) as running:
        yield running
