"""The kernels of a deferred state: neither cuts into calls nor tokens that are taken back change a bit."""

import numpy as np
import pytest
from deferred import CUTS, TOKEN_INPUTS, conv_case, read, scan_case
from kernel_calls import each_isa, native
from kernel_calls import run as run_kernel

from dfssm import _native
from dfssm.opset.tolerances import reduction, rms_error

# Head dimensions and state sizes with and without whole vectors; as many as a pass takes, and more.
CASES = [
    conv_case(),
    conv_case(C=300, W=2),
    *(scan_case(state, **sizes) for state in ("float32", "float16", "int8") for sizes in ({}, dict(P=64, N=70))),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def kernels(isa, **options):
    return lambda op, inputs, **attributes: run_kernel(op, isa, inputs, **attributes, **options)


@each_isa
@each_case
def test_any_cut_into_calls_gives_the_same_bits(isa, case):
    expected, _ = read(kernels(isa), case, CUTS[0])
    for cut in CUTS[1:]:
        np.testing.assert_array_equal(read(kernels(isa, threads=2), case, cut)[0], expected, err_msg=str(cut))


@each_isa
@each_case
def test_tokens_that_are_taken_back_leave_no_trace(isa, case):
    for tokens in (1, 5, 8):
        for cut in CUTS[:3]:
            taken, _ = read(kernels(isa), case, cut, take_back=tokens)
            np.testing.assert_array_equal(taken, read(kernels(isa), case, cut)[0], err_msg=f"{cut} {tokens}")


@each_isa
@pytest.mark.parametrize("case", [CASES[0], CASES[-1]], ids=lambda case: case.id)
def test_a_count_that_is_none_is_refused(isa, case):
    inputs = case.inputs() | case.attributes
    inputs["pending_count"][1] = 16
    with pytest.raises(ValueError, match=f"{case.op}: input 'pending_count' has 16, expected at most 15"):
        getattr(native(isa), case.op)(isa, **inputs)


def test_it_is_the_immediate_state_over_10000_tokens():
    """fp32: sums in another order. Narrower: no farther from fp32 than a state that is rounded after every token."""
    tokens, isa = 10_000, _native.default_isa()
    case = scan_case("float32", B=1, T=tokens, P=8, N=16)
    inputs = case.inputs()
    steps = {name: inputs[name] for name in TOKEN_INPUTS}
    fixed = {name: inputs[name] for name in ("A_log", "D", "dt_bias")}

    def immediate(dtype):
        states = {"state": np.zeros((1, 2, 16, 8), dtype)}
        if dtype == "int8":
            states["state_scale"] = np.zeros((1, 2, 16), np.float32)
        y = np.empty_like(inputs["x"])
        for t in range(tokens):
            token = {name: value[:, t : t + 1].copy() for name, value in steps.items()}
            run_kernel(
                "SelectiveScanStep", isa, token | fixed | states, in_place=True, out=y[:, t : t + 1], **case.attributes
            )
        return y

    def deferred(dtype):
        states = {
            "state": np.zeros((1, 2, 16, 8), dtype),
            "pending_x": np.zeros((1, 16, 16), np.float32),
            "pending_B": np.zeros((1, 16, 32), np.float32),
            "pending_decay": np.zeros((1, 16, 2), np.float32),
            "pending_count": np.zeros(1, np.uint8),
        }
        if dtype == "int8":
            states["state_scale"] = np.zeros((1, 2, 16), np.float32)
        return run_kernel("DeferredScanStep", isa, steps | fixed | states, **case.attributes)[0]

    exact = immediate("float32")
    reduction(16 + 8).check(deferred("float32"), exact)
    for dtype in ("float16", "int8"):
        assert rms_error(deferred(dtype), exact) < rms_error(immediate(dtype), exact)
