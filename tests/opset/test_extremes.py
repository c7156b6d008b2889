"""NaN, infinities and the ends of fp32: what the references make of them, and that the ONNX bodies make the same."""

import extremes
import numpy as np
import onnxruntime
import pytest
from each import check_each
from nodes import ALL_OPS, node_model
from onnx.reference import ReferenceEvaluator

from dfssm.opset.reference import half_ref, quantize_activations_ref, quantize_state_ref, rms_norm_ref

F32 = np.float32


def test_halves_saturate_by_hand():
    values = F32([65504, 65519.99, 65520, 1e5, 3e38, np.inf, 1.5, 2049, 1e-8, np.nan, -0.0])
    stored = [65504, 65504, 65504, 65504, 65504, 65504, 1.5, 2048, 0, np.nan, -0.0]
    for sign in (1, -1):
        half = half_ref(sign * values)
        assert half.dtype == np.float16
        np.testing.assert_array_equal(half, sign * np.array(stored))
        assert (np.signbit(half) == np.signbit(sign * values))[~np.isnan(values)].all()


@pytest.mark.parametrize("bad", extremes.NOT_FINITE)
def test_a_row_that_is_not_finite_is_nan_and_no_other(bad):
    x = np.tile(F32([[1, -127, 63.5]]), (3, 1))
    x[1, 1] = bad
    q, s = quantize_activations_ref(x)
    assert q.tolist() == [[1, -127, 64], [0, 0, 0], [1, -127, 64]]
    np.testing.assert_array_equal(s, [[1], [np.nan], [1]])
    q, s = quantize_state_ref(x[None, None])
    assert not q[0, 0, 1].any() and np.isnan(s[0, 0, 1]) and np.isfinite(s[0, 0, [0, 2]]).all()


def test_what_is_too_large_to_be_normed_is_nan():
    weight = np.ones(4, F32)
    with np.errstate(over="ignore"):
        assert np.isfinite(rms_norm_ref(np.full((1, 1, 4), 9e18, F32), weight)).all()
        assert np.isnan(rms_norm_ref(F32([[[2e19, 0, 1, -1]]]), weight)).all()


def stock_onnxruntime(case):
    model = node_model(case, body=True).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def reference_evaluator(case):
    evaluator = ReferenceEvaluator(node_model(case, body=True))
    return lambda inputs: evaluator.run(None, inputs)


@pytest.mark.parametrize("runtime", [reference_evaluator, stock_onnxruntime])
@pytest.mark.parametrize("op", ALL_OPS)
def test_bodies(op, runtime):
    check_each(extremes.cases(op), lambda case: extremes.check(case, runtime(case)))
