"""The pass `fuse`: what it makes of a layer, what it leaves alone, and that no bit of the result changes."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import student_ref
from plugins_trt import adapter
from trt_graphs import step, write_step

from dfssm.opset.tolerances import half_tolerance
from dfssm.targets.trt_lowering import LOWERINGS, check, fuse, lower, passes
from dfssm.targets.trt_lowering.graph import load, node_named, ours, read, save
from dfssm.targets.trt_plugins import FUSED

IN, SCAN, OUT = "/layers.0/in_proj", "/layers.0/scan", "/layers.0/out_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder with the step graph of a student of two layers."""
    folder = tmp_path_factory.mktemp("plain")
    write_step(folder, "plain")
    return folder


def prepared(folder) -> gs.Graph:
    """The step graph as the pass finds it."""
    graph = load(folder / "model.onnx")
    passes("plugin")["words"](graph)
    return graph


def names(node: gs.Node) -> tuple[list[str], list[str]]:
    return [t.name for t in node.inputs], [t.name for t in node.outputs]


def test_a_layer(plain):
    graph = prepared(plain)
    config = student_ref.config("plain")
    assert fuse.run(graph) == [IN, OUT, "/layers.1/in_proj", "/layers.1/out_proj"]
    graph.cleanup().toposort()
    layer = [node for node in graph.nodes if node.name.startswith("/layers.0/")]
    assert [node.op for node in layer] == ["NormScaffoldConv", "SelectiveScanStep", "GatedNormScaffoldAdd"]
    first, scan, last = layer
    weights = [f"{{}}.{name}" for name in ("bits", "scale", "down", "down_scale", "up", "up_scale")]
    assert names(first) == (
        ["/embed/mul/out", "layers.0.norm.weight"]
        + [name.format("layers.0.in_proj") for name in weights]
        + ["conv_state.0", "layers.0.conv.weight", "layers.0.conv.bias"],
        ["/layers.0/in_proj/y", "conv_state_out.0"],
    )
    assert names(last) == (
        ["/layers.0/scan/y", "/layers.0/in_proj/y", "layers.0.gated_norm.weight"]
        + [name.format("layers.0.out_proj") for name in weights]
        + ["/embed/mul/out"],
        ["/layers.0/residual/out"],
    )
    inner, state = config.d_inner, config.ngroups * config.d_state
    assert first.attrs["x_start"] == inner and first.attrs["activation"] == "silu" and last.attrs["z_start"] == 0
    assert {name: scan.attrs[name] for name in ("x_start", "B_start", "C_start", "dt_start")} == {
        "x_start": inner,
        "B_start": 2 * inner,
        "C_start": 2 * inner + state,
        "dt_start": 2 * inner + 2 * state,
    }
    assert [t.name for t in scan.inputs[:4]] == ["/layers.0/in_proj/y"] * 4
    for node in (first, last):
        assert node.attrs.keys() == FUSED[node.op].defaults.keys()
    assert fuse.run(graph) == []


def read_again(of: str) -> Callable:
    """One more node, which reads the output of node `of`."""

    def harm(graph: gs.Graph) -> None:
        tensor = node_named(graph, of).outputs[0]
        graph.nodes.append(gs.Node("Neg", "/again", {}, [tensor], [gs.Variable("again", np.float32)]))

    return harm


def as_output(of: str) -> Callable:
    return lambda graph: graph.outputs.append(node_named(graph, of).outputs[0])


def overlap(graph: gs.Graph) -> None:
    """The time steps begin one column early, in a channel of the convolution."""
    node_named(graph, SCAN).attrs["dt_start"] -= 1


def whole(graph: gs.Graph) -> None:
    """The gate is all of the product."""
    del node_named(graph, "/layers.0/gated_norm").attrs["z_start"]


def broadcast(graph: gs.Graph) -> None:
    residual = node_named(graph, "/layers.0/residual")
    residual.inputs[0] = gs.Constant("one", np.ones(residual.inputs[1].shape[-1], np.float32))


