"""Runs under the roof, worked by hand."""

import pytest

from dfssm.bench.roofline import Point, roofline


def test_points_by_hand():
    result = {
        "step_bytes": {"weights": 60.0, "state_read": 30.0, "state_written": 10.0},  # 100 bytes
        "tok_s": 5.0, "floor_tok_s": 8.0, "prompt": 6, "prompt_calls": 2, "prefill_tok_s": 12.0,
        "batches": [{"batch": 4, "tok_s": 10.0}],
    }  # fmt: skip
    bandwidth, points = roofline(result, operations=1000)
    assert bandwidth == 800
    assert points == [
        Point("decode", 10.0, 5000.0),
        Point("batch 4", pytest.approx(4000 / 220), 10000.0),  # weights once, four states
        Point("prompt of 6", 30.0, 12000.0),  # 6 tokens in 2 calls of 100 bytes
    ]
