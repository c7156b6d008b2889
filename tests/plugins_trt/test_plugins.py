"""The plugin classes, from creator to launch, on the host emulation: what they compute, and what they refuse."""

import subprocess
import sys

import nodes
import numpy as np
import pytest
from each import check_each
from plugins_trt import adapter, lowered

from dfssm.opset import OPS
from dfssm.opset.cases import Case
from dfssm.targets.trt_plugins import PLUGINS

IDS = dict(ids=lambda case: case.id)


@pytest.fixture(scope="session", autouse=True)
def library():
    if reason := adapter.missing():
        pytest.skip(reason)
    return adapter.build()


def run(case: Case, inputs: dict | None = None, **attributes) -> list[np.ndarray]:
    inputs = inputs or lowered.lowered_inputs(case)
    return adapter.session(lowered.node_model(case, inputs, **attributes)).run(None, nodes.feeds(inputs))


def one(op: str, **sizes) -> Case:
    return next(c for c in lowered.CANONICAL if c.op == op and sizes.items() <= c.sizes.items())


@pytest.mark.parametrize("op", OPS)
def test_plugin_is_the_reference(op):
    check_each([case for case in lowered.CANONICAL if case.op == op], lambda case: nodes.check_outputs(case, run(case)))


STARTS = [("CausalConv1dStep", "x_start"), ("SelectiveScanStep", "dt_start"), ("GatedRMSNorm", "z_start")]
STATEFUL = [
    one("CausalConv1dStep", T=1, W=4),
    one("CausalConv1dStep", T=7, W=3),
    *(one("SelectiveScanStep", T=t, state=s) for t in (1, 19) for s in ("float32", "float16", "int8")),
]


@pytest.mark.parametrize("case", STATEFUL, **IDS)
def test_state_in_place(case):
    """Two steps on bound buffers, the state's input and output one and the same."""
    nodes.check_state_in_place(case, adapter.session(lowered.node_model(case)))


def test_head_of_words():
    """A head that is the embedding, too, comes in int32 words."""
    case = one("Int8MatMul", T=2)
    inputs = lowered.lowered_inputs(case)
    nodes.check_outputs(case, run(case, inputs | {"w": inputs["w"].view(np.int32)}, w_words=1))
    odd = one("Int8MatMul", K=130)
    with pytest.raises(Exception, match="input 'w' is in words of 32 bits, expected K=130 to be a multiple of 4"):
        run(odd, lowered.lowered_inputs(odd) | {"w": np.zeros((21, 33), np.int32)}, w_words=1)


NARROW = [
    *(one(op, T=t) for op in OPS for t in (1, 7 if "Norm" in op else 2)),
    *(next(c for c in lowered.CANONICAL if c.op == op and c.attributes.get(start, 0) > 0) for op, start in STARTS),
]


@pytest.mark.parametrize("case", NARROW, **IDS)
def test_half_activations(case):
    """fp16 in and out, fp32 between: the reference's result of the rounded inputs, rounded once more."""
    inputs = {k: v.astype(np.float16) if k in lowered.TOKENS else v for k, v in lowered.lowered_inputs(case).items()}
    model = lowered.node_model(case, inputs)
    outputs = model.graph.output[: 0 if case.op == "Int8MatMul" else 1]
    for output in outputs:
        output.type.tensor_type.elem_type = 10
    got = adapter.session(model).run(None, nodes.feeds(inputs))
    assert got[0].dtype == (np.float16 if outputs else np.float32)
    rounded = case.inputs() | {k: v.astype(np.float32) for k, v in inputs.items() if k in lowered.TOKENS}
    wanted = nodes.expected_outputs(case, rounded)
    ulp = np.abs(wanted[0]).max() * 2.0**-11  # half a step of fp16 at the largest value
    assert np.abs(got[0] - wanted[0]).max() <= ulp * (1 + 2**-8)


