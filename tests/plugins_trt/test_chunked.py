"""SelectiveScanStep of 32 tokens and more: in chunks on the tensor cores (selective_scan_step/chunked.cuh), on the
emulation, whose mma cuts sums as early as a device may. Measured by the recurrence in fp64.
"""

import extremes
import numpy as np
import pytest
from each import check_each

from dfssm.opset.cases import CASES, Case
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.reference import quantize_state_ref, selective_scan_step_ref
from dfssm.opset.tolerances import Tolerance, fp16_pairs

OP = "SelectiveScanStep"
F32 = np.float32
STATES = ("float32", "float16", "int8")
CHUNK = 32
each_state = pytest.mark.parametrize("state", STATES)


def _case(T, H=1, P=32, N=16, state="float32", B=1, kind="normal", **attributes) -> Case:
    return Case(OP, dict(B=B, T=T, H=H, P=P, N=N, state=state), attributes, kind)


def scan64(
    x, dt, B, C, A_log, D, dt_bias, state, state_scale=None, ngroups=1, dt_min=0.0, dt_max=np.inf,
    x_start=-1, dt_start=-1, B_start=-1, C_start=-1,
):  # fmt: skip
    """y and the state, which is not rounded: token after token, in fp64."""
    batch, H, N, P = state.shape
    widths = (H * P, H, ngroups * N, ngroups * N)
    starts = (x_start, dt_start, B_start, C_start)
    x, dt, B, C = (
        value[..., max(start, 0) : max(start, 0) + width].astype(np.float64)
        for value, start, width in zip((x, dt, B, C), starts, widths, strict=True)
    )
    h = state.astype(np.float64) * (1 if state_scale is None else state_scale[..., None].astype(np.float64))
    x = x.reshape(batch, -1, H, P)
    B, C = (v.reshape(batch, -1, ngroups, 1, N).repeat(H // ngroups, 3).reshape(batch, -1, H, N) for v in (B, C))
    d = np.clip(np.logaddexp(0, dt + dt_bias.astype(np.float64)), dt_min, dt_max)
    decay = np.exp(-np.exp(A_log.astype(np.float64)) * d)
    y = np.empty_like(x)
    for t in range(x.shape[1]):
        h = decay[:, t, :, None, None] * h + (d[:, t, :, None] * B[:, t])[..., None] * x[:, t, :, None]
        y[:, t] = np.einsum("bhn,bhnp->bhp", C[:, t], h) + D[:, None] * x[:, t]
    return y.reshape(batch, -1, H * P), h


def check(case, actual, inputs, rounding=0.0):
    """Within the bound of the tensor cores; of a narrow state a rounding more."""
    y, h = scan64(**inputs, **case.attributes)
    T, N = case.sizes["T"], case.sizes["N"]
    bound = fp16_pairs(N + T, depth=2)
    Tolerance(bound.relative + rounding, bound.reason).check(actual[0], y, "y")
    state = actual[1] * actual[2][..., None] if len(actual) == 3 else actual[1]
    stored = {"float32": 0.0, "float16": 2.0**-11, "int8": 0.5 / 127}[case.state_dtype]
    bound = fp16_pairs(T)
    Tolerance(bound.relative + 1.01 * stored, bound.reason).check(state, h, "new_state")


def check_run(kernels, case, **options):
    inputs = case.inputs()
    check(case, kernels.run(OP, inputs, **options, **case.attributes), inputs)


def test_case_table(kernels):
    """Every case of the op with more tokens than a chunk."""
    cases = [Case(OP, {**case.sizes, "T": 37}, case.attributes, case.kind) for case in CASES if case.op == OP]

    def check_one(case):
        inputs = case.inputs()
        actual = kernels.run(OP, inputs, **case.attributes)
        check(case, actual, inputs)
        expected = selective_scan_step_ref(**inputs, **case.attributes)
        for name, a, e in zip(("y", "new_state", "new_state_scale"), actual, expected, strict=False):
            ALL_OPS[OP].tolerance(case.sizes, name).check(a, e, name)

    check_each(cases, check_one)


@each_state
def test_2048_tokens(kernels, state):
    check_run(kernels, _case(2048, N=32, state=state))


def test_2048_tokens_of_a_head_of_the_model(kernels):
    check_run(kernels, _case(2048, P=64, N=128))


@each_state
def test_shapes(kernels, state):
    """Tokens, columns and rows about the sizes of chunks, slices and tiles; what only the other kernels take too."""
    shapes = [*((T, 2, 8, 16) for T in (31, 32, 33, 47, 48, 49, 63, 64, 65))]
    shapes += [*((34, 1, P, 20) for P in (1, 31, 33, 63, 64, 65, 96)), *((34, 1, 4, N) for N in (1, 15, 17, 127, 129))]
    check_each([_case(T, H, P, N, state) for T, H, P, N in shapes], lambda case: check_run(kernels, case))


def test_groups_and_rows(kernels):
    check_each(
        [_case(40, 4, 8, 8, state, B=3, ngroups=groups) for state in STATES for groups in (1, 2, 4)],
        lambda case: check_run(kernels, case),
    )


@each_state
def test_narrow_activations(kernels, state):
    """One fp16 is all of B and of C then."""
    case = _case(70, 2, 24, 20, state, ngroups=2)
    inputs = case.inputs()
    for name in ("x", "dt", "B", "C"):
        inputs[name] = inputs[name].astype(np.float16).astype(F32)
    actual = kernels.run(OP, inputs, type="float16", **case.attributes)
    check(case, actual, inputs, 2.0**-11)


def test_small_steps_after_large_ones(kernels):
    """Decays underflow and come back: a sum of logarithms would have lost what follows a large step."""
    case = _case(96, 2, 16, 16)
    inputs = case.inputs()
    inputs["A_log"][:] = np.log(F32(16))
    for large in (5.0, 100.0, 1e5):
        inputs["dt"] = np.full_like(inputs["dt"], -6)
        inputs["dt"][:, ::7] = large
        inputs["x"][:, ::7] = 0  # else nothing but x d would be seen
        check(case, kernels.run(OP, inputs), inputs)


def test_time_steps_at_their_ends(kernels):
    for dt in (-200.0, -100.0, -30.0, 30.0, 200.0):
        case = _case(40)
        inputs = case.inputs()
        inputs["dt"][:] = dt
        check(case, kernels.run(OP, inputs), inputs)


@pytest.mark.parametrize("exponent", [-40, -34, -20, 20, 31, 34, 40])
@pytest.mark.parametrize("name", ["x", "B", "C", "state"])
def test_magnitudes(kernels, name, exponent):
    """Scaled to what fp16 can hold; past 2^32 and below 2^-32 token by token."""
    case = _case(40, 2, 8, 8)
    inputs = case.inputs()
    inputs[name] = inputs[name] * F32(2.0**exponent)
    check(case, kernels.run(OP, inputs), inputs)


def test_one_large_number_among_small_ones(kernels):
    """The largest sets the scale of its matrix: the others lose no more than 2^-39 of it."""
    case = _case(64, 1, 16, 16)
    for name in ("x", "B", "C"):
        inputs = case.inputs()
        inputs[name][0, 5, 3] = 2.0**14
        y, _ = kernels.run(OP, inputs)
        expected, _ = scan64(**inputs)
        fp16_pairs(16 + 64, depth=2).check(y[:, :5], expected[:, :5], name)


@pytest.mark.parametrize("case", [_case(34, 1, 6, 5), _case(33, 1, 5, 4, "int8")], ids=lambda c: c.id)
def test_extremes(kernels, case):
    """NaN, infinities and the ends of fp32, also in a chunk that others of plain numbers precede and follow."""
    extremes.check(case, lambda inputs: kernels.run(OP, inputs, **case.attributes))


def test_it_is_the_chunks_that_run(kernels):
    """From 32 tokens on the sums are others than those of steps: else this file tests nothing."""
    for T, equal in ((31, True), (32, False)):
        case = _case(T, 1, 16, 16)
        inputs = case.inputs()
        y, state, ys = None, inputs["state"], []
        for t in range(T):
            token = {name: inputs[name][:, t : t + 1] for name in ("x", "dt", "B", "C")}
            y, state = kernels.run(OP, {**inputs, **token, "state": state})
            ys.append(y)
        together, _ = kernels.run(OP, inputs)
        assert (together == np.concatenate(ys, 1)).all() == equal


def test_whole_chunks_in_calls_of_their_own(kernels):
    """With an fp32 state nothing is rounded between calls: the same bits, of the chunks as of one call."""
    case = _case(3 * CHUNK, 2, 40, 12)
    inputs = case.inputs()
    whole, state, ys = kernels.run(OP, inputs), inputs["state"], []
    for first in (0, CHUNK):
        rows = slice(first, first + CHUNK * (1 + first // CHUNK))
        part = {name: inputs[name][:, rows] for name in ("x", "dt", "B", "C")}
        y, state = kernels.run(OP, {**inputs, **part, "state": state})
        ys.append(y)
    np.testing.assert_array_equal(np.concatenate(ys, 1), whole[0])
    np.testing.assert_array_equal(state, whole[1])


@each_state
def test_in_place_and_ranges_of_columns(kernels, state):
    case = _case(50, 2, 10, 9, state, ngroups=2)
    inputs = case.inputs()
    plain = kernels.run(OP, inputs, **case.attributes)
    columns = {name: (at, inputs[name].shape[-1] + at + 2) for at, name in enumerate(("x", "dt", "B", "C"))}
    for options in (dict(in_place=True), dict(columns=columns, offset=4), dict(dependent=True)):
        for a, b in zip(kernels.run(OP, inputs, **options, **case.attributes), plain, strict=True):
            np.testing.assert_array_equal(a, b)


@each_state
def test_rows_of_a_batch_are_independent(kernels, state):
    case = _case(45, 2, 8, 8, state, B=2)
    inputs = case.inputs()
    together = kernels.run(OP, inputs)
    inputs["x"][1] *= 1000
    apart = kernels.run(OP, inputs)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        assert (a[1] != b[1]).any()


def test_narrow_states_are_the_rounded_fp32_state(kernels):
    case = _case(50, 2, 12, 9, "int8")
    inputs = case.inputs()
    inputs["state_scale"] = np.exp2(np.round(np.log2(np.maximum(inputs["state_scale"], 1e-3)))).astype(F32)
    wide = (inputs["state"] * inputs["state_scale"][..., None]).astype(F32)  # 7 bits: exact in fp16 too
    rest = {name: value for name, value in inputs.items() if not name.startswith("state")}
    y, fp32 = kernels.run(OP, {**rest, "state": wide})
    y16, fp16 = kernels.run(OP, {**rest, "state": wide.astype(np.float16)})
    y8, q, scale = kernels.run(OP, inputs)
    np.testing.assert_array_equal(y16, y)
    np.testing.assert_array_equal(y8, y)
    np.testing.assert_array_equal(fp16, fp32.astype(np.float16))
    for a, b in zip((q, scale), quantize_state_ref(fp32), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fp16_state_saturates(kernels):
    case = _case(40, 1, 8, 8, "float16")
    inputs = case.inputs()
    inputs["x"] = inputs["x"] * F32(1e8)
    _, state = kernels.run(OP, inputs)
    _, expected = scan64(**inputs)
    np.testing.assert_array_equal(np.abs(state) == 65504, np.abs(expected) >= 65504)
    assert (np.abs(state) == 65504).mean() > 0.5
