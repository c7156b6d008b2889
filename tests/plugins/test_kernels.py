"""Every kernel of every instruction set against opset.reference and against float64, over odd sizes."""

import itertools

import numpy as np
import pytest
from each import check_each
from kernel_calls import F32, each_isa, native, run
from nodes import output_names

from dfssm.opset.cases import cases
from dfssm.opset.layouts import LAYOUTS
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.packing import pack_bits, to_layout, up_to_layout
from dfssm.opset.reference import REFERENCES
from dfssm.opset.tolerances import EPS16, EPS32, reduction


@each_isa
@pytest.mark.parametrize("op", ALL_OPS)
def test_case_table(isa, op):
    def check(case):
        inputs = case.inputs()
        expected = REFERENCES[op](**inputs, **case.attributes)
        expected = expected if isinstance(expected, tuple) else (expected,)
        actual = run(op, isa, inputs, **case.attributes)
        assert len(actual) == len(expected)
        for name, a, e in zip(output_names(case), actual, expected, strict=True):
            assert a.dtype == e.dtype
            ALL_OPS[op].tolerance({**case.sizes, **case.attributes}, name).check(a, e, name)

    check_each(cases(op), check)


def _whole_numbers(rng, *shape):
    """fp32 activations that quantise to themselves with scale 1: whole, each row's largest magnitude 127."""
    x = rng.integers(-127, 128, shape).astype(F32)
    x[..., rng.integers(shape[-1])] = 127
    return x


@each_isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("K", [32, 64, 96, 288, 576])
def test_scaffold_is_exact_in_integers(isa, layout, K):
    """Scales of 1 and whole activations leave nothing to round: outputs are exact integers below 2^24."""
    rng = np.random.default_rng(K)
    tokens = (1, 2, 3, 4, 5, 11, 12, 13, 24, 25, 64) if K <= 64 else (1, 3, 5, 13)
    for M, R, n in itertools.product((1, 15, 16, 17, 33, 80), (0, 1, 5, 16), tokens):
        x = _whole_numbers(rng, n, K)
        signs = rng.choice(np.array([-1, 1], np.int8), (M, K))
        down = rng.integers(-1, 2, (R, K), dtype=np.int8)
        up = rng.integers(-3, 4, (M, R), dtype=np.int8)
        expected = x.astype(np.int64) @ signs.T + (x.astype(np.int64) @ down.T) @ up.T
        assert np.abs(expected).max() < 2**24
        bits, stored_up = pack_bits(signs), up
        if layout:
            bits, stored_up = to_layout(bits, LAYOUTS[layout]), up_to_layout(up, LAYOUTS[layout])
        ones = np.ones(M, F32)
        y = native(isa).BinaryScaffoldMatMul(isa, x, bits, ones, down, np.ones(R, F32), stored_up, ones, layout=layout)
        np.testing.assert_array_equal(y, expected, err_msg=f"M={M} R={R} n={n}")


