"""`dfssm serve --ray` with two replicas, one of which is killed: `make test-ray`."""

from argparse import Namespace

import pytest
from tools import load

pytestmark = pytest.mark.ray
pytest.importorskip("ray", reason="Ray is not installed: make test-ray")


def test_a_killed_replica_fails_its_requests_alone_and_all_texts_are_the_engines(engine, tiny_bundle):
    given = Namespace(clients=8, requests=40, tokens=32, threads=1, replicas=2)
    found = load.run_killed(engine, str(tiny_bundle), given)
    assert found["passed"], found
    assert found["answers"]["200"] >= 8 * 40 - 8
