"""The case table as a file, for an Arm board without Python: tools/arm/run_calls.cpp reads it there.

make build && .venv/bin/python tests/arm_cases.py write CALLS    here; it builds build/arm/run_calls, too
./run_calls <CALLS >RESULTS                                      on the board
.venv/bin/python tests/arm_cases.py check RESULTS                here: how many cases of each kernel table are right
"""

import sys

import arm
from nodes import check_outputs

from dfssm.opset.cases import CASES, DEFERRED_CASES

ISAS = ["scalar", *arm.CPUS]


def write(path: str) -> None:
    arm.build()
    with open(path, "wb") as file:
        for isa in ISAS:
            for case in CASES + DEFERRED_CASES:
                file.write(arm.encoded(case.op, isa, **case.inputs(), **case.attributes)[0])


def check(path: str) -> bool:
    """Prints a line for each table and each case that is wrong; whether all are right that the board could run."""
    wrong = 0
    with open(path, "rb") as file:
        results = arm.Results(file)
        for isa in ISAS:
            right = 0
            for case in CASES + DEFERRED_CASES:
                try:
                    check_outputs(case, results.read())
                    right += 1
                except ValueError:  # refused: of a table that the CPU lacks
                    wrong += isa in results.isas
                except AssertionError as error:
                    wrong += 1
                    print(f"{isa} {case.id}: {error}")
            found = f"{right} of {len(CASES + DEFERRED_CASES)} cases" if isa in results.isas else "not there"
            print(f"{isa}: {found}")
    return not wrong


if __name__ == "__main__":
    command, path = sys.argv[1:]
    sys.exit({"write": write, "check": lambda path: not check(path)}[command](path))
