import dataclasses
import json

import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from dfssm.base import DfssmError
from dfssm.bench import decode
from dfssm.bench.bandwidth import Bandwidth, Probes
from dfssm.bench.child import follow_script, run_child
from dfssm.bench.traffic import state_bytes, step_bytes
from dfssm.cli.main import dfssm
from dfssm.runtime import Engine
from dfssm.runtime.machine import machine, process_memory


def test_the_figures_hang_together(tiny_bundle):
    result = decode.bench(str(tiny_bundle), threads=1, prompt=8, tokens=4, rounds=3)
    moved = result["step_bytes"]
    assert moved["state_read"] == moved["state_written"] == Engine.load(tiny_bundle).new_state().nbytes
    assert result["gb_s"] == pytest.approx(result["tok_s"] * sum(moved.values()) / 1e9)
    floor = moved["weights"] / result["read_gb_s"] + 2 * moved["state_read"] / result["read_write_gb_s"]
    assert result["floor_tok_s"] == pytest.approx(1e9 / floor, rel=0.5)  # medians of rounds are not one round
    assert 0 < result["floor_share"] < 1 and result["threads"] == 1 and result["peers"] == {}
    low, high = result["tok_s_quartiles"]
    assert low <= result["tok_s"] <= high
    assert result["rss_bytes"] == result["file_bytes"] + result["anonymous_bytes"] <= result["peak_rss_bytes"]


