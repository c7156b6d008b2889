"""Numbers at the ends of fp32 and past them, put into the inputs of every op, and what every backend owes them: NaN
where the reference has NaN, the same infinities, and else the reference's number.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dfssm.opset.cases import Case
from dfssm.opset.cases import cases as table
from dfssm.opset.ops import ALL_OPS
from dfssm.opset.tolerances import Tolerance

HUGE, HUGE_SCALE = 3e38, 1e30
"""A scale is multiplied with whole numbers and other scales, in any order; none of these may overflow alone."""

NOT_FINITE = (np.nan, np.inf, -np.inf)
EXTREMES = (*NOT_FINITE, HUGE, -HUGE, 1e-45, -1e-40, -0.0, 1e5, -1e5)

CANCELLED = 1e-5
"""Of the largest result: where one term dwarfs all others, results are what is left when two like it cancel."""

CASES = [
    *(
        Case("BinaryScaffoldMatMul", dict(B=1, T=T, K=64, M=17, R=R), {"layout": layout, "planes": planes})
        for layout in (0, 1)
        for T, R, planes in ((1, 4, 1), (3, 3, 1), (2, 0, 2))
    ),
    *(Case("Int8MatMul", dict(B=1, T=T, K=33, M=5)) for T in (1, 3)),
    Case("CausalConv1dStep", dict(B=1, T=1, C=20, W=4)),
    Case("CausalConv1dStep", dict(B=2, T=3, C=9, W=3), {"x_start": 2}),
    Case("CausalConv1dStep", dict(B=1, T=2, C=17, W=2), {"activation": "none"}),
    *(
        Case("SelectiveScanStep", dict(B=1, T=T, H=2, P=P, N=N, state=state), attributes)
        for state in ("float32", "float16", "int8")
        for T, P, N, attributes in (
            (1, 32, 6, {}),
            (5, 16, 17, {"ngroups": 2}),
            (1, 7, 5, {"dt_min": 0.01, "dt_max": 0.2}),  # no kernel of many elements an access takes 7
            (3, 33, 4, {}),
        )
    ),
    Case("DeferredConv1dStep", dict(B=2, T=3, C=17, W=3, count=6), {"x_start": 2}),
    *(
        Case("DeferredScanStep", dict(B=2, T=T, H=2, P=P, N=N, count=count, state=state), attributes)
        for state in ("float32", "float16", "int8")
        for T, P, N, count, attributes in ((1, 32, 6, 8, {}), (5, 7, 17, 4, {"ngroups": 2}))
    ),
    Case("RMSNorm", dict(B=1, T=2, C=20)),
    Case("GatedRMSNorm", dict(B=1, T=2, C=36), {"groups": 4}),
    Case("GatedRMSNorm", dict(B=1, T=1, C=33), {"z_start": 3}),
]


def cases(op: str) -> list[Case]:
    """The cases of one op; of an op that has none here, the first of the shared table."""
    return [case for case in CASES if case.op == op] or table(op)[:3]


def inputs(case: Case) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Inputs of the case, and where they are extreme: one number anywhere, then NaN and infinities in several places.

    The other numbers are a hundredth of the usual, so that no sum or product with 3e38 overflows in one order only.
    """
    rng = np.random.default_rng(len(case.id))
    plain = {name: _small(value) if value.dtype.kind == "f" else value for name, value in case.inputs().items()}
    floats = [name for name, value in plain.items() if value.dtype.kind == "f" and value.size]
    if case.sizes.get("R") == 0:  # no correction that it could scale
        floats.remove("up_scale")
    for name in floats:
        start = max(int(case.attributes.get(f"{name}_start", -1)), 0)
        flat = np.flatnonzero(np.isfinite(plain[name]))  # what lies beside a range of columns is NaN already
        for at in {flat[0], flat[-1], rng.choice(flat)}:
            for value in EXTREMES:
                if abs(value) == HUGE and name.endswith("scale"):
                    value = np.copysign(HUGE_SCALE, value)
                yield f"{name}[{at}] = {value} (columns from {start})", _put(plain, name, at, value)
    for _ in range(40):
        made, where = plain, []
        for name in rng.choice(floats, 2):
            at, value = rng.choice(np.flatnonzero(np.isfinite(plain[name]))), rng.choice((*NOT_FINITE, 0.0))
            made = _put(made, name, at, value)
            where.append(f"{name}[{at}] = {value}")
        yield ", ".join(where), made


def _small(value: np.ndarray) -> np.ndarray:
    return (value / 100).astype(value.dtype)


def _put(values: dict[str, np.ndarray], name: str, at: int, value: float) -> dict[str, np.ndarray]:
    changed = values[name].copy()
    with np.errstate(over="ignore"):  # 3e38 is an infinity of fp16
        changed.reshape(-1)[at] = value
    return values | {name: changed}


def check(case: Case, run: Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]) -> None:
    """AssertionError that says which inputs `run` treats otherwise than the reference does."""
    failures = []
    with np.errstate(all="ignore"):
        for where, given in inputs(case):
            expected = ALL_OPS[case.op].reference(**given, **case.attributes)
            expected = expected if isinstance(expected, tuple) else (expected,)
            sizes = ALL_OPS[case.op].check(given, case.attributes) | {"state": case.state_dtype}
            try:
                for spec, got, wanted in zip(ALL_OPS[case.op].outputs, run(given), expected, strict=False):
                    assert got.dtype == wanted.dtype
                    bound = max(ALL_OPS[case.op].tolerance(sizes, spec.name).relative, CANCELLED)
                    same(got, wanted, Tolerance(bound, "fp32 sums in which one term dwarfs the others"), spec.name)
            except AssertionError as error:
                failures.append(f"{where}: {error}")
    assert not failures, f"{len(failures)} of {case.id}:\n" + "\n".join(failures[:20])


def same(got: np.ndarray, wanted: np.ndarray, tolerance: Tolerance, name: str) -> None:
    """AssertionError where one is NaN or infinite and the other not so, or numbers are too far apart."""
    assert got.shape == wanted.shape, f"{name}: shape {got.shape}, expected {wanted.shape}"
    for kind in (np.isnan, np.isposinf, np.isneginf):
        ours, theirs = kind(got), kind(wanted)
        assert (ours == theirs).all(), f"{kind.__name__} of {name} at {np.flatnonzero(ours != theirs)[:8]}"
    finite = np.isfinite(wanted)
    tolerance.check(got[finite], wanted[finite], name)
