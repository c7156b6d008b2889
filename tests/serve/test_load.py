"""tests/tools/load.py for a moment."""

from argparse import Namespace

from tools import load


def test_clients_get_what_the_engine_makes_alone(engine, tiny_bundle):
    given = Namespace(
        clients=4, requests=3, tokens=8, threads=1, rounds=1, replicas=0, max_replicas=0, slots=4, temperature=1.0
    )
    found = load.run_clients(engine, str(tiny_bundle), given)
    assert found["passed"] and found["answers"] == {"200": 12} and 0 < found["p50_seconds"] <= found["p99_seconds"]
    assert load.run_batching(engine, str(tiny_bundle), given)["passed"]
