"""One check over many cases is one test: what fails says which cases, and that none was skipped."""

import os
import signal
import traceback
from collections.abc import Callable, Iterable


def check_each(cases: Iterable, check: Callable[..., None], name: Callable[..., str] = lambda case: case.id) -> None:
    """`check(case)` for every case; then an ExceptionGroup of what failed, each with the case's name."""
    cases = list(cases)
    assert cases, "no cases"
    failures = []
    for case in cases:
        try:
            check(case)
        except Exception as error:
            error.add_note(f"case: {name(case)}")
            failures.append((name(case), error))
    if failures:
        names, errors = zip(*failures, strict=True)
        raise ExceptionGroup(f"{len(errors)} of {len(cases)} cases failed: {', '.join(names)}", list(errors))


def survive_each(cases: Iterable, check: Callable[..., None]) -> None:
    """`check(case)` for every case in a child process; AssertionError with the case that fails or takes it down."""
    cases = list(cases)
    assert cases, "no cases"
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        failed = True
        try:
            for case in cases:
                os.write(writing, f"case: {case.id}\n".encode())
                check(case)
            failed = False
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(failed)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    how = f"died of {signal.Signals(-status).name}" if status < 0 else "failed"
    assert status == 0, f"{how} at {said[said.rindex('case: ') :]}"
    assert said.count("case: ") == len(cases)
