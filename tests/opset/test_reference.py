"""The references against hand-worked cases and plain float64 loops that share no code with them."""

import math

import numpy as np
import pytest
from scan_loops import scan_loops

from dfssm.base import DfssmError
from dfssm.opset.cases import CASES, Case, cases
from dfssm.opset.layouts import LAYOUTS
from dfssm.opset.packing import pack_bits, to_layout, up_to_layout
from dfssm.opset.reference import (
    REFERENCES,
    binary_scaffold_matmul_ref,
    causal_conv1d_step_ref,
    gated_rms_norm_ref,
    int8_matmul_ref,
    quantize_activations_ref,
    quantize_state_ref,
    rms_norm_ref,
    selective_scan_step_ref,
)

F32 = np.float32


def test_quantisation_by_hand():
    x = np.array([[127, 63.5, -0.5, 0.5, 1.5, -126.5]], F32)  # inv = 1: ties go to even
    q, s = quantize_activations_ref(x)
    assert q.tolist() == [[127, 64, 0, 0, 2, -126]]
    assert s.tolist() == [[1.0]]


@pytest.mark.parametrize("value", [0.0, 1e-38, 9.9e-31])
def test_rows_too_small_to_scale_are_zero(value):
    q, s = quantize_activations_ref(np.full((2, 4), value, F32))
    assert not q.any() and not s.any()


def test_quantised_never_exceeds_127():
    m = np.random.default_rng(0).uniform(1e-30, 1e30, (200_000, 1)).astype(F32)
    q, _ = quantize_activations_ref(np.concatenate([m, -m], axis=1))
    assert q.min() == -127 and q.max() == 127


def test_scaffold_by_hand():
    # x: K=32, one row of +1 on the first two columns. q = (127, -64), s = 2/127.
    x = np.zeros((1, 1, 32), F32)
    x[0, 0, :2] = 2, -1
    signs = np.full((1, 32), -1)
    signs[0, 0] = 1
    down = np.zeros((1, 32), np.int8)
    down[0, 1] = 3
    y = binary_scaffold_matmul_ref(
        x,
        pack_bits(signs),
        np.array([0.5], F32),
        down,
        np.array([0.1], F32),
        np.array([[5]], np.int8),
        np.array([2.0], F32),
    )
    # 63.5 rounds half to even: q = (127, -64); scaffold 0.5 * s * (127 + 64); h = 0.1 * s * 3 * -64; + 2 * 5 * h
    s = 2 / 127
    assert y.shape == (1, 1, 1)
    assert y.item() == pytest.approx(0.5 * s * 191 + 10 * 0.1 * s * -192, rel=1e-6)


def scaffold_loops(x, bits, scale, down, down_scale, up, up_scale, planes=1):
    """Float64, element by element."""
    bits, scale = bits.reshape(planes, *bits.shape[-2:]), scale.reshape(planes, -1)
    batch, tokens, width = x.shape
    rows, rank = up.shape
    y = np.zeros((batch, tokens, rows))
    for b in range(batch):
        for t in range(tokens):
            m = np.abs(x[b, t]).max()
            inv = F32(127) / m if m >= 1e-30 else F32(0)
            q = [int(round(float(v * inv))) for v in x[b, t]]  # Python rounds half to even as well
            s = float(m) / 127 if m >= 1e-30 else 0.0
            h = [float(down_scale[r]) * s * sum(q[k] * int(down[r, k]) for k in range(width)) for r in range(rank)]
            for m_ in range(rows):
                for p in range(planes):
                    dot = sum(q[k] if bits[p, m_, k // 8] >> (k % 8) & 1 else -q[k] for k in range(width))
                    y[b, t, m_] += float(scale[p, m_]) * s * dot
                y[b, t, m_] += float(up_scale[m_]) * sum(int(up[m_, r]) * h[r] for r in range(rank))
    return y


@pytest.mark.parametrize(
    "case",
    [c for c in cases("BinaryScaffoldMatMul") if not c.attributes["layout"] and c.sizes["K"] * c.sizes["T"] <= 512],
    ids=lambda c: c.id,
)
def test_scaffold_against_loops(case):
    inputs = case.inputs()
    planes = case.attributes.get("planes", 1)
    expected = scaffold_loops(**inputs, planes=planes)
    actual = binary_scaffold_matmul_ref(**inputs, planes=planes)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_layouts_agree_exactly():
    for case in cases("BinaryScaffoldMatMul"):
        if case.attributes["layout"] or case.kind != "normal":
            continue
        inputs, planes = case.inputs(), case.attributes.get("planes", 1)
        packed = inputs | {"bits": to_layout(inputs["bits"], LAYOUTS[1]), "up": up_to_layout(inputs["up"], LAYOUTS[1])}
        np.testing.assert_array_equal(
            binary_scaffold_matmul_ref(**inputs, planes=planes),
            binary_scaffold_matmul_ref(**packed, planes=planes, layout=1),
        )


def test_int8_matmul_by_hand():
    x = np.array([[[1, -1, 0.5]]], F32)  # q = 127, -127, 64 (63.5 to even)
    w = np.array([[1, 2, 3], [-127, 127, 0]], np.int8)
    y = int8_matmul_ref(x, w, np.array([2, 0.25], F32))
    np.testing.assert_allclose(y[0, 0], [2 / 127 * (127 - 254 + 192), 0.25 / 127 * -2 * 127 * 127], rtol=1e-6)


def test_conv_by_hand_and_state():
    x = np.array([[[1.0], [2.0]]], F32)
    state = np.array([[[10, 20, 30]]], F32)
    y, new_state = causal_conv1d_step_ref(x, state, np.array([[1, 2, 3, 4]], F32), np.array([5], F32), "none")
    assert y[0, :, 0].tolist() == [10 + 40 + 90 + 4 + 5, 20 + 60 + 3 + 8 + 5]
    assert new_state.tolist() == [[[30, 1, 2]]]


def test_one_call_of_many_tokens_is_many_steps():
    for op, function in (("CausalConv1dStep", causal_conv1d_step_ref), ("SelectiveScanStep", selective_scan_step_ref)):
        for case in cases(op):
            if case.sizes["T"] == 1 or case.state_dtype != "float32":
                continue
            inputs = case.inputs()
            y, state = function(**inputs, **case.attributes)
            pieces = []
            for t in range(case.sizes["T"]):
                step = {k: v[:, t : t + 1] if k in ("x", "dt", "B", "C") else v for k, v in inputs.items()}
                piece, inputs["state"] = function(**step, **case.attributes)
                pieces.append(piece)
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), y, err_msg=case.id)
            np.testing.assert_array_equal(inputs["state"], state, err_msg=case.id)


