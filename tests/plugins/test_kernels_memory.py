"""What the kernels touch: nothing outside their arrays, any alignment, states in place, disjoint ranges."""

import numpy as np
import pytest
from each import check_each, survive_each
from kernel_calls import copies, each_isa, guarded, misaligned, native, run
from nodes import ALL_OPS, STATES

from dfssm.opset.cases import CASES, DEFERRED_CASES, cases

# Every shape of the table at a size that keeps the page-sized copies cheap.
SMALL = [
    case
    for case in CASES + DEFERRED_CASES
    if case.kind == "normal" and np.prod(list(size for size in case.sizes.values() if isinstance(size, int))) < 1 << 21
]


def _assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


each_op = pytest.mark.parametrize("op", ALL_OPS)


@each_isa
@pytest.mark.parametrize("at", ["start", "end"])
@each_op
def test_nothing_outside_is_touched(isa, at, op):
    """Inputs, output and in-place states each beside a page that cannot be read or written."""
    native(isa)  # is built, or skips

    def check(case):
        inputs = case.inputs()
        expected = run(op, isa, inputs, **case.attributes)
        placed = {name: guarded(value, at) for name, value in inputs.items()}
        options = dict(out=guarded(np.full_like(expected[0], np.nan), at))
        if STATES & inputs.keys():
            options["in_place"] = True
        _assert_equal(run(op, isa, placed, **case.attributes, **options), expected)

    survive_each([case for case in SMALL if case.op == op], check)


@each_isa
@each_op
def test_any_alignment(isa, op):
    def check(case):
        inputs = case.inputs()
        expected = run(op, isa, inputs, **case.attributes)
        _assert_equal(run(op, isa, {k: misaligned(v) for k, v in inputs.items()}, **case.attributes), expected)

    check_each([case for case in SMALL if case.op == op], check)


@each_isa
@pytest.mark.parametrize("op", [name for name, op in ALL_OPS.items() if len(op.outputs) > 1])
def test_states_in_place(isa, op):
    def check(case):
        inputs = case.inputs()
        expected = run(op, isa, copies(inputs), **case.attributes)
        actual = run(op, isa, inputs, in_place=True, **case.attributes)
        assert actual[1] is inputs[ALL_OPS[op].outputs[1].over]
        _assert_equal(actual, expected)

    check_each(cases(op), check)


@each_isa
@each_op
def test_threads_change_nothing(isa, op):
    def check(case):
        inputs = case.inputs()
        expected = run(op, isa, inputs, **case.attributes)
        _assert_equal(run(op, isa, inputs, threads=3, **case.attributes), expected)

    check_each(cases(op), check)