def twice(graph: gs.Graph) -> None:
    residual = node_named(graph, "/layers.0/residual")
    residual.inputs[0] = residual.inputs[1]


def too_wide(graph: gs.Graph) -> None:
    for norm in ("/layers.0/norm", "/layers.0/gated_norm"):
        node_named(graph, norm).inputs[-1] = gs.Constant(f"{norm}.w", np.ones(fuse.MOST_COLUMNS + 1, np.float32))


def multiply(graph: gs.Graph) -> None:
    node_named(graph, "/layers.0/residual").op = "Mul"


def without_norm(graph: gs.Graph) -> None:
    norm = node_named(graph, "/layers.0/norm")
    norm.op, norm.domain = "LayerNormalization", ""


def without_conv(graph: gs.Graph) -> None:
    node_named(graph, "/layers.0/conv").domain = "elsewhere"


@pytest.mark.parametrize(
    "change, left, why",
    [
        (
            read_again("/layers.0/norm"),
            [IN],
            "is read by BinaryScaffoldMatMul /layers.0/in_proj and Neg /again, not",
        ),
        (read_again(IN), [IN], "Neg /again reads all columns of /layers.0/in_proj/y, of which 64 to 143 are convolved"),
        (
            read_again("/layers.0/conv"),
            [IN],
            "Neg /again reads /layers.0/conv/y and has no attribute",
        ),
        (read_again("/layers.0/gated_norm"), [OUT], "out is read by BinaryScaffoldMatMul /layers.0/out_proj and Neg"),
        (read_again(OUT), [OUT], "/layers.0/out_proj/y is read by Add /layers.0/residual and Neg /again, not by one"),
        (as_output("/layers.0/norm"), [IN], "/layers.0/norm/out is an output of the graph"),
        (as_output(IN), [IN], "/layers.0/in_proj/y is an output of the graph"),
        (as_output("/layers.0/conv"), [IN], "/layers.0/conv/y is an output of the graph"),
        (as_output("/layers.0/gated_norm"), [OUT], "/layers.0/gated_norm/out is an output of the graph"),
        (as_output(OUT), [OUT], "/layers.0/out_proj/y is an output of the graph"),
        (overlap, [IN], "SelectiveScanStep /layers.0/scan reads columns 143 to 146 of"),
        (whole, [IN], "GatedRMSNorm /layers.0/gated_norm reads all columns of /layers.0/in_proj/y"),
        (without_conv, [IN], "/layers.0/in_proj/y is convolved by 0 CausalConv1dStep, not by one"),
        (broadcast, [OUT], "Add /layers.0/residual adds one of float32"),
        (twice, [OUT], "is read by Add /layers.0/residual and Add /layers.0/residual, not by one"),
        (multiply, [OUT], "/layers.0/out_proj/y is read by Mul /layers.0/residual, not by an Add"),
        (too_wide, [IN, OUT], "has 12289 columns, shared memory holds 12288"),
        (
            without_norm,
            [IN],
            "/layers.0/norm/out, comes from LayerNormalization /layers.0/norm, not",
        ),
    ],
)
def test_what_is_left_alone(change, left, why, plain):
    """A chain whose middle is wanted elsewhere, or whose last node is another one, stays as it is; others do not."""
    graph = prepared(plain)
    change(graph)
    before = {name: names(node_named(graph, name)) for name in left}
    fused = fuse.run(graph)
    assert fused == [name for name in (IN, OUT, "/layers.1/in_proj", "/layers.1/out_proj") if name not in left]
    assert list(fused.refused) == left and all(why in reason for reason in fused.refused.values()), fused.refused
    for name in left:
        assert node_named(graph, name).op == "BinaryScaffoldMatMul" and names(node_named(graph, name)) == before[name]


def test_residual_may_be_either_operand(plain):
    graph = prepared(plain)
    add = node_named(graph, "/layers.0/residual")
    add.inputs[0], add.inputs[1] = add.inputs[1], add.inputs[0]
    assert OUT in fuse.run(graph)
    assert node_named(graph, OUT).inputs[-1].name == "/embed/mul/out"