@pytest.mark.parametrize("case", [c for c in CASES if any("_start" in a for a in c.attributes)], ids=lambda c: c.id)
def test_a_range_of_columns_is_the_columns_alone(case):
    """Bit for bit; `Case.inputs` says where the range lies, and what is around it is NaN."""
    inputs, others = case.inputs(), dict(case.attributes)
    expected = REFERENCES[case.op](**inputs, **others)
    for name, value in inputs.items():
        start = others.pop(f"{name}_start", -1)
        if start >= 0:
            inputs[name] = value[..., start : value.shape[-1] - (start + 1) % 4].copy()
    assert not any(np.isnan(value).any() for value in inputs.values())
    actual = REFERENCES[case.op](**inputs, **others)
    if case.op == "GatedRMSNorm":
        actual, expected = [actual], [expected]
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


SMALL_SCANS = [
    Case("SelectiveScanStep", dict(B=2, T=3, H=4, P=3, N=5, state=state), attributes)
    for state in ("float32", "float16", "int8")
    for attributes in ({}, {"ngroups": 2}, {"ngroups": 4, "dt_min": 0.01, "dt_max": 0.05})
]


@pytest.mark.parametrize("case", SMALL_SCANS, ids=lambda c: c.id)
def test_scan_against_loops(case):
    inputs = case.inputs()
    y, new_state, *new_scale = selective_scan_step_ref(**inputs, **case.attributes)
    expected_y, expected_state = scan_loops(**inputs, **case.attributes)
    np.testing.assert_allclose(y, expected_y, rtol=2e-5, atol=1e-5)
    assert str(new_state.dtype) == case.state_dtype
    if new_scale:
        half_step = np.abs(expected_state).max(-1, keepdims=True) / 127 * 0.501
        assert (np.abs(new_state * new_scale[0][..., None] - expected_state) <= half_step).all()
    else:
        rtol = {"float32": 2e-5, "float16": 6e-4}[case.state_dtype]
        np.testing.assert_allclose(new_state.astype(np.float64), expected_state, rtol=rtol, atol=1e-6)


def test_int8_state_of_a_zero_row_stays_zero():
    q, scale = quantize_state_ref(np.zeros((1, 1, 2, 4), F32))
    assert not q.any() and not scale.any()


def test_norms_by_hand():
    x = np.array([[[3.0, 4.0]]], F32)
    np.testing.assert_allclose(
        rms_norm_ref(x, np.array([1, 2], F32), eps=0.0)[0, 0], [3 / 12.5**0.5, 8 / 12.5**0.5], rtol=1e-6
    )
    z = np.array([[[1.0, -2.0]]], F32)
    v = [3 / (1 + math.exp(-1)), 4 * -2 / (1 + math.exp(2))]
    root = ((v[0] ** 2 + v[1] ** 2) / 2 + 1e-5) ** 0.5
    np.testing.assert_allclose(gated_rms_norm_ref(x, z, np.ones(2, F32))[0, 0], [v[0] / root, v[1] / root], rtol=1e-6)
    grouped = gated_rms_norm_ref(x, z, np.ones(2, F32), eps=1e-12, groups=2)
    np.testing.assert_allclose(grouped[0, 0], [1, -1], rtol=1e-6)  # a group of one is its own sign


def test_arguments_are_checked():
    inputs = cases("Int8MatMul")[2].inputs()
    with pytest.raises(DfssmError, match="Int8MatMul: input 'w_scale' has shape"):
        int8_matmul_ref(**inputs | {"w_scale": np.ones(3, F32)})
