"""What the kernels touch: nothing outside their arrays, any alignment, states in place, disjoint ranges."""

import numpy as np
import pytest
from kernel_calls import copies, each_isa, guarded, misaligned, run

from dfssm.opset.cases import CASES

# Every shape of the table at a size that keeps the page-sized copies cheap.
SMALL = [
    case
    for case in CASES
    if case.kind == "normal" and np.prod(list(size for size in case.sizes.values() if isinstance(size, int))) < 1 << 21
]


def _assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


@each_isa
@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_nothing_outside_is_touched(isa, at, case):
    """Inputs, output and in-place states each beside a page that cannot be read or written."""
    inputs = case.inputs()
    expected = run(case.op, isa, inputs, **case.attributes)
    placed = {name: guarded(value, at) for name, value in inputs.items()}
    options = dict(out=guarded(np.full_like(expected[0], np.nan), at))
    if "state" in inputs:
        options["in_place"] = True
    _assert_equal(run(case.op, isa, placed, **case.attributes, **options), expected)


@each_isa
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.id)
def test_any_alignment(isa, case):
    inputs = case.inputs()
    expected = run(case.op, isa, inputs, **case.attributes)
    _assert_equal(run(case.op, isa, {k: misaligned(v) for k, v in inputs.items()}, **case.attributes), expected)


@each_isa
@pytest.mark.parametrize("case", [case for case in CASES if "state" in case.inputs()], ids=lambda case: case.id)
def test_states_in_place(isa, case):
    inputs = case.inputs()
    expected = run(case.op, isa, copies(inputs), **case.attributes)
    actual = run(case.op, isa, inputs, in_place=True, **case.attributes)
    assert actual[1] is inputs["state"]
    _assert_equal(actual, expected)


@each_isa
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_threads_change_nothing(isa, case):
    inputs = case.inputs()
    expected = run(case.op, isa, inputs, **case.attributes)
    _assert_equal(run(case.op, isa, inputs, threads=3, **case.attributes), expected)
