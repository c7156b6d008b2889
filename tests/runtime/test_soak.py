"""tests/tools/soak.py for a moment, on every backend."""

import pytest
from backends import BACKENDS
from tools import soak

from dfssm.runtime import Engine


@pytest.fixture(params=BACKENDS)
def run_by(request, tiny_bundle):
    return BACKENDS[request.param](Engine.load(tiny_bundle, threads=1))


def test_threads_generate_what_one_does(run_by):
    found = soak.threads(run_by, count=8, generations=6)
    assert found["passed"] and found["wrong"] == 0 and found["generations"] == 48


def test_steps_leave_no_memory_behind(run_by):
    found = soak.steps(run_by, count=1000)
    assert found["passed"] and found["steps"] == 1000
