"""The scan, the convolution and the norms against plain float64 NumPy."""

import numpy as np
import pytest
import torch
from mamba2_ref import scan_ref

from dfssm.model.functional import (
    causal_conv1d,
    gated_rms_norm,
    rms_norm,
    selective_scan_step,
    ssd_chunked,
)

SHAPES = [
    # batch, tokens, heads, headdim, state, groups, chunk
    (1, 1, 2, 4, 3, 1, 4),
    (3, 7, 4, 5, 6, 2, 4),
    (2, 16, 4, 8, 16, 4, 8),
    (1, 37, 6, 3, 5, 3, 8),
    (1, 5, 2, 4, 3, 1, 64),
    (2, 9, 3, 1, 1, 1, 1),
]


def scan_inputs(batch, tokens, heads, P, N, groups, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shapes = [
        *[(batch, tokens, size) for size in (heads * P, heads, groups * N, groups * N)],
        *[(heads,)] * 3,
        (batch, heads, N, P),
    ]
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def tensors(arrays, **options):
    return [torch.tensor(array, **options) for array in arrays]


@pytest.mark.parametrize("batch, tokens, heads, P, N, groups, chunk", SHAPES)
@pytest.mark.parametrize("dt_limit", [(0.0, np.inf), (0.3, 1.0)])
def test_both_forms_are_the_recurrence(batch, tokens, heads, P, N, groups, chunk, dt_limit):
    inputs = scan_inputs(batch, tokens, heads, P, N, groups)
    expected = scan_ref(*inputs, ngroups=groups, dt_limit=dt_limit)
    options = {"ngroups": groups, "dt_limit": dt_limit}
    for found in (
        selective_scan_step(*tensors(inputs), **options),
        ssd_chunked(*tensors(inputs), **options, chunk_size=chunk),
    ):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-11, atol=1e-12)


def test_chunked_gradients_are_those_of_the_recurrence():
    inputs = scan_inputs(2, 21, 4, 3, 5, 2)
    gradients = []
    for form in (selective_scan_step, lambda *a, **k: ssd_chunked(*a, **k, chunk_size=8)):
        leaves = tensors(inputs, requires_grad=True)
        y, state = form(*leaves, ngroups=2)
        (y.square().sum() + state.square().sum()).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_fp32_keeps_its_digits_where_decays_differ_by_orders_of_magnitude():
    # Steps of 0.001 between steps of 50 with A = -16: the log decay runs to tens of thousands in a chunk, yet
    # neighbours in a quiet stretch see each other. An fp32 sum would leave them three digits.
    inputs = scan_inputs(1, 128, 2, 4, 8, 1, dtype=np.float32)
    inputs[1] = np.where(np.arange(128) % 16 < 8, 50.0, -7.0).astype(np.float32)[None, :, None].repeat(2, axis=2)
    inputs[4], inputs[6] = np.full(2, np.log(16.0), np.float32), np.zeros(2, np.float32)
    expected, expected_state = scan_ref(*inputs)
    leaves = tensors(inputs, requires_grad=True)
    y, state = ssd_chunked(*leaves, chunk_size=64)
    (y.sum() + state.sum()).backward()
    # fp32 sums of 8 products: a few ulps of the largest term, which is the size of y's scale.
    np.testing.assert_allclose(y.detach(), expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(state.detach(), expected_state, rtol=0, atol=2e-6 * np.abs(expected_state).max())
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_half_inputs_are_computed_in_fp32():
    inputs = scan_inputs(2, 20, 2, 4, 8, 1, dtype=np.float32)
    halves = [torch.tensor(a).to(torch.bfloat16) for a in inputs[:4]] + tensors(inputs[4:])
    expected, _ = scan_ref(*(a.float().numpy() for a in halves))
    for form in (selective_scan_step, ssd_chunked):
        y, state = form(*halves)
        assert y.dtype == state.dtype == torch.float32
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_convolution(width, tokens, activation):
    rng = np.random.default_rng(width)
    x, state = rng.standard_normal((2, tokens, 5)), rng.standard_normal((2, 5, width - 1))
    weight, bias = rng.standard_normal((5, width)), rng.standard_normal(5)
    window = np.concatenate([state, x.transpose(0, 2, 1)], axis=2)
    expected = np.stack([bias + (window[:, :, t : t + width] * weight).sum(-1) for t in range(tokens)], axis=1)
    if activation == "silu":
        expected = expected / (1 + np.exp(-expected))
    y, new_state = causal_conv1d(*tensors([x, state, weight, bias]), activation)
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(new_state.numpy(), window[:, :, tokens:])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_norms(groups):
    rng = np.random.default_rng(groups)
    y, z, weight = rng.standard_normal((2, 3, 8)) * 5, rng.standard_normal((2, 3, 8)), rng.standard_normal(8)
    v = y * z / (1 + np.exp(-z))
    grouped = v.reshape(2, 3, groups, -1)
    rms = np.sqrt((grouped**2).mean(-1, keepdims=True) + 1e-5)
    expected = (grouped / rms).reshape(v.shape) * weight
    found = gated_rms_norm(*tensors([y, z, weight]), 1e-5, groups)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    if groups == 1:
        expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * weight
        np.testing.assert_allclose(rms_norm(*tensors([y, weight]), 1e-5).numpy(), expected, rtol=1e-12)
