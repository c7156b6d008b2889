"""The native lowering in ONNX Runtime: standard ops that compute what the reference does."""

import extremes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
import student_ref
from each import check_each
from nodes import node_model
from trt_graphs import step, stock_session, widened, write_step

from dfssm.opset import OPS
from dfssm.opset.cases import Case
from dfssm.opset.schema import STATE_DTYPES
from dfssm.opset.tolerances import model_tolerance
from dfssm.targets.trt_lowering import lower
from dfssm.targets.trt_lowering.graph import Emitter, load, ours
from dfssm.targets.trt_lowering.native import run as make_native

# What TensorRT-RTX 1.7's parser takes; a test with TensorRT itself is in test_trt_build.py.
REFUSED = {"BitShift", "BitwiseAnd", "BitwiseOr", "MatMulInteger", "DynamicQuantizeLinear"}


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("name", student_ref.CONFIGS)
def test_equals_reference(name, state_dtype, tmp_path):
    """Eight tokens of two rows, each from the reference's states: logits and new states of every config of the grid."""
    config, tensors = write_step(tmp_path, name, state_dtype)
    lower(tmp_path / "model.onnx", tmp_path / "native.onnx", "native")
    ops = {node.op_type for node in onnx.load(tmp_path / "native.onnx", load_external_data=False).graph.node}
    assert not ops & REFUSED
    session = stock_session(tmp_path / "native.onnx")
    tolerance = model_tolerance(config.n_layer, config.d_model)
    states = student_ref.zero_states(config, 2, state_dtype)
    for ids in np.random.default_rng(1).integers(0, config.vocab_size, (8, 2, 1)):
        logits, new = step(session, ids, states)
        expected, states = student_ref.step(config, tensors, ids, states)
        tolerance.check(logits, expected, "logits")
        for key in states:
            if not key.startswith("ssm_scale"):
                tolerance.check(widened(new, key), widened(states, key), key)


def test_demo_over_32_tokens(tmp_path):
    """As exact as the arithmetic allows: float sums in another order, and no code of an activation moved."""
    config, _ = write_step(tmp_path, "demo", "fp32")
    lower(tmp_path / "model.onnx", tmp_path / "native.onnx", "native")
    sessions = [stock_session(tmp_path / name) for name in ("native.onnx", "model.onnx")]
    states = student_ref.zero_states(config, 1, "fp32")
    for ids in np.random.default_rng(2).integers(0, config.vocab_size, (32, 1, 1)):
        (logits, _), (expected, states) = (step(session, ids, states) for session in sessions)
        model_tolerance(config.n_layer, config.d_model).check(logits, expected, "logits")


def native_session(case: Case) -> onnxruntime.InferenceSession:
    """The case's op alone, lowered; integer weights are constants, the other inputs are the session's."""
    model = node_model(case)
    for name, value in case.inputs().items():
        (info,) = (i for i in model.graph.input if i.name == name)
        if name in ("bits", "down", "up", "w"):
            model.graph.input.remove(info)
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        else:
            info.CopyFrom(onnx.helper.make_tensor_value_info(name, info.type.tensor_type.elem_type, value.shape))
    graph = gs.import_onnx(model)
    make_native(graph)
    return onnxruntime.InferenceSession(gs.export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("op", OPS)
def test_extremes(op):
    def check(case):
        session = native_session(case)
        fed = {i.name for i in session.get_inputs()}
        extremes.check(case, lambda inputs: session.run(None, {k: v for k, v in inputs.items() if k in fed}))

    plain = [c for c in extremes.cases(op) if not c.attributes.get("layout") and "z_start" not in c.attributes]
    check_each([c for c in plain if c.sizes["T"] == 1] or [Case(op, plain[0].sizes | {"T": 1})], check)


def test_columns_of_a_wider_tensor(tmp_path):
    """An attribute `<input>_start` says where in a wider tensor the op's columns begin."""
    write_step(tmp_path, "groups")
    graph = load(tmp_path / "model.onnx")
    graph.functions = []
    (conv, *_), (scan, *_), (norm, *_) = (
        list(ours(graph, op)) for op in ("CausalConv1dStep", "SelectiveScanStep", "GatedRMSNorm")
    )
    conv.attrs["x_start"], norm.attrs["z_start"] = 7, 0
    scan.attrs |= {"x_start": 1, "dt_start": 2, "B_start": 3, "C_start": 4}
    widths = {"CausalConv1dStep": [64 + 2 * 2 * 8], "SelectiveScanStep": [64, 4, 16, 16], "GatedRMSNorm": [64]}
    make_native(graph)
    for node, starts in ((conv, [7]), (scan, [1, 2, 3, 4]), (norm, [0])):
        slices = [n for n in graph.nodes if n.op == "Slice" and n.name.startswith(f"{node.name}/")][: len(starts)]
        bounds = [[int(n.inputs[i].values[0]) for i in (1, 2)] for n in slices]
        assert bounds == [[s, s + w] for s, w in zip(starts, widths[node.op], strict=True)]


def test_emitter_names_are_unique(tmp_path):
    write_step(tmp_path, "plain")
    graph = load(tmp_path / "model.onnx")
    emit = Emitter(graph, "/here")
    x = emit("Add", emit("Mul", graph.inputs[0], 2), [1, 2])
    assert x.inputs[0].name == "/here/Add_2" and x.inputs[0].inputs[1].values.dtype == np.int64
    assert emit("Neg", 1.0).inputs[0].inputs[0].values.dtype == np.float32
