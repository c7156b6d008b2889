"""The plugins of fused ops, from creator to launch, on the host emulation: as test_plugins.py."""

import numpy as np
import onnxruntime
import pytest
from plugins_trt import adapter, fused, lowered
from plugins_trt.fused import ACTIVATIONS, CASES, FusedCase

CONV, ADD = "NormScaffoldConv", "GatedNormScaffoldAdd"


@pytest.fixture(scope="session", autouse=True)
def library():
    if reason := adapter.missing():
        pytest.skip(reason)
    return adapter.build()


def run(case: FusedCase, inputs: dict | None = None, **attributes) -> list[np.ndarray]:
    inputs = inputs or fused.lowered_inputs(case)
    return adapter.session(fused.node_model(case, inputs, **attributes)).run(None, lowered.feeds(inputs))


def one(op: str, **sizes) -> FusedCase:
    return next(c for c in CASES if c.op == op and sizes.items() <= c.sizes.items())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_plugin_is_the_chain(kernels, case):
    """Bit for bit: the kernels are given what the node has."""
    inputs = case.inputs()
    for a, b in zip(run(case), case.chain(inputs, kernels.run), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("tokens", [1, 9])
def test_state_in_place(tokens):
    """Two steps on bound buffers, the state's input and output one and the same."""
    case = one(CONV, T=tokens)
    inputs = case.inputs()
    session = adapter.session(fused.node_model(case))
    state = onnxruntime.OrtValue.ortvalue_from_numpy(inputs["state"].copy())
    binding = session.io_binding()
    binding.bind_cpu_input("x", inputs["x"])
    binding.bind_ortvalue_input("state", state)
    binding.bind_output("y", "cpu")
    binding.bind_ortvalue_output("new_state", state)
    for _ in range(2):
        before = state.numpy().copy()
        session.run_with_iobinding(binding)
        case.check((binding.get_outputs()[0].numpy(), state.numpy()), inputs | {"state": before})


@pytest.mark.parametrize("case", [one(op, T=t) for op in (CONV, ADD) for t in (1, 2)], ids=lambda case: case.id)
def test_half_activations(case):
    inputs = fused.lowered_inputs(case)
    inputs |= {name: inputs[name].astype(np.float16) for name in ACTIVATIONS[case.op]}
    model = fused.node_model(case, inputs)
    got = adapter.session(model).run(None, lowered.feeds(inputs))
    assert got[0].dtype == np.float16
    rounded = case.inputs() | {name: inputs[name].astype(np.float32) for name in ACTIVATIONS[case.op]}
    case.check([value.astype(np.float32) for value in got], rounded, 2.0**-11)


def test_defaults_are_the_schema():
    for case in (one(CONV, T=9), one(ADD, T=1)):
        assert not case.attributes
        written = {name: None for name in fused.FUSED[case.op].defaults}
        for a, b in zip(run(case), run(case, **written), strict=True):
            np.testing.assert_array_equal(a, b)


WRONG_ATTRIBUTES = [
    (CONV, {"eps": -1.0}, "attribute 'eps' is -1, expected a number >= 0"),
    (CONV, {"planes": 0}, "attribute 'planes' is 0, expected at least 1"),
    (CONV, {"activation": "gelu"}, "attribute 'activation' is 'gelu', expected 'silu' or 'none'"),
    (CONV, {"x_start": -1}, "attribute 'x_start' is -1, expected at least 0"),
    (ADD, {"groups": 0}, "attribute 'groups' is 0, expected at least 1"),
    (ADD, {"layout": 1}, "attribute 'layout' is 1, expected 0: these kernels read the canonical bits"),
    (ADD, {"z_start": -2}, "attribute 'z_start' is -2, expected at least -1"),
]


@pytest.mark.parametrize(("op", "attributes", "message"), WRONG_ATTRIBUTES)
def test_wrong_attribute(op, attributes, message):
    with pytest.raises(Exception, match="the/node") as error:
        adapter.session(fused.node_model(one(op), **attributes))
    assert f"{op} '/the/node': {message}" in str(error.value)


WRONG_SHAPES = [
    (CONV, "x", (1, 1, 33), "input 'x' has K=33, expected a multiple of 32"),
    (CONV, "bits", (40, 2), "input 'bits' has shape [40, 2], expected [Mp=40, K / 32 = 1]"),
    (CONV, "conv_weight", (8, 5), "input 'conv_weight' has W=5, expected 2 to 4"),
    (CONV, "state", (1, 8, 2), "input 'state' has shape [1, 8, 2], expected [B=1, C=8, W - 1 = 3]"),
    (CONV, "conv_bias", (9,), "input 'conv_bias' has shape [9], expected [C=8]"),
    (ADD, "z", (1, 1, 31), "input 'z' has shape [1, 1, 31], expected [B=1, T=1, K=32]"),
    (ADD, "norm_weight", (31,), "input 'norm_weight' has shape [31], expected [K=32]"),
    (ADD, "residual", (1, 1, 2), "input 'residual' has shape [1, 1, 2], expected [B=1, T=1, M=1]"),
]


@pytest.mark.parametrize(("op", "name", "shape", "message"), WRONG_SHAPES)
def test_wrong_shape(op, name, shape, message):
    case = one(op, K=32)
    inputs = fused.lowered_inputs(case)
    inputs[name] = np.ones(shape, inputs[name].dtype)
    with pytest.raises(Exception, match="the/node") as error:
        run(case, inputs)
    assert f"{op} '/the/node': {message}" in str(error.value)


def test_columns_that_are_not_there():
    with pytest.raises(Exception, match=r"input 'state' has C=8, expected x_start=33 \+ C <= M=40"):
        run(one(CONV, K=32), x_start=33)
    with pytest.raises(
        Exception, match=r"input 'z' has shape \[1, 1, 32\], expected \[B=1, T=1, >= z_start=1 \+ K=32\]"
    ):
        run(one(ADD, K=32), z_start=1)
    with pytest.raises(Exception, match="input 'y' has K=32, expected a multiple of groups=3"):
        run(one(ADD, K=32), groups=3)
