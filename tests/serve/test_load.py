"""tests/tools/load.py for a moment."""

from tools import load


def test_clients_get_what_the_engine_makes_alone(engine, tiny_bundle):
    given = load.options(clients=4, requests=3, tokens=8, rounds=1, slots=4, temperature=1.0)
    found = load.run_clients(engine, str(tiny_bundle), given)
    assert found["passed"] and found["answers"] == {"200": 12} and 0 < found["p50_seconds"] <= found["p99_seconds"]
    assert load.run_batching(engine, str(tiny_bundle), given)["passed"]