def test_defaults_are_the_schema():
    """A node without attributes is the node with the defaults written out."""
    for op in OPS:
        case = one(op, T=7 if "Norm" in op else 2)
        if case.attributes not in ({}, {"layout": 0}):
            continue
        written = {name: None for name in OPS[op].defaults}
        for a, b in zip(run(case), run(case, **written), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("op", ["BinaryScaffoldMatMul", "Int8MatMul"])
def test_workspace_grows_with_the_tokens(kernels, op):
    """Plugins ask once, for a profile's largest shapes: what suffices there must suffice for fewer tokens."""
    for K, M, R in ((32, 1, 0), (2048, 8512, 16), (96, 33, 5)):
        args = ("dfssm_trt_scaffold_workspace", K, M, R) if op[0] == "B" else ("dfssm_trt_int8_workspace", K)
        bytes = [kernels.sized(args[0], n, *args[1:]) for n in range(1, 200)]
        assert bytes == sorted(bytes)


WRONG_ATTRIBUTES = [
    ("BinaryScaffoldMatMul", {"planes": 0}, "attribute 'planes' is 0, expected at least 1"),
    (
        "BinaryScaffoldMatMul",
        {"layout": 1},
        "attribute 'layout' is 1, expected 0: these kernels read",
    ),
    ("CausalConv1dStep", {"activation": "gelu"}, "attribute 'activation' is 'gelu', expected 'silu' or 'none'"),
    ("CausalConv1dStep", {"x_start": -2}, "attribute 'x_start' is -2, expected at least -1"),
    ("SelectiveScanStep", {"ngroups": 0}, "attribute 'ngroups' is 0, expected at least 1"),
    ("SelectiveScanStep", {"dt_min": 2.0, "dt_max": 1.0}, "attribute 'dt_min' is 2, expected at most 'dt_max' = 1"),
    ("SelectiveScanStep", {"int8_state": 2}, "attribute 'int8_state' is 2, expected 0 or 1"),
    ("GatedRMSNorm", {"eps": -1.0}, "attribute 'eps' is -1, expected a number >= 0"),
    ("RMSNorm", {"eps": float("nan")}, "attribute 'eps' is nan, expected a number >= 0"),
]


@pytest.mark.parametrize(("op", "attributes", "message"), WRONG_ATTRIBUTES)
def test_wrong_attribute(op, attributes, message):
    case = one(op)
    with pytest.raises(Exception, match="the/node") as error:
        adapter.session(lowered.node_model(case, **attributes))
    assert f"{op} '/the/node': {message}" in str(error.value)


WRONG_SHAPES = [
    (
        "BinaryScaffoldMatMul",
        dict(T=2),
        "bits",
        (17, 4),
        "input 'bits' has shape [17, 4], expected [Mp=17, K / 32 = 5]",
    ),
    ("BinaryScaffoldMatMul", dict(T=2), "x", (1, 2, 161), "input 'x' has K=161, expected a multiple of 32"),
    ("BinaryScaffoldMatMul", dict(T=2), "x", (1, 0, 160), "input 'x' has shape [1, 0, 160], expected [B, T, K], every"),
    ("BinaryScaffoldMatMul", dict(T=2), "up", (17, 4), "input 'up' has shape [17, 4], expected [Mp=17, R=3]"),
    ("Int8MatMul", dict(T=2), "w", (8, 65), "input 'w' has shape [8, 65], expected [M=8, K=64]"),
    ("Int8MatMul", dict(T=2), "x", (1, 2, 131073), "input 'x' has K=131073, expected 1 to 131072: int32 sums"),
    ("CausalConv1dStep", dict(T=2, W=4), "weight", (40, 5), "input 'weight' has W=5, expected 2 to 4"),
    (
        "CausalConv1dStep",
        dict(T=2, W=4),
        "state",
        (1, 40, 2),
        "input 'state' has shape [1, 40, 2], expected [B=1, C=40, W - 1 = 3]",
    ),
    (
        "SelectiveScanStep",
        dict(T=2),
        "dt",
        (3, 2, 3),
        "input 'x' has shape [3, 2, 32], expected [B=3, T=2, H * P = 48]",
    ),
    ("SelectiveScanStep", dict(T=2), "dt", (3, 1, 2), "input 'dt' has shape [3, 1, 2], expected [B=3, T=2, H=2]"),
    (
        "SelectiveScanStep",
        dict(T=2),
        "state",
        (3, 2, 8, 15),
        "input 'x' has shape [3, 2, 32], expected [B=3, T=2, H * P = 30]",
    ),
    ("GatedRMSNorm", dict(T=7), "z", (2, 7, 47), "input 'z' has shape [2, 7, 47], expected [B=2, T=7, C=48]"),
    ("RMSNorm", dict(T=7), "weight", (47,), "input 'weight' has shape [47], expected [C=48]"),
]


@pytest.mark.parametrize(("op", "sizes", "name", "shape", "message"), WRONG_SHAPES)
def test_wrong_shape(op, sizes, name, shape, message):
    case = one(op, **sizes)
    inputs = lowered.lowered_inputs(case)
    inputs[name] = np.ones(shape, inputs[name].dtype)
    with pytest.raises(Exception, match="the/node") as error:
        run(case, inputs)
    assert f"{op} '/the/node': {message}" in str(error.value)


def test_columns_that_are_not_there():
    case = one("CausalConv1dStep", T=2, C=40)
    with pytest.raises(Exception, match="the/node") as error:
        run(case, x_start=1)
    assert "input 'x' has shape [1, 2, 40], expected [B=1, T=2, >= x_start=1 + C=40]" in str(error.value)


def test_heads_and_groups():
    scan, norm = one("SelectiveScanStep", T=2), one("GatedRMSNorm", T=7)
    with pytest.raises(Exception, match="input 'dt' has H=2, expected a multiple of ngroups=3"):
        run(scan, ngroups=3)
    with pytest.raises(Exception, match="input 'y' has C=48, expected a multiple of groups=5"):
        run(norm, groups=5)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_misaligned_state(kind):
    """States lie in the caller's memory; kernels read and write them 16 bytes at a time."""
    case = one("CausalConv1dStep", T=2, W=4)
    inputs = case.inputs()
    room = np.zeros(inputs["state"].size + 8, np.float32)
    address = room.ctypes.data + (-room.ctypes.data) % 16 + 4
    session = adapter.session(lowered.node_model(case))
    binding = session.io_binding()
    bind, name = (binding.bind_input, "state") if kind == "input" else (binding.bind_output, "new_state")
    bind(name, "cpu", 0, np.float32, inputs["state"].shape, address)
    for other in nodes.feeds(inputs).keys() - {name}:
        binding.bind_cpu_input(other, inputs[other])
    for other in {"y", "new_state"} - {name}:
        binding.bind_output(other, "cpu")
    with pytest.raises(Exception, match=f"{kind} '{name}' is bound to an address that is no multiple of 16"):
        session.run_with_iobinding(binding)


@pytest.mark.parametrize("claimed", [0, 1])
def test_int8_state_must_be_declared(claimed):
    """A node whose attribute and tensors disagree is refused: TensorRT would connect the wrong outputs."""
    case = one("SelectiveScanStep", T=2, state="float32" if claimed else "int8")
    with pytest.raises(Exception, match="inputs and .* outputs, expected"):
        run(case, int8_state=claimed)


REGISTRATION = """
import ctypes, _ctypes, sys
tensorrt, path = ctypes.CDLL(sys.argv[1]), sys.argv[2]
tensorrt.fake_error.restype = ctypes.c_char_p
plugins = ctypes.CDLL(path)  # polygraphy --plugins
print(tensorrt.fake_count(), tensorrt.fake_error(b'eps').decode())
print(tensorrt.fake_error(b'epsilon').decode())
print(tensorrt.fake_load(path.encode()), tensorrt.fake_count())  # load_library, although it is loaded already
print(tensorrt.fake_load(path.encode()), tensorrt.fake_count())  # once is enough
"""


UNLOADING = """
import ctypes, _ctypes, sys
tensorrt = ctypes.CDLL(sys.argv[1])
_ctypes.dlclose(ctypes.CDLL(sys.argv[2])._handle)
print(tensorrt.fake_count())
"""


def python(code: str, *libraries) -> str:
    """What a fresh process prints; nothing on stderr."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, libraries)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_registration(tmp_path):
    """A plain dlopen registers the plugins; load_library takes them over; errors go to TensorRT's logger."""
    assert python(REGISTRATION, adapter.fake_tensorrt(tmp_path), adapter.plugin_library()).splitlines() == [
        f"{len(PLUGINS)} RMSNorm 'a node': attribute 'eps' is -1, expected a number >= 0",
        "RMSNorm 'a node': unknown attribute 'epsilon'; known: eps",
        f"1 {len(PLUGINS)}",
        f"0 {len(PLUGINS)}",
    ]


def test_unloading_leaves_nothing_behind(tmp_path):
    assert python(UNLOADING, adapter.fake_tensorrt(tmp_path), adapter.plugin_library()) == "0\n"


def test_it_loads_where_no_tensorrt_is():
    assert python("import ctypes, sys; ctypes.CDLL(sys.argv[1]).getCreators", adapter.plugin_library()) == ""
