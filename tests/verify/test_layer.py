"""The nodes of a layer, against the way of a Mamba-2 block written out by hand."""

import pytest
import tiny

from dfssm.base import DfssmError
from dfssm.targets.bundle import Bundle
from dfssm.verify.layer import layer_nodes

NAMES = ["norm", "in_proj", "conv", "scan", "gated_norm", "out_proj", "residual"]
# The convolution, the scan and the gated norm read columns of in_proj's output: xBC, dt, z.
SOURCES = [[-1], [0], [1], [1, 2], [1, 3], [4], [-1, 5]]


def test_a_layer_is_read_as_it_was_built(tiny_bundle):
    c = tiny.CONFIG
    with Bundle(tiny_bundle) as bundle:
        nodes = layer_nodes(bundle, 1)
    assert [node.name for node in nodes] == [f"/layers.1/{name}" for name in NAMES]
    assert [node.sources for node in nodes] == SOURCES
    assert [node.ours for node in nodes] == [True] * 6 + [False]
    _, in_proj, conv, scan, *_, residual = nodes
    assert [weight.name.rpartition(".")[2] for weight in in_proj.weights] == [
        "bits", "scale", "down", "down_scale", "up", "up_scale",
    ]  # fmt: skip
    assert str(in_proj.output) == f"float [B, T, {c.d_in_proj}]" and not in_proj.states
    (state,), (new_state,) = conv.states, conv.new_states
    assert (state.name, new_state.name) == ("conv_state.1", "conv_state_out.1")
    assert str(state) == str(new_state) == f"float [B, {c.conv_dim}, {c.d_conv - 1}]"
    assert str(scan.states[0]) == f"float16 [B, {c.nheads}, {c.d_state}, {c.headdim}]"
    assert str(residual.output) == f"float [B, T, {c.d_model}]" and not residual.weights


def test_a_layer_that_is_not_there(tiny_bundle):
    with Bundle(tiny_bundle) as bundle, pytest.raises(DfssmError, match="0 nodes of layer 2, 1 to 64 can be shown"):
        layer_nodes(bundle, 2)
