"""The passes that lower a step graph for TensorRT: each on a small graph, and all of them on the demo model."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from trt_graphs import write_step

from dfssm.base import DfssmError
from dfssm.opset import DOMAIN, OPS
from dfssm.opset.packing import unpack_bits
from dfssm.targets.trt_lowering import LOWERINGS, dtypes, lower, passes
from dfssm.targets.trt_lowering.check import check_in_place, check_lowered
from dfssm.targets.trt_lowering.graph import load, node_named, ours, raw_bytes, read, save

STATES = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder with the demo's step graph."""
    folder = tmp_path_factory.mktemp("demo")
    write_step(folder, "demo")
    return folder


def run(name: str, graph: gs.Graph, lowering: str = "plugin") -> list[str]:
    return passes(lowering)[name](graph)


def graph_of(nodes, inputs, outputs, initializers=()) -> gs.Graph:
    graph = helper.make_graph(nodes, "small", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return gs.import_onnx(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def value(name: str, dtype: int, *shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def test_functions(demo):
    graph = load(demo / "model.onnx")
    nodes = len(graph.nodes)
    assert sorted(run("functions", graph)) == sorted(OPS)
    assert not graph.functions and len(graph.nodes) == nodes
    assert run("functions", graph) == []


def test_words_are_a_view(demo):
    graph = load(demo / "model.onnx")
    scaffolds = list(ours(graph, "BinaryScaffoldMatMul"))
    before = {node.name: (bytes(raw_bytes(node.inputs[1])), read(node.inputs[1])) for node in scaffolds}
    names = run("words", graph)
    assert len(names) == 12 and all(name.endswith("_proj.bits") for name in names)
    for node in scaffolds:
        words, (data, bits) = node.inputs[1], before[node.name]
        assert words.dtype == np.int32 and words.shape == [bits.shape[0], bits.shape[1] // 4]
        assert bytes(raw_bytes(words)) == data
        w = np.asarray(read(words)).view(np.uint32)  # column k is bit k % 32 of word k / 32
        columns = (w[:, :, None] >> np.arange(32, dtype=np.uint32) & 1).reshape(len(w), -1)
        np.testing.assert_array_equal(columns.astype(np.int8) * 2 - 1, unpack_bits(np.asarray(bits)))
    assert run("words", graph) == []


def test_words_of_planes_and_of_a_tensor_in_the_file(tmp_path):
    write_step(tmp_path, "planes2")
    graph = load(tmp_path / "model.onnx")
    bits = node_named(graph, "/layers.0/in_proj").inputs[1]
    planes, rows, width = bits.shape
    run("words", graph)
    assert bits.shape == [planes, rows, width // 4] and planes == 2


def test_logits_are_those_of_the_places_that_are_given(demo):
    graph = load(demo / "model.onnx")
    graph.functions = []
    before = gs.export_onnx(graph)
    assert run("logits_at", graph) == ["/keep/gather"] and run("logits_at", graph) == []
    graph.cleanup()
    assert [tensor.name for tensor in graph.inputs][-2:] == ["ssm_state.5", "logits_at"]
    assert not [node for node in graph.nodes if node.op in ("Neg", "Slice")]
    after = gs.export_onnx(graph)
    assert "logits_to_keep" in [t.name for t in before.graph.initializer]
    assert "logits_to_keep" not in [t.name for t in after.graph.initializer]
    (gather,) = (node for node in after.graph.node if node.name == "/keep/gather")
    (norm,) = (node for node in after.graph.node if node.name == "/norm_f")
    assert list(gather.input) == ["/layers.5/residual/out", "logits_at"] and norm.input[0] == gather.output[0]


def test_logits_of_the_last_token_alone(demo):
    graph = load(demo / "model.onnx")
    changed = passes("plugin", only_last=True)["logits_at"](graph)
    assert changed == ["/keep/slice"] and passes("plugin", only_last=True)["logits_at"](graph) == []
    graph.cleanup()
    assert "logits_at" not in [tensor.name for tensor in graph.inputs]
    assert node_named(graph, "/keep/slice").inputs[1].values.tolist() == [-1]
    assert not [node for node in graph.nodes if node.op == "Neg"]


def table_graph(table: np.ndarray) -> gs.Graph:
    """A Gather of int8 rows and its Cast."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], "/embed/gather", axis=0),
        helper.make_node("Cast", ["rows"], ["wide"], "/embed/cast", to=TensorProto.FLOAT),
    ]
    D = table.shape[1]
    graph = graph_of(
        nodes,
        [value("ids", TensorProto.INT64, "B", "T")],
        [value("wide", TensorProto.FLOAT, "B", "T", D)],
        [numpy_helper.from_array(table, "table")],
    )
    graph.tensors()["rows"].dtype, graph.tensors()["rows"].shape = np.int8, ["B", "T", D]
    return graph


@pytest.mark.parametrize("kind", ["random", "extreme"])
def test_embedding_takes_words_apart(kind):
    """Every byte of a word comes out as the int8 it was, whatever its neighbours are."""
    table = np.random.default_rng(0).integers(-128, 128, (256, 64), np.int8)
    if kind == "extreme":  # every combination of the bytes where a borrow or a carry may go wrong
        edge = np.array([-128, -127, -1, 0, 1, 127], np.int8)
        words = np.stack(np.meshgrid(edge, edge, edge, edge), -1).reshape(-1, 4)
        table = words[: len(words) // 8 * 8].reshape(-1, 32)
    graph = table_graph(table)
    assert run("embedding", graph) == ["table"]
    run("dtypes", graph)
    model = gs.export_onnx(graph)
    onnx.checker.check_model(model, full_check=True)
    assert not {"BitShift", "BitwiseAnd"} & {node.op_type for node in model.graph.node}
    assert [t.data_type for t in model.graph.initializer if t.name == "table"] == [TensorProto.INT32]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    ids = np.arange(len(table)).reshape(1, -1)
    np.testing.assert_array_equal(session.run(None, {"ids": ids})[0], table[ids].astype(np.float32))


def test_tied_table_stays_one_constant(demo):
    graph = load(demo / "model.onnx")
    run("embedding", graph)
    gather, head = node_named(graph, "/embed/gather"), node_named(graph, "/lm_head")
    assert gather.inputs[0] is head.inputs[1] and head.inputs[1].dtype == np.int32
    run("plugin_attributes", graph)
    assert head.attrs["w_words"] == 1


def test_untied_head_keeps_int8(tmp_path):
    write_step(tmp_path, "untied")
    graph = load(tmp_path / "model.onnx")
    run("embedding", graph)
    run("plugin_attributes", graph)
    head = node_named(graph, "/lm_head")
    assert head.inputs[1].dtype == np.int8 and head.attrs["w_words"] == 0


@pytest.mark.parametrize("state_dtype", STATES)
def test_plugin_attributes(state_dtype, tmp_path):
    write_step(tmp_path, "limits", state_dtype)
    graph = load(tmp_path / "model.onnx")
    assert len(run("plugin_attributes", graph)) == len(list(ours(graph)))
    for node in ours(graph):
        assert node.attrs["plugin_version"] == "" and node.attrs["plugin_namespace"] == ""
        assert node.attrs.keys() >= OPS[node.op].defaults.keys()
    (scan, *_) = ours(graph, "SelectiveScanStep")
    assert scan.attrs["int8_state"] == (state_dtype == "int8") and scan.attrs["dt_max"] == pytest.approx(0.1)
    assert run("plugin_attributes", graph) == []


def test_one_token(demo):
    graph = load(demo / "model.onnx")
    assert {"input_ids", "logits"} <= set(run("one_token", graph, "native"))
    assert graph.inputs[0].shape == ["B", 1] and graph.outputs[0].shape == ["B", 1, 4096]
    graph.cleanup()
    assert node_named(graph, "/keep/slice") is None
    assert not [t.name for t in graph.tensors().values() if isinstance(t, gs.Variable) and "T" in t.shape]


def test_dtypes_states_what_is_missing_and_refuses_what_is_wrong():
    graph = graph_of(
        [helper.make_node("Exp", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["z"])],
        [value("x", TensorProto.FLOAT, "B", 3)],
        [value("z", TensorProto.FLOAT, "B", 3)],
    )
    assert run("dtypes", graph) == ["y"]
    assert graph.tensors()["y"].dtype == np.float32 and list(graph.tensors()["y"].shape) == ["B", 3]
    assert run("dtypes", graph) == []

    norm = helper.make_node("RMSNorm", ["x", "w"], ["out"], "norm", domain=DOMAIN)
    weight = numpy_helper.from_array(np.ones(3, np.float32), "w")
    sides = [value("x", TensorProto.FLOAT, "B", 1, 3)]
    with pytest.raises(ValueError, match="norm: output 'out' is int8"):
        run("dtypes", graph_of([norm], sides, [value("out", TensorProto.INT8, "B", 1, 3)], [weight]))
    behind = helper.make_node("Neg", ["out"], ["y"])
    with pytest.raises(ValueError, match="the dtype of out does not follow"):
        run("dtypes", graph_of([norm, behind], sides, [value("y", TensorProto.FLOAT, "B", 1, 3)], [weight]))


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_demo(lowering, state_dtype, tmp_path):
    """All passes: same inputs and outputs, three nodes a layer, every dtype stated, the weights where they were."""
    write_step(tmp_path, "demo", state_dtype)
    data = (tmp_path / "model.onnx.data").read_bytes()
    changed = lower(tmp_path / "model.onnx", tmp_path / "lowered.onnx", lowering)
    assert list(changed) == list(LOWERINGS[lowering]) and all(changed[name] for name in changed)
    assert (tmp_path / "model.onnx.data").read_bytes() == data
    model = onnx.load(tmp_path / "lowered.onnx", load_external_data=False)
    assert not model.functions
    step, lowered = load(tmp_path / "model.onnx"), load(tmp_path / "lowered.onnx")
    places = ["logits_at"] if lowering == "plugin" else []
    names = [t.name for t in step.inputs]
    assert [t.name for t in lowered.inputs] == names + places and len(names) in (13, 19)
    assert [t.name for t in step.outputs] == [t.name for t in lowered.outputs]
    assert lowered.tensors()["ssm_state.3"].dtype == STATES[state_dtype]
    assert all(t.dtype is not None for t in lowered.tensors().values())
    if lowering == "native":
        assert not list(ours(lowered)) and onnx.checker.check_model(str(tmp_path / "lowered.onnx")) is None
        return
    layer = ["NormScaffoldConv", "SelectiveScanStep", "GatedNormScaffoldAdd"]
    assert [node.op for node in ours(lowered)] == 6 * layer + ["RMSNorm", "Int8MatMul"]
    assert {node.name for node in ours(lowered)} < {node.name for node in ours(step)}
    assert len((tmp_path / "lowered.onnx").read_bytes()) < 100_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lowered.onnx", "model.onnx", "model.onnx.data"]


def lose_a_node(graph):
    node_named(graph, "/norm_f").op = "Identity"
    node_named(graph, "/norm_f").domain = ""


def change_an_attribute(graph):
    node_named(graph, "/norm_f").attrs["eps"] = 1e-3


def test_a_misspelt_attribute_is_refused(demo):
    """TensorRT's parser would drop it, and the default would be taken."""
    graph = load(demo / "model.onnx")
    node_named(graph, "/layers.0/conv").attrs["xstart"] = 3
    with pytest.raises(DfssmError, match="CausalConv1dStep: unknown attribute 'xstart'; known: activation, x_start$"):
        run("plugin_attributes", graph)


def cross_two_inputs(graph):
    inputs = node_named(graph, "/layers.2/scan").inputs
    inputs[4], inputs[5] = inputs[5], inputs[4]


def change_a_weight(graph):
    weight = node_named(graph, "/norm_f").inputs[1]
    weight.values, weight.data_location = np.asarray(read(weight)) * np.float32(2), None


@pytest.mark.parametrize(
    "harm, words",
    [
        (lose_a_node, "RMSNorm /norm_f is gone"),
        (change_an_attribute, "RMSNorm /norm_f has .* it should have"),
        (cross_two_inputs, "/layers.2/scan reads layers.2.scan.D where it read layers.2.scan.A_log"),
        (change_a_weight, "/norm_f has other bytes for norm_f.weight"),
        (lambda graph: graph.outputs.pop(), "the outputs are"),
    ],
)
def test_check_sees_what_a_pass_got_wrong(harm, words, demo, tmp_path):
    lower(demo / "model.onnx", demo / "lowered.onnx")
    graph = load(demo / "lowered.onnx")
    harm(graph)
    (tmp_path / "model.onnx.data").symlink_to(demo / "model.onnx.data")
    save(graph, tmp_path / "harmed.onnx")
    with pytest.raises(ValueError, match=words):
        check_lowered(load(demo / "model.onnx"), load(tmp_path / "harmed.onnx"), "plugin")


def read_a_state_twice(graph):
    graph.nodes.append(gs.Node("Identity", "/copy", {}, [graph.tensors()["conv_state.0"]], [gs.Variable("copied")]))


def make_a_state_elsewhere(graph):
    made = next(tensor for tensor in graph.outputs if tensor.name == "conv_state_out.0")
    maker, inner = made.inputs[0], gs.Variable("inner", made.dtype, made.shape)
    maker.outputs[maker.outputs.index(made)] = inner
    graph.nodes.append(gs.Node("Identity", "/copy", {}, [inner], [made]))


def cross_two_states(graph):
    first, second = (node_named(graph, f"/layers.{i}/in_proj") for i in (0, 1))
    (one,), (other,) = ([t for t in node.inputs if "conv_state" in t.name] for node in (first, second))
    first.inputs[first.inputs.index(one)], second.inputs[second.inputs.index(other)] = other, one


@pytest.mark.parametrize(
    "harm, words",
    [
        (read_a_state_twice, "NormScaffoldConv /layers.0/in_proj and Identity /copy reads it, NormScaffoldConv"),
        (make_a_state_elsewhere, "NormScaffoldConv /layers.0/in_proj reads it, no plugin makes the new one"),
        (cross_two_states, "/layers.1/in_proj reads it, NormScaffoldConv /layers.0/in_proj makes the new one"),
    ],
)
def test_a_state_that_cannot_be_updated_in_place_is_refused(harm, words, demo):
    lower(demo / "model.onnx", demo / "lowered.onnx")
    graph = load(demo / "lowered.onnx")
    check_in_place(graph)
    harm(graph)
    with pytest.raises(DfssmError) as caught:
        check_in_place(graph)
    assert str(caught.value).startswith("conv_state.0 cannot be updated in place: ") and words in str(caught.value)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("compile with --lowering native")


def test_lowering_looks_whether_states_can_be_updated_in_place(demo, monkeypatch):
    states = dtypes.run
    monkeypatch.setattr(dtypes, "run", lambda graph: make_a_state_elsewhere(graph) or states(graph))
    monkeypatch.setattr("dfssm.targets.trt_lowering.check_lowered", lambda *graphs: None)  # it would tell it, too
    with pytest.raises(DfssmError, match=r"^conv_state\.0 cannot be updated in place: "):
        lower(demo / "model.onnx", demo / "harmed.onnx")
