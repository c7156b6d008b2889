"""`dfssm serve --ray`: a replica is killed, another is started under load: `make test-ray`."""

import pytest
from tools import load

pytestmark = pytest.mark.ray
pytest.importorskip("ray", reason="Ray is not installed: make test-ray")


def test_a_killed_replica_fails_its_requests_alone_and_all_texts_are_the_engines(engine, tiny_bundle):
    given = load.options(requests=40, replicas=2)
    found = load.run_killed(engine, str(tiny_bundle), given)
    assert found["passed"], found
    assert found["answers"]["200"] >= 8 * 40 - 8


def test_a_second_replica_is_started_under_load(engine, tiny_bundle):
    given = load.options(replicas=1, max_replicas=2, seconds=120)
    found = load.run_scaled(engine, str(tiny_bundle), given)
    assert found["passed"], found
