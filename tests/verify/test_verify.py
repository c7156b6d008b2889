"""The verifier's parts: the taps of a graph, its run in calls, and a difference against Polygraphy's."""

import numpy as np
import onnx
import pytest
import tiny

from dfssm.opset.schema import DOMAIN
from dfssm.opset.tolerances import Tolerance
from dfssm.targets import get_target
from dfssm.verify.difference import MANY, Difference
from dfssm.verify.graph import TAPPED, inference, run, write_tapped, zero_states

BOUND = Tolerance(0.01, "for the test")


def arrays(tokens: int, error: float = 0.0):
    rng = np.random.default_rng(1)
    student = rng.standard_normal((1, tokens, 5)).astype(np.float32)
    bundle = student.copy()
    bundle[0, 1, 2] += error
    return bundle, student


@pytest.mark.parametrize("error", [0.0, 1e-4, 0.2])
def test_a_difference_is_polygraphys(error):
    from polygraphy.comparator import IterationResult, SimpleCompareFunc

    bundle, student = arrays(4, error)
    difference = Difference(BOUND)
    difference.add(bundle, student)
    largest = float(np.abs(student).max())
    function = SimpleCompareFunc(atol=BOUND.relative * largest, rtol=0.0, check_error_stat="max")
    found = function(IterationResult({"y": bundle}), IterationResult({"y": student}))["y"]
    assert difference.max_abs == pytest.approx(found.max_absdiff)
    assert difference.passed == bool(found) == (error < 0.02)


def test_the_worst_of_several_counts():
    difference = Difference(BOUND)
    for error in (0.001, 0.2, 0.0):
        difference.add(*arrays(4, error))
    assert difference.max_abs == pytest.approx(0.2, rel=1e-5) and not difference.passed


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_number_that_is_none_fails(number):
    difference = Difference(BOUND, BOUND)
    difference.add(*arrays(MANY, number))
    difference.add(*arrays(MANY))
    assert not difference.passed


def test_a_wrong_channel_is_typical_and_a_flipped_token_is_not():
    wide, noise = Tolerance(0.5, "flips"), Tolerance(1e-5, "noise")
    flipped, channel, short = (Difference(wide, noise) for _ in range(3))
    flipped.add(*arrays(MANY, 0.3))
    bundle, student = arrays(MANY)
    channel.add(bundle * np.array([1, 1, 1.01, 1, 1], np.float32), student)
    short.add(bundle[:, 1:] * 1.01, student[:, 1:])
    assert flipped.passed and not channel.passed
    assert short.typical_rel is None and short.passed


def test_every_op_but_the_head_is_tapped_and_the_graph_computes_the_same(tmp_path):
    folder = tiny.write_bundle(tmp_path / "b", target="onnx", state_dtype="int8", tokenizer=False)
    taps = write_tapped(folder / "model.onnx", folder)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    nodes = [node.name for node in graph.node if node.domain == DOMAIN and node.op_type != "Int8MatMul"]
    adds = [node.name for node in graph.node if node.op_type == "Add"]
    assert [tap.node for tap in taps if tap.op not in ("Embedding", "Residual")] == nodes
    assert [tap.node for tap in taps if tap.op == "Residual"] == adds and len(adds) == tiny.CONFIG.n_layer
    assert taps[0].module == "embedding" and taps[-2].name == f"{taps[-2].module}.residual"

    ids = np.random.default_rng(0).integers(0, tiny.CONFIG.vocab_size, (1, 5))
    done = []
    tapped, shipped = (
        run(inference(session), zero_states(session), ids, [3, 1, 1], lambda: done.append(1))
        for session in (get_target("onnx").open_session(folder, model=name) for name in (TAPPED, "model.onnx"))
    )
    assert {name for tap in taps for name in tap.outputs} <= set(tapped) and len(done) == 6
    for name, values in shipped.items():
        assert len(values) == 3 and all(map(np.array_equal, values, tapped[name])), name
    assert [value.shape[1] for value in tapped["/embed/mul/out"]] == [3, 1, 1]
