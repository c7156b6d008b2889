"""What the op library refuses: an ONNX Runtime error with the numbers, and a session that still works."""

import ctypes
import os
import subprocess
import sys

import nodes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from dfssm import _native
from dfssm.opset.cases import Case, cases
from dfssm.opset.layouts import LAYOUTS

RUNTIME_ERROR = onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException
INVALID_ARGUMENT = onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument
INVALID_GRAPH = onnxruntime.capi.onnxruntime_pybind11_state.InvalidGraph

SCAFFOLD = Case("BinaryScaffoldMatMul", dict(B=1, T=2, K=64, M=40, R=4))
ROW16 = Case("BinaryScaffoldMatMul", dict(B=1, T=2, K=64, M=40, R=4), {"layout": 1, "planes": 2})
INT8 = Case("Int8MatMul", dict(B=1, T=2, K=64, M=40))
CONV = Case("CausalConv1dStep", dict(B=1, T=2, C=8, W=4))
SCAN = Case("SelectiveScanStep", dict(B=1, T=2, H=4, P=8, N=6), {"ngroups": 2})
SCAN_INT8 = Case("SelectiveScanStep", {**SCAN.sizes, "state": "int8"}, {"ngroups": 2})
NORM = Case("RMSNorm", dict(B=1, T=2, C=8))
GATED = Case("GatedRMSNorm", dict(B=1, T=2, C=12), {"groups": 4})

CONV_RANGE = Case("CausalConv1dStep", CONV.sizes, {"x_start": 3})
SCAN_RANGES = Case(
    "SelectiveScanStep", SCAN.sizes, {f"{name}_start": 3 for name in ("x", "dt", "B", "C")} | {"ngroups": 2}
)
GATED_RANGE = Case("GatedRMSNorm", GATED.sizes, {"groups": 4, "z_start": 3})

