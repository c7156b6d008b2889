"""The CUDA kernels on the host emulation against opset.reference, over the shared case table and past its edges.

Every buffer lies in the midst of poison, every load and store is checked (emulation.h): a kernel that passes has also
touched nothing it must not, raced with nobody and left no byte of its outputs unwritten.
"""

import itertools

import numpy as np
import pytest
from each import check_each
from plugins_trt.emulated import EmulationError, widen

from dfssm.opset.cases import CASES, Case
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.reference import REFERENCES
from dfssm.opset.tolerances import Tolerance

F32 = np.float32
OUTPUTS = ("y", "new_state", "new_state_scale")
TABLE = [case for case in CASES if case.attributes.get("layout", 0) == 0]
ACTIVATIONS = {
    "BinaryScaffoldMatMul": ("x",),
    "Int8MatMul": ("x",),
    "CausalConv1dStep": ("x",),
    "SelectiveScanStep": ("x", "dt", "B", "C"),
    "GatedRMSNorm": ("y", "z"),
    "RMSNorm": ("x",),
}
UNIT = {"float32": 0.0, "float16": 2.0**-11}
"""Largest relative error of rounding to the type: half a step of its 11 significant bits."""


def reference(case: Case, inputs: dict) -> tuple[np.ndarray, ...]:
    expected = REFERENCES[case.op](**inputs, **case.attributes)
    return expected if isinstance(expected, tuple) else (expected,)


def check(case: Case, actual, expected, type: str = "float32") -> None:
    """Inputs are what the type can hold and arithmetic is fp32, so a narrow type adds one rounding of y."""
    assert len(actual) == len(expected)
    sizes = {**case.sizes, **case.attributes}
    for name, a, e in zip(OUTPUTS, actual, expected, strict=False):
        assert a.dtype == e.dtype
        bound = ALL_OPS[case.op].tolerance(sizes, name)
        if name == "y" and UNIT[type] and not (case.op == "Int8MatMul"):  # logits are fp32
            bound = Tolerance(bound.relative + UNIT[type], f"{bound.reason}, and one rounding to {type}")
        bound.check(a, e, name)


def rounded(case: Case, inputs: dict, type: str) -> dict:
    return {k: widen(v.astype(type)) if k in ACTIVATIONS[case.op] else v for k, v in inputs.items()}


def draw(op: str, kind: str = "normal", attributes: dict | None = None, **sizes) -> tuple[Case, dict]:
    case = Case(op, sizes, attributes or {}, kind)
    return case, case.inputs()


@pytest.mark.parametrize("op", ACTIVATIONS)
def test_case_table(kernels, op):
    def check_case(case):
        inputs = case.inputs()
        check(case, kernels.run(op, inputs, **case.attributes), reference(case, inputs))

    check_each([case for case in TABLE if case.op == op], check_case)


@pytest.mark.parametrize("op", ACTIVATIONS)
def test_narrow_activations(kernels, op):
    """The whole table but what fp16 cannot hold."""
    for case in TABLE:
        if case.op != op or case.kind == "huge":
            continue
        inputs = rounded(case, case.inputs(), "float16")
        check(case, kernels.run(op, inputs, type="float16", **case.attributes), reference(case, inputs), "float16")


