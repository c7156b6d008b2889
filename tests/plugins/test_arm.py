"""The kernels and the op library for Arm, under an emulator: what the tests of every instruction set do not ask."""

import os
import re
import subprocess

import arm
import arm_cases
import numpy as np
import pytest
from each import check_each
from kernel_calls import EMULATED
from nodes import ALL_OPS, check_outputs
from test_packaging import EXPORTS

from dfssm.opset import DOMAIN
from dfssm.opset.cases import CASES, DEFERRED_CASES, cases

pytestmark = pytest.mark.skipif(not EMULATED, reason="this is an Arm machine: its own kernels are tested")

USABLE = {"cortex-a72": ["scalar"], "neoverse-n1": ["scalar", "dotprod"], "max": ["scalar", "dotprod", "i8mm"]}
"""Kernel tables that CPUs can run. The first one has neither instruction: the library must run on it all the same."""


@pytest.fixture
def built():
    arm.native("i8mm")  # or skips


@pytest.mark.parametrize("cpu", USABLE)
def test_the_cpu_decides(built, cpu):
    assert arm.Runner(cpu).isas() == USABLE[cpu]


@pytest.mark.parametrize("op", ALL_OPS)
def test_the_plain_kernels_run_on_any_cpu(built, op):
    oldest = arm.Runner("cortex-a72")

    def check(case):
        inputs = case.inputs()
        outputs = getattr(oldest, op)("scalar", **inputs, **case.attributes)
        check_outputs(case, outputs if isinstance(outputs, tuple) else (outputs,))

    check_each(cases(op)[::4], check)


@pytest.mark.parametrize("op", ALL_OPS)
def test_both_sets_give_the_same_bits(built, op):
    def check(case):
        inputs = case.inputs()
        a, b = (getattr(arm.native(isa), op)(isa, **inputs, **case.attributes) for isa in arm.CPUS)
        np.testing.assert_equal(a, b)

    check_each(cases(op), check)


def test_a_process_that_dies_is_an_error_and_the_next_call_runs(built):
    x, w, scale = np.ones((1, 64), np.float32), np.ones((4, 64), np.int8), np.ones(4, np.float32)
    runner = arm.Runner("max")
    runner._process.kill()
    with pytest.raises(AssertionError, match="^Int8MatMul on i8mm under qemu-aarch64 -cpu max died"):
        runner.Int8MatMul("i8mm", x, w, scale)
    np.testing.assert_array_equal(runner.Int8MatMul("i8mm", x, w, scale), [[64] * 4])
    with pytest.raises(ValueError, match=r"^Int8MatMul: input 'w' has shape \[4, 64\], expected \[M=4, K=63\]$"):
        runner.Int8MatMul("i8mm", x[:, :63], w, scale)


def test_the_case_table_travels_as_a_file(built, tmp_path, capsys):
    """As on a board: calls in a file, results in another."""
    cpu = "neoverse-n1"
    calls, results = tmp_path / "calls", tmp_path / "results"
    arm_cases.write(calls)
    with calls.open("rb") as given, results.open("wb") as written:
        subprocess.run(arm.command(cpu, "run_calls"), stdin=given, stdout=written, check=True)
    assert arm_cases.check(results)
    count = len(CASES + DEFERRED_CASES)
    lines = [f"{isa}: {count} of {count} cases" if isa in USABLE[cpu] else f"{isa}: not there" for isa in USABLE["max"]]
    assert capsys.readouterr().out.splitlines() == lines
    data = bytearray(results.read_bytes())
    first = data.index(b"float32") + 7 + 8 + 3 * 8 + 8  # of the first result: behind dtype, rank, shape and place
    data[first : first + 4] = np.float32(1e9).tobytes()
    results.write_bytes(data)
    assert not arm_cases.check(results)
    assert f"scalar {CASES[0].id}: y: relative error" in capsys.readouterr().out


def _readelf(*options):
    library = arm.BUILD / "dfssm/libdfssm_ort_cpu.so"
    return subprocess.run(["readelf", *options, library], capture_output=True, text=True, check=True).stdout


def test_the_op_library_is_for_any_arm_system(built):
    assert "AArch64" in _readelf("-h")
    symbols = [line.split() for line in _readelf("--dyn-syms", "-W").splitlines() if " GLOBAL " in line]
    assert sorted(words[-1] for words in symbols if words[6] != "UND") == EXPORTS
    needed = {line.split("[")[1].rstrip("]") for line in _readelf("-d").splitlines() if "(NEEDED)" in line}
    assert needed <= {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-aarch64.so.1"}
    # manylinux_2_28, as on x86-64: Ubuntu 22.04, Debian 11 and later
    versions = re.findall(r"Name: (GLIBC|GLIBCXX)_([0-9.]+)", _readelf("-V", "-W"))
    newest = {
        library: max(tuple(map(int, v.split("."))) for of, v in versions if of == library) for library, _ in versions
    }
    assert newest["GLIBC"] <= (2, 28) and newest["GLIBCXX"] <= (3, 4, 25)


@pytest.mark.parametrize("cpu", USABLE)
def test_the_op_library_registers_its_ops(built, cpu):
    command = arm.command(cpu, "load_library", arm.BUILD / "dfssm/libdfssm_ort_cpu.so")
    environment = {name: value for name, value in os.environ.items() if name != "DFSSM_ISA"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    isas, isa, ops = done.stdout.splitlines()
    assert isas.split() == USABLE[cpu] and isa == USABLE[cpu][-1]
    assert ops == f"{DOMAIN}: {' '.join(ALL_OPS)}"


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(arm.Unavailable, match="^.*apt-get install g\\+\\+-aarch64-linux-gnu qemu-user$"):
        arm.build.__wrapped__()
