"""NaN, infinities and the ends of fp32 through the kernels of every instruction set."""

import extremes
import numpy as np
import pytest
from each import check_each
from kernel_calls import F32, each_isa, run
from nodes import ALL_OPS

from dfssm.opset.cases import Case


@each_isa
@pytest.mark.parametrize("op", ALL_OPS)
def test_kernels(op, isa):
    def check(case):
        extremes.check(case, lambda inputs: run(op, isa, inputs, **case.attributes))

    check_each(extremes.cases(op), check)


@each_isa
@pytest.mark.parametrize("op", ["RMSNorm", "GatedRMSNorm"])
def test_zeros_without_eps_are_no_numbers(isa, op):
    """0 / 0, as the reference has it."""
    case = Case(op, dict(B=1, T=2, C=20), {"eps": 0.0}, "zero")
    (out,) = run(op, isa, case.inputs(), **case.attributes)
    with np.errstate(invalid="ignore"):
        expected = ALL_OPS[op].reference(**case.inputs(), **case.attributes)
    assert np.isnan(out).any()
    np.testing.assert_array_equal(np.isnan(out), np.isnan(expected))


@each_isa
def test_silu_far_out(isa):
    """x / (1 + exp(-x)) in float64, from where exp(-x) leaves fp32 to the largest number, in every lane."""
    magnitudes = np.concatenate([np.linspace(80, 110, 61), np.geomspace(200, 3.4e38, 60)]).astype(F32)
    x = np.concatenate([-magnitudes, magnitudes])
    with np.errstate(over="ignore"):
        expected = x.astype(float) / (1 + np.exp(-x.astype(float)))
    inputs = dict(x=x.reshape(1, 1, -1), state=np.zeros((1, x.size, 1), F32), weight=np.tile(F32([0, 1]), (x.size, 1)))
    y, _ = run("CausalConv1dStep", isa, inputs | {"bias": np.zeros(x.size, F32)})
    # From -87 on the vector kernels' exp is 0: 1.4e-36 at most is lost.
    np.testing.assert_allclose(y.ravel(), expected, rtol=1e-6, atol=2e-36)
