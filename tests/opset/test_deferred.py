"""The ops of a deferred state against those of an immediate one, and against themselves over other cuts."""

import numpy as np
import pytest
from deferred import CUTS, conv_case, read, scan_case
from scan_loops import scan_loops

from dfssm.base import DfssmError
from dfssm.opset.pending import kept
from dfssm.opset.reference import REFERENCES, deferred_scan_step_ref
from dfssm.opset.tolerances import reduction

CASES = [conv_case(), *(scan_case(state) for state in ("float32", "float16", "int8"))]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def run(op, inputs, **attributes):
    return REFERENCES[op](**inputs, **attributes)


def test_kept_by_hand():
    # Tokens that were pending before the call, in whole blocks; of a long call all but the last 8 to 15.
    for (count, tokens), expected in {
        (0, 1): 0, (7, 1): 0, (8, 1): 8, (15, 8): 8, (0, 8): 0, (0, 9): 0, (0, 16): 8, (3, 13): 8, (3, 61): 56,
    }.items():  # fmt: skip
        assert kept(count, tokens) == expected
    for count in range(16):
        for tokens in range(1, 40):
            left = count + tokens - kept(count, tokens)
            assert min(tokens, 8) <= left < 16 and kept(count, tokens) % 8 == 0


@each_case
@pytest.mark.parametrize("cut", CUTS[1:], ids=str)
def test_any_cut_into_calls_gives_the_same_bits(case, cut):
    np.testing.assert_array_equal(read(run, case, cut)[0], read(run, case, CUTS[0])[0])


@each_case
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_tokens_that_are_taken_back_leave_no_trace(case, tokens):
    for cut in (CUTS[0], CUTS[2]):
        np.testing.assert_array_equal(read(run, case, cut, take_back=tokens)[0], read(run, case, cut)[0])


def test_the_convolution_is_that_of_an_immediate_state():
    case = conv_case()
    inputs = case.inputs()
    y, _ = REFERENCES["CausalConv1dStep"](
        inputs["x"], np.zeros((2, 19, 3), np.float32), inputs["weight"], inputs["bias"]
    )
    np.testing.assert_array_equal(read(run, case, CUTS[2])[0], y)


def test_the_scan_is_that_of_an_immediate_state():
    case = scan_case("float32")
    inputs = case.inputs()
    inputs["state"][:] = 0
    given = {name: value for name, value in inputs.items() if not name.startswith("pending")}
    expected, _ = scan_loops(**given, **case.attributes)
    reduction(7 + 8).check(read(run, case, CUTS[0])[0], expected)


def test_the_stored_state_is_that_before_the_pending_tokens():
    case = scan_case("float32")
    inputs = case.inputs()
    given = {name: value for name, value in inputs.items() if not name.startswith("pending")}
    given["state"] = np.zeros_like(given["state"])
    y, states = read(run, case, CUTS[2])
    folded = 45 - int(states["pending_count"][0])
    assert folded % 8 == 0 and folded >= 24
    for name in ("x", "dt", "B", "C"):
        given[name] = given[name][:, :folded]
    _, expected = scan_loops(**given, **case.attributes)
    reduction(45).check(states["state"], expected)


def test_a_count_that_is_none_is_refused():
    inputs = scan_case("float32").inputs()
    inputs["pending_count"][1] = 16
    with pytest.raises(DfssmError, match="DeferredScanStep: input 'pending_count' has 16, expected at most 15"):
        deferred_scan_step_ref(**inputs, ngroups=2)