@each_isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens", [97, 500])
def test_a_long_prompt_has_the_bits_of_its_parts(isa, layout, tokens):
    """97 tokens are three tiles, 500 eleven, more than are packed at once; 1030 rows are two ranges of them."""
    K, M, R = 32, 1030, 5
    rng = np.random.default_rng(0)
    bits, up = rng.integers(0, 256, (M, K // 8), np.uint8), rng.integers(-127, 128, (M, R), np.int8)
    down = rng.integers(-127, 128, (R, K), np.int8)
    scales = [rng.uniform(0.01, 0.1, size).astype(F32) for size in (M, R, M)]
    if layout:
        bits, up = to_layout(bits, LAYOUTS[layout]), up_to_layout(up, LAYOUTS[layout])
    weights = (bits, scales[0], down, scales[1], up, scales[2])

    def product(x):
        return native(isa).BinaryScaffoldMatMul(isa, x, *weights, layout=layout)

    x = rng.standard_normal((1, tokens, K)).astype(F32)
    parts = [product(x[:, t : t + 7]) for t in range(0, tokens, 7)]
    np.testing.assert_array_equal(product(x), np.concatenate(parts, 1))


@each_isa
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scaffold_at_the_ends_of_int8(isa, layout):
    """All bits set on a long row: the largest sums that an accumulator can meet.

    Of 127 and -127 the products are largest; of 31 and three 0 the low five bits of the sum of four activations are,
    which look-up tables add up by themselves.
    """
    K, M = 2 * 8192 + 96, 64
    bits = np.full((M, K // 8), 255, np.uint8)  # the same bytes in all layouts
    empty = np.zeros((0, K), np.int8), np.zeros(0, F32), np.zeros((M, 0), np.int8), np.ones(M, F32)
    for n, columns in itertools.product((1, 2, 7), ([127], [-127], [31, 0, 0, 0])):
        x = np.tile(F32(columns), (n, K // len(columns)))
        x[:, :1] = np.sign(columns[0]) * 127  # so that the scale is 1
        y = native(isa).BinaryScaffoldMatMul(isa, x, bits, np.ones(M, F32), *empty, layout=layout)
        np.testing.assert_array_equal(y, np.repeat(x.sum(1, keepdims=True), M, 1))


@each_isa
def test_int8_matmul_is_exact_in_integers(isa):
    rng = np.random.default_rng(0)
    sizes = [1, 2, 15, 16, 17, 31, 32, 63, 64, 65, 100, 127, 128, 129, 200]
    for K, M, n in itertools.product(sizes, (1, 3, 4, 5, 9), (1, 2, 3, 5, 6, 7, 13)):
        x = _whole_numbers(rng, n, K)
        w = rng.integers(-128, 128, (M, K), dtype=np.int8)
        w[0] = -128
        y = native(isa).Int8MatMul(isa, x, w, np.ones(M, F32))
        np.testing.assert_array_equal(y, x.astype(np.int64) @ w.T.astype(np.int64), err_msg=f"K={K} M={M} n={n}")


def _softplus64(x):
    return np.logaddexp(0, x)


def _scan64(x, dt, B, C, A_log, D, dt_bias, h, groups):
    """The recurrence in float64: x [T,H,P], dt [T,H], B and C [T,G,N], h [H,N,P] -> y [T,H,P], h."""
    heads = A_log.size
    group = np.arange(heads) // (heads // groups)
    y = np.empty(x.shape)
    for t in range(len(x)):
        d = _softplus64(dt[t] + dt_bias)
        decay = np.exp(-np.exp(A_log) * d)
        h = decay[:, None, None] * h + (d[:, None] * B[t, group])[..., None] * x[t][:, None]
        y[t] = np.einsum("hn,hnp->hp", C[t, group], h) + D[:, None] * x[t]
    return y, h


@each_isa
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("P", [1, 7, 8, 9, 16, 24, 31, 32, 33, 64, 72, 130])
def test_scan_against_float64(isa, dtype, P):
    rng = np.random.default_rng(P)
    H, groups = 4, 2
    for N, T in itertools.product((1, 2, 16, 17, 128, 130), (1, 2, 5)):
        draw = {
            name: rng.standard_normal(shape).astype(F32)
            for name, shape in dict(
                x=(1, T, H * P),
                dt=(1, T, H),
                B=(1, T, groups * N),
                C=(1, T, groups * N),
                D=(H,),
                dt_bias=(H,),
            ).items()
        }
        draw["A_log"] = np.log(rng.uniform(1, 16, H)).astype(F32)
        state = rng.standard_normal((1, H, N, P)).astype(F32)
        if dtype == "int8":
            scale = (np.abs(state).max(-1) / 127).astype(F32)
            stored = np.rint(state / scale[..., None]).astype(np.int8)
            draw |= dict(state=stored, state_scale=scale)
            before = stored.astype(np.float64) * scale[..., None]
        else:
            draw["state"] = state.astype(dtype)
            before = draw["state"].astype(np.float64)
        y, h = _scan64(
            draw["x"].astype(np.float64).reshape(T, H, P),
            draw["dt"][0],
            draw["B"].reshape(T, groups, N),
            draw["C"].reshape(T, groups, N),
            draw["A_log"],
            draw["D"],
            draw["dt_bias"],
            before[0],
            groups,
        )
        actual = run("SelectiveScanStep", isa, draw, ngroups=groups)
        where = f"N={N} T={T}"
        reduction(N + T).check(actual[0].reshape(T, H, P), y, f"y, {where}")
        after = actual[1][0].astype(np.float64)
        # fp16: half a step, of the value or of the denormals; int8: half a step of the row's scale
        step = EPS16 / 2 * np.abs(h) + 2.0**-25 if dtype == "float16" else 0.0
        if dtype == "int8":
            after *= actual[2][0][..., None]
            step = 0.5 * np.abs(h).max(-1, keepdims=True) / 127
        slack = reduction(T).relative * np.abs(h).max()
        assert (np.abs(after - h) <= step + slack).all(), where


@each_isa
@pytest.mark.parametrize("width", [2, 3, 4])
def test_conv_against_float64(isa, width):
    rng = np.random.default_rng(width)
    for C, T, activation in itertools.product((1, 7, 8, 15, 16, 17, 40, 128, 257, 530), (1, 2, 9), ("silu", "none")):
        x = rng.standard_normal((2, T, C)).astype(F32)
        state = rng.standard_normal((2, C, width - 1)).astype(F32)
        weight, bias = rng.standard_normal((C, width)).astype(F32), rng.standard_normal(C).astype(F32)
        window = np.concatenate([state.swapaxes(1, 2), x], axis=1).astype(np.float64)
        expected = bias + sum(window[:, w : w + T] * weight[:, w] for w in range(width))
        if activation == "silu":
            expected = expected / (1 + np.exp(-expected))
        y, new_state = native(isa).CausalConv1dStep(isa, x, state, weight, bias, activation)
        reduction(width + 1).check(y, expected, f"C={C} T={T} {activation}")
        np.testing.assert_array_equal(new_state, window[:, T:].swapaxes(1, 2).astype(F32))


@each_isa
def test_norms_against_float64(isa):
    rng = np.random.default_rng(0)
    for size, groups in itertools.product((1, 7, 8, 15, 16, 17, 100, 2048), (1, 3)):
        C = size * groups
        y = rng.standard_normal((3, C)).astype(F32)
        z = (3 * rng.standard_normal((3, C))).astype(F32)
        weight = rng.standard_normal(C).astype(F32)
        v = y.astype(np.float64) * z / (1 + np.exp(-z.astype(np.float64)))
        v = v.reshape(3, groups, size)
        expected = v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-5)
        expected = expected.reshape(3, C) * weight
        actual = native(isa).GatedRMSNorm(isa, y, z, weight, 1e-5, groups)
        reduction(size).check(actual, expected, f"gated, C={C} groups={groups}")
        expected = y / np.sqrt((y.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
        reduction(C).check(native(isa).RMSNorm(isa, y, weight), expected, f"C={C}")


@each_isa
def test_silu_error_bound(isa):
    """Two ulp of fp32 over the whole range, and nothing odd where exp(-x) would overflow or vanish."""
    x = np.concatenate([np.linspace(-86, 86, 200_001), [-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]]).astype(F32)
    C = x.size
    weight = np.tile(np.array([0, 1], F32), (C, 1))
    y, _ = native(isa).CausalConv1dStep(isa, x[None, None], np.zeros((1, C, 1), F32), weight, np.zeros(C, F32))
    exact = x * np.exp(-np.logaddexp(0, -x.astype(np.float64)))
    # beyond -87 the exponential stops at exp(-87) = 1.6e-38: an error of |x| times that
    bound = 4 * EPS32 * np.abs(exact) + np.where(x < -86, np.abs(x) * 2e-38, 0)
    assert (np.abs(y[0, 0] - exact) <= bound).all()