WRONG_SHAPES = [
    (SCAFFOLD, "x", (1, 2, 96), "'bits' has shape [40, 8], expected [Mp=40, K / 8 = 12]"),
    (SCAFFOLD, "x", (1, 2, 48), "'x' has K=48, expected a multiple of 32"),
    (SCAFFOLD, "x", (1, 0, 64), "'x' has shape [1, 0, 64], expected [B, T, K], every dimension at least 1"),
    (SCAFFOLD, "bits", (39, 8), "'bits' has shape [39, 8], expected [Mp=40, K / 8 = 8]"),
    (SCAFFOLD, "down", (4, 32), "'down' has shape [4, 32], expected [R=4, K=64]"),
    (SCAFFOLD, "down_scale", (3,), "'down_scale' has shape [3], expected [R=4]"),
    (SCAFFOLD, "up", (40, 3), "'up' has shape [40, 3], expected [Mp=40, R=4]"),
    (SCAFFOLD, "up_scale", (41,), "'up_scale' has shape [41], expected [M=40]"),
    (ROW16, "bits", (2, 40, 8), "'bits' has shape [2, 40, 8], expected [planes=2, Mp=48, K / 8 = 8]"),
    (ROW16, "scale", (3, 40), "'scale' has shape [3, 40], expected [planes=2, M=40]"),
    (ROW16, "up", (40, 4), "'up' has shape [40, 4], expected [Mp=48, R=4]"),
    (INT8, "w", (40, 65), "'w' has shape [40, 65], expected [M=40, K=64]"),
    (INT8, "w_scale", (0,), "'w_scale' has shape [0], expected [M], every dimension at least 1"),
    (CONV, "state", (1, 8, 2), "'state' has shape [1, 8, 2], expected [B=1, C=8, W - 1 = 3]"),
    (CONV, "weight", (8, 5), "'weight' has W=5, expected 2 to 4"),
    (CONV, "weight", (7, 4), "'weight' has shape [7, 4], expected [C=8, W=4]"),
    (CONV, "bias", (9,), "'bias' has shape [9], expected [C=8]"),
    (SCAN, "x", (1, 2, 33), "'x' has shape [1, 2, 33], expected [B=1, T=2, H * P = 32]"),
    (SCAN, "dt", (1, 1, 4), "'dt' has shape [1, 1, 4], expected [B=1, T=2, H=4]"),
    (SCAN, "B", (1, 2, 6), "'B' has shape [1, 2, 6], expected [B=1, T=2, ngroups * N = 12]"),
    (SCAN, "C", (1, 2, 13), "'C' has shape [1, 2, 13], expected [B=1, T=2, ngroups * N = 12]"),
    (SCAN, "A_log", (5,), "'A_log' has shape [5], expected [H=4]"),
    (SCAN, "D", (1,), "'D' has shape [1], expected [H=4]"),
    (SCAN, "dt_bias", (3,), "'dt_bias' has shape [3], expected [H=4]"),
    (SCAN, "state", (1, 3, 6, 8), "'state' has shape [1, 3, 6, 8], expected [B=1, H=4, N=6, P=8]"),
    (SCAN, "state", (2, 4, 6, 8), "'state' has shape [2, 4, 6, 8], expected [B=1, H=4, N=6, P=8]"),
    (
        SCAN_INT8,
        "state_scale",
        (1, 4, 5),
        "'state_scale' has shape [1, 4, 5], expected [B=1, H=4, N=6]",
    ),
    (NORM, "weight", (7,), "'weight' has shape [7], expected [C=8]"),
    (GATED, "z", (1, 1, 12), "'z' has shape [1, 1, 12], expected [B=1, T=2, C=12]"),
    (GATED, "y", (1, 2, 10), "'y' has C=10, expected a multiple of groups=4"),
    (GATED, "weight", (24,), "'weight' has shape [24], expected [C=12]"),
    (CONV, "x", (1, 2, 11), "'state' has shape [1, 8, 3], expected [B=1, C=11, W - 1 = 3]"),
    (CONV_RANGE, "x", (1, 2, 10), "'x' has shape [1, 2, 10], expected [B=1, T=2, >= x_start=3 + C=8]"),
    (CONV_RANGE, "weight", (9, 4), "'weight' has shape [9, 4], expected [C=8, W=4]"),
    (
        SCAN_RANGES,
        "x",
        (1, 2, 32),
        "'x' has shape [1, 2, 32], expected [B=1, T=2, >= x_start=3 + H * P = 32]",
    ),
    (SCAN_RANGES, "dt", (1, 2, 3), "'dt' has shape [1, 2, 3], expected [B=1, T=2, >= dt_start=3 + H=4]"),
    (SCAN_RANGES, "dt", (1, 1, 7), "'dt' has shape [1, 1, 7], expected [B=1, T=2, >= dt_start=3 + H=4]"),
    (SCAN_RANGES, "dt", (2, 2, 7), "'dt' has shape [2, 2, 7], expected [B=1, T=2, >= dt_start=3 + H=4]"),
    (
        SCAN_RANGES,
        "B",
        (1, 2, 14),
        "'B' has shape [1, 2, 14], expected [B=1, T=2, >= B_start=3 + ngroups * N = 12]",
    ),
    (
        SCAN_RANGES,
        "C",
        (1, 2, 14),
        "'C' has shape [1, 2, 14], expected [B=1, T=2, >= C_start=3 + ngroups * N = 12]",
    ),
    (GATED_RANGE, "z", (1, 2, 14), "'z' has shape [1, 2, 14], expected [B=1, T=2, >= z_start=3 + C=12]"),
]


@pytest.mark.parametrize(("case", "name", "shape", "message"), WRONG_SHAPES)
def test_wrong_shape(default_library, case, name, shape, message):
    session = default_library.session(nodes.node_model(case))
    inputs = case.inputs()
    wrong = inputs | {name: np.zeros(shape, inputs[name].dtype)}
    with pytest.raises(INVALID_ARGUMENT) as error:
        session.run(None, wrong)
    assert f"{case.op} '/the/node': input {message}" in str(error.value)
    nodes.check_outputs(case, session.run(None, inputs))


def test_wrong_rank(default_library):
    """A graph that declares one rank and weights of another: found at the first run, at the latest."""
    model = nodes.node_model(NORM, constants=True)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((1, 8), np.float32), "weight"))
    with pytest.raises(
        INVALID_ARGUMENT, match=r"RMSNorm '/the/node': input 'weight' has shape \[1, 8\], expected \[C\]"
    ):
        default_library.session(model).run(None, nodes.feeds(NORM.inputs()))


def test_too_many_columns_for_exact_sums(default_library):
    columns = 131073
    inputs = {
        "x": np.ones((1, 1, columns), np.float32),
        "w": np.ones((1, columns), np.int8),
        "w_scale": np.ones(1, np.float32),
    }
    with pytest.raises(
        INVALID_ARGUMENT, match="Int8MatMul '/the/node': input 'x' has K=131073, expected 1 to 131072: int32 sums"
    ):
        default_library.session(nodes.node_model(INT8)).run(None, inputs)


