"""The prediction for GPUs against what it is made of: the ledger's bytes, and its own bounds."""

import pytest

from dfssm.bench import gpu
from dfssm.model import ledger
from dfssm.model.config import DFSSMConfig

CONFIG = DFSSMConfig(vocab_size=50288, d_model=2048, n_layer=48, d_state=128, headdim=64, rank=16).to_dict()


def test_weights_are_those_of_the_ledger():
    bytes_of = ledger.model_bytes(CONFIG)
    activations = 4 * (2048 + 8512) + 4 * (4096 + 2048)
    projections = sum(gpu.product_bytes(1, K, M, bits=True) for K, M in ((2048, 8512), (4096, 2048)))
    assert 48 * (projections - activations) == bytes_of["scaffold"] + bytes_of["low rank"]
    assert gpu.product_bytes(1, 2048, 50288, bits=False) - 4 * (2048 + 50288) == bytes_of["embedding"]


@pytest.mark.parametrize(("state", "size"), [("fp32", 4), ("fp16", 2), ("int8", 1)])
def test_scan_moves_the_state_both_ways_and_little_else(state, size):
    assert 1 < gpu.scan_bytes(state) / (2 * 64 * 64 * 128 * size) < 1.1


@pytest.mark.parametrize("device", gpu.GPUS + gpu.JETSONS, ids=lambda device: device.name)
def test_no_step_is_faster_than_its_bytes(device):
    for state in gpu.SCAN:
        seconds = [gpu.step(device, batch, state) for batch in gpu.BATCHES]
        assert seconds == sorted(seconds)
        for batch, time in zip(gpu.BATCHES, seconds, strict=True):
            moved = ledger.weight_bytes_of_step(CONFIG) + batch * 48 * gpu.scan_bytes(state)
            assert time > moved / device.bandwidth


@pytest.mark.parametrize(("batch", "nodes"), [(1, 5), (64, 5), (65, 6), (512, 6)])
def test_nodes_of_a_layer(batch, nodes):
    """On a GPU whose memory and cores take no time: what is left are the nodes, three of them after the layers."""
    instant = gpu.Gpu("bound by launches", 1e30, 1, 1e30, 1e30)
    for state in gpu.SCAN:
        assert gpu.step(instant, batch, state) == pytest.approx((48 * nodes + 3) * gpu.NODE)


def test_more_tokens_than_a_pass_takes_cost_another_pass():
    slow = gpu.Gpu("bound by issue", 1e18, 1, 1e9, 1e9)
    one, two = (gpu.product(slow, n, 2048, 8512, bits=True) - 2 * gpu.NODE for n in (32, 33))
    assert two == pytest.approx(2 * one)
