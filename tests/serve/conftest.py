import pytest
from serving import serving

from dfssm.runtime import Engine


@pytest.fixture(scope="session")
def engine(tiny_bundle):
    return Engine.load(tiny_bundle, threads=1)


@pytest.fixture(scope="session")
def server(engine):
    with serving(engine, slots=4, queue=8) as running:
        yield running
