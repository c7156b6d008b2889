"""The helpers that run many cases in one test: a failure names its case, a crash too."""

import ctypes
import faulthandler
from types import SimpleNamespace

import pytest
from each import check_each, survive_each

CASES = [SimpleNamespace(id=f"case-{n}", n=n) for n in range(5)]


def odd_fails(case):
    assert case.n % 2 == 0, f"{case.n} is odd"


def test_every_failure_is_named():
    seen = []
    with pytest.raises(ExceptionGroup, match="^2 of 5 cases failed: case-1, case-3") as group:
        check_each(CASES, lambda case: (seen.append(case.n), odd_fails(case)))
    assert seen == [0, 1, 2, 3, 4]
    assert [error.__notes__ for error in group.value.exceptions] == [["case: case-1"], ["case: case-3"]]
    check_each(CASES[::2], odd_fails)


def test_a_case_that_fails_in_the_child_is_named():
    with pytest.raises(AssertionError, match="^failed at case: case-1\n(.|\n)*1 is odd"):
        survive_each(CASES, odd_fails)
    survive_each(CASES[::2], odd_fails)


def test_a_case_that_takes_the_child_down_is_named():
    def crash(case):
        if case.n == 3:
            faulthandler.disable()  # pytest's, which would fill the log
            ctypes.string_at(0)

    with pytest.raises(AssertionError, match="^died of SIGSEGV at case: case-3\n"):
        survive_each(CASES, crash)


@pytest.mark.parametrize("run", [check_each, survive_each])
def test_no_cases_are_no_success(run):
    with pytest.raises(AssertionError, match="no cases"):
        run([], odd_fails)