def test_whole_product_convolved():
    """A convolution of all columns says so by x_start = -1; it starts at column 0."""
    weight = gs.Constant("w", np.ones(32, np.float32))
    shapes = dict(bits=(8, 1), scale=(8,), down=(0, 32), down_scale=(0,), up=(8, 0), up_scale=(8,))
    scaffold = [gs.Constant(name, np.zeros(shape, np.float32)) for name, shape in shapes.items()]
    x, h, y, c, state, new = (
        gs.Variable(name, np.float32, shape)
        for name, shape in dict(x=["B", "T", 32], h=["B", "T", 32], y=["B", "T", 8], c=["B", "T", 8], s=["B", 8, 3],
                                new=["B", 8, 3]).items()
    )  # fmt: skip
    conv = [y, state, gs.Constant("cw", np.ones((8, 4), np.float32)), gs.Constant("cb", np.ones(8, np.float32))]
    out = gs.Variable("out", np.float32, ["B", "T", 8])
    ours_ = dict(domain=fuse.DOMAIN)
    nodes = [
        gs.Node("RMSNorm", "norm", {}, [x, weight], [h], **ours_),
        gs.Node("BinaryScaffoldMatMul", "product", {}, [h, *scaffold], [y], **ours_),
        gs.Node("CausalConv1dStep", "conv", {"activation": "none"}, conv, [c, new], **ours_),
        gs.Node("GatedRMSNorm", "gate", {"z_start": -1}, [x, c, weight], [out], **ours_),
    ]
    graph = gs.Graph(nodes, [x, state], [out, new])
    assert fuse.run(graph) == ["product"]
    product, gate = node_named(graph, "product"), node_named(graph, "gate")
    assert product.attrs == dict(eps=1e-5, planes=1, layout=0, activation="none", x_start=0)
    assert gate.inputs[1] is y and gate.attrs == {"z_start": 0}


def start_elsewhere(graph):
    node_named(graph, IN).attrs["x_start"] += 1


def read_elsewhere(graph):
    node_named(graph, SCAN).attrs["B_start"] += 1


def cross_two_inputs(graph):
    inputs = node_named(graph, OUT).inputs
    inputs[0], inputs[1] = inputs[1], inputs[0]


def change_a_weight(graph):
    weight = node_named(graph, IN).inputs[9]
    weight.values, weight.data_location = np.asarray(read(weight)) * np.float32(2), None


def fuse_what_was_no_chain(graph):
    node_named(graph, OUT).op = "NormScaffoldConv"


def rename(graph):
    node_named(graph, IN).name = "/layers.0/in_conv"


def lose_the_norm(graph):
    """As a pass might that takes a norm into a product although another node reads it."""
    node = node_named(graph, "/layers.1/in_proj")
    node.inputs[0] = gs.Variable("/layers.1/norm/out", np.float32, node.inputs[0].shape)


@pytest.mark.parametrize(
    "harm, words",
    [
        (
            start_elsewhere,
            "/layers.0/scan reads columns 64 to 127 of /layers.0/in_proj/y, 65 to 144 of which are /layers.0/in_proj:",
        ),
        (read_elsewhere, "SelectiveScanStep /layers.0/scan has .*'B_start': 65.* it should have .*'B_start': 64"),
        (
            cross_two_inputs,
            "GatedRMSNorm of GatedNormScaffoldAdd /layers.0/out_proj reads all columns of /layers.0/in_proj/y",
        ),
        (change_a_weight, "/layers.0/in_proj has other bytes for layers.0.conv.weight"),
        (fuse_what_was_no_chain, "NormScaffoldConv /layers.0/out_proj has 10 inputs, expected 11"),
        (
            rename,
            "BinaryScaffoldMatMul /layers.0/in_proj is BinaryScaffoldMatMul of NormScaffoldConv /layers.0/in_conv now",
        ),
        (lose_the_norm, "/layers.1/in_proj reads /layers.1/norm/out, which nothing makes"),
    ],
)
def test_check_sees_what_the_pass_got_wrong(harm, words, plain, tmp_path):
    lower(plain / "model.onnx", plain / "lowered.onnx")
    graph = load(plain / "lowered.onnx")
    harm(graph)
    for path in plain.glob("*.data"):
        (tmp_path / path.name).symlink_to(path)
    save(graph, tmp_path / "harmed.onnx")
    with pytest.raises(ValueError, match=words):
        check.check_lowered(load(plain / "model.onnx"), load(tmp_path / "harmed.onnx"), "plugin")


