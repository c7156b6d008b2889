"""The simulated kernels of AVX-512 and AVX-VNNI: no instruction that needs AVX, and the results of the real ones."""

import shutil
import subprocess

import numpy as np
import pytest
import simulated_avx512
from kernel_calls import F32, KNOWN, isas_to_test, native, run
from nodes import ALL_OPS

from dfssm import _native
from dfssm.opset.cases import cases

REAL = "avx512vnni"
SIMULATED = simulated_avx512.NAMES[REAL]


def where_real(isa):
    return pytest.mark.skipif(isa not in _native.isas(), reason=f"this CPU cannot run {isa} kernels")


def test_no_instruction_needs_avx():
    """AVX and AVX-512 instructions are written with a v (VEX, EVEX) or, on mask registers, with a k."""
    native(SIMULATED)
    if not shutil.which("objdump"):
        pytest.skip("objdump is not installed")
    command = ["objdump", "-d", "--no-show-raw-insn", simulated_avx512.LIBRARY]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = [line.split("\t")[1] for line in code.splitlines() if "\t" in line]
    assert len(instructions) > 10_000
    wide = [i for i in instructions if i.startswith(("v", "k")) or "ymm" in i or "zmm" in i]
    assert not wide, wide[:10]


@pytest.mark.parametrize(
    ("op", "isa"),
    [
        *(pytest.param(op, REAL, marks=where_real(REAL)) for op in ALL_OPS),
        *(
            pytest.param(op, isa, marks=where_real(isa))
            for isa in ("avxvnni", "avx512vbmi")
            for op in ALL_OPS
            if "MatMul" in op
        ),
    ],
)
def test_simulated_is_real(op, isa):
    """Not only the integers: a simulated lane does the real one's float operations, in the same order."""
    for case in cases(op):
        inputs = case.inputs()
        real, simulated = (run(op, of, inputs, **case.attributes) for of in (isa, simulated_avx512.NAMES[isa]))
        for a, e in zip(simulated, real, strict=True):
            np.testing.assert_array_equal(a, e, err_msg=case.id)


@where_real(REAL)
def test_simulated_quantisation_is_real():
    rng = np.random.default_rng(0)
    for K in (1, 15, 16, 64, 100, 2048):
        x = rng.integers(-(1 << 31), 1 << 31, (64, K), dtype=np.int64).astype(np.int32).view(F32)  # NaNs among them
        for a, e in zip(*(native(isa).quantize_activations(isa, x) for isa in (SIMULATED, REAL)), strict=True):
            np.testing.assert_array_equal(a, e)


def test_the_simulation_takes_the_place_of_what_the_cpu_lacks():
    others = [isa for isa in KNOWN if isa != REAL]
    assert REAL in KNOWN and {"scalar", "avx2", "avxvnni"} <= set(others)
    assert isas_to_test(others, simulate="") == [*others, SIMULATED]
    assert isas_to_test(KNOWN, simulate="") == KNOWN
    assert isas_to_test(KNOWN, simulate=REAL) == [*KNOWN, SIMULATED]
    none = [isa for isa in KNOWN if isa not in simulated_avx512.NAMES]
    assert isas_to_test(none, simulate="") == [*none, *simulated_avx512.NAMES.values()]


@pytest.mark.parametrize("value", ["", *simulated_avx512.NAMES])
def test_the_environment_asks_for_the_simulation(monkeypatch, value):
    monkeypatch.setenv("DFSSM_SIMULATE", value)
    assert simulated_avx512.forced() == value


def test_what_cannot_be_simulated_is_named(monkeypatch):
    monkeypatch.setenv("DFSSM_SIMULATE", "amx")
    with pytest.raises(
        ValueError, match="^DFSSM_SIMULATE is 'amx'; what can be simulated is avxvnni, avx512vnni, avx512vbmi$"
    ):
        simulated_avx512.forced()


def test_headers_that_cannot_be_had_are_named(monkeypatch, tmp_path):
    (tmp_path / "fetch_simde.sh").write_text("echo no mirror answers; exit 1")
    for name in ("SYSTEM", "FETCHED", "SOURCE"):
        monkeypatch.setattr(simulated_avx512, name, tmp_path)
    with pytest.raises(simulated_avx512.Unavailable, match="^libsimde-dev is not installed .* no mirror answers"):
        simulated_avx512.simde()