def test_json_is_one_object_with_the_documented_keys(tiny_bundle, tmp_path):
    arguments = ["bench", str(tiny_bundle), "--rounds", "1", "--tokens", "2", "--prompt", "2"]
    result = CliRunner().invoke(dfssm, [*arguments, "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    contract = {"tok_s", "gb_s", "floor_tok_s", "floor_share", "threads", "rss_bytes", "state_dtype"}
    assert contract <= set(found) and result.stdout.count("\n") == 1
    plot = tmp_path / "speed.svg"
    text = CliRunner().invoke(dfssm, [*arguments, "--plot", str(plot)], catch_exceptions=False).stdout
    assert "memory bandwidth" in text and "prefill" in text
    assert text.endswith(f"\n{plot}\n") and "limit of the memory" in plot.read_text()


def test_a_plot_of_another_form_is_refused_before_anything_is_timed(tiny_bundle, tmp_path):
    done = CliRunner().invoke(dfssm, ["bench", str(tiny_bundle), "--plot", str(tmp_path / "speed.pdf")])
    assert done.exit_code == 2 and "the name must end in .svg or .png" in done.stderr


def test_wrong_outputs_are_not_timed(tiny_bundle, monkeypatch):
    engine = Engine.load(tiny_bundle)
    right = decode.follow_script
    monkeypatch.setattr(decode, "follow_script", lambda *arguments: np.roll(right(*arguments), 1, axis=1))
    with pytest.raises(DfssmError, match="computes wrong logits.*not timed"):
        decode.check_outputs(str(tiny_bundle), engine)


def test_the_child_computes_the_same(tiny_bundle, tmp_path):
    found = run_child(str(tiny_bundle), 1, 5, 2, logits=str(tmp_path / "logits.npy"))
    engine = Engine.load(tiny_bundle, threads=1)
    here = follow_script(engine, engine.new_state(), 5, 2)
    assert np.load(tmp_path / "logits.npy").tolist() == here.tolist()
    assert found["load_seconds"] > 0


def test_a_child_that_fails_is_named(tmp_path):
    with pytest.raises(DfssmError, match="not a bundle"):
        run_child(str(tmp_path), 1, 5, 2)


def test_the_peer_runs_beside_the_bundle(tiny_bundle):
    result = decode.bench(str(tiny_bundle), prompt=2, tokens=2, rounds=2, peers=("stock-ort",))
    (peer,) = result["peers"].values()
    assert set(result["peers"]) == {"stock-ort, 8-bit head"}
    assert min(peer["tok_s"], peer["ratio"], peer["prefill_tok_s"], peer["prefill_ratio"]) > 0
    assert "session options tried, tok/s: none " in peer["options"]


def test_an_unknown_peer_is_named(tiny_bundle):
    with pytest.raises(DfssmError, match="unknown peer 'other': choose stock-ort or llama.cpp"):
        decode.bench(str(tiny_bundle), prompt=2, tokens=2, rounds=1, peers=("other",))


def test_sequences_at_once_have_a_limit_of_their_own(tiny_bundle):
    result = decode.bench(str(tiny_bundle), threads=1, prompt=2, tokens=2, rounds=2, batches=(1, 3))
    one, three = result["batches"]
    assert (one["batch"], three["batch"]) == (1, 3) and 0 < three["floor_share"] < 1
    assert one["floor_tok_s"] == pytest.approx(result["floor_tok_s"])
    assert one["floor_tok_s"] < three["floor_tok_s"] < 3 * one["floor_tok_s"], "weights are read once"


def test_a_deferred_state_is_read_by_every_token_and_written_by_every_eighth():
    tensors = {
        "ssm_state.0": np.zeros((1, 4, 8, 8), np.float16),  # 512 bytes
        "pending_x.0": np.zeros((1, 16, 32), np.float32),  # 128 bytes a token
        "pending_count.0": np.zeros(1, np.uint8),
        "conv_state.0": np.zeros((1, 16 + 3, 10), np.float32),  # 40 bytes a token
    }
    read, written = state_bytes(tensors, "fp16-deferred")
    assert read == pytest.approx(512 + 4.5 * 128 + 1 + 3 * 40), "1 to 8 tokens are pending"
    assert written == pytest.approx(512 / 8 + 128 + 1 + 40)
    assert state_bytes(tensors, "fp16") == (512 + 2048 + 1 + 760,) * 2


@pytest.mark.parametrize(
    ("state_dtype", "conv", "scan"),
    [
        ("fp16", "CausalConv1dStep", "SelectiveScanStep"),
        ("fp16-deferred", "DeferredConv1dStep", "DeferredScanStep"),
    ],
)
def test_ops_say_where_a_token_goes(state_dtype, conv, scan, tmp_path):
    bundle = tiny.write_bundle(tmp_path / "b", target="ort-cpu", state_dtype=state_dtype)
    arguments = ["bench", str(bundle), "--ops", "--rounds", "1", "--tokens", "2", "--prompt", "2"]
    ops = json.loads(CliRunner().invoke(dfssm, [*arguments, "--json"], catch_exceptions=False).stdout)["ops"]
    nodes, layers = {row["op"]: row["nodes"] for row in ops["table"]}, tiny.CONFIG.n_layer
    assert nodes == {
        "RMSNorm": layers + 1, "BinaryScaffoldMatMul": 2 * layers, conv: layers,
        scan: layers, "GatedRMSNorm": layers, "Int8MatMul": 1,
    }  # fmt: skip
    # GB/s times seconds is bytes: of the states, what the limit of a whole token counts, and the weights of the op.
    engine = Engine.load(bundle)
    read, written = state_bytes(engine.new_state().tensors, state_dtype)
    of_config = step_bytes(engine.config, engine.manifest.layout, state_dtype)
    assert (of_config["state_read"], of_config["state_written"]) == pytest.approx((read, written))
    c, moved = tiny.CONFIG, {row["op"]: 1e9 * row["gb_s"] * row["seconds"] for row in ops["table"]}
    weights = 4 * layers * (c.conv_dim * (c.d_conv + 1) + 3 * c.nheads)
    assert moved[conv] + moved[scan] == pytest.approx(weights + read + written)
    assert {row["op"] for row in ops["table"] if row["weights_cycle"]} == {"BinaryScaffoldMatMul", "Int8MatMul"}
    within = sum(row["seconds"] for row in ops["table"]) / ops["seconds"]
    assert 0 < within < 1 and ops["outside_share"] == pytest.approx(1 - within)
    assert "outside our kernels" in CliRunner().invoke(dfssm, arguments, catch_exceptions=False).stdout


def test_ops_are_those_of_our_kernels(tmp_path):
    bundle = tiny.write_bundle(tmp_path / "b", target="onnx")
    with pytest.raises(DfssmError, match="--ops takes a bundle of target ort-cpu, this one is onnx"):
        decode.bench(str(bundle), prompt=2, tokens=2, rounds=1, ops=True)


def test_the_machine_states_itself():
    found = machine()
    assert found["cores"] >= 1 and found["memory_bytes"] > 1 << 28 and found["cpu"]
    memory = process_memory()
    assert memory["rss_bytes"] == memory["file_bytes"] + memory["anonymous_bytes"] <= memory["peak_rss_bytes"]


def test_the_probes_measure_what_memory_can_do():
    bandwidth = Bandwidth(1 << 24, threads=2)
    for probe in (bandwidth.read(), bandwidth.read_write()):
        assert len(probe) == len(bandwidth.patterns) and 0.05 < probe.min() <= probe.max() < 2000


def test_the_best_pattern_is_that_of_the_highest_median():
    probes = Probes(["steady", "lucky once"])
    for before, after in (([5, 1], [7, 1]), ([6, 2], [6, 2]), ([4, 90], [6, 90])):
        probes.add(np.array(before), np.array(after))
    assert probes.pattern == "steady" and probes.rates.tolist() == [6, 6, 5]


def test_the_bundle_without_its_tokenizer_can_be_measured(cpu_target, tmp_path):
    bundle = tiny.write_bundle(tmp_path / "b", target=cpu_target, tokenizer=False)
    assert decode.bench(str(bundle), prompt=2, tokens=2, rounds=1)["tok_s"] > 0


def test_weights_are_mapped_and_not_copied(cpu_target, tiny_bundle, tmp_path):
    if cpu_target != "ort-cpu":
        pytest.skip("the bodies of the portable target unpack the weights")
    config = dataclasses.replace(tiny.CONFIG, vocab_size=60_000, d_model=512)
    bundle = tiny.write_bundle(tmp_path / "b", config, target=cpu_target, state_dtype="fp16")
    weights = (bundle / "model.onnx.data").stat().st_size
    small, large = (run_child(str(b), 1, 40, 4) for b in (tiny_bundle, bundle))
    assert weights > 30e6
    assert large["file_bytes"] - small["file_bytes"] > 0.9 * weights, "a step reads all weights"
    assert large["anonymous_bytes"] - small["anonymous_bytes"] < 0.3 * weights
