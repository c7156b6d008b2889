"""The fused kernels on the host emulation: bit for bit the kernels of the ops one after another, and opset's references
within their tolerances. What the emulation checks is in test_kernels.py.
"""

import numpy as np
import pytest
from plugins_trt.emulated import EmulationError
from plugins_trt.fused import ACTIVATIONS, CASES, FusedCase

from dfssm.opset.cases import Case

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def separately(kernels, case: FusedCase, inputs: dict) -> tuple[np.ndarray, ...]:
    return case.chain(inputs, kernels.run)


@each_case
def test_fused_is_the_chain(kernels, case):
    inputs = case.inputs()
    fused = kernels.run(case.op, inputs, **case.attributes)
    for a, b in zip(fused, separately(kernels, case, inputs), strict=True):
        np.testing.assert_array_equal(a, b)
    case.check(fused, inputs)


def test_launches(kernels):
    """One for one token, whose norm every block computes; two for more."""
    rows = (((1, 1), 1), ((2, 1), 2), ((64, 1), 2), ((65, 1), 2), ((1, 2), 2), ((1, 40), 2), ((1, 65), 2))
    for op, extra in (("NormScaffoldConv", dict(C=8, W=4)), ("GatedNormScaffoldAdd", {})):
        for (B, T), expected in rows:
            case = FusedCase(op, dict(B=B, T=T, K=128, M=8, R=2, **extra))
            kernels.launches()
            kernels.run(op, case.inputs())
            assert kernels.launches() == expected, case.id
    narrow, wide = (FusedCase("GatedNormScaffoldAdd", dict(B=1, T=1, K=128, M=M, R=2)) for M in (24 * 16, 24 * 16 + 1))
    for case, expected in ((narrow, 1), (wide, 2)):  # three blocks for each of the emulation's eight SMs, and one more
        kernels.run(case.op, case.inputs())
        assert kernels.launches() == expected
    scan = Case("SelectiveScanStep", dict(B=2, T=40, H=2, P=8, N=8, state="float32"))
    kernels.run(scan.op, scan.inputs())
    assert kernels.launches() == 1


@each_case
def test_narrow_activations(kernels, case):
    """What lies between the ops is fp32; only what is stored is rounded."""
    inputs = case.inputs()
    for name in ACTIVATIONS[case.op]:
        inputs[name] = inputs[name].astype(np.float16).astype(np.float32)
    case.check(kernels.run(case.op, inputs, type="float16", **case.attributes), inputs, 2.0**-11)


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "NormScaffoldConv"], ids=lambda case: case.id)
def test_state_in_place(kernels, case):
    inputs = case.inputs()
    apart = kernels.run(case.op, inputs, **case.attributes)
    for a, b in zip(kernels.run(case.op, inputs, in_place=True, **case.attributes), apart, strict=True):
        np.testing.assert_array_equal(a, b)


@each_case
def test_launches_that_overlap(kernels, case):
    inputs = case.inputs()
    apart = kernels.run(case.op, inputs, **case.attributes)
    for a, b in zip(kernels.run(case.op, inputs, dependent=True, **case.attributes), apart, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("offset", [4, 8])
@pytest.mark.parametrize("case", [CASES[2], CASES[3], CASES[-7]], ids=lambda case: case.id)
def test_unaligned_activations(kernels, case, offset):
    """One value a load where 16 bytes are not aligned; the chain loads the same way."""
    inputs = case.inputs()
    fused = kernels.run(case.op, inputs, offset=offset, **case.attributes)
    for a, b in zip(
        fused, case.chain(inputs, lambda *args, **kw: kernels.run(*args, offset=offset, **kw)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_prefill_is_the_steps(kernels):
    """Nine tokens at once and one by one."""
    case = FusedCase("NormScaffoldConv", dict(B=2, T=9, K=96, M=40, R=3, C=16, W=4), {"x_start": 8})
    inputs = case.inputs()
    y, state = kernels.run(case.op, inputs, **case.attributes)
    past, ys = inputs["state"], []
    for t in range(9):
        step = inputs | dict(x=inputs["x"][:, t : t + 1], state=past)
        one, past = kernels.run(case.op, step, in_place=True, **case.attributes)
        past = past.copy()
        ys.append(one)
    np.testing.assert_array_equal(np.concatenate(ys, axis=1), y)
    np.testing.assert_array_equal(past, state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("op", ACTIVATIONS)
def test_a_token_that_is_not_finite_harms_no_other(kernels, op, bad):
    sizes = dict(B=3, T=1, K=64, M=20, R=2) | (dict(C=4, W=4) if op == "NormScaffoldConv" else {})
    case = FusedCase(op, sizes)
    inputs = case.inputs()
    clean = kernels.run(op, inputs)[0]
    inputs[ACTIVATIONS[op][0]][1, 0, 5] = bad
    y = kernels.run(op, inputs)[0]
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(np.delete(y, 1, axis=0), np.delete(clean, 1, axis=0))


def test_wide_rows(kernels):
    """More columns than the quantisation takes at once, and more shared memory than a block gets unasked."""
    for K in (4128, 11_264, 13_056):
        case = FusedCase("GatedNormScaffoldAdd", dict(B=1, T=2, K=K, M=5, R=9), {"groups": 2})
        inputs = case.inputs()
        (fused,) = kernels.run(case.op, inputs, **case.attributes)
        np.testing.assert_array_equal(fused, separately(kernels, case, inputs)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        FusedCase("NormScaffoldConv", dict(B=65, T=1, K=128, M=12673, R=1, C=9000, W=4), {"x_start": 1500}),
        FusedCase("GatedNormScaffoldAdd", dict(B=1, T=65, K=128, M=12673, R=1)),
    ],
    ids=lambda case: case.id,
)
def test_large_products(kernels, case):
    """One row and one token more than 99 tiles of 128 rows and one of 64 tokens."""
    inputs = case.inputs()
    case.check(kernels.run(case.op, inputs, **case.attributes), inputs)


def test_what_no_kernel_takes(kernels):
    wide = FusedCase("NormScaffoldConv", dict(B=1, T=1, K=64, M=20, R=0, C=4, W=5))
    with pytest.raises(EmulationError, match="cudaError 1:"):
        kernels.run(wide.op, wide.inputs())
    groups = FusedCase("GatedNormScaffoldAdd", dict(B=1, T=1, K=64, M=20, R=0))
    with pytest.raises(EmulationError, match="cudaError 1:"):
        kernels.run(groups.op, groups.inputs(), groups=3)
