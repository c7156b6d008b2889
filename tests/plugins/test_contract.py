"""The op contract is one: what Python's `Op.check` refuses, the generated C++ refuses in the same words."""

import numpy as np
import pytest
from kernel_calls import run
from nodes import ALL_OPS

from dfssm.base import DfssmError
from dfssm.opset.cases import Case, cases

ROOMY = dict(B=2, T=3, K=64, M=20, R=4, C=12, W=4, H=4, P=8, N=6)
"""Sizes that no two of an op have in common, and none of which is 1."""

ATTRIBUTES = {
    "BinaryScaffoldMatMul": [{}, {"layout": 1}, {"layout": 2}, {"planes": 2}],
    "SelectiveScanStep": [{}, {"ngroups": 2, "x_start": 3, "B_start": 1}],
    "CausalConv1dStep": [{}, {"x_start": 2}],
    "DeferredScanStep": [{}, {"ngroups": 2, "x_start": 3, "B_start": 1}],
    "DeferredConv1dStep": [{}, {"x_start": 2}],
    "GatedRMSNorm": [{}, {"groups": 3, "z_start": 4}],
}


def shapes_near(shape: tuple[int, ...]):
    """Each dimension one more, one less and 0; and a rank that is 1 higher."""
    for axis, size in enumerate(shape):
        for other in (size + 1, size - 1, 0):
            yield (*shape[:axis], other, *shape[axis + 1 :])
    yield (1, *shape)


def wrong_inputs(case: Case):
    inputs = case.inputs()
    for name, value in inputs.items():
        yield inputs | {name: None}
        yield inputs | {name: value.astype(np.float64)}
        for shape in shapes_near(value.shape):
            yield inputs | {name: np.zeros(shape, value.dtype)}


def python_says(case: Case, inputs: dict, attributes: dict) -> str | None:
    try:
        ALL_OPS[case.op].check(inputs, attributes)
    except DfssmError as error:
        return str(error)
    return None


def cpp_says(case: Case, inputs: dict, attributes: dict) -> str | None:
    try:
        run(case.op, "scalar", inputs, **attributes)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("op", ALL_OPS)
def test_what_does_not_fit_is_refused_in_the_same_words(op):
    said = []
    for attributes in ATTRIBUTES.get(op, [{}]):
        for state in ("float32", "int8") if op.endswith("ScanStep") else (None,):
            count = {"count": 9} if op.startswith("Deferred") else {}
            sizes = {name: value for name, value in ROOMY.items() if name in ALL_OPS[op].symbols and name != "S"}
            case = Case(op, sizes | count | ({"state": state} if state else {}), attributes)
            assert cpp_says(case, case.inputs(), attributes) is None
            for inputs in wrong_inputs(case):
                said.append(python_says(case, inputs, attributes))
                assert cpp_says(case, inputs, attributes) == said[-1]
    assert sum(message is not None for message in said) > 10


def wrong_values(attribute):
    yield from {int: (-2, 7), float: (-1.0, float("nan")), str: ("silo", "")}[type(attribute.default)]


@pytest.mark.parametrize("op", [name for name, op in ALL_OPS.items() if op.attributes])
def test_wrong_attributes_are_refused_in_the_same_words(op):
    case = next(case for case in cases(op) if not case.sizes["T"] == 1)
    refused = 0
    wrong = [{a.name: value} for a in ALL_OPS[op].attributes for value in wrong_values(a)]
    for attributes in [*wrong, *({f"{a.name}_": 1} for a in ALL_OPS[op].attributes)]:
        message = python_says(case, case.inputs(), case.attributes | attributes)
        assert cpp_says(case, case.inputs(), {**case.attributes, **attributes}) == message
        refused += message is not None
    assert refused > len(ALL_OPS[op].attributes)