@pytest.mark.skipif(bool(adapter.missing()), reason=str(adapter.missing()))
@pytest.mark.parametrize("name, fused", [("demo", True), ("plain", True), ("odd", False), ("planes2", True)])
def test_half_activations(name, fused, tmp_path, monkeypatch):
    """A prompt of more than a chunk and steps with the emulated plugins: logits and states stay fp32, within the
    tolerance of fp16 and not equal; every activation between our nodes is fp16, and nothing else."""
    config, _ = write_step(tmp_path, name, "fp32")
    if not fused:
        monkeypatch.setitem(LOWERINGS, "plugin", tuple(p for p in LOWERINGS["plugin"] if p != "fuse"))
    sessions = []
    for activations in ("fp32", "fp16"):
        changed = lower(
            tmp_path / "model.onnx", tmp_path / f"{activations}.onnx", only_last=True, activations=activations
        )
        sessions.append(adapter.session(tmp_path / f"{activations}.onnx"))
    lowered = load(tmp_path / "fp16.onnx")
    half = {tensor.name for tensor in lowered.tensors().values() if tensor.dtype == np.float16}
    assert half == set(changed["half"]) and len(half) > 2 * config.n_layer
    assert sum(node.op == "Cast" and node.attrs["to"] == onnx.TensorProto.FLOAT16 for node in lowered.nodes) == 1
    bound = half_tolerance(config.n_layer)  # the same kernels: nothing else differs
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 38))
    states = [student_ref.zero_states(config, 1, "fp32")] * 2
    for call in np.split(ids, [34, 36, 37], axis=1):
        (expected, wanted), (logits, new) = (step(*pair) for pair in zip(sessions, [call] * 2, states, strict=True))
        assert logits.dtype == np.float32 and (logits != expected).any()
        bound.check(logits, expected, "logits")
        for key in wanted:
            assert new[key].dtype == np.float32
            bound.check(new[key], wanted[key], key)
        states = [wanted, new]


@pytest.mark.skipif(bool(adapter.missing()), reason=str(adapter.missing()))
@pytest.mark.parametrize(
    "name, state_dtype", [("plain", "fp32"), ("mixed", "int8"), ("odd", "fp16"), ("limits", "fp32")]
)
def test_fused_graph_is_the_graph(name, state_dtype, tmp_path, monkeypatch):
    """A prefill and two steps with the emulated plugins: the same logits and states, bit for bit."""
    config, _ = write_step(tmp_path, name, state_dtype)
    sessions = []
    for lowering in (LOWERINGS["plugin"], tuple(p for p in LOWERINGS["plugin"] if p != "fuse")):
        monkeypatch.setitem(LOWERINGS, "plugin", lowering)
        lower(tmp_path / "model.onnx", tmp_path / "lowered.onnx", only_last=True)
        assert bool(list(ours(load(tmp_path / "lowered.onnx"), *FUSED))) == ("fuse" in lowering)
        sessions.append(adapter.session(tmp_path / "lowered.onnx"))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 7))
    states = student_ref.zero_states(config, 2, state_dtype)
    for call in np.split(ids, [5, 6], axis=1):
        (logits, new), (expected, wanted) = (step(session, call, states) for session in sessions)
        np.testing.assert_array_equal(logits, expected)
        for key in states:
            np.testing.assert_array_equal(new[key], wanted[key])
        states = wanted
