"""The prediction for GPUs against what it is made of: the ledger's bytes, and its own bounds."""

from dataclasses import replace
from pathlib import Path

import pytest

from dfssm.base import DfssmError
from dfssm.bench import gpu
from dfssm.model import ledger
from dfssm.model.config import DFSSMConfig

INSTANT = gpu.Gpu("bound by launches", 1e30, 1000, 1e30, 1e30)

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
            assert time > moved / (device.copied or device.bandwidth)


@pytest.mark.parametrize(("batch", "launches"), [(1, 3), (2, 5), (64, 5), (65, 5), (512, 5)])
def test_launches_of_a_layer(batch, launches):
    """On a GPU whose memory and cores take no time: what is left are launches, three of them after the layers. The
    emulation counts the same (plugins_trt/test_fused.py)."""
    for state in gpu.SCAN:
        assert gpu.step(INSTANT, batch, state) == pytest.approx((48 * launches + 3) * gpu.LAUNCH)
        assert gpu.prefill(INSTANT, max(batch, 2), state) == pytest.approx((48 * 5 + 3) * gpu.LAUNCH)


def test_more_tokens_than_a_pass_takes_cost_another_pass():
    slow = gpu.Gpu("bound by issue", 1e18, 1, 1e9, 1e9)
    one, two = (gpu.product(slow, n, 2048, 8512, bits=True) - 2 * gpu.LAUNCH for n in (32, 33))
    assert two == pytest.approx(2 * one)


def test_an_sm_without_a_block_draws_nothing():
    whole = gpu.Gpu("as many SMs as blocks", 1e12, 128, 1e30, 1e30)
    half = replace(whole, sms=256)
    times = [gpu.scan(device, 1, "fp32") - gpu.LAUNCH for device in (whole, half)]
    assert times[1] == pytest.approx(2 * times[0])


def test_a_measured_copy_goes_before_the_data_sheet():
    sheet = gpu.Gpu("", 1e12, 1, 1e30, 1e30)
    assert replace(sheet, copied=0.5e12).memory(1e9) == pytest.approx(2e-3)
    assert sheet.memory(1e9) == pytest.approx(1e-3 / gpu.BANDWIDTH_SHARE)


@pytest.mark.parametrize("device", gpu.GPUS, ids=lambda device: device.name)
def test_each_change_is_predicted_to_help(device):
    steps, prompts = (
        [of(device, n, "fp16", design) for _, design in gpu.CHANGES] for of, n in ((gpu.step, 1), (gpu.prefill, 512))
    )
    small = device.sms < 8512 / 64 / gpu.ONE_TOKEN_WAVES
    assert steps[0] == steps[1] and (steps[2] == steps[1] if small else steps[2] < steps[1])
    assert prompts[0] > prompts[1] == prompts[2] > prompts[3]


@pytest.mark.parametrize("device", gpu.GPUS + gpu.JETSONS, ids=lambda device: device.name)
def test_a_product_that_convolves_is_predicted_to_be_faster(device):
    """Of every length, also those that its tiles fit badly; but on eight SMs where three stand for two."""
    apart = gpu.Design(convolving=False)
    for n in (*range(32, 140), 244, 245, 500, 512, 1000, 2048):
        least = 1.03 if device.sms == 8 and (59 <= n <= 64 or 123 <= n <= 128) else 1
        assert gpu.prefill(device, n, "fp16") < least * gpu.prefill(device, n, "fp16", apart), n
        assert gpu.step(device, n, "fp16") <= gpu.step(device, n, "fp16", apart), n


@pytest.mark.parametrize(
    ("n", "sequence", "tiles"),
    [(64, 1, 1.0), (60, 60, 1.5), (1000, 1000, 17 / 16), (640, 20, 11 / 10), (128, 128, 1.5), (512, 512, 9 / 8)],
)
def test_tiles_of_a_product_that_convolves(n, sequence, tiles):
    """Whole sequences of 32 or 64 tokens, 29 or 61 of a longer one."""
    assert gpu._made_again(n, 8512, sequence) == pytest.approx(tiles)


@pytest.mark.parametrize("name", ["gpu.md", "jetson.md"])
def test_documents_are_what_the_calculation_writes(name):
    text = (Path(__file__).parents[2] / "docs" / name).read_text()
    assert gpu.filled(text) == text
    assert len(gpu.PLACE.findall(text)) == text.count("<!-- end -->") > 0


def test_a_place_without_a_table():
    with pytest.raises(DfssmError, match="there is no table 'none'"):
        gpu.filled("<!-- predicted: none -->\n\n<!-- end -->")