def with_type(model: onnx.ModelProto, dtype: str, *names: str) -> onnx.ModelProto:
    """The model with these inputs and outputs declared of another dtype."""
    for value in [*model.graph.input, *model.graph.output]:
        if value.name in names:
            value.type.tensor_type.elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return model


@pytest.mark.parametrize("body", [False, True])
@pytest.mark.parametrize(("case", "name"), [(NORM, "x"), (SCAFFOLD, "bits"), (SCAN, "dt"), (CONV, "state")])
def test_wrong_dtype(default_library, case, name, body):
    """ONNX Runtime finds these itself, from the types we register; a function body does not take over."""
    model = with_type(nodes.node_model(case, body=body), "float64", name)
    with pytest.raises(
        INVALID_GRAPH, match=rf"tensor\(double\)' of input parameter \({name}\) of operator \({case.op}\)"
    ):
        default_library.session(model)


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint8"])
def test_wrong_state_dtype(default_library, dtype):
    model = with_type(nodes.node_model(SCAN), dtype, "state", "new_state")
    with pytest.raises(RUNTIME_ERROR, match=f"input 'state' has dtype {dtype}, expected float32 or float16 or int8"):
        default_library.session(model)


def test_the_scale_belongs_to_an_int8_state(default_library):
    model = with_type(nodes.node_model(SCAN), "int8", "state", "new_state")
    with pytest.raises(
        RUNTIME_ERROR,
        match=r"SelectiveScanStep '/the/node': input 'state_scale' is missing, expected \[B, H, N\] for 'state' of",
    ):
        default_library.session(model)
    model = with_type(nodes.node_model(SCAN_INT8), "float32", "state", "new_state")
    with pytest.raises(
        RUNTIME_ERROR,
        match="SelectiveScanStep '/the/node': input 'state_scale' is present, expected none: 'state' is not int8",
    ):
        default_library.session(model)
    model = nodes.node_model(SCAN_INT8)
    del model.graph.node[0].output[2], model.graph.output[2]
    with pytest.raises(RUNTIME_ERROR, match="SelectiveScanStep '/the/node': output 'new_state_scale' is missing"):
        default_library.session(model)


def test_an_optional_input_may_have_the_empty_name(default_library):
    model = nodes.node_model(SCAN)
    model.graph.node[0].input.append("")
    nodes.check_outputs(SCAN, default_library.session(model).run(None, SCAN.inputs()))


@pytest.mark.parametrize(
    ("case", "attributes", "message"),
    [
        (SCAFFOLD, {"planes": 0}, "attribute 'planes' is 0, expected at least 1"),
        (SCAFFOLD, {"layout": 99}, f"attribute 'layout' is 99, expected {' or '.join(map(str, LAYOUTS))}"),
        (SCAFFOLD, {"planes": 1.0}, "attribute 'planes' is a float, expected an integer"),
        (SCAFFOLD, {"layout": "row16"}, "attribute 'layout' is a string, expected an integer"),
        (SCAFFOLD, {"planes": [1]}, "attribute 'planes' is of another type, expected an integer"),
        (NORM, {"eps": [0.5]}, "attribute 'eps' is of another type, expected a float"),
        (CONV, {"activation": ["silu"]}, "attribute 'activation' is of another type, expected a string"),
        (CONV, {"x_start": onnx.numpy_helper.from_array(np.int64([3]))}, "attribute 'x_start' is of another type, .*"),
        (GATED, {"groups": onnx.GraphProto(name="g")}, "attribute 'groups' is of another type, expected an integer"),
        (NORM, {"eps": -1.0}, "attribute 'eps' is -1, expected a number >= 0"),
        (NORM, {"eps": float("nan")}, "attribute 'eps' is nan, expected a number >= 0"),
        (NORM, {"eps": 1}, "attribute 'eps' is an integer, expected a float"),
        (CONV, {"activation": "gelu"}, "attribute 'activation' is 'gelu', expected 'silu' or 'none'"),
        (CONV, {"activation": 1}, "attribute 'activation' is an integer, expected a string"),
        (GATED, {"groups": 0}, "attribute 'groups' is 0, expected at least 1"),
        (CONV, {"x_start": -2}, "attribute 'x_start' is -2, expected at least -1"),
        (SCAN, {"dt_start": 0.5}, "attribute 'dt_start' is a float, expected an integer"),
        (GATED, {"z_start": -(2**63)}, "attribute 'z_start' is -9223372036854775808, expected at least -1"),
        (SCAN, {"ngroups": -2}, "attribute 'ngroups' is -2, expected at least 1"),
        (SCAN, {"dt_min": 2.0, "dt_max": 1.0}, "attribute 'dt_min' is 2, expected at most 'dt_max' = 1"),
    ],
)
def test_wrong_attribute(default_library, case, attributes, message):
    with pytest.raises(RUNTIME_ERROR, match=f"{case.op} '/the/node': {message}"):
        default_library.session(nodes.node_model(case, attributes=attributes))


