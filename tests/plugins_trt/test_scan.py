"""SelectiveScanStep on the emulation: the shapes that each of its kernels takes, and what must hold to the last bit.

Which kernel a shape takes is in plugins/trt/selective_scan_step/kernel.cu: 16-byte accesses for one token, 4 columns a
thread for many, one element an access for the rest.
"""

import ctypes

import numpy as np
import pytest
from each import check_each

from dfssm.opset.cases import Case
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.reference import quantize_state_ref, selective_scan_step_ref
from dfssm.opset.tolerances import EPS16, Tolerance, reduction

OP = "SelectiveScanStep"
F32 = np.float32
STATES = ("float32", "float16", "int8")
NAMES = ("y", "new_state", "new_state_scale")
NAN = np.uint32(0x7FFFFFFF).view(F32)
"""The NaN that a GPU makes; its low bits are not zero, as those of NumPy's are."""

each_state = pytest.mark.parametrize("state", STATES)

# B, H, P, N, groups: what it is there for
SHAPES = {
    "one": (1, 1, 1, 1, 1),
    "odd": (2, 3, 5, 7, 3),  # one element an access
    "long-odd": (1, 2, 33, 9, 1),  # a second round of lanes
    "fours": (1, 6, 12, 9, 3),  # rows are no multiple of 16 bytes of a narrow state
    "model": (1, 2, 64, 48, 1),  # two slices of fp32 and fp16
    "slice": (2, 2, 48, 33, 2),  # the last slice is half full, the last row lane almost empty
    "wide": (1, 1, 80, 20, 1),  # int8 rows of more than 64 columns
    "too-wide": (1, 1, 132, 6, 1),  # int8 rows of more than 128 columns
    "deep": (1, 1, 4, 260, 1),  # more rows than some tiles have
    "too-deep": (1, 1, 4, 516, 1),  # more rows than any tile has
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def _case(shape, state="float32", T=1, **attributes) -> Case:
    B, H, P, N, groups = SHAPES[shape]
    return Case(OP, dict(B=B, T=T, H=H, P=P, N=N, state=state), dict(ngroups=groups, **attributes))


def _check(case, actual, expected, extra=0.0):
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        bound = ALL_OPS[OP].tolerance(case.sizes, name)
        Tolerance(bound.relative + extra, bound.reason).check(a, e, name)


def _equal(actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=False):
        np.testing.assert_array_equal(a, e, err_msg=name)


def _step_by_step(run, inputs, **attributes):
    """The tokens of `inputs` one call each, the state handed on."""
    inputs, y = dict(inputs), []
    for t in range(inputs["x"].shape[1]):
        token = {name: inputs[name][:, t : t + 1] for name in ("x", "dt", "B", "C")}
        out = run(OP, {**inputs, **token}, **attributes)
        y.append(out[0])
        inputs.update(zip(("state", "state_scale"), out[1:], strict=False))
    return np.concatenate(y, axis=1), *out[1:]


@each_shape
def test_shapes(kernels, shape):
    def check(case):
        inputs = case.inputs()
        actual = kernels.run(OP, inputs, **case.attributes)
        _check(case, actual, selective_scan_step_ref(**inputs, **case.attributes))

    check_each([_case(shape, state, T) for state in STATES for T in (1, 2, 7, 33)], check)


@each_state
@pytest.mark.parametrize("shape", ["odd", "fours", "model", "wide"])
def test_narrow_activations(kernels, shape, state):
    """Arithmetic is fp32 on what was stored: only the rounding of y comes on top."""
    for T in (1, 3):
        case = _case(shape, state, T)
        inputs = case.inputs()
        for name in ("x", "dt", "B", "C"):
            inputs[name] = inputs[name].astype(np.float16).astype(F32)
        actual = kernels.run(OP, inputs, type="float16", **case.attributes)
        _check(case, actual, selective_scan_step_ref(**inputs, **case.attributes), 2**-11)


@pytest.mark.parametrize("shape", ["odd", "fours", "slice"])
def test_tokens_at_once_are_steps(kernels, shape):
    """With an fp32 state nothing is rounded between calls, and y adds up in one order for every T: the same bits."""
    case = _case(shape, T=19)
    inputs = case.inputs()
    _equal(kernels.run(OP, inputs, **case.attributes), _step_by_step(kernels.run, inputs, **case.attributes))


@pytest.mark.parametrize("state, step", [("float16", EPS16), ("int8", 1 / 127)])
@pytest.mark.parametrize("shape", ["odd", "fours", "slice"])
def test_tokens_at_once_are_steps_but_for_rounding(kernels, shape, state, step):
    """A narrow state is rounded once a call, by up to half a step of it; decay shrinks what was lost before, and C
    weighs both sides alike, so y is off by the same share."""
    case = _case(shape, state, T=5)
    inputs = case.inputs()
    at_once = kernels.run(OP, inputs, **case.attributes)
    steps = _step_by_step(kernels.run, inputs, **case.attributes)
    bound = Tolerance(5 * step / 2, f"five roundings of a {state} state against one")
    bound.check(steps[0], at_once[0], "y")
    if state == "int8":  # rows have scales of their own: compare what they mean
        at_once, steps = ((None, out[1] * out[2][..., None]) for out in (at_once, steps))
    bound.check(steps[1].astype(F32), at_once[1].astype(F32), "new_state")


@each_state
@pytest.mark.parametrize("shape", ["odd", "fours", "model", "slice", "wide", "too-wide"])
def test_in_place(kernels, shape, state):
    for T in (1, 9):
        case = _case(shape, state, T)
        inputs = case.inputs()
        _equal(
            kernels.run(OP, inputs, in_place=True, **case.attributes),
            kernels.run(OP, inputs, **case.attributes),
        )


@pytest.mark.parametrize("type", ["float32", "float16"])
@pytest.mark.parametrize("shape", ["odd", "model"])
def test_ranges_of_columns(kernels, shape, type):
    """x, dt, B and C out of the middle of wider rows, at any alignment, NaN around them."""
    for T in (1, 3):
        case = _case(shape, T=T)
        inputs = case.inputs()
        columns = {
            name: (start, inputs[name].shape[-1] + start + 2) for start, name in enumerate(("x", "dt", "B", "C"))
        }
        _equal(
            kernels.run(OP, inputs, type=type, columns=columns, offset=4, **case.attributes),
            kernels.run(OP, inputs, type=type, **case.attributes),
        )


@each_state
@pytest.mark.parametrize("shape", ["odd", "slice"])
def test_batch_rows_are_independent(kernels, shape, state):
    B, H, P, N, groups = SHAPES[shape]
    for T in (1, 9):
        case = _case(shape, state, T)
        inputs = case.inputs()
        together = kernels.run(OP, inputs, **case.attributes)
        for b in range(B):
            shared = ("A_log", "D", "dt_bias")
            row = {name: value if name in shared else value[b : b + 1] for name, value in inputs.items()}
            _equal([out[b : b + 1] for out in together], kernels.run(OP, row, **case.attributes))


@pytest.mark.parametrize("shape", ["odd", "fours", "model", "wide"])
@pytest.mark.parametrize("T", [1, 3])
def test_narrow_states_are_the_rounded_fp32_state(kernels, shape, T):
    """The same numbers in an fp32 and in a narrow state give the same fp32 values, and those are rounded exactly as the
    reference rounds. (int8: scales are powers of two here, so that no product with one is rounded.)"""
    case = _case(shape, "int8", T)
    inputs = case.inputs()
    inputs["state_scale"] = np.exp2(np.round(np.log2(np.maximum(inputs["state_scale"], 1e-3)))).astype(F32)
    wide = (inputs["state"] * inputs["state_scale"][..., None]).astype(F32)  # 7 bits: exact in fp16 too
    rest = {name: value for name, value in inputs.items() if not name.startswith("state")}
    _, fp32 = kernels.run(OP, {**rest, "state": wide}, **case.attributes)
    _, fp16 = kernels.run(OP, {**rest, "state": wide.astype(np.float16)}, **case.attributes)
    _, q, scale = kernels.run(OP, inputs, **case.attributes)
    np.testing.assert_array_equal(fp16, fp32.astype(np.float16))
    expected_q, expected_scale = quantize_state_ref(fp32)
    np.testing.assert_array_equal(scale, expected_scale)
    np.testing.assert_array_equal(q, expected_q)


@pytest.mark.parametrize("shape", ["odd", "fours", "model", "wide"])
@pytest.mark.parametrize("T", [1, 3])
def test_rows_that_are_not_finite(kernels, shape, T):
    """An int8 row with infinity or NaN has scale NaN and q 0, and stays alone in that."""
    case = _case(shape, "int8", T)
    clean = case.inputs()
    B, H, P, N, groups = SHAPES[shape]
    untouched = kernels.run(OP, clean, **case.attributes)
    for value in (NAN, np.inf):
        inputs = {**clean, "state_scale": clean["state_scale"].copy()}
        inputs["state"] = np.where(clean["state"] == 0, np.int8(1), clean["state"])
        inputs["state_scale"][0, -1, N // 2] = value
        y, q, scale = kernels.run(OP, inputs, **case.attributes)
        assert np.isnan(scale[0, -1, N // 2]) and np.isnan(scale).sum() == 1
        assert (q[0, -1, N // 2] == 0).all()
        assert not np.isfinite(y.reshape(-1, T, H, P)[0, :, -1]).any()
    x = clean["x"].copy()
    x.reshape(-1, T, H, P)[-1, -1, 0, P // 2] = NAN  # one column of one head: every row of it has that column
    _, q, scale = kernels.run(OP, {**clean, "x": x}, **case.attributes)
    assert np.isnan(scale[-1, 0]).all() and (q[-1, 0] == 0).all()
    others = np.ones((B, H), bool)
    others[-1, 0] = False
    np.testing.assert_array_equal(scale[others], untouched[2][others])
    np.testing.assert_array_equal(q[others], untouched[1][others])


@pytest.mark.parametrize("shape", ["odd", "fours", "model"])
def test_rows_near_zero(kernels, shape):
    """Below 1e-30 a row counts as zero; just above it does not."""
    case = _case(shape, "int8")
    inputs = case.inputs()
    inputs["state_scale"][:] = 0
    for size, is_zero in ((1e-33, True), (1e-24, False)):
        _, q, scale = kernels.run(OP, {**inputs, "x": np.full_like(inputs["x"], size)}, **case.attributes)
        assert (scale == 0).all() == is_zero and (q == 0).all() == is_zero


@each_state
@pytest.mark.parametrize("T", [1, 3])
def test_limits_of_the_time_step(kernels, state, T):
    """Clamped on both sides, far out too."""
    for limits in (dict(dt_min=0.01, dt_max=0.02), dict(dt_min=0.01), dict(dt_max=0.02)):
        case = _case("slice", state, T, **limits)
        inputs = case.inputs()
        inputs["dt"] = np.resize(F32([-200, -30, 0, 5, 30, 200]), inputs["dt"].shape)
        _check(case, kernels.run(OP, inputs, **case.attributes), selective_scan_step_ref(**inputs, **case.attributes))


@pytest.mark.parametrize("shape", ["odd", "slice"])
def test_a_time_step_that_is_nan(kernels, shape):
    """No clamp may hide it, and only its head sees it."""
    case = _case(shape, T=2, dt_min=0.01, dt_max=0.1)
    inputs = case.inputs()
    inputs["dt"][0, 1, 1] = NAN
    y, state = kernels.run(OP, inputs, **case.attributes)
    B, H, P, N, groups = SHAPES[shape]
    expected = np.zeros((B, 2, H), bool)
    expected[0, 1, 1] = True
    np.testing.assert_array_equal(np.isnan(y).reshape(B, 2, H, P), np.repeat(expected[..., None], P, -1))
    assert np.isnan(state[0, 1]).all() and np.isnan(state).sum() == N * P


def test_fp16_state_saturates(kernels):
    case = _case("model", "float16")
    inputs = case.inputs()
    inputs["x"] = inputs["x"] * F32(1e9)
    _, expected = selective_scan_step_ref(**inputs, **case.attributes)
    _, state = kernels.run(OP, inputs, **case.attributes)
    largest = np.finfo(np.float16).max
    assert (np.abs(state) == largest).mean() > 0.5 and np.isfinite(state).all()
    np.testing.assert_array_equal(np.abs(state) == largest, np.abs(expected) == largest)


def _workspace(kernels, state, T, P, N, B=2, H=3):
    size = ctypes.c_size_t()
    arguments = [*[None] * 12, B, T, H, P, N, 1, *[ctypes.c_int64(0)] * 4, *[ctypes.c_float(0)] * 2]
    code = kernels.library.dfssm_trt_selective_scan_step(*arguments, STATES.index(state), 0, None, ctypes.byref(size))
    assert code == 0
    return size.value


@each_state
def test_workspace(kernels, state):
    """None for the shapes of models; for any other as much fp32 as the narrow state has elements, at every T."""
    for P, N in ((32, 16), (64, 64), (64, 128), (64, 256), (80, 128), (128, 128), (128, 256)):
        assert _workspace(kernels, state, 1, P, N) == _workspace(kernels, state, 512, P, N) == 0
    for T in (1, 2, 512):
        assert _workspace(kernels, state, T, 33, 9) == (0 if state == "float32" else 4 * 2 * 3 * 33 * 9)


def test_long_prompts_have_the_tolerance_of_the_table(kernels):
    """fp32 along 100 tokens: 13 chunks, the last one of 4 tokens."""
    case = Case(OP, dict(B=1, T=100, H=2, P=8, N=4, state="float32"))
    inputs = case.inputs()
    y, state = kernels.run(OP, inputs)
    expected = selective_scan_step_ref(**inputs)
    reduction(4 + 100).check(y, expected[0])
    reduction(100).check(state, expected[1])