@pytest.mark.parametrize("op", ACTIVATIONS)
def test_launches_that_overlap(kernels, op):
    """Begun before that has ended which makes activations, states and workspace: nothing of these is touched before
    that was waited for, and the results are the same."""

    def check_case(case):
        inputs = case.inputs()
        overlapping = kernels.run(op, inputs, dependent=True, **case.attributes)
        for a, b in zip(overlapping, kernels.run(op, inputs, **case.attributes), strict=True):
            np.testing.assert_array_equal(a, b)

    cases = [case for case in TABLE if case.op == op]
    more = {
        "SelectiveScanStep": [Case(op, dict(B=1, T=1, H=1, P=132, N=6, state="int8"))],  # the general kernel
        "BinaryScaffoldMatMul": [Case(op, dict(B=1, T=65, K=128, M=40, R=2))],
    }
    check_each(cases[:: max(1, len(cases) // 6)] + cases[-2:] + more.get(op, []), check_case)


STRIDED = [
    (Case("CausalConv1dStep", dict(B=2, T=3, C=40, W=4)), ("x",)),
    (Case("CausalConv1dStep", dict(B=2, T=1, C=40, W=3)), ("x",)),
    (
        Case("SelectiveScanStep", dict(B=2, T=1, H=4, P=16, N=16, state="float16"), {"ngroups": 2}),
        ("x", "dt", "B", "C"),
    ),
    (Case("SelectiveScanStep", dict(B=2, T=9, H=4, P=16, N=16, state="float32")), ("x", "dt", "B", "C")),
    (Case("GatedRMSNorm", dict(B=2, T=3, C=48), {"groups": 2}), ("z",)),
]


@pytest.mark.parametrize("type", UNIT)
@pytest.mark.parametrize("case, strided", STRIDED, ids=lambda value: value.id if isinstance(value, Case) else "")
def test_ranges_of_columns(kernels, case, strided, type):
    """Inputs inside wider tensors, with 16-byte accesses still possible and not; NaN beside them."""
    inputs = rounded(case, case.inputs(), type)
    expected = reference(case, inputs)
    for start, spare in ((16, 16), (0, 8), (1, 15), (8, 3), (3, 2)):
        columns = {name: (start, start + inputs[name].shape[-1] + spare) for name in strided}
        actual = kernels.run(case.op, inputs, type=type, columns=columns, **case.attributes)
        check(case, actual, expected, type)


@pytest.mark.parametrize("type", UNIT)
@pytest.mark.parametrize("op", ACTIVATIONS)
def test_unaligned_activations(kernels, op, type):
    """Activations are aligned as their type is, and no better."""
    item = 4 if type == "float32" else 2
    table = [case for case in TABLE if case.op == op and case.kind == "normal"]
    for case in table[2:6]:
        inputs = rounded(case, case.inputs(), type)
        for offset in (item, 8):
            actual = kernels.run(op, inputs, type=type, offset=offset, **case.attributes)
            check(case, actual, reference(case, inputs), type)


@pytest.mark.parametrize("op", ["CausalConv1dStep", "SelectiveScanStep", "GatedRMSNorm", "RMSNorm"])
def test_in_place_is_the_same(kernels, op):
    """States over themselves, norms over their input: the same bits as into memory of their own."""
    for case in TABLE:
        if case.op != op:
            continue
        inputs = case.inputs()
        apart = kernels.run(op, inputs, **case.attributes)
        for a, b in zip(kernels.run(op, inputs, in_place=True, **case.attributes), apart, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=case.id)


def _whole_numbers(rng, *shape) -> np.ndarray:
    """fp32 activations that quantise to themselves with scale 1: whole, each row's largest magnitude 127."""
    x = rng.integers(-127, 128, shape).astype(F32)
    x[..., rng.integers(shape[-1])] = 127
    return x


def _scaffold(x, signs, down, up) -> dict:
    bits = np.packbits(signs > 0, axis=-1, bitorder="little")
    M, R = up.shape
    ones = dict(scale=np.ones(M, F32), down_scale=np.ones(R, F32), up_scale=np.ones(M, F32))
    return dict(x=x[None], bits=bits, down=down, up=up, **ones)


EXACT = [
    *itertools.product((32, 96), (1, 17, 65), (0, 3, 16), (1, 2, 5, 8, 9, 16, 17, 33)),
    *itertools.product((288, 544), (33,), (3,), (1, 5, 16, 17)),
    # past a unit of columns, a tile of rows, of tokens
    *((512, 64, 0, 64), (576, 129, 4, 65), (1088, 200, 16, 3), (544, 33, 2, 130), (4128, 17, 2, 2), (4128, 16, 1, 17)),
]


@pytest.mark.parametrize("K", sorted({shape[0] for shape in EXACT}))
def test_scaffold_is_exact_in_integers(kernels, K):
    """Scales of 1 and whole activations leave nothing to round: outputs are exact integers below 2^24."""
    rng = np.random.default_rng(K)
    for _, M, R, n in (shape for shape in EXACT if shape[0] == K):
        x = _whole_numbers(rng, n, K)
        signs = rng.choice(np.array([-1, 1], np.int8), (M, K))
        down = rng.integers(-1, 2, (R, K), dtype=np.int8)
        up = rng.integers(-3, 4, (M, R), dtype=np.int8)
        expected = x.astype(np.int64) @ signs.T + (x.astype(np.int64) @ down.T) @ up.T
        assert np.abs(expected).max() < 2**24
        (y,) = kernels.run("BinaryScaffoldMatMul", _scaffold(x, signs, down, up))
        np.testing.assert_array_equal(y[0], expected, err_msg=f"M={M} R={R} n={n}")


@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("value", [127, -127])
def test_scaffold_at_the_ends_of_int8(kernels, n, value):
    """All bits set, all activations +127 or -127: the largest sums an accumulator can meet, on a long row."""
    K, M = 8192, 3
    x = np.full((n, K), value, F32)
    signs, down, up = np.ones((M, K), np.int8), np.zeros((0, K), np.int8), np.zeros((M, 0), np.int8)
    (y,) = kernels.run("BinaryScaffoldMatMul", _scaffold(x, signs, down, up))
    np.testing.assert_array_equal(y, np.full((1, n, M), K * value))


def test_int8_matmul_is_exact_in_integers(kernels):
    rng = np.random.default_rng(0)
    for K, M, n in itertools.product((1, 15, 16, 31, 33, 100, 129), (1, 9, 33), (1, 2, 5, 17)):
        x = _whole_numbers(rng, n, K)
        w = rng.integers(-128, 128, (M, K), dtype=np.int8)
        w[0] = -128
        (y,) = kernels.run("Int8MatMul", dict(x=x[None], w=w, w_scale=np.ones(M, F32)))
        np.testing.assert_array_equal(y[0], x.astype(np.int64) @ w.T.astype(np.int64), err_msg=f"K={K} M={M} n={n}")


@pytest.mark.parametrize(
    "case",
    [
        Case("BinaryScaffoldMatMul", dict(B=1, T=65, K=128, M=12673, R=1)),
        Case("Int8MatMul", dict(B=1, T=65, K=144, M=12673)),
    ],
    ids=lambda case: case.id,
)
def test_large_products(kernels, case):
    """One row and one token more than 99 tiles of 128 rows and one of 64 tokens: the large tiles, at their edges."""
    inputs = case.inputs()
    check(case, kernels.run(case.op, inputs), reference(case, inputs))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("op", ["BinaryScaffoldMatMul", "Int8MatMul"])
def test_a_token_that_is_not_finite_gives_nan_and_harms_no_other(kernels, op, tokens, bad):
    sizes = dict(B=1, T=tokens, K=64, M=17) | ({"R": 2} if op == "BinaryScaffoldMatMul" else {})
    _, inputs = draw(op, **sizes)
    (clean,) = kernels.run(op, inputs)
    inputs["x"][0, 1, 5] = bad
    (y,) = kernels.run(op, inputs)
    assert np.isnan(y[0, 1]).all()
    np.testing.assert_array_equal(np.delete(y, 1, axis=1), np.delete(clean, 1, axis=1))


@pytest.mark.parametrize("tokens", [31, 32, 33, 65, 100])
@pytest.mark.parametrize("in_place", [False, True])
def test_long_convolutions(kernels, tokens, in_place):
    """Past the run of tokens of one block: who reads the old state and who writes the new one."""
    for C, W in ((6, 2), (8, 3), (5, 4), (520, 4)):
        case, inputs = draw("CausalConv1dStep", B=2, T=tokens, C=C, W=W)
        check(case, kernels.run(case.op, inputs, in_place=in_place), reference(case, inputs))


def test_many_sequences(kernels):
    """Batch is an axis of the grid of some kernels."""
    for case in (
        Case("CausalConv1dStep", dict(B=65, T=1, C=3, W=4)),
        Case("SelectiveScanStep", dict(B=33, T=1, H=2, P=8, N=8, state="float32")),
        Case("RMSNorm", dict(B=130, T=1, C=8)),
        Case("GatedRMSNorm", dict(B=1, T=130, C=40), {"groups": 5}),
        Case("Int8MatMul", dict(B=65, T=1, K=32, M=3)),
        Case("BinaryScaffoldMatMul", dict(B=130, T=1, K=32, M=3, R=1)),
    ):
        inputs = case.inputs()
        check(case, kernels.run(case.op, inputs, **case.attributes), reference(case, inputs))


@pytest.mark.parametrize("C", [2047, 2048, 4096, 13_000])
def test_wide_norms(kernels, C):
    """More values than a block has threads; 13,000 fp32 are more shared memory than a block gets unasked."""
    case, inputs = draw("GatedRMSNorm", B=1, T=2, C=C)
    for type in UNIT:
        narrowed = rounded(case, inputs, type)
        check(case, kernels.run(case.op, narrowed, type=type), reference(case, narrowed), type)


def test_what_no_kernel_takes(kernels):
    """Sizes beyond the device or the op come back as errors of the launch, not as wrong numbers."""
    case, inputs = draw("RMSNorm", B=1, T=1, C=60_000)  # a group must fit in shared memory
    with pytest.raises(EmulationError, match="cudaError 9:"):
        kernels.run(case.op, inputs)
    _, inputs = draw("CausalConv1dStep", B=1, T=1, C=4, W=5)
    with pytest.raises(EmulationError, match="cudaError 1:"):
        kernels.run("CausalConv1dStep", inputs)
    case, inputs = draw("GatedRMSNorm", B=1, T=1, C=10)
    with pytest.raises(EmulationError, match="cudaError 1:"):
        kernels.run(case.op, inputs, groups=3)


@pytest.mark.parametrize("state", ["float32", "float16", "int8"])
def test_scans_past_the_tiles(kernels, state):
    """Tokens, headdim and d_state just under, at and over what a kernel may take at a time; many more than it keeps."""
    for H, P, N, T in (
        *[(1, 64, 128, T) for T in (7, 8, 9)],
        *[(2, 8, 8, T) for T in (15, 16, 17, 65)],
        *((2, 63, 127, 2), (1, 65, 129, 1), (1, 128, 16, 3), (1, 256, 5, 1), (1, 32, 256, 2), (1, 130, 130, 1)),
    ):
        case, inputs = draw("SelectiveScanStep", B=1, T=T, H=H, P=P, N=N, state=state)
        check(case, kernels.run(case.op, inputs, in_place=True), reference(case, inputs))


def test_prefill_is_the_steps(kernels):
    """24 tokens at once and one by one."""
    case, inputs = draw("SelectiveScanStep", B=1, T=24, H=2, P=16, N=8, state="float32")
    together = kernels.run(case.op, inputs)
    state, ys = inputs["state"], []
    for t in range(24):
        step = {k: v[:, t : t + 1] if k in ACTIVATIONS[case.op] else v for k, v in inputs.items()} | {"state": state}
        y, state = kernels.run(case.op, step)
        ys.append(y)
    check(case, (np.concatenate(ys, axis=1), state), together)
