"""Quantisation, half precision, and the messages of dfssm._native."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from kernel_calls import F32, each_isa, native, run

from dfssm import _native
from dfssm.opset.cases import Case
from dfssm.opset.reference import TINY, quantize_activations_ref
from dfssm.opset.schema import STATE_DTYPES


def _hostile_rows(rng):
    """Rows [n, K] that hurt quantisation: ties, zeros, denormals, the threshold TINY, the largest floats."""
    for K in (1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 2048):
        ties = (rng.integers(-253, 254, (4, K)) / 2).astype(F32)
        ties[:, 0] = 127
        yield ties
        yield rng.standard_normal((4, K)).astype(F32)
        yield np.zeros((1, K), F32)
        for magnitude in (1e-45, 1e-38, TINY, np.nextafter(TINY, F32(0)), 1e-20, 1e30, np.finfo(F32).max):
            row = (rng.uniform(-1, 1, (1, K)) * magnitude).astype(F32)
            row[0, rng.integers(K)] = magnitude
            yield row
        yield np.where(rng.random((2, K)) < 0.5, F32(-0.0), F32(1e-42))
        # every fp32 rounding of m and 127 / m
        yield rng.integers(0x00800000, 0x7F7FFFFF, (64, K), dtype=np.int32).view(F32)


@each_isa
def test_quantisation_is_bit_equal(isa):
    for x in _hostile_rows(np.random.default_rng(0)):
        with np.errstate(over="ignore", under="ignore"):
            q, s = quantize_activations_ref(x)
        actual_q, actual_s, total = native(isa).quantize_activations(isa, x)
        np.testing.assert_array_equal(actual_q, q)
        np.testing.assert_array_equal(actual_s.view(np.int32), s[:, 0].view(np.int32))
        np.testing.assert_array_equal(total, q.sum(-1, dtype=np.int32))


@each_isa
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(isa, bad):
    rng = np.random.default_rng(0)
    for K in (1, 8, 16, 31, 100):
        for k in (0, K // 2, K - 1):
            x = rng.standard_normal((3, K)).astype(F32)
            clean = native(isa).quantize_activations(isa, x)
            x[1, k] = bad
            q, s, total = native(isa).quantize_activations(isa, x)
            assert np.isnan(s[1]) and not q[1].any() and total[1] == 0
            for a, e in zip((q, s, total), clean, strict=True):
                np.testing.assert_array_equal(a[[0, 2]], e[[0, 2]])
            y = native(isa).Int8MatMul(isa, x, np.ones((5, K), np.int8), np.ones(5, F32))
            assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()


@each_isa
def test_an_int8_state_row_that_is_not_finite_becomes_nan_and_no_other(isa):
    """B[n] = NaN spoils row n of every head: in whole blocks of rows and in what is left over."""
    rng = np.random.default_rng(0)
    for N, bad, T in itertools.product((5, 16, 70), (0, 4), (1, 2)):
        inputs = dict(
            x=rng.standard_normal((1, T, 2 * 20)).astype(F32),
            dt=rng.standard_normal((1, T, 2)).astype(F32),
            B=rng.standard_normal((1, T, N)).astype(F32),
            C=rng.standard_normal((1, T, N)).astype(F32),
            A_log=np.zeros(2, F32),
            D=np.zeros(2, F32),
            dt_bias=np.zeros(2, F32),
            state=rng.integers(-127, 128, (1, 2, N, 20), dtype=np.int8),
            state_scale=rng.uniform(0.01, 0.1, (1, 2, N)).astype(F32),
        )
        _, state, scale = run("SelectiveScanStep", isa, inputs)
        inputs["B"][:, 0, bad] = np.nan
        _, spoilt_state, spoilt_scale = run("SelectiveScanStep", isa, inputs)
        assert np.isnan(spoilt_scale[..., bad]).all() and not spoilt_state[:, :, bad].any()
        others = np.arange(N) != bad
        np.testing.assert_array_equal(spoilt_state[:, :, others], state[:, :, others])
        np.testing.assert_array_equal(spoilt_scale[..., others], scale[..., others])


@each_isa
@pytest.mark.parametrize("dtype", STATE_DTYPES.values())
def test_a_time_step_that_is_nan_is_not_clamped(isa, dtype):
    inputs = _store(isa, np.ones(20, F32), dtype, np.ones(20))
    if dtype == "int8":
        inputs["state_scale"] = np.ones((1, 1, 1), F32)
    inputs["dt"][...] = np.nan
    y, *_ = run("SelectiveScanStep", isa, inputs, dt_min=0.1, dt_max=0.2)
    assert np.isnan(y).all()


def _store(isa, values, dtype, state):
    """`values` [P] through one scan step into `state` [P]: d = 1, B = 1, decay whatever of it."""
    P, one = values.size, np.ones(1, F32)
    inputs = dict(x=values.reshape(1, 1, P), dt=one.reshape(1, 1, 1), B=one.reshape(1, 1, 1), C=one.reshape(1, 1, 1))
    inputs |= dict(A_log=np.zeros(1, F32), D=np.zeros(1, F32), dt_bias=np.zeros(1, F32))
    inputs["state"] = state.astype(dtype).reshape(1, 1, 1, P)
    return inputs


@each_isa
def test_half_precision_stores_round_as_numpy(isa):
    rng = np.random.default_rng(0)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).astype(F32)
    halves = halves[np.isfinite(halves)]
    between = (halves[:-1] + halves[1:]) / 2  # exact ties, and one step to either side of them
    wide = rng.integers(0, 1 << 32, 50_000, dtype=np.uint32).view(F32)
    values = np.concatenate(
        [
            halves,
            between,
            np.nextafter(between, F32(9e9)),
            np.nextafter(between, F32(-9e9)),
            wide[np.isfinite(wide)],
            F32([65519.996, 65520, -65520]),
        ]
    )
    inputs = _store(isa, values, np.float16, np.zeros(values.size))
    _, state = run("SelectiveScanStep", isa, inputs, dt_min=1.0, dt_max=1.0)
    largest = np.finfo(np.float16).max  # past it states saturate
    expected = (values + F32(0)).clip(-largest, largest).astype(np.float16)
    np.testing.assert_array_equal(state.ravel().view(np.uint16), expected.view(np.uint16))


@each_isa
def test_half_precision_loads_are_exact(isa):
    """d = 0: the state passes through one step unchanged, and y = C . state is the state itself."""
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    inputs = _store(isa, np.zeros(halves.size, F32), np.float16, halves)
    y, state = run("SelectiveScanStep", isa, inputs, dt_min=0.0, dt_max=0.0)
    np.testing.assert_array_equal(y.ravel(), halves.astype(F32))
    np.testing.assert_array_equal(state.ravel(), halves)


def _valid_matmul():
    return dict(x=np.ones((2, 32), F32), w=np.ones((3, 32), np.int8), w_scale=np.ones(3, F32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(w=np.ones((3, 31), np.int8)), r"input 'w' has shape \[3, 31\], expected \[M=3, K=32\]"),
        (dict(w=np.ones((3, 32), F32)), r"input 'w' has dtype float32, expected int8"),
        (dict(x=np.ones((2, 32))), r"input 'x' has dtype float64, expected float32"),
        (dict(x=np.asfortranarray(np.ones((2, 32), F32))), r"input 'x' must be in C order"),
        (dict(w_scale=np.ones((3, 1), F32)), r"input 'w_scale' has shape \[3, 1\], expected \[M\]"),
        (dict(out=np.ones((2, 4), F32)), r"'out' is float32 \[2, 4\], expected float32 \[2, 3\]"),
        (dict(w=None), r"input 'w' is missing"),
        (dict(wscale=np.ones(3, F32)), r"unknown attribute 'wscale'; known: none"),
    ],
)
def test_a_misfit_is_named(change, message):
    with pytest.raises(ValueError, match=f"^Int8MatMul: {message}$"):
        _native.Int8MatMul("scalar", **(_valid_matmul() | change))


CONV = Case("CausalConv1dStep", dict(B=1, T=2, C=8, W=4), {"x_start": 3})
SCAN = Case("SelectiveScanStep", dict(B=1, T=2, H=4, P=8, N=6), {"ngroups": 2, "x_start": 3, "dt_start": 3})
GATED = Case("GatedRMSNorm", dict(B=1, T=2, C=12), {"z_start": 3})


@pytest.mark.parametrize(
    ("case", "change", "attributes", "message"),
    [
        (CONV, {}, dict(x_start=-2), r"attribute 'x_start' is -2, expected at least -1"),
        (CONV, {}, dict(x_start=-1), r"input 'state' has shape \[1, 8, 3\], expected \[B=1, C=11, W - 1 = 3\]"),
        (CONV, {}, dict(x_start=4), r"input 'x' has shape \[1, 2, 11\], expected \[B=1, T=2, >= x_start=4 \+ C=8\]"),
        (CONV, {}, dict(x_start=2**63 - 1), rf"input 'x' .*, expected .* >= x_start={2**63 - 1} \+ C=8\]"),
        (CONV, dict(x=np.ones((2, 2, 11), F32)), {}, r"input 'state' has .*, expected \[B=2, C=8, W - 1 = 3\]"),
        (
            CONV,
            dict(x=np.ones((1, 2, 7), F32)),
            {},
            r"input 'x' has shape \[1, 2, 7\], expected \[B=1, T=2, >= x_start=3 \+ C=8\]",
        ),
        (
            SCAN,
            {},
            dict(x_start=4),
            r"input 'x' has shape \[1, 2, 35\], expected \[B=1, T=2, >= x_start=4 \+ H \* P = 32\]",
        ),
        (SCAN, {}, dict(dt_start=4), r"input 'dt' has shape \[1, 2, 7\], expected \[B=1, T=2, >= dt_start=4 \+ H=4\]"),
        (
            SCAN,
            {},
            dict(B_start=1),
            r"input 'B' has shape \[1, 2, 12\], expected \[B=1, T=2, >= B_start=1 \+ ngroups \* N = 12\]",
        ),
        (
            SCAN,
            {},
            dict(C_start=1),
            r"input 'C' has shape \[1, 2, 12\], expected \[B=1, T=2, >= C_start=1 \+ ngroups \* N = 12\]",
        ),
        (
            SCAN,
            dict(dt=np.ones((1, 7), F32)),
            {},
            r"input 'dt' has shape \[1, 1, 7\], expected \[B=1, T=2, >= dt_start=3 \+ H=4\]",
        ),
        (SCAN, dict(dt=np.ones((1, 2, 7))), {}, r"input 'dt' has dtype float64, expected float32"),
        (GATED, {}, dict(z_start=4), r"input 'z' has shape \[1, 2, 15\], expected \[B=1, T=2, >= z_start=4 \+ C=12\]"),
        (GATED, {}, dict(z_start=-1), r"input 'z' has shape \[1, 2, 15\], expected \[B=1, T=2, C=12\]"),
        (CONV, {}, dict(xstart=3), r"unknown attribute 'xstart'; known: activation, x_start"),
    ],
)
def test_a_range_of_columns_that_does_not_fit_is_named(case, change, attributes, message):
    with pytest.raises(ValueError, match=f"^{case.op}: {message}$"):
        run(case.op, "scalar", case.inputs() | change, **case.attributes | attributes)


def test_an_unknown_isa_is_named():
    with pytest.raises(ValueError, match=r"^Int8MatMul: isa is 'sse9'; this CPU can use: scalar.*$"):
        _native.Int8MatMul("sse9", **_valid_matmul())


def _default_isa(value):
    env = {**os.environ, "DFSSM_ISA": value}
    code = "from dfssm import _native; print(_native.default_isa())"
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_the_environment_forces_an_isa():
    assert _native.isas()[0] == "scalar"
    for isa in _native.isas():
        assert _default_isa(isa).stdout.strip() == isa
    assert _default_isa("").stdout.strip() == _native.isas()[-1]
    refused = _default_isa("avx9000")
    assert refused.returncode != 0
    assert f"DFSSM_ISA is 'avx9000'; this CPU can use: {' '.join(_native.isas())}" in refused.stderr
