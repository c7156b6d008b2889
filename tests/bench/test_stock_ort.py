"""The peer must do the same work: its recurrence is checked against the reference, its size against ours."""

import dataclasses

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny

from dfssm.bench.stock_ort import OPTIONS, build_peer, open_peer
from dfssm.opset.reference import selective_scan_step_ref

# one group: com.microsoft LinearAttention shares B and C among all heads
CONFIG = dataclasses.replace(tiny.CONFIG, d_model=128, ngroups=1, vocab_size=300).to_dict()


def test_the_peers_recurrence_is_mamba2s(tmp_path):
    """LinearAttention and what stands around it, from conv output and dt to y, against SelectiveScanStep."""
    path = build_peer(CONFIG, tmp_path)
    model = onnx.load(path)
    attention = next(node for node in model.graph.node if node.op_type == "LinearAttention")
    wanted = ["layers.0.part2", "layers.0.xbc.part0", "layers.0.xbc.part1", "layers.0.xbc.part2"]
    following = next(n for n in model.graph.node if n.op_type == "Add" and attention.output[0] in n.input)
    layer_output = following.output[0]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, None) for n in [*wanted, layer_output])
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options)
    rng = np.random.default_rng(0)
    feed = {"input_ids": rng.integers(0, 300, (1, 5))}
    for tensor in session.get_inputs()[1:]:
        feed[tensor.name] = rng.standard_normal([1, *tensor.shape[1:]]).astype(np.float32)
    names = [*wanted, layer_output, "ssm_state_out.0"]
    dt, x, B, C, y, state = session.run(names, feed)
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    expected_y, expected_state = selective_scan_step_ref(
        x, dt, B, C, np.log(-weights["layers.0.A"]), weights["layers.0.D"][:, 0], weights["layers.0.dt_bias"],
        feed["ssm_state.0"], ngroups=1,
    )[:2]  # fmt: skip
    assert np.abs(y - expected_y).max() <= 1e-4 * np.abs(expected_y).max()
    assert np.abs(state - expected_state).max() <= 1e-4 * np.abs(expected_state).max()


@pytest.mark.parametrize("option", ["", *OPTIONS])
@pytest.mark.parametrize("head_bits", [0, 8])
def test_it_decodes_and_reads_prompts(tmp_path, head_bits, option):
    peer = open_peer(build_peer(CONFIG, tmp_path, head_bits), threads=1, option=option)
    assert peer.decode(3) > 0 and peer.prefill(5) > 0


def test_its_projections_are_two_bits_a_weight(tmp_path):
    model = onnx.load(build_peer(CONFIG, tmp_path))
    linear = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    assert len(linear) == 2 * CONFIG["n_layer"]
    for node in linear:
        attributes = {a.name: a.i for a in node.attribute}
        assert attributes["bits"] == 2 and attributes["accuracy_level"] == 4