@pytest.mark.parametrize(
    ("case", "name", "known"),
    [
        (CONV, "xstart", "activation, x_start"),
        (CONV, "x_starts", "activation, x_start"),
        (CONV, "x_strat", "activation, x_start"),
        (SCAN, "b_start", "ngroups, dt_min, dt_max, x_start, dt_start, B_start, C_start"),
        (NORM, "ep", "eps"),
    ],
)
def test_a_misspelt_attribute_is_refused(default_library, case, name, known):
    """ONNX Runtime tells no custom op what its node has: names one letter off are asked for."""
    with pytest.raises(RUNTIME_ERROR, match=f"{case.op} '/the/node': unknown attribute '{name}'; known: {known}$"):
        default_library.session(nodes.node_model(case, attributes={name: 1}))


def test_a_start_past_every_tensor(default_library):
    session = default_library.session(nodes.node_model(CONV, attributes={"x_start": 2**63 - 1}))
    with pytest.raises(
        INVALID_ARGUMENT, match=r"input 'x' has shape .*, expected \[B=1, T=2, >= x_start=9223372036854775807 \+ C=8\]"
    ):
        session.run(None, CONV.inputs())


def test_absent_attributes_have_the_schema_defaults(default_library):
    case = Case("CausalConv1dStep", CONV.sizes)  # silu
    nodes.check_outputs(case, default_library.session(nodes.node_model(case, attributes={})).run(None, case.inputs()))
    for op in ("SelectiveScanStep", "GatedRMSNorm"):
        case = next(c for c in cases(op) if not c.attributes and c.sizes["T"] > 1)
        session = default_library.session(nodes.node_model(case, attributes={}))
        nodes.check_outputs(case, session.run(None, case.inputs()))


def load(library, **environment) -> subprocess.CompletedProcess:
    code = f"import onnxruntime; onnxruntime.SessionOptions().register_custom_ops_library({str(library.path)!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_unknown_isa_names_the_usable_ones(default_library):
    result = load(default_library, DFSSM_ISA="mmx")
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert "DFSSM_ISA" in message and "mmx" in message
    assert all(isa in message for isa in _native.isas())


def test_the_choice_is_logged_when_asked(default_library):
    result = load(default_library, DFSSM_LOG="1", DFSSM_ISA="scalar")
    assert result.stderr == f"dfssm: ort-cpu kernels: scalar (usable: {' '.join(_native.isas())})\n"
    assert load(default_library, DFSSM_LOG="0").stderr == ""


def test_an_older_onnxruntime_gets_a_clean_error(default_library, tmp_path):
    """A stand-in for ONNX Runtime 1.10: API version 1, whose first function makes an error, and no newer."""
    create_status = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_size_t)

    class ApiBase(ctypes.Structure):
        _fields_ = [("get_api", get_api), ("get_version", get_version)]

    version = ctypes.create_string_buffer(b"1.10.0")
    messages = []

    @create_status
    def keep_message(code, text):
        messages.append(text.decode())
        return 0xE

    first_functions = (create_status * 1)(keep_message)
    base = ApiBase(
        get_api(lambda number: ctypes.addressof(first_functions) if number == 1 else 0),
        get_version(lambda: ctypes.addressof(version)),
    )
    fresh = tmp_path / "fresh.so"
    fresh.write_bytes(default_library.path.read_bytes())
    register = ctypes.CDLL(str(fresh)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 0xE
    assert messages == [
        "dfssm: this library needs the API of ONNX Runtime 1.18, which version 1.10.0 does not have; "
        "upgrade onnxruntime"
    ]
